"The record of a run: states, locks, damage, many at once."

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from polm_lab.core.knobs import WrongInput
from polm_lab.core.run import STALE, Run, Stopped, all_runs, open_run, parent_of

HOLD = """
import sys, time
from polm_lab.core.run import Run
with Run(sys.argv[1]).active():
    print("running", flush=True)
    time.sleep(60)
"""


def held(run):
    "A process that runs `run` until it is ended."
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "running\n"
    return process


def test_a_killed_process_is_dead_at_once_and_its_run_can_go_on():
    run = Run.create("example", {"steps": 3})
    process = held(run)
    assert run.status == "running"
    process.kill()
    process.wait()
    assert run.status == "dead"
    assert run.read()["status"] == "running"
    with Run(run.path).active():
        pass
    assert run.status == "finished"


def test_one_run_is_run_by_one_process():
    run = Run.create("example", {"steps": 3})
    process = held(run)
    try:
        with pytest.raises(WrongInput, match="running already"):
            with Run(run.path).active():
                pass
        assert run.status == "running", "the refused process must not touch the record"
    finally:
        process.kill()
        process.wait()


def test_a_run_of_another_machine_is_judged_by_its_heartbeat():
    run = Run.create("example", {})
    run.update(status="running", host="elsewhere", heartbeat=time.time())
    assert run.status == "running"
    run.update(heartbeat=time.time() - STALE - 1)
    assert run.status == "dead"


def test_the_heart_beats(monkeypatch):
    monkeypatch.setattr("polm_lab.core.run.HEARTBEAT", 0.05)
    run = Run.create("example", {})
    with run.active():
        first = run.read()["heartbeat"]
        until = time.monotonic() + 10
        while run.read()["heartbeat"] == first and time.monotonic() < until:
            time.sleep(0.05)
        assert run.read()["heartbeat"] > first


@pytest.mark.parametrize(
    "error, status, reason",
    [
        (Stopped("asked"), "stopped", "asked to stop"),
        (KeyboardInterrupt(), "stopped", "asked to stop"),
        (WrongInput("data x: no rows"), "failed", "data x: no rows"),
        (RuntimeError("broken\nmore"), "failed", "RuntimeError: broken"),
    ],
)
def test_how_a_run_ended_is_recorded(error, status, reason):
    run = Run.create("example", {})
    with pytest.raises(type(error)):
        with run.active():
            raise error
    assert (run.status, run.read()["reason"]) == (status, reason)


def test_a_finished_run_is_not_run_again():
    run = Run.create("example", {})
    with run.active():
        run.log(1, loss=1.0)
    with pytest.raises(WrongInput, match="finished"):
        with Run(run.path).active():
            pass
    assert run.status == "finished"
    assert len(run.lines()) == 1


def test_sigterm_asks_for_a_stop():
    run = Run.create("example", {})
    with run.active():
        assert not run.stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop_requested()


def test_ten_runs_started_at_once_do_not_disturb_each_other(runs):
    start = """
import sys
from polm_lab.core.run import Run
run = Run.create("example", {"steps": 50, "seed": int(sys.argv[1])})
with run.active():
    for step in range(1, 51):
        run.log(step, loss=float(sys.argv[1]))
"""
    processes = [subprocess.Popen([sys.executable, "-c", start, str(i)]) for i in range(10)]
    assert [p.wait(timeout=60) for p in processes] == [0] * 10
    found = all_runs(runs)
    assert len(found) == 10
    assert {r.status for r in found} == {"finished"}
    for run in found:
        lines = run.lines()
        assert [row["step"] for row in lines] == list(range(1, 51))
        assert {row["loss"] for row in lines} == {float(run.settings["seed"])}


def test_damaged_lines_are_left_out_and_rewinding_mends_the_file():
    run = Run.create("example", {})
    for step in range(1, 6):
        run.log(step, loss=float(step))
    path = run.path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([lines[0], '{"step": 2, "loss"', lines[2], "\x00\x00", lines[3], lines[4]]) + "\n"
    )
    assert [row["step"] for row in run.lines()] == [1, 3, 4, 5]
    run.rewind(3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_numbers_that_are_not_finite_are_null_in_the_record():
    run = Run.create("example", {})
    run.log(1, loss=float("nan"), reward=float("inf"))
    text = (run.path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["loss"] is None


def test_runs_are_opened_by_id_part_and_path(runs):
    a, b = Run.create("sft", {}), Run.create("dpo", {})
    assert open_run(a.id).path == open_run("-sft-").path == open_run(str(a.path)).path == a.path
    with pytest.raises(WrongInput, match="2 runs"):
        open_run(a.id[:8])
    with pytest.raises(WrongInput, match="no such run"):
        open_run("grpo")
    assert parent_of(str(b.path / "model")) == parent_of(b.id) == [b.id]
    assert parent_of("tiny") == []


def test_a_damaged_record_says_so(runs):
    run = Run.create("sft", {})
    (run.path / "run.json").write_text('{"id": ')
    with pytest.raises(WrongInput, match="damaged"):
        Run(run.path)
    assert all_runs(runs) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WrongInput, match="cannot be written"):
        Run.create("sft", {}, out=tmp_path / "file" / "runs")


def test_a_run_records_its_dtype_and_goes_on_with_it(tmp_path):
    "auto is resolved once; a run that began in bf16, on another machine, goes on in bf16."
    from polm_lab.training.chain import create, execute

    settings, loss = (
        dict(data="sums", steps=1, batch_size=2, eval_rows=2, max_length=64, device="cpu"),
        [],
    )
    for asked, found in (("auto", "float32"), ("bfloat16", "bfloat16")):
        run = execute(create("sft", settings | dict(dtype=asked), out=tmp_path))
        record = run.read()
        assert (record["dtype"], record["device"], record["parallel"]) == (found, "cpu", "none")
        loss.append(run.lines()[0]["loss"])
    begun = create("sft", settings | dict(dtype="auto"), out=tmp_path)
    begun.update(dtype="bfloat16")
    again = execute(Run(begun.path))
    assert again.read()["dtype"] == "bfloat16"
    assert again.lines()[0]["loss"] == loss[1] != loss[0]


def test_steps_count_show_and_end_when_asked(monkeypatch):
    "A stop ends the loop before the next step; a resumed run drops what was logged before."
    shown = []
    show = lambda self, step, metrics: shown.append((step, self.total, dict(metrics)))  # noqa: E731
    monkeypatch.setattr("polm_lab.core.run.Progress.__call__", show)
    run = Run.create("example", {})
    with pytest.raises(Stopped, match=f"after 2 of 3 parts; `polm resume {run.id}`"), run.active():
        for step in run.steps(3, unit="parts"):
            if step == 1:  # a step without metrics shows none, not those of the step before
                run.log(step, loss=1.0)
            run.sample(step, [dict(completion="x")])
            if step == 2:
                run.request_stop()
    assert shown == [(1, 3, {"loss": 1.0}), (2, 3, {})]
    assert (run.status, run.read()["total"], len(run.lines("samples"))) == ("stopped", 3, 2)
    run.clear_stop()
    with Run(run.path).active() as again:
        walked = [step for step in again.steps(3) if not again.log(step, loss=2.0)]
    assert walked == [row["step"] for row in run.lines()] == [1, 2, 3]
    assert {row["loss"] for row in run.lines()} == {2.0}
    assert run.lines("samples") == []


def test_a_walk_from_a_later_step_keeps_what_came_before():
    run = Run.create("example", {})
    for step in (1, 2, 3):
        run.log(step, loss=1.0)
    assert list(run.steps(4, first=3)) == [3, 4]
    assert [row["step"] for row in run.lines()] == [1, 2]
    run.request_stop()  # a walk with no step left is over, not stopped
    assert list(run.steps(4, first=5)) == []
    with pytest.raises(Stopped, match="after 0 of 2"):
        next(run.steps(4, first=3))
