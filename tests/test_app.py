"The workbench without a browser: each view shows what is wrong with a run, and survives it."

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from polm_lab.core.run import Run
from polm_lab.runner import launch
from polm_lab.workbench.app import TABS, RunBar, Workbench, summary_html
from polm_lab.workbench.configure import Configure
from polm_lab.workbench.ready import WarmProcess
from polm_lab.workbench.watch import Watch


@pytest.fixture
def make(runs):
    "A finished run of `method` as its record has it: `make(steps=3)`."

    def made(method="sft", status="finished", **settings):
        run = Run.create(method, dict(model="tiny", data="sums", steps=3) | settings)
        for step in range(1, 4):
            run.log(step, loss=1 / step, reward=step / 3)
        run.sample(3, [dict(prompt="1+1=", completion="2", reward=1.0)])
        run.frame("before", dict(accuracy=0.5))
        run.frame("after", dict(accuracy=0.75))
        run.update(status=status)
        return run

    return made


def all_tabs(bench):
    "Open each tab, look twice, and give the words of the run's bar."
    for number in range(len(TABS)):
        bench.tabs.selected_index = number
        bench.refresh()
    return bench.bar.text.value


def test_every_tab_on_no_runs_and_on_a_finished_one(make, runs):
    empty = Workbench()
    assert "No run is chosen" in all_tabs(empty)
    run = make()
    empty.refresh()
    assert [value for _, value in empty.picker.options] == [run.id]
    bench = Workbench()
    assert "finished" in all_tabs(bench)
    assert bench.run == run.id
    assert "0.5 → 0.75" in bench.bar.summary.value
    assert bench.views["Compare"].chosen == [run.id]


BROKEN = {
    "deleted": (lambda run: shutil.rmtree(run.path), "no run is there"),
    "empty run.json": (lambda run: (run.path / "run.json").write_text(""), "damaged"),
    "half a run.json": (
        lambda run: (run.path / "run.json").write_text('{"id": "x", "method": "sft"'),
        "damaged",
    ),
    "another run.json": (lambda run: (run.path / "run.json").write_text("{}"), "are missing"),
    "a list for run.json": (lambda run: (run.path / "run.json").write_text("[]"), "are missing"),
    "metrics.jsonl is a folder": (
        lambda run: ((run.path / "metrics.jsonl").unlink(), (run.path / "metrics.jsonl").mkdir()),
        "metrics.jsonl",
    ),
    "samples.jsonl is garbage": (
        lambda run: (run.path / "samples.jsonl").write_bytes(os.urandom(9000)),
        "finished",
    ),
    "metrics.jsonl is garbage": (
        lambda run: (run.path / "metrics.jsonl").write_bytes(os.urandom(9000)),
        "finished",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_record_that_breaks_under_the_view(name, make):
    other, run = make(), make()
    breaks, words = BROKEN[name]
    bench = Workbench()
    bench.run = run.id
    all_tabs(bench)
    breaks(run)
    assert words in all_tabs(bench)
    bench.run = other.id
    assert "finished" in all_tabs(bench)
    assert other.id in bench.bar.text.value
    later = Workbench()  # opened on a folder that holds the broken run
    later.run = run.id
    all_tabs(later)
    later.run = other.id
    assert "finished" in all_tabs(later)


def test_a_killed_run_is_dead_and_can_be_resumed(make):
    code = (
        "import sys, os, signal; from polm_lab.core.run import Run\n"
        "with Run(sys.argv[1]).active() as run:\n    run.log(1, loss=1.0)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = Run.create("sft", dict(steps=3))
    (run.path / "log.txt").write_text("<b>last words</b>\n")
    subprocess.run([sys.executable, "-c", code, str(run.path)])
    bar = RunBar()
    bar.show(run)
    assert "its process is gone" in bar.text.value
    assert "&lt;b&gt;last words" in bar.text.value
    assert not bar.resume_button.disabled
    assert bar.stop_button.disabled


FULL = """
mount -t tmpfs -o size=12m tmpfs {disk} && {python} - {disk} <<'END'
import sys, time
from pathlib import Path
from polm_lab.core.run import all_runs
from polm_lab.workbench.app import Workbench
out = Path(sys.argv[1])
bench = Workbench(out)
bench.configure.method.value = "sft"
bench.configure.form.load(dict(steps=3, save_every=1, eval_rows=4, batch_size=4))
bench.configure.start()
run = all_runs(out)[0]
while run.status in ("created", "running"):
    bench.refresh()
    time.sleep(0.2)
bench.refresh()
print("AFTER", bench.bar.text.value)
try:
    (out / "ballast").write_bytes(b"x" * 2**24)
except OSError:
    pass
bench.tabs.selected_index = 0
bench.configure.start()
print("START", bench.configure.message.value)
bench.configure.preset_name.value = "mine"
bench.configure.save()
print("PRESET", bench.configure.message.value)
print("RUNS", len(all_runs(out)))
(out / "ballast").unlink()
bench.configure.save()
print("AGAIN", bench.configure.message.value)
END
"""


def test_a_full_disk(tmp_path):
    """A real disk of 12 MiB, mounted in its own namespace.

    The run that fills it records why it failed.
    A run that cannot be created is refused in one line.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", FULL.format(disk=disk, python=sys.executable)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    printed = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    if "AFTER" not in printed:
        assert "mount" in done.stderr or "unshare" in done.stderr, done.stderr[-2000:]
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()[-200:]}")
    assert "failed" in printed["AFTER"]
    assert "No space left" in printed["AFTER"]
    assert "cannot be written" in printed["START"]
    assert "No space left" in printed["START"]
    assert 'role="alert"' in printed["START"]
    assert "cannot be written" in printed["PRESET"], (printed, done.stderr[-1000:])
    assert printed["RUNS"] == "1", (printed, done.stderr[-1000:])
    assert "saved" in printed["AGAIN"], (printed, done.stderr[-1000:])


def test_a_spare_process_that_was_killed_is_replaced(runs):
    spare = WarmProcess()
    spare.ready()
    os.kill(spare.process.pid, signal.SIGKILL)
    spare.process.wait()
    run = launch.create("sft", dict(steps=1, eval_rows=4, batch_size=4))
    spare.give(run)
    assert launch.wait(run, 120).status == "finished"


def test_stop_resume_and_clone(make):
    run = make(status="stopped", steps=7, learning_rate=0.002)
    desk = Configure()
    desk.take(run)
    assert desk.form.values == dict(data="sums", steps=7, learning_rate=0.002)
    assert run.id in desk.message.value
    assert "steps 7" in desk.code["polm"].text
    given = []
    spare = WarmProcess()
    spare.give = given.append
    bar = RunBar(spare)
    bar.show(run)
    bar.resume()
    assert given[0].path == run.path
    assert "resuming" in bar.message.value
    bar.show(make())
    bar.resume()
    assert len(given) == 1
    assert "it is finished" in bar.message.value


def test_the_sweep_begins_from_the_form_and_gives_its_run_to_watch(make):
    run = make("dpo")
    bench = Workbench()
    bench.configure.method.value = "dpo"
    bench.configure.form.load(dict(steps=9, beta=0.3))
    bench.tabs.selected_index = TABS.index("Sweep")
    view = bench.views["Sweep"]
    assert view.method == "dpo"
    assert view.fixed.value.splitlines() == ["beta 0.3", "steps 9"]
    view.fixed.value = "steps 11"
    bench.refresh()
    assert view.fixed.value == "steps 11", "what was typed there stays until Configure changes"
    other = make()
    bench.refresh()
    view.selected_run = other.id
    assert bench.run == other.id
    assert bench.bar.run.id == other.id != run.id


def test_a_view_is_made_once_by_two_threads(make, monkeypatch):
    make()
    bench, made, plain = Workbench(), [], Workbench._make

    def slowly(self, name):
        made.append(name)
        time.sleep(0.3)
        return plain(self, name)

    monkeypatch.setattr(Workbench, "_make", slowly)
    # a click, which JupyterLab hands to a thread of its own
    bench.tabs.selected_index = TABS.index("Understand")
    bench.views.clear()
    clicks = [threading.Thread(target=bench.refresh) for _ in range(3)]
    for click in clicks:
        click.start()
    for click in clicks:
        click.join()
    assert made == ["Understand"] * 2
    assert bench.tabs.children[TABS.index("Understand")].children == (bench.views["Understand"],)


def test_an_import_that_fails_does_not_end_the_looking(make, monkeypatch):
    def half_there():
        raise AttributeError("partially initialized module 'pandas'")

    async def scene():
        monkeypatch.setattr("polm_lab.workbench.app.import_views", half_there)
        bench, until = Workbench(every=0.01), time.monotonic() + 60
        while not bench.page.asked and not bench._task.done() and time.monotonic() < until:
            await asyncio.sleep(0.02)
        bench.close()
        return bench.page.asked

    make()
    assert asyncio.run(scene()) == 1


def test_a_page_that_does_not_answer_gets_nothing_more(make):
    async def scene():
        make()
        bench = Workbench(every=0.01)
        seen = []
        bench.refresh = lambda: seen.append(1)
        until = time.monotonic() + 60
        while not seen and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
        waiting = len(seen)
        bench.page.answered = bench.page.asked
        await asyncio.sleep(0.2)
        bench.close()
        return waiting, len(seen)

    assert asyncio.run(scene()) == (1, 2)


def test_what_goes_wrong_while_looking_is_said_and_the_looking_goes_on(make):
    async def scene():
        bench, looks = Workbench(every=0.01), []

        def look():
            looks.append(1)
            if len(looks) == 1:
                raise RuntimeError("<b>odd</b>")

        bench.refresh = look
        trouble, until = "", time.monotonic() + 60
        while len(looks) < 2 and time.monotonic() < until:
            await asyncio.sleep(0.02)
            bench.page.answered = bench.page.asked
            trouble = trouble or bench.trouble.value
        await asyncio.sleep(0.05)
        bench.close()
        return trouble, bench.trouble.value

    trouble, now = asyncio.run(scene())
    assert "RuntimeError: &lt;b&gt;odd" in trouble
    assert now == ""


def test_a_run_made_of_others_says_which_part_runs(make):
    whole, part = make("reft", status="running", steps=3), Run.create("sft", dict(steps=8))
    whole.update(stages={"warm-up": part.id})
    bench = Workbench()
    bench.run = whole.id
    with whole.active(), part.active():
        part.log(5, loss=1.0)
        bench.refresh()
        sentence = f"warm-up ({part.id}): step 5 of 8"
        assert sentence in bench.bar.text.value
        assert sentence in Watch(whole).status.value
    bench.refresh()
    assert "warm-up" not in bench.bar.text.value
    assert "finished" in bench.bar.text.value


def test_the_first_method_that_is_offered_is_the_plainest():
    form = Configure()
    assert form.method.value == "sft"
    form.search.value = "preference pairs"
    assert form.method.value is None or form.method.value != "sft"
    form.search.value = ""
    assert form.method.value in [name for _, name in form.method.options]


def test_a_summary_is_shown_whole_and_escaped():
    shown = summary_html({"before": {"a<b": 1.0}, "after": {"a<b": 2.0, "new": 0.25, "odd": "x"}})
    assert "a&lt;b&ensp;<b>1 → 2" in shown
    assert "new&ensp;<b>– → 0.25" in shown
    assert "odd&ensp;<b>– → –" in shown
    assert summary_html({}) == ""


def test_whoever_comes_back_in_mid_run_sees_it(make):
    with Run.create("sft", dict(steps=3)).active() as going:
        bench = Workbench()
        assert bench.run == going.id
        assert TABS[bench.tabs.selected_index] == "Watch"
    assert TABS[Workbench().tabs.selected_index] == "Configure"
