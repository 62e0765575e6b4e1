"Helpers that tests share."

import copy
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from polm_lab.core.knobs import WrongInput
from polm_lab.rewards.sandbox import missing

ROOT = Path(__file__).parent.parent
POLM = Path(sys.executable).parent / "polm"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test that runs code of a model where no sandbox works, and say so.

    With POLM_SANDBOX=required (as in CI) it fails instead.
    """
    try:
        return (yield)
    except WrongInput as wrong:
        if "sandbox: " in str(wrong) and missing() and os.environ.get("POLM_SANDBOX") != "required":
            pytest.skip(str(wrong))
        raise


def pytest_terminal_summary(terminalreporter, config):
    """With `--durations=N`, write the N slowest parts of tests to runs/durations.txt too.

    The file also has the seconds of each test file.
    """
    if not config.getoption("durations"):
        return
    parts, files = [], Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "when"):
                parts.append((report.duration, report.when, report.nodeid))
                files[report.nodeid.split("::")[0]] += report.duration
    slowest = sorted(parts, reverse=True)[: config.getoption("durations")]
    lines = [f"{seconds:8.2f} s {when:8} {name}" for seconds, when, name in slowest]
    lines += ["", *(f"{seconds:8.1f} s in all  {name}" for name, seconds in files.most_common())]
    place = Path(os.environ.get("POLM_DURATIONS", ROOT / "runs" / "durations.txt"))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    "Runs of a test go to a folder of its own."
    folder = tmp_path / "runs"
    monkeypatch.setenv("POLM_RUNS", str(folder))
    monkeypatch.delenv("POLM_RUN", raising=False)
    return folder


@pytest.fixture(scope="module")
def smol():
    "The folder of `smol` in the user's own cache; with POLM_REAL=required it has to be had."
    from polm_lab.models.packaged import get_model

    try:
        return get_model("smol", lambda line: None)
    except WrongInput as wrong:
        if os.environ.get("POLM_REAL") == "required":
            raise
        pytest.skip(f"smol cannot be had: {wrong}")


@pytest.fixture(scope="module")
def tokenizer():
    "The tokenizer of the embedded model."
    from polm_lab.models.tokenizers import load_tokenizer

    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def start():
    "The embedded model; a test that changes weights takes a copy, such as `shaken(start)`."
    from polm_lab.models.load import load_model

    return load_model("tiny", dtype="float32", device="cpu")


def proof(copy: Path, names) -> dict[str, dict[str, bool]]:
    "What holds for methods of a copy of the project, by `conforming.py` in one process."
    done = subprocess.run(
        [sys.executable, ROOT / "tests/conforming.py", *names],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return json.loads(done.stdout.strip().split("\n")[-1])


def shaken(model, seed=0):
    "A copy of a model with other weights, some way from it."
    import torch

    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return model


def trl_pairs(tokenizer, start, place, **config):
    """Give TRL's DPOTrainer five pairs and a model off `start`, with the loss and its gradient.

    Returns the trainer, its batch as our side takes it, and the loss.
    """
    import copy

    import datasets
    from trl import DPOConfig, DPOTrainer

    from polm_lab.data.load import load_data

    rows = []
    for row in load_data("chat", "preference")[:5]:
        rows.append({name: row[name] for name in ("prompt", "chosen", "rejected")})
    common = dict(use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_length=128)
    trainer = DPOTrainer(
        shaken(start),
        copy.deepcopy(start),
        DPOConfig(str(place), per_device_train_batch_size=5, **common, **config),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return trainer, dict(batch, sides=2), loss.item()


@pytest.fixture
def polm(runs):
    "The command line in a process of its own: `polm('run', 'sft', ...)`."

    def call(*words, timeout=300, **env):
        return subprocess.run(
            [POLM, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **env},
        )

    return call


@pytest.fixture
def forked(runs, tmp_path):
    "The same as `polm`, where it trains: begun as a copy of a process that has imported all."
    from processes import call

    return functools.partial(call, folder=tmp_path)
