"""kill -9 at random instants: a resumed run is bit for bit the run that was never killed.

The suite kills two times what learns by a loop of its own. With POLM_KILLS every method that
trains is killed as often as it says (the figures in LOG.md are from 20).
"""

import os
import random
import signal
import time

import pytest
from processes import start

from polm_lab.core.knobs import WrongInput
from polm_lab.core.method import methods
from polm_lab.core.run import Run, all_runs

KILLS = int(os.environ.get("POLM_KILLS", 2))
SETTINGS = {
    "sft": dict(steps=40, data="sums#512", batch_size=8, neftune_alpha=5),
    "dpo": dict(steps=40, data="sums#512", batch_size=8),
    "reward": dict(steps=60, data="sums#512", batch_size=8),
    "grpo": dict(steps=40, data="sums#512", batch_size=16, num_generations=4, max_new_tokens=8),
    "ppo": dict(
        steps=40,
        data="sums#512",
        rewards="correct",
        batch_size=16,
        max_new_tokens=8,
        details="whiten_advantages,normalize,adaptive_kl:0.01,missing_eos,clip_value",
    ),
}

# a method that is added is killed too
SETTINGS |= {
    name: dict(steps=40, data="sums#512", batch_size=16) | m.small
    for name, m in methods().items()
    if m.trains and name not in SETTINGS
}
# they search in each step
SETTINGS["reader"] |= dict(steps=16, batch_size=4)
SETTINGS["retriever"] |= dict(steps=20, batch_size=8)
# it learns by PPO's loop, where the others imitate
SETTINGS["critic-coderl"] = SETTINGS["critic"] | dict(
    algorithm="coderl", data="", steps=16, batch_size=8
)


if "POLM_KILLS" not in os.environ:
    LOOPS = ("sft", "grpo", "ppo", "rlaif", "reader", "critic-coderl")
    SETTINGS = {name: SETTINGS[name] for name in LOOPS}


def words(settings):
    return [
        w
        for k, v in (
            dict(eval_rows=8, save_every=3, dtype="float32", device="cpu") | settings
        ).items()
        for w in ("-p", k, str(v))
    ]


def model_bytes(run):
    return b"".join(p.read_bytes() for p in sorted((run.path / "model").glob("*.safetensors")))


@pytest.mark.parametrize("name", SETTINGS)
def test_killed_and_resumed_equals_uninterrupted(name, runs, tmp_path):
    errors, run_it = tmp_path / "errors.txt", ("run", name.partition("-")[0], "--bare", "--out")
    whole = start(*run_it, tmp_path / "whole", *words(SETTINGS[name]), errors=errors)
    whole.join(timeout=600)
    if whole.exitcode == 2:  # without a sandbox the suite leaves it out
        raise WrongInput(errors.read_text())
    assert whole.exitcode == 0, errors.read_text()
    reference = all_runs(tmp_path / "whole")[0]
    assert reference.status == "finished"
    training = reference.lines()[-1]["seconds"] + 1.0

    rng, kills = random.Random(7), 0
    process = start(*run_it, runs, *words(SETTINGS[name]), errors=errors)
    while True:
        until = time.monotonic() + 120
        while not (found := all_runs(runs)) or (
            found[0].status in ("created", "dead", "stopped") and process.is_alive()
        ):
            assert time.monotonic() < until
            time.sleep(0.05)
        run = found[0]
        if kills < KILLS:
            process.join(timeout=rng.uniform(0.0, 2.0 * training / (KILLS + 1)))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        process.join(timeout=600)
        if run.status == "finished":
            break
        assert run.status == "dead", (run.status, errors.read_text())
        process = start("resume", run.path, errors=errors)

    print(f"{name}: {kills} kills")
    assert kills >= min(KILLS, 2), "the run ended before it was killed: make it longer"
    assert model_bytes(run) == model_bytes(reference)
    assert model_bytes(run)
    assert [row["step"] for row in run.lines()] == list(range(1, SETTINGS[name]["steps"] + 1))
    timed = ("seconds", "tokens_per_second", "memory_mib")

    def strip(rows: list[dict]) -> list[dict]:
        "The rows without their times."
        stripped = []
        for row in rows:
            stripped.append({k: v for k, v in row.items() if k not in timed})
        return stripped

    assert strip(run.lines()) == strip(reference.lines()), (
        "the metrics are those of the uninterrupted run"
    )
    assert strip(run.lines("samples")) == strip(reference.lines("samples"))
    assert Run(run.path).summary == reference.summary
