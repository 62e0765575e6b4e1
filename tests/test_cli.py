"The command line and its Python twins, as a user meets them."

import json
import os
import signal
import subprocess
import time

import pytest
from conftest import POLM

import polm_lab as lab
from polm_lab.core.run import all_runs

SHORT = [
    "-p",
    "steps",
    3,
    "-p",
    "eval_rows",
    4,
    "-p",
    "data",
    "sums",
    "-p",
    "batch_size",
    4,
    "-p",
    "save_every",
    1,
]


def last_json(done):
    return json.loads(done.stdout.strip().split("\n")[-1])


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    "A run through its notebook: what it reported, and its folder of runs."
    folder = tmp_path_factory.mktemp("through")
    done = subprocess.run(
        [POLM, "run", "sft", *map(str, SHORT), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "POLM_RUNS": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return last_json(done), folder


def test_run_goes_through_papermill_and_leaves_the_notebook(through):
    report, folder = through
    assert report["status"] == "finished"
    assert set(report["summary"]) == {"before", "after"}
    run = lab.open_run(report["run"], folder)
    notebook = json.loads((run.path / "notebook.ipynb").read_text())
    injected = [
        c for c in notebook["cells"] if "injected-parameters" in c["metadata"].get("tags", [])
    ]
    assert len(injected) == 1
    assert "steps = 3" in "".join(injected[0]["source"])
    assert len(run.lines()) == 3
    assert run.settings["steps"] == 3
    assert (run.path / "model" / "model.safetensors").exists()
    assert len(all_runs(folder)) == 1, "the notebook uses the run that was prepared for it"


def test_bare_equals_the_notebook(forked, through):
    bare = lab.open_run(last_json(forked("run", "sft", *SHORT, "--json", "--bare"))["run"])
    run = lab.open_run(through[0]["run"], through[1])
    assert (bare.path / "model/model.safetensors").read_bytes() == (
        run.path / "model/model.safetensors"
    ).read_bytes()
    assert not (bare.path / "notebook.ipynb").exists()
    assert bare.summary == run.summary


def test_knobs_from_a_file_are_overridden_by_options(forked, tmp_path):
    (tmp_path / "knobs.yaml").write_text(
        "steps: 2\nlearning_rate: 1e-4\ndata: sums\neval_rows: 4\n"
    )
    report = last_json(
        forked("run", "sft", "--bare", "--json", "-f", tmp_path / "knobs.yaml", "-p", "steps", "1")
    )
    settings = lab.open_run(report["run"]).settings
    assert (settings["steps"], settings["learning_rate"], settings["data"]) == (1, 1e-4, "sums")


def test_stop_and_resume(forked, runs):
    process = subprocess.Popen(
        [
            POLM,
            "run",
            "sft",
            "--bare",
            "-p",
            "steps",
            "5000",
            "-p",
            "data",
            "sums",
            "-p",
            "eval_rows",
            "4",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    until = time.monotonic() + 120
    while not (all_runs(runs) and all_runs(runs)[0].lines()):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.1)
    run = all_runs(runs)[0]
    stopped = forked("stop", run.id)
    assert stopped.returncode == 0
    assert "stopped at step" in stopped.stdout
    assert process.wait(timeout=60) == 130
    at = len(run.lines())
    assert run.status == "stopped"
    assert run.read()["step"] == at
    run.update(settings={**run.settings, "steps": at + 2})
    assert forked("resume", run.id).returncode == 0
    assert run.status == "finished"
    assert [row["step"] for row in run.lines()] == list(range(1, at + 3))
    again = forked("resume", run.id)
    assert again.returncode == 2
    assert "finished" in again.stderr


def test_ctrl_c_stops_a_notebook_run_with_its_state_saved(runs):
    process = subprocess.Popen(
        [POLM, "run", "sft", "-p", "steps", "5000", "-p", "data", "sums", "-p", "eval_rows", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 180
    while not (all_runs(runs) and all_runs(runs)[0].lines()):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130, process.stderr.read()
    run = all_runs(runs)[0]
    assert run.status == "stopped"
    assert list((run.path / "checkpoints").glob("step-*"))


def test_launch_outlives_its_caller_and_can_be_waited_for():
    run = lab.launch("sft", notebook=False, steps=3, data="sums", eval_rows=4, batch_size=4)
    assert lab.wait(run, timeout=120).status == "finished"
    assert len(run.lines()) == 3


def test_looking(forked):
    a = lab.run("sft", steps=2, data="sums", eval_rows=4, batch_size=4)
    b = lab.run(
        "sft",
        steps=2,
        data="sums",
        eval_rows=4,
        batch_size=4,
        learning_rate=1e-4,
        model=str(a.path / "model"),
    )
    assert b.record["parents"] == [a.id]
    assert list(lab.runs()["run"]) == [b.id, a.id]
    assert "learning_rate" in lab.compare(a, b).index
    shown = forked("show", b.id)
    assert shown.returncode == 0
    assert b.id in shown.stdout
    assert "perplexity" in shown.stdout
    assert a.id in forked("runs").stdout
    assert "learning_rate" in forked("compare", a.id, b.id).stdout
    listed = forked("methods").stdout
    assert all(name in listed for name in ("sft", "dpo", "grpo"))
    assert json.loads(forked("show", b.id, "--json").stdout)["status"] == "finished"


def test_doctor(polm):
    done = polm("doctor")
    assert done.returncode == 0
    assert "torch" in done.stdout
    assert "tiny" in done.stdout


def test_another_folder_for_runs(forked, tmp_path):
    done = forked("run", "sft", "--bare", "--json", "--out", tmp_path / "elsewhere", *SHORT)
    assert last_json(done)["path"].startswith(str(tmp_path / "elsewhere"))
    assert forked("show", last_json(done)["run"], "--out", tmp_path / "elsewhere").returncode == 0


def test_two_processes_by_accelerate(tmp_path):
    done = subprocess.run(
        [
            POLM.parent / "accelerate",
            "launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
            "--no_python",
            POLM,
            "run",
            "sft",
            "--bare",
            "--json",
            "--out",
            tmp_path,
            *map(str, SHORT),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(all_runs(tmp_path)) == 1
    assert all_runs(tmp_path)[0].status == "finished"
    assert all_runs(tmp_path)[0].record["processes"] == 2
    assert all_runs(tmp_path)[0].record["parallel"] == "ddp"
    refused = subprocess.run(
        [POLM, "run", "sft"],
        capture_output=True,
        text=True,
        env={**os.environ, "WORLD_SIZE": "2", "RANK": "0"},
    )
    assert refused.returncode == 2
    assert "--bare" in refused.stderr


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["--version"]])
def test_help(polm, words):
    assert polm(*words).returncode == 0
