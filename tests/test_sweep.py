"Sweeps, copies, the queue and the commands, with real processes where it matters."

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from conftest import POLM, ROOT

import polm_lab as lab
from polm_lab.cli import polm as cli
from polm_lab.core.knobs import WrongInput
from polm_lab.core.run import Run, Stopped, all_runs
from polm_lab.runner import launch
from polm_lab.runner.sweep import (
    all_sweeps,
    create_sweep,
    open_sweep,
    plan,
    resume_sweep,
    results,
    sweep_command,
    work_sweep,
)
from polm_lab.runner.proposals import tpe_point
from polm_lab.workbench.trials import Sweeps, fill_figure, parallel

SHORT = dict(steps=2, data="sums", eval_rows=4, batch_size=4, save_every=1)


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


class Written:
    """Start processes that import no torch.

    Each writes ten steps of a curve that ends at its learning rate.
    """

    code = (
        "import sys, time; from polm_lab.core.run import Run, Stopped\n"
        "run = Run(sys.argv[1])\n"
        "with run.active():\n"
        "    for step in range(run.record['step'] + 1, 11):\n"
        "        run.log(step, accuracy=run.settings['learning_rate'] * step / 10); "
        "run.update(step=step); time.sleep(0.03)\n"
        "        if run.stop_requested(): raise Stopped\n"
        "        if (run.path / 'ill').exists() and step == 5: (run.path / 'ill').unlink(); raise "
        "RuntimeError('ill')\n"
        "    run.frame('after', {'accuracy': run.settings['learning_rate']})\n"
    )

    def __init__(self, ill=()):
        self.ill, self.started = ill, []

    def __call__(self, run):
        self.started.append(run.record["trial"])
        if run.record["trial"] in self.ill and self.started.count(run.record["trial"]) == 1:
            (run.path / "ill").touch()
        process = subprocess.Popen(
            [sys.executable, "-c", self.code, str(run.path)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return lambda: process.poll() is not None


MINI = """
import time
from dataclasses import dataclass
from polm_lab.core.knobs import knob
from polm_lab.core.settings import RunSettings, redefault
from polm_lab.core.method import method
from polm_lab.core.run import Run, Stopped

@dataclass(kw_only=True)
class Mini(RunSettings):
    steps: int = knob(5, "steps", low=1)
    rate: float = knob(0.5, "height of the curve", low=0, log=True)
    pace: float = knob(0.0, "seconds a step", low=0)
    data: str = knob("", "a file that is read, if one is given")
    dtype: str = redefault("dtype", "float32")

@method(family="finetuning", title="Mini", trains=False)
def mini(settings: Mini, run: Run) -> None:
    "Write a curve, to try what is around a run."
    run.rewind(run.record["step"])
    for step in range(run.record["step"] + 1, settings.steps + 1):
        run.log(step, accuracy=settings.rate * step / settings.steps)
        run.update(step=step)
        time.sleep(settings.pace)
        if run.stop_requested():
            raise Stopped
    run.note(open(settings.data).read() if settings.data else "")
    run.frame("after", {"accuracy": settings.rate})
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return the environment of a copy of this package with one method more.

    The method has a notebook and loads no torch.
    """
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(
        ROOT / "polm_lab", root / "polm_lab", ignore=shutil.ignore_patterns("__pycache__")
    )
    (root / "data").symlink_to(ROOT / "data")
    (root / "polm_lab" / "finetuning" / "mini.py").write_text(MINI)
    lines = {
        "parameters": 'steps = 5\nrate = 0.5\npace = 0.0\ndata = ""',
        "run": (
            'import polm_lab as lab\nfrom polm_lab.finetuning.mini import Mini\nlab.run("mini", '
            "**lab.from_cell(Mini, globals()))"
        ),
    }
    code = [
        dict(
            cell_type="code",
            id=n,
            metadata=dict(tags=[n]),
            source=text,
            outputs=[],
            execution_count=None,
        )
        for n, text in lines.items()
    ]
    (root / "nbs" / "finetuning").mkdir(parents=True)
    kernel = dict(name="python3", display_name="python3", language="python")
    (root / "nbs" / "finetuning" / "mini.ipynb").write_text(
        json.dumps(dict(cells=code, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5))
    )
    return dict(
        PYTHONPATH=str(root), OMP_NUM_THREADS="1", PATH=f"{POLM.parent}:{os.environ['PATH']}"
    )


def python(code, tree, **more):
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import json, polm_lab as lab\n{code}"],
        capture_output=True,
        text=True,
        env={**os.environ, **tree},
        **more,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def planned(runs, rates, **more):
    return create_sweep(plan("sft", {"learning_rate": rates}, SHORT, **more), runs)


def ends(sweep):
    return [t["status"] for t in sweep.trials]


# Sweeps


def test_a_grid_of_runs_through_papermill(polm, forked, runs, tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a kernel takes modules of its folder first
    (tmp_path / "data").write_text("some")
    done = polm(
        "sweep",
        "mini",
        "-g",
        "rate",
        "0.2,0.1",
        "-p",
        "data",
        tmp_path / "data",
        "--jobs",
        2,
        "--json",
        **tree,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.strip().split("\n")[-1])
    assert report["status"] == "finished"
    assert [t["status"] for t in report["trials"]] == ["finished"] * 2
    found = lab.open_run(report["best"]["run"])
    assert report["best"]["value"] == 0.2 == found.summary["after"]["accuracy"]
    assert report["best"]["values"] == {"rate": 0.2}
    assert report["best"]["path"] == str(found.path)
    assert (found.path / "notebook.ipynb").exists()
    assert found.record["sweep"] == report["sweep"]
    assert found.record["via"] == "notebook"
    shown = forked("show", report["sweep"])
    assert shown.returncode == 0
    assert found.id in shown.stdout
    assert report["sweep"] in forked("sweeps").stdout
    table = lab.results(report["sweep"])
    assert list(table["rate"]) == [0.2, 0.1]
    assert list(table["step"]) == [5, 5]
    again = forked("resume", report["sweep"])
    assert again.returncode == 2
    assert "finished" in again.stderr
    assert len(again.stderr.strip().split("\n")) == 1


def test_a_killed_sweep_goes_on_where_it_was(polm, runs, tree):
    words = [
        "sweep",
        "mini",
        "-g",
        "rate",
        "0.1,0.2",
        "-p",
        "steps",
        "20",
        "-p",
        "pace",
        "0.1",
        "--bare",
    ]
    process = subprocess.Popen(
        [POLM, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **tree},
    )
    until(lambda: all_runs(runs) and len(all_runs(runs)[0].lines()) > 3)
    process.kill(), process.wait()
    (made,) = all_sweeps(runs)
    assert made.status == "dead"
    assert ends(made) == ["running", "waiting"]
    first = all_runs(runs)[0]
    # the trial continues without the sweep, unless it is killed too
    with suppress(ProcessLookupError):
        os.kill(first.read()["pid"], signal.SIGKILL)
    until(lambda: first.status == "dead")
    assert polm("resume", made.id, **tree).returncode == 0
    done = open_sweep(made.path)
    assert done.status == "finished"
    assert len(all_runs(runs)) == 2
    assert all(t["failures"] == [] for t in done.trials)
    assert [row["step"] for row in first.lines()] == list(range(1, 21))
    assert done.best["values"] == {"rate": 0.2}


def test_a_sweep_of_its_own_process_is_stopped_and_resumed(polm, runs, tree):
    started = polm(
        "sweep",
        "mini",
        "-g",
        "rate",
        "0.1,0.2",
        "-p",
        "steps",
        "100",
        "-p",
        "pace",
        "0.1",
        "--bare",
        "--detach",
        "--json",
        **tree,
    )
    made = open_sweep(json.loads(started.stdout)["sweep"])
    until(lambda: all_runs(runs) and all_runs(runs)[0].lines())
    stopped = polm("stop", made.id)
    assert stopped.returncode == 0
    assert "stopped at trial 0" in stopped.stdout
    assert all_runs(runs)[0].status == "stopped"
    assert ends(open_sweep(made.path)) == ["stopped", "waiting"]
    again = polm("stop", made.id)
    assert again.returncode == 2
    assert "it is stopped" in again.stderr


def test_trials_that_outlive_a_killed_sweep_are_taken_over(runs, tmp_path):
    made, code = (
        planned(runs, [0.1, 0.2, 0.3], jobs=2),
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); from test_sweep import "
        "*; work_sweep(open_sweep(sys.argv[1]), start=Written(), pause=0.02)",
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(made.path)], env=os.environ)
    until(lambda: len([r for r in all_runs(runs) if len(r.lines()) >= 2]) == 2)
    process.kill(), process.wait()
    start = Written()
    done = resume_sweep(made.path, start=start, pause=0.02)
    assert start.started == [2]
    assert done.status == "finished"
    assert len(all_runs(runs)) == 3
    assert [t["value"] for t in done.trials] == [0.1, 0.2, 0.3]
    assert all(len(r.lines()) == 10 for r in all_runs(runs))


def test_a_run_that_was_made_and_not_written_down_is_found_again(runs):
    made = planned(runs, [0.1])
    stray = launch.create("sft", SHORT | {"learning_rate": 0.1}, runs)
    stray.update(sweep=made.id, trial=0)  # and here the sweep was killed
    assert work_sweep(made, start=Written(), pause=0.02).trials[0]["run"] == stray.id
    assert len(all_runs(runs)) == 1


def test_failures_are_retried_and_reported(runs):
    start = Written(ill={1})
    done = work_sweep(planned(runs, [0.1, 0.2]), start=start, pause=0.02)
    assert start.started == [0, 1, 1]
    assert [t["value"] for t in done.trials] == [0.1, 0.2]
    assert done.trials[1]["failures"] == ["RuntimeError: ill"]
    assert list(results(done)["tries"]) == [1, 2]
    assert [row["step"] for row in Run(runs / done.trials[1]["run"]).lines()] == list(range(1, 11))
    start = Written(ill={0})
    done = work_sweep(planned(runs, [0.1, 0.2], retries=0), start=start, pause=0.02)
    assert start.started == [0, 1]
    assert ends(done) == ["failed", "finished"]
    assert "1 of 2 trials failed: RuntimeError: ill" in done.read()["reason"]
    assert "ill" in results(done)["reason"][0]
    assert done.best["values"]["learning_rate"] == 0.2
    hopeless = planned(runs, [0.1], retries=0)
    with pytest.raises(RuntimeError, match="all 1 trials failed: RuntimeError: ill"):
        work_sweep(hopeless, start=Written(ill={0}), pause=0.02)
    assert hopeless.status == "failed"
    assert ends(resume_sweep(hopeless, start=Written(), pause=0.02)) == ["finished"]


def test_stopped_and_resumed(runs):
    made, start = planned(runs, [0.1, 0.2]), Written()
    with pytest.raises(Stopped):
        work_sweep(
            made, show=lambda s: s.trials[0]["run"] and s.request_stop(), start=start, pause=0.02
        )
    assert made.status == "stopped"
    assert ends(made) == ["stopped", "waiting"]
    with pytest.raises(WrongInput, match="it is stopped"):
        launch.stop(made)
    resume_sweep(made, start=start, pause=0.02)
    assert made.status == "finished"
    assert start.started == [0, 0, 1]
    assert len(Run(runs / made.trials[0]["run"]).lines()) == 10
    with pytest.raises(WrongInput, match="nothing is left"):
        resume_sweep(made)


def test_a_deleted_run_and_a_metric_that_is_not_there(runs):
    def delete(sweep):
        if sweep.trials[0]["status"] == "running":
            shutil.rmtree(runs / sweep.trials[0]["run"], ignore_errors=True)

    done = work_sweep(planned(runs, [0.1, 0.2]), show=delete, start=Written(), pause=0.02)
    assert ends(done) == ["failed", "finished"]
    assert "gone" in done.trials[0]["reason"]
    made, start = planned(runs, [0.1, 0.2], metric="perplexity"), Written()
    with pytest.raises(WrongInput, match="metric = 'perplexity'.*accuracy"):
        work_sweep(made, start=start, pause=0.02)
    assert start.started == [0]
    assert made.status == "failed"
    assert "accuracy" in made.record["reason"]


def test_pruning_and_a_resumed_search_that_proposes_the_same(runs):
    pytest.importorskip("optuna")
    whole = work_sweep(
        planned(runs / "a", (1e-4, 1.0), search="tpe", trials=7), start=Written(), pause=0.01
    )
    cut = planned(runs / "b", (1e-4, 1.0), search="tpe", trials=7)
    with pytest.raises(Stopped):
        work_sweep(
            cut, show=lambda s: s.trials[5]["run"] and s.request_stop(), start=Written(), pause=0.01
        )
    resume_sweep(cut, start=Written(), pause=0.01)
    assert [t["values"] for t in cut.trials] == [t["values"] for t in whole.trials]
    assert len({t["values"]["learning_rate"] for t in whole.trials}) == 7

    pruned = planned(runs / "c", [0.9, 0.8, 0.7, 0.6, 0.1], prune=True)
    work_sweep(pruned, start=Written(), pause=0.01)
    assert ends(pruned) == ["finished"] * 4 + ["pruned"], pruned.trials
    last = Run(runs / "c" / pruned.trials[4]["run"])
    assert last.status == "stopped"
    assert pruned.trials[4]["reason"].startswith("pruned at step")
    assert len(last.lines()) < 10


def test_trials_at_the_same_time_differ():
    pytest.importorskip("optuna")
    space = {"learning_rate": dict(low=1e-6, high=1e-1, log=True)}
    done = [dict(values={"learning_rate": 10.0**-e}, value=1 / e) for e in range(1, 7)]
    running = [*done, dict(values=tpe_point(space, done, "up", 6), value=None)]
    assert tpe_point(space, running, "up", 7) != running[-1]["values"]


def test_ray(runs, tree):
    pytest.importorskip("ray")
    tree = tree | dict(RAY_raylet_start_wait_time_s="600")  # a busy machine
    printed = python(
        "import ray\ndone = lab.sweep('mini', {'rate': [0.1, 0.2]}, on='ray', jobs=2, "
        "notebook=False)\nprint(json.dumps([done.id, ray.is_initialized()]))",
        tree,
    )
    name, left = json.loads(printed.strip().split("\n")[-1])
    done = open_sweep(name)
    assert not left, "the cluster that was started for the sweep is gone"
    assert done.status == "finished", done.trials
    assert ends(done) == ["finished"] * 2, done.trials
    assert all(Run(runs / t["run"]).status == "finished" for t in done.trials), done.trials
    assert done.best["value"] == 0.2


PLANS = {
    "an unknown method": (("sfd", {"steps": "1"}), {}, ["sfd", "sft"]),
    "nothing to vary": (("sft", {}), {}, ["no knob is swept"]),
    "an unknown knob": (("sft", {"step": "1,2"}), {}, ["step", "steps"]),
    "a value out of range": (("sft", {"steps": "1,-2"}), {}, ["steps", "-2"]),
    "no number": (("sft", {"steps": "1,two"}), {}, ["two", "whole number"]),
    "an empty list": (("sft", {"steps": []}), {}, ["list of values"]),
    "a bare number": (("sft", {"steps": 3}), {}, ["list"]),
    "too many": (
        ("sft", {"steps": list(range(1, 200)), "seed": list(range(200))}),
        {},
        ["39,800 combinations"],
    ),
    "broken JSON": (("sft", {"adapter": '["lora'}), {}, ["JSON"]),
    "a range in a grid": (("sft", {"steps": "1..5"}), {}, ["range", "random"]),
    "a range upside down": (("sft", {"steps": "5..1"}), dict(search="random"), ["low end"]),
    "a range of words": (("sft", {"schedule": ("a", "b")}), dict(search="random"), ["schedule"]),
    "swept and fixed": (("sft", {"steps": "1,2"}, {"steps": 3}), {}, ["swept and fixed"]),
    "a wrong fixed value": (("sft", {"steps": "1,2"}, {"clip": "-1"}), {}, ["clip"]),
    "a search nobody has": (("sft", {"steps": "1,2"}), dict(search="bayes"), ["bayes", "tpe"]),
    "a place nobody has": (("sft", {"steps": "1,2"}), dict(on="slurm"), ["slurm", "ray"]),
    "no jobs": (("sft", {"steps": "1,2"}), dict(jobs=0), ["jobs"]),
    "trials of a grid": (("sft", {"steps": "1,2"}), dict(trials=7), ["combinations"]),
    "an unknown metric": (
        ("sft", {"steps": "1,2"}),
        dict(metric="acuracy"),
        ["accuracy", "better"],
    ),
    "a metric without a direction": (("sft", {"steps": "1,2"}), dict(metric="entropy"), ["better"]),
    "no direction": (("sft", {"steps": "1,2"}), dict(better="left"), ["up, down"]),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_wrong_plan_writes_nothing(case, runs):
    given, options, words = PLANS[case]
    with pytest.raises(WrongInput) as wrong:
        plan(*given, **options)
    assert all(word in str(wrong.value) for word in words), wrong.value
    assert "\n" not in str(wrong.value), wrong.value
    assert not runs.exists()


def test_what_is_not_installed_is_refused_in_one_line(monkeypatch, capsys):
    for module, words in (
        ("optuna", ["sweep", "sft", "-g", "steps", "1,2", "--search", "tpe"]),
        ("ray", ["sweep", "sft", "-g", "steps", "1,2", "--on", "ray"]),
        ("voila", ["app"]),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            real = __import__("importlib.util").util.find_spec
            patch.setattr(
                "importlib.util.find_spec",
                lambda name, *more: None if name == module else real(name, *more),
            )
            assert cli.main(args=words) == 2
            printed = capsys.readouterr().err.strip().split("\n")
            assert len(printed) == 1, printed
            assert "not installed" in printed[0], printed
            assert "pip install" in printed[0], printed


def test_an_app_gets_further_arguments_and_stays_on_this_machine(monkeypatch):
    import importlib.util

    asked = []
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: importlib.machinery.ModuleSpec(name, None)
    )
    monkeypatch.setattr("os.execv", lambda program, words: asked.append(words))
    cli.main(args=["app", "--port", "8877", "--no-browser"])
    cli.main(args=["lab", "--port=8877"])
    assert asked[0][1:3] == ["-m", "voila"]
    assert "--Voila.ip=127.0.0.1" in asked[0]
    assert asked[0][-3:] == ["--port", "8877", "--no-browser"]
    assert asked[1][1:3] == ["-m", "jupyterlab"]
    assert asked[1][-1] == "--port=8877"


def test_the_command_of_a_sweep_is_the_sweep(runs, capsys):
    grid = {
        "learning_rate": "1e-5..1e-3",
        "adapter": ["none", "lora:r=4,lora_alpha=8"],
        "eval_data": ["", "sums"],
    }
    options = dict(
        search="random",
        trials=3,
        jobs=2,
        metric="perplexity",
        retries=0,
        notebook=False,
        search_seed=5,
    )
    line = sweep_command("sft", grid, {"data": "it's $HOME"}, runs, **options)
    seen = {}

    def note(planned, out):
        seen.update(planned=planned, out=out)
        raise WrongInput("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polm_lab.cli.create_sweep", note)
        assert cli.main(args=shlex.split(line)[1:]) == 2
    assert seen["planned"] == plan("sft", grid, {"data": "it's $HOME"}, **options)
    assert seen["out"] == str(runs)


def test_the_form_starts_a_sweep_shows_it_and_survives_its_loss(runs, monkeypatch):
    view = Sweeps(runs)
    assert view.pick.options == (("none yet", ""),)
    assert view.start.disabled
    view.add.value = "learning_rate"
    assert view.varied.value == "learning_rate 0.001"
    assert view.add.value == ""
    assert "peak learning rate" in view.hints.value
    view.varied.value, view.fixed.value = "learning_rate 0.1, 0.2", "steps 2\ndata sums"
    view.how["jobs"].control.value = "none"
    assert "expected a whole number" in view.message.value
    assert view.start.disabled
    view.how["jobs"].control.value = "1"
    assert view.message.value == "2 trials, 1 at a time"
    assert "learning_rate 0.1,0.2" in view.command.text
    monkeypatch.setattr(
        "polm_lab.runner.launch.spawn", lambda made: work_sweep(made, start=Written(), pause=0.02)
    )
    view.start.click()
    found = open_sweep(view.chosen, runs)
    assert found.status == "finished"
    assert [row["status"] for row in view.table.rows] == ["finished"] * 2
    assert "0.2" in view.state.value
    view.table.selected = [1]
    assert view.selected_run == found.trials[1]["run"]
    view.dark = True
    assert (
        view.figure.layout.template.layout.paper_bgcolor
        == parallel(found, dark=True).layout.template.layout.paper_bgcolor
    )
    again = Sweeps(runs)
    assert again.chosen == found.id, "read from the record"
    assert again.table.rows == view.table.rows, "read from the record"
    (found.path / "run.json").write_text("{")
    again.refresh()
    assert "damaged" in again.state.value
    shutil.rmtree(found.path)
    again.refresh()
    assert "no run is there" in again.state.value
    assert again.resume.disabled


def test_only_what_is_new_is_drawn(runs, monkeypatch):
    made = planned(runs, [i / 200 for i in range(1, 201)])
    for trial in made.trials[:-1]:
        trial.update(
            status="finished", value=0.5, run=f"run-{trial['number']}", step=2, seconds=1.0
        )
    made.save()
    view, sent = Sweeps(runs), []
    view.table.observe(lambda change: sent.append("table"), "rows")
    monkeypatch.setattr(
        "polm_lab.workbench.trials.fill_figure",
        lambda *given: (sent.append("figure"), fill_figure(*given)),
    )
    view.refresh()
    assert sent == []
    made.trials[-1].update(status="finished", value=0.9)
    made.save()
    view.refresh()
    assert sent == ["table", "figure"]
    assert len(view.figure.data[0].line.color) == 200


# Copies, the queue, the commands


def test_clone(runs):
    run = launch.create("dpo", dict(beta=0.3, steps=7, adapter="lora:r=4"))
    run.update(settings={**run.settings, "a_knob_of_last_year": 1})
    assert lab.clone(run) == dict(beta=0.3, steps=7, adapter="lora:r=4")
    assert lab.clone(run.id, steps="9", beta=0.1) == dict(steps=9, adapter="lora:r=4")
    copy = launch.create(run.method, lab.clone(run, seed=5))
    assert copy.settings == {
        k: v for k, v in run.settings.items() if k != "a_knob_of_last_year"
    } | {"seed": 5}
    with pytest.raises(WrongInput, match="stepps"):
        lab.clone(run, stepps=3)
    with pytest.raises(WrongInput, match="beta"):
        lab.clone(run, beta=-1)


def test_the_queue_outlives_who_filled_it_and_its_own_process(runs, tree, polm):
    python("for seed in range(3): lab.enqueue('mini', notebook=False, seed=seed, pace=0.2)", tree)
    out = launch.waiting(runs)[-1]
    assert launch.stop(out).status == "stopped"
    assert out.read()["reason"] == "taken out of the queue"
    by_seed = {run.settings["seed"]: run for run in all_runs(runs)}
    first, second = by_seed[0], by_seed[1]
    until(lambda: first.status == "running")
    assert list(lab.runs()["status"]).count("queued") == 1
    for process in psutil.process_iter(["cmdline"]):
        if "work-queue" in (process.info["cmdline"] or []) and str(runs) in process.info["cmdline"]:
            process.kill()
    # the next run that is queued finds the queue as it was left
    python("lab.enqueue('mini', notebook=False, seed=3).request_stop()", tree)
    until(lambda: second.status == "finished")
    assert first.status == "finished"
    assert not out.lines()
    until(lambda: not launch.waiting(runs))
    assert (second.path / "lock").stat().st_mtime >= (
        first.path / "metrics.jsonl"
    ).stat().st_mtime, "the second began when the first was over"


def test_a_run_of_the_queue_that_is_killed_or_deleted_does_not_hold_up_the_next(
    runs, tree, monkeypatch, capsys
):
    killed, deleted, last = (
        launch.create("sft", SHORT | {"seed": seed}, runs, via="bare") for seed in range(3)
    )
    for number, run in enumerate((killed, deleted, last)):
        run.update(queued=float(number + 1))
    started = []

    def start(run, keep):
        started.append(run.id)
        if run.id == killed.id:
            shutil.rmtree(deleted.path)
            return subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
        return subprocess.Popen(["true"])

    monkeypatch.setattr(launch, "spawn", start)
    launch.work_queue(runs)
    assert started == [killed.id, last.id]
    assert not launch.waiting(runs)


def test_the_queue_waits_while_the_disk_is_full(runs, monkeypatch, capsys):
    run, tries, replace = launch.create("sft", SHORT, runs, via="bare"), [], launch.Run.update
    run.update(queued=1.0)

    def update(self, **facts):
        tries.append(facts)
        if len(tries) < 3:
            raise OSError(28, "No space left on device")
        replace(self, **facts)

    monkeypatch.setattr(launch.Run, "update", update)
    monkeypatch.setattr(launch, "spawn", lambda run, keep: subprocess.Popen(["true"]))
    monkeypatch.setattr(launch, "PATIENCE", 0.01)
    launch.work_queue(runs)
    printed = capsys.readouterr().out.strip().split("\n")
    assert len(tries) == 3
    assert len(printed) == 1
    assert run.id in printed[0]
    assert "No space left" in printed[0]
    assert not launch.waiting(runs)


def test_a_run_whose_process_dies_before_it_begins_has_failed(runs, monkeypatch):
    run = launch.create("sft", SHORT, via="bare")
    monkeypatch.setattr(launch, "POLM", ("false",))
    launch.spawn(run).wait()
    until(lambda: run.status == "failed")
    assert "before the run began (exit status 1)" in run.read()["reason"]


def test_each_command_does_what_the_button_does(runs, tree, tmp_path):
    data = tmp_path / "it's $HOME; \"sums\" & 'more'.txt"
    data.write_text("some")
    values = dict(rate=1e-05, steps=3, data=str(data), seed=0)
    shown = json.loads(
        python(
            f"lab.launch('mini', **{values!r}); print(json.dumps(lab.commands('mini', "
            f"{values!r})))",
            tree,
            cwd=tmp_path,
        )
    )
    (tmp_path / "script.py").write_text(shown["python"])
    for line in (
        shown["papermill"],
        shown["polm"],
        f"python {shlex.quote(str(tmp_path / 'script.py'))}",
    ):
        done = subprocess.run(
            line,
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, **tree},
        )
        assert done.returncode == 0, (line, done.stderr[-2000:])
    found = all_runs(runs)
    until(lambda: all(r.status == "finished" for r in found))
    assert len(found) == 4
    assert found[0].settings["rate"] == 1e-5
    assert found[0].settings["data"] == str(data)
    curve = [row["accuracy"] for row in found[0].lines()]
    for each in found:
        assert each.settings == found[0].settings
        assert [row["accuracy"] for row in each.lines()] == curve
    assert (runs / "mini.ipynb").exists()
    assert sum((r.path / "notebook.ipynb").exists() for r in found) == 3
    assert shown["polm"].startswith("polm run mini -p rate 1e-05"), (
        "what equals the default is not written"
    )
    assert "seed" not in shown["python"], "what equals the default is not written"


@pytest.mark.parametrize(
    "method, data, metric",
    [
        ("dpo", "sums", "pair_accuracy"),
        ("ppo", "chat#20", "gold_score"),
        ("sft", "stories", "gold_score"),
        ("grpo", "sums", "accuracy"),
        ("grpo", "facts", "accuracy"),
        ("sft", "code", "accuracy"),
    ],
)
def test_a_sweep_without_a_metric_compares_answers(method, data, metric):
    _, settings, _ = plan(method, {"learning_rate": [1e-4, 1e-3]}, dict(data=data))
    assert (settings["metric"], settings["better"]) == (metric, "up")
    named, _ = plan(method, {"learning_rate": [1e-4]}, dict(data=data), metric="kl", better="down")[
        1:
    ]
    assert named["metric"] == "kl"
