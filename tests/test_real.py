"Runs on a real model: the plan is sound, data are prepared always alike, and runs continue where they were."

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import start

from polm_lab.core.knobs import WrongInput
from polm_lab.core.method import find, methods
from polm_lab.core.run import Run
from polm_lab.runner import launch
from polm_lab.runner.launch import notebooks_folder
from polm_lab.runner.real import (
    REAL_COLUMNS,
    RealRuns,
    prepare,
    read_real,
    read_real_plan,
    real_source,
    real_table,
    references,
    wilson,
    with_places,
    write_real,
)
from polm_lab.training.chain import check_settings

PLAN = read_real_plan()
SMALL = dict(data="train:arithmetic", eval_data="held:arithmetic", eval_rows=8, batch_size=4)


def small_plan(**settings: dict) -> dict:
    "A plan of runs of SFT on `tiny`, by name of the setting."
    runs = []
    for name, knobs in settings.items():
        seeds = knobs.pop("seeds", [0])
        runs.append(dict(method="sft", setting=name, seeds=seeds, knobs=SMALL | knobs))
    return dict(defaults={}, data=dict(arithmetic=dict(made="arithmetic", held=8)), runs=runs)


@pytest.fixture
def forked(monkeypatch):
    "Processes of runs begin as copies of one that has imported all."

    def begin(*words, log, env=None, keep=()):
        process = start(*words, out=log, errors=log, **(env or {}))
        return SimpleNamespace(wait=process.join)

    monkeypatch.setattr(launch, "polm_process", begin)


def small_runs(folder: Path, **settings: dict) -> RealRuns:
    return RealRuns(small_plan(**settings), folder, folder / "RESULTS.csv", notebook=False)


def test_the_plan_has_every_method():
    planned = {run["method"] for run in PLAN["runs"]}
    assert planned == set(methods()) - {"tour"}  # it is SFT, DPO and GRPO on generated text


@pytest.mark.parametrize("run", PLAN["runs"], ids=lambda run: f"{run['method']} {run['setting']}")
def test_the_knobs_of_the_plan_are_accepted(run, tmp_path):
    def place(what: str, name: str) -> str:
        if what == "run":
            assert name in {f"{one['method']}/{one['setting']}" for one in PLAN["runs"]}
        else:
            assert name in PLAN["data"]
        return str(tmp_path / what)

    knobs = {name: value for name, value in run["knobs"].items() if name != "measure"}
    _, settings = check_settings(run["method"], with_places(knobs, place))
    assert getattr(settings, "eval_rows", 200) <= 500
    alone = run["method"] in ("dpo", "reward", "grpo", "rloo", "ppo", "rlaif", "reft")
    assert len(run["seeds"]) in ((3,) if alone else (1, 3))


def test_a_run_comes_after_those_it_refers_to(tmp_path):
    order = RealRuns(PLAN, tmp_path).order()
    seen = set()
    for run, _ in order:
        assert references(run) <= seen
        seen.add(f"{run['method']}/{run['setting']}")
    assert len(order) == sum(len(run["seeds"]) for run in PLAN["runs"])


def test_data_are_prepared_always_alike(tmp_path, monkeypatch):
    rows = [dict(prompt=f"{n}+1=", completion=str(n + 1)) for n in range(40)]
    source = tmp_path / "given" / "rows.jsonl"
    source.parent.mkdir()
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("POLM_REAL_DATA", str(source.parent))
    facts = dict(sources=["none.jsonl", "rows.jsonl"], kind="completion", held=10, rows=20)
    assert real_source("rows", facts, short=True) == "rows.jsonl"
    once, twice = (prepare("rows", facts, tmp_path / name) for name in ("a", "b"))
    texts = {part: file.read_text() for part, file in once.items()}
    assert texts == {part: file.read_text() for part, file in twice.items()}
    held, train = (texts[part].splitlines() for part in ("held", "train"))
    assert (len(held), len(train)) == (10, 20)
    assert not set(held) & set(train)
    source.unlink()
    assert prepare("rows", facts, tmp_path / "a") == once  # what is there is kept
    with pytest.raises(WrongInput, match="POLM_REAL_DATA"):
        prepare("rows", facts, tmp_path / "c")
    with pytest.raises(WrongInput, match="10 rows"):
        source.write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
        prepare("rows", facts, tmp_path / "d")


def test_a_changed_plan_replaces_its_rows(forked, tmp_path):
    said = []
    assert small_runs(tmp_path, one=dict(steps=1)).all(say=said.append) == 0
    before = read_real(tmp_path / "RESULTS.csv")
    assert set(before[0]) == set(REAL_COLUMNS)
    assert small_runs(tmp_path, one=dict(steps=1)).all(say=said.append) == 0
    assert len(said) == 1  # nothing was left to do
    assert small_runs(tmp_path, one=dict(steps=2)).all(say=said.append) == 0
    after = read_real(tmp_path / "RESULTS.csv")
    assert len(after) == len(before)
    assert {json.loads(row["knobs"])["steps"] for row in after} == {2}


def test_a_run_that_fails_does_not_stop_the_others(forked, tmp_path):
    said = []
    runs = small_runs(tmp_path, bad=dict(model="run:sft/nothing"), good=dict(steps=1))
    assert runs.all(say=said.append) == 1
    assert "no finished run" in said[0]
    assert {row["setting"] for row in read_real(tmp_path / "RESULTS.csv")} == {"good"}


def test_a_run_that_another_begins_with_is_made_again(forked, tmp_path):
    "Results are kept without the folders of their runs; what still needs one makes it."
    said = []
    first, later = dict(steps=1), dict(steps=1, model="run:sft/first")
    assert small_runs(tmp_path, first=dict(first)).all(say=said.append) == 0
    for path in tmp_path.glob("*-sft-*"):
        shutil.rmtree(path)
    both = small_runs(tmp_path, first=dict(first), later=dict(later))
    assert both.all(say=said.append) == 0
    assert [line.split(",")[1].strip() for line in said] == ["first", "first", "later"]
    assert both.all(say=said.append) == 0
    assert len(said) == 3


def test_no_metric_has_a_path_in_its_name(forked, tmp_path):
    plan = small_plan(a=dict(steps=1), b=dict(steps=2))
    knobs = dict(models="run:sft/a,run:sft/b", tasks="held:arithmetic", eval_rows=4)
    plan["runs"].append(dict(method="merge", setting="both", seeds=[0], knobs=knobs))
    runs = RealRuns(plan, tmp_path, tmp_path / "RESULTS.csv", notebook=False)
    assert runs.all(["sft", "merge"], say=print) == 0
    found = {row["metric"] for row in read_real(tmp_path / "RESULTS.csv")}
    assert "perplexity/arithmetic" in found
    rows = read_real(tmp_path / "RESULTS.csv")
    assert not any(str(tmp_path) in value for row in rows for value in row.values())
    settings = {row["setting"] for row in rows if row["method"] == "merge"}
    assert {"both: base", "both: sft/a", "both: sft/b"} <= settings
    shares = [row for row in rows if row["metric"] == "accuracy/arithmetic"]
    assert shares
    assert all(float(row["high"]) == round(wilson(float(row["after"]), 4)[1], 4) for row in shares)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_real import small_runs
sys.exit(small_runs(Path({folder!r}), one=dict(steps=30, save_every=5)).all())
"""


def test_killed_in_the_middle_it_continues(forked, tmp_path):
    "Both the command and the process of the run are killed; the next call resumes."
    settings = dict(steps=30, save_every=5)
    whole = tmp_path / "whole"
    assert small_runs(whole, one=dict(settings)).all(say=lambda line: None) == 0
    folder = tmp_path / "killed"
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script])
    until = time.monotonic() + 120
    while not list(folder.glob("*/checkpoints/step-*")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.wait()
    run = next(Run(path.parent) for path in folder.glob("*/run.json"))
    os.kill(run.read()["pid"], signal.SIGKILL)
    while Run(run.path).status == "running":
        time.sleep(0.05)
    assert small_runs(folder, one=dict(settings)).all(say=lambda line: None) == 0
    assert len(list(folder.glob("*/run.json"))) == 1
    first, second = (read_real(place / "RESULTS.csv") for place in (whole, folder))
    ends = [[(row["metric"], row["after"]) for row in rows] for rows in (first, second)]
    assert ends[0] == ends[1]


def test_the_table_joins_seeds(tmp_path):
    usual = dict.fromkeys(REAL_COLUMNS, "") | dict(
        method="dpo", setting="a", metric="pair_accuracy"
    )
    rows = []
    for seed, after in enumerate((0.5, 0.6, 0.7)):
        low, high = wilson(after, 500)
        ends = dict(before="0.5", after=after, low=low, high=high)
        rows.append(usual | ends | dict(seed=seed, seconds=60 * seed, peak_mib=100 + seed))
    path = tmp_path / "RESULTS.csv"
    write_real(rows, path)
    line = real_table("dpo", path=path).loc["a", "pair_accuracy"]
    assert float(line["after"]) == 0.6
    assert line["95 %"] == f"{wilson(0.5, 500)[0]:.3g} to {wilson(0.7, 500)[1]:.3g}"
    assert (line["seeds"], line["minutes"], line["peak, MiB"]) == (3, "1.0", 102)
    assert real_table("sft", path=path).empty
    with pytest.raises(WrongInput, match="dpo"):
        real_table("dpq", path=path)


def test_the_interval_is_wilsons():
    "Wilson 1927, with z = 1.96 and n = 200, to three digits by hand."
    for share, low, high in ((0.5, 0.4313609, 0.5686391), (0.95, 0.9104225, 0.9726145)):
        found = wilson(share, 200, z=1.959963984540054)
        assert abs(found[0] - low) < 1e-3
        assert abs(found[1] - high) < 1e-3


LONGER = {  # on one core without bfloat16, next to other work
    "peft, instructions",  # 42 adapters one after the other: 101 minutes
    "quantize, squeezellm, 3 bits",  # 28 minutes
    "overoptimization, chat",  # two proxies, and GRPO against each: 87 minutes
    "distill, half of it, from labels alone",  # 21 minutes
    "rloo, arithmetic",  # its third seed: 33 minutes, the others 7 and 13 with AMX
    "ppo, arithmetic",  # its third seed: 68 minutes, the others 9 and 17 with AMX
}


def test_the_kept_results_are_sound():
    for row in read_real():
        name = f"{row['method']}, {row['setting'].partition(': ')[0]}"
        assert row["method"] in methods()
        assert float(row["after"]) == float(row["after"])
        assert float(row["seconds"]) <= 20 * 60 or name in LONGER
        assert 0 < float(row["peak_mib"]) <= 12 * 1024
        if row["low"]:
            assert float(row["low"]) <= float(row["after"]) <= float(row["high"])


@pytest.mark.parametrize("method", sorted({row["method"] for row in read_real()}))
def test_the_page_of_a_method_ends_with_its_results(method):
    notebook = json.loads((notebooks_folder() / find(method).notebook).read_text())
    cell = notebook["cells"][-1]
    assert "".join(cell["source"]) == f'lab.real_table("{method}")'
    shown = "".join(cell["outputs"][0]["data"]["text/html"])
    for setting in {row["setting"] for row in read_real() if row["method"] == method}:
        assert html.escape(setting) in shown


def test_a_kept_result_counts_in_whatever_dtype(forked, tmp_path):
    runs = small_runs(tmp_path, a=dict(steps=1, dtype="float32"))
    runs.all(say=lambda line: None)
    (other,) = small_runs(tmp_path, a=dict(steps=1, dtype="bfloat16")).plan["runs"]
    (more,) = small_runs(tmp_path, a=dict(steps=2, dtype="float32")).plan["runs"]
    assert runs.kept(other, 0)
    assert not runs.kept(more, 0)
    assert not runs.kept(other, 1)


@pytest.mark.parametrize("there", [True, False])
def test_a_fast_dtype_is_that_of_the_machine(tmp_path, monkeypatch, there):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": there})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    place = tmp_path / "plan.toml"
    place.write_text('[defaults]\ndtype = "fast"\n[sft.a]\nsteps = 1\n')
    (run,) = read_real_plan(place)["runs"]
    assert run["knobs"]["dtype"] == ("bfloat16" if there else "float32")
