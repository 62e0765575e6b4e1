"""A lesson that does not hold never makes a run fail.

The tests of the project require its claims.
"""

from types import SimpleNamespace

import pytest

from polm_lab.training.chain import create
from polm_lab.core.run import Run
from polm_lab.runner import launch

FAILED = SimpleNamespace(ename="AssertionError", evalue="it does not hold\nmore")


def prepared(tmp_path, **facts):
    run = create(
        "sft",
        dict(data="sums", steps=1, batch_size=2, eval_rows=2, max_length=64, device="cpu"),
        out=tmp_path,
    )
    run.update(**facts)
    return run


def test_a_lesson_after_the_run_leaves_it_finished(tmp_path):
    run = prepared(tmp_path, status="finished")
    launch._after_failed_cell(run, FAILED)
    record = Run(run.path).record
    assert (record["status"], record["notebook_error"]) == (
        "finished",
        "AssertionError: it does not hold",
    )


def test_a_lesson_before_the_run_does_not_stop_it(tmp_path):
    run = prepared(tmp_path)
    launch._after_failed_cell(run, FAILED)
    record = Run(run.path).record
    assert record["status"] == "finished"
    assert record["notebook_error"]
    assert record["summary"]["after"]


def test_another_error_before_the_run_fails_it(tmp_path):
    run = prepared(tmp_path)
    with pytest.raises(RuntimeError, match="KeyError: 'x'"):
        launch._after_failed_cell(run, SimpleNamespace(ename="KeyError", evalue="'x'"))
    assert Run(run.path).record["status"] == "failed"


def test_claims_are_printed_and_only_the_tests_insist(tmp_path, monkeypatch, capsys):
    run, other = prepared(tmp_path), create("sft", dict(seed=3), out=tmp_path)
    monkeypatch.delenv("POLM_CLAIMS", raising=False)
    assert launch.claims(other, one_is_two=False, one_is_one=True).holds.tolist() == [False, True]
    assert "does not hold in this run: one is two" in capsys.readouterr().out
    monkeypatch.setenv("POLM_CLAIMS", "required")
    with pytest.raises(AssertionError, match="one is two"):
        launch.claims(other, one_is_two=False)  # another seed is still the default run
    assert not launch.claims(run, one_is_two=False).holds.any()  # other knobs are not
