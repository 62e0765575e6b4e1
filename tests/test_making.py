"Making data: kills, torn lines, endpoints that fail, parents that lead back, counted verdicts."

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from serving import Endpoint as Server
from serving import endpoint

from polm_lab.core.knobs import WrongInput
from polm_lab.core.run import Run, Stopped, read_lines
from polm_lab.data.load import load_data
from polm_lab.data.rows import Row
from polm_lab.rewards.endpoint import Endpoint, answer_text
from polm_lab.training.making import Kept, by_first, in_order, make_rows

server = endpoint(Server)
ROWS = [{"prompt": f"{n}+1="} for n in range(20)]
FILES = ("rows.jsonl", "data.jsonl")


def new_run(out, **settings) -> Run:
    return Run.create("made", {"seed": 3, "data": "numbers"} | settings, out=out)


class Maker:
    "Adds one, writes down what it is asked, and does `then` before its `at`-th answer."

    def __init__(self, at: int = 0, then=None):
        self.asked, self.at, self.then, self.guard = [], at, then, threading.Lock()

    def __call__(self, rows, seeds):
        with self.guard:
            self.asked += [row["prompt"] for row in rows]
            if self.at and len(self.asked) >= self.at:
                self.then()
        found = [int(row["prompt"][:-3]) + 1 for row in rows]
        return [[row | {"completion": str(n), "draw": s}] for row, n, s in zip(rows, found, seeds)]


def odd(row, kept):
    return "kept" if int(row["completion"]) % 2 else "even"


def files(run) -> list[bytes]:
    return [(run.path / name).read_bytes() for name in FILES]


def lose():
    raise WrongInput("the endpoint is gone")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = new_run(tmp_path_factory.mktemp("whole"))
    make_rows(run, ROWS, Maker(), odd)
    return run


@pytest.mark.parametrize("size, at_once", [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_batches_and_threads_make_the_same_rows(whole, tmp_path, size, at_once):
    run, maker = new_run(tmp_path), Maker()
    kept = make_rows(run, ROWS, maker, odd, size=size, at_once=at_once)
    assert files(run) == files(whole)
    assert kept == whole.lines("data")
    assert len(kept) == 10
    assert sorted(maker.asked) == sorted(row["prompt"] for row in ROWS)


@pytest.mark.parametrize("size, at_once", [(1, 1), (3, 1), (1, 4)])
def test_what_dies_in_the_middle_is_resumed_and_asked_nothing_twice(whole, tmp_path, size, at_once):
    run, maker = new_run(tmp_path), Maker(8, lose)
    with pytest.raises(WrongInput, match="gone"), run.active():
        make_rows(run, ROWS, maker, odd, size=size, at_once=at_once)
    assert run.status == "failed"
    assert run.read()["reason"] == "the endpoint is gone"
    answered = {row["row"] for row in run.lines("asked")}
    assert answered
    assert not (run.path / "data.jsonl").exists()
    again = Maker()
    with run.active():
        make_rows(run, ROWS, again, odd, size=size, at_once=at_once)
    starts = [start for start in range(0, len(ROWS), size) if start not in answered]
    wanted = [row["prompt"] for start in starts for row in ROWS[start : start + size]]
    assert sorted(again.asked) == sorted(wanted)
    assert files(run) == files(whole)
    make_rows(run, ROWS, Maker(1, lose), odd)  # what is finished asks nothing


def test_a_torn_last_line_costs_one_question_and_no_other(whole, tmp_path):
    run = new_run(tmp_path)
    make_rows(run, ROWS, Maker(), odd)
    path = run.path / "asked.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    (run.path / "data.jsonl").unlink()
    maker = Maker()
    make_rows(run, ROWS, maker, odd)
    assert maker.asked == [ROWS[-1]["prompt"]]
    assert files(run) == files(whole)
    (run.path / "data.jsonl").unlink()
    make_rows(run, ROWS, Maker(1, lose), odd)  # the answer after the torn line is whole


def test_equal_rows_are_asked_each_with_its_own_seed(tmp_path):
    made = make_rows(new_run(tmp_path), [ROWS[0]] * 3, Maker())
    assert len({row["draw"] for row in made}) == len({row["id"] for row in made}) == 3


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_making import ROWS, Maker, odd
from polm_lab.core.run import Run
from polm_lab.training.making import make_rows
run = Run(sys.argv[1])
with run.active():
    make_rows(run, ROWS, Maker(6, lambda: time.sleep(0.3)), odd, at_once=2)
"""


def test_a_kill_in_the_middle_changes_nothing(whole, tmp_path):
    run = new_run(tmp_path)
    words = [sys.executable, "-c", SCRIPT, str(run.path), str(ROOT / "tests")]
    process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 120
    while len(run.lines("asked")) < 8 and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    answered = len(run.lines("asked"))
    assert run.status == "dead"
    assert 8 <= answered < len(ROWS)
    maker = Maker()
    with run.active():
        make_rows(run, ROWS, maker, odd)
    assert len(maker.asked) == len(ROWS) - answered
    assert files(run) == files(whole)


def test_an_endpoint_that_dies_ends_in_one_line_and_what_it_said_is_kept(server, tmp_path):
    server.says = "fine"
    far = Endpoint(server.url, "small", tries=2, pause=0.001, say=lambda text: None)

    def make(rows, seeds):
        if server.asked >= 9:
            server.dead = True
        messages = [{"role": "user", "content": rows[0]["prompt"]}]
        return [[rows[0] | {"completion": far.ask(messages, answer_text)}]]

    run = new_run(tmp_path)
    with pytest.raises(WrongInput) as caught, run.active():
        make_rows(run, ROWS, make, at_once=3)
    assert "\n" not in str(caught.value)
    assert "503" in str(caught.value)
    assert run.status == "failed"
    answered = len(run.lines("asked"))
    assert 0 < answered < len(ROWS)
    server.dead, server.asked = False, -100
    with run.active():
        kept = make_rows(run, ROWS, make, at_once=3)
    assert server.asked + 100 == len(ROWS) - answered
    assert [r["completion"] for r in kept] == ["fine"] * 20
    assert run.status == "finished"


def test_a_stop_keeps_what_was_made(whole, tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(Stopped, match="stopped after 5 of 20 rows"), run.active():
        make_rows(run, ROWS, Maker(5, run.request_stop), odd)
    assert run.status == "stopped"
    assert len(run.lines("asked")) == len(run.lines("rows")) == 5
    run.clear_stop()
    maker = Maker()
    with run.active():
        make_rows(run, ROWS, maker, odd)
    assert len(maker.asked) == 15
    assert files(run) == files(whole)


def test_parents_lead_back_through_two_rounds(tmp_path):
    run = new_run(tmp_path)
    first = make_rows(run, ROWS[:4], Maker(), part="first-", source="sums#4")
    assert [row["parents"] for row in first] == [[{"data": "sums#4", "row": n}] for n in range(4)]

    def pairs(rows, seeds):
        assert all(set(row) == {"prompt", "completion", "draw"} for row in rows), (
            "facts are taken off"
        )
        return [[row | {"completion": "a"}, row | {"completion": "b"}] for row in rows]

    second = make_rows(run, first, pairs)
    assert [row["parents"] for row in second] == [[row["id"]] for row in first for _ in range(2)]
    assert len({row["id"] for row in first + second}) == 12
    assert {r["verdict"] for r in second} == {"kept"}
    joined = make_rows(
        run, first, lambda rows, seeds: [[{"prompt": "x", "parents": ["a", "b"]}]], part="joined-"
    )
    assert joined[0]["parents"] == ["a", "b"]
    assert load_data(str(run.path / "data.jsonl"), "completion", "all")[0]["parents"] == [
        first[0]["id"]
    ]


def test_verdicts_see_what_was_kept_and_are_counted(tmp_path):
    run = new_run(tmp_path)

    def make(rows, seeds):
        number = int(rows[0]["prompt"][:-3])
        text = {"completion": str(number % 4)}
        return [
            [] if number == 0 else [text] if number < 19 else [text | {"verdict": "unreadable"}]
        ]

    def new(row, kept):
        return "seen before" if row["completion"] in [k["completion"] for k in kept] else "kept"

    kept = make_rows(run, ROWS, make, new, at_once=4)
    assert [row["completion"] for row in kept] == ["1", "2", "3", "0"]
    wanted = {
        "rows": 19,
        "kept": 4 / 19,
        "verdict/kept": 4,
        "verdict/seen before": 14,
        "verdict/unreadable": 1,
    }
    assert run.summary == {"before": {"rows": 20}, "after": wanted}
    assert [row["verdict"] for row in run.lines("rows")].count("seen before") == 14


def test_nothing_kept_is_one_line_with_the_counts(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(WrongInput) as caught:
        make_rows(
            run, ROWS, Maker(), lambda row, kept: "dull" if row["completion"] < "5" else "old"
        )
    assert "none of 20 rows" in str(caught.value)
    assert "dull" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(run.lines("rows")) == 20
    assert not (run.path / "data.jsonl").exists()


def test_a_maker_or_a_verdict_that_is_wrong_says_so(tmp_path):
    with pytest.raises(TypeError, match="0 lists for 1 rows"):
        make_rows(new_run(tmp_path), ROWS, lambda rows, seeds: [])
    with pytest.raises(TypeError, match="verdict: found True"):
        make_rows(new_run(tmp_path), ROWS, Maker(), lambda row, kept: True)


def test_rows_know_their_place_and_seeds_depend_on_the_number_alone(tmp_path):
    rows, seen = [Row(row, f"file:{n}") for n, row in enumerate(ROWS, 1)], []

    def make(batch, seeds):
        seen.extend((row.where, seed) for row, seed in zip(batch, seeds))
        return [[dict(row)] for row in batch]

    make_rows(new_run(tmp_path), rows, make, size=7)
    other = Maker()
    made = make_rows(new_run(tmp_path), ROWS[:5], other)
    assert [where for where, _ in seen] == [f"file:{n}" for n in range(1, 21)]
    assert [row["draw"] for row in made] == [seed for _, seed in seen[:5]]
    assert len({s for _, s in seen}) == 20


def test_other_processes_wait_and_read(whole, tmp_path):
    run = new_run(tmp_path)
    reader = Run(run.path, writes=False)
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(make_rows(reader, ROWS, Maker(1, lose), odd))
    )
    thread.start()
    make_rows(run, ROWS, Maker(), odd)
    thread.join(30)
    assert found == whole.lines("data")
    by_first(run, run.path / "data.jsonl", lambda: pytest.fail("made again"))


def test_an_answer_is_the_same_now_and_after_a_resume(tmp_path):
    odd_things = {"pair": (1, 2), "many": {3: "three"}, "path": Path("a/b")}
    now = Kept(tmp_path / "k.jsonl").get(["q"], lambda: odd_things)
    later = Kept(tmp_path / "k.jsonl").get(["q"], lambda: pytest.fail("asked again"))
    assert now == later == read_lines(tmp_path / "k.jsonl")[0]
    assert now["pair"] == [1, 2]


def test_a_failure_cancels_what_waits(tmp_path):
    begun = []

    def ask(n):
        begun.append(n)
        time.sleep(0.01)
        if n == 2:
            lose()
        return n

    with pytest.raises(WrongInput):
        list(in_order(ask, range(200), at_once=2))
    assert len(begun) < 20
    assert json.dumps(begun[:2]) == "[0, 1]"
