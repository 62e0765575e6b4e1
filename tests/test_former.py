"Former names: records with old names open, compare and resume; an old knob is refused with its new name."

import json
import random

import pytest

import polm_lab as lab
from polm_lab.core.former import FORMER_KNOBS, FORMER_METRICS, SPLIT_METRICS
from polm_lab.core.former import current_record, metrics_reader
from polm_lab.core.knobs import WrongInput
from polm_lab.core.method import find
from polm_lab.core.metrics import METRICS
from polm_lab.core.run import Run, open_run
from polm_lab.core.settings import knobs, make_settings
from polm_lab.runner import launch
from polm_lab.runner.sweep import open_sweep
from polm_lab.workbench.controls import presets
from polm_lab.workbench.record import Record

CASES = [(name, *pair) for name, names in FORMER_KNOBS.items() for pair in names.items()]


@pytest.mark.parametrize("method, old, new", CASES)
def test_an_old_knob_is_refused_with_its_new_name(method, old, new):
    settings = find(method).settings
    known = {k.name: k for k in knobs(settings)}
    assert new in known
    assert old not in known
    with pytest.raises(WrongInput) as wrong:
        make_settings(settings, {old: known[new].default})
    message = str(wrong.value)
    assert f"knob {old!r}" in message
    assert f"called {new!r} now" in message
    assert "\n" not in message


def test_an_unknown_knob_is_still_answered_with_the_nearest():
    with pytest.raises(WrongInput, match="did you mean 'num_generations'"):
        make_settings(find("grpo").settings, {"num_generation": 4})


def test_the_command_line_refuses_an_old_knob(polm, tmp_path):
    done = polm("run", "grpo", "-p", "samples", "4", "--out", str(tmp_path))
    assert done.returncode == 2
    assert not done.stdout
    assert "num_generations" in done.stderr
    assert done.stderr.count("\n") == 1


def as_of_old(run: Run, method: str) -> Run:
    "The run with its record under the old names."
    back = {new: old for old, new in FORMER_KNOBS[method].items()}
    record = json.loads((run.path / "run.json").read_text())
    record["settings"] = {back.get(k, k): v for k, v in record["settings"].items()}
    (run.path / "run.json").write_text(json.dumps(record))
    return Run(run.path)


SHORT = dict(data="sums", steps=4, batch_size=8, num_generations=4, max_new_tokens=6)


def test_a_run_of_old_is_shown_compared_and_cloned(tmp_path):
    whole = lab.run("grpo", out=tmp_path, **SHORT, loss="dapo", eval_rows=4, save_every=2)
    old = as_of_old(whole, "grpo")
    assert old.settings["num_generations"] == 4
    assert old.settings["loss"] == "dapo"
    assert "samples" not in old.settings
    assert "loss_type" not in old.settings
    new = lab.run("grpo", out=tmp_path, **SHORT, eval_rows=4)
    table = lab.compare(old, new)
    assert list(table.loc["loss"]) == ["dapo", "grpo"]
    assert "num_generations" not in table.index
    assert "samples" not in table.index
    assert launch.clone(old)["loss"] == "dapo"


def test_a_stopped_run_of_old_goes_on_to_the_same_weights(tmp_path):
    from polm_lab.core.run import Stopped
    from polm_lab.training import chain

    whole = lab.run("grpo", out=tmp_path, **SHORT, eval_rows=4, save_every=1)
    run = chain.create("grpo", dict(SHORT, eval_rows=4, save_every=1), out=tmp_path)
    log = run.log

    def stop_after_two(step, **metrics):
        log(step, **metrics)
        if step == 2:
            run.request_stop()

    run.log = stop_after_two
    with pytest.raises(Stopped):
        chain.execute(run)
    old = as_of_old(run, "grpo")
    old.clear_stop()
    done = chain.execute(old)
    assert done.status == "finished"
    for name in ("reward", "loss", "kl"):
        assert [line[name] for line in done.lines()] == [line[name] for line in whole.lines()]
    weights = [r.path / "model" / "model.safetensors" for r in (whole, done)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_metrics_of_old_are_read_everywhere(tmp_path):
    run = Run.create("selfrefine", dict(strategy="rci", samples=2), out=tmp_path)
    lines = [dict(step=n, accuracy=n / 4, broken=0.25, mended=0.5) for n in range(3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.path / "metrics.jsonl").write_text(text)
    run.update(summary=dict(after=dict(accuracy=0.5, broken=0.25)))
    opened = open_run(run.path)
    assert opened.settings == dict(algorithm="rci", num_generations=2)
    assert set(opened.lines()[0]) == {"step", "accuracy", *FORMER_METRICS.values()}
    assert opened.last_line()["incorrect_to_correct"] == 0.5
    assert opened.summary["after"]["correct_to_incorrect"] == 0.25
    columns = Record(opened).columns
    assert "incorrect_to_correct" in columns
    assert "mended" not in columns
    assert list(opened.metrics().incorrect_to_correct) == [0.5] * 3


def test_sweeps_and_presets_of_old_are_read(tmp_path):
    settings = dict(space={"loss_type": ["grpo", "dapo"]}, fixed={"samples": 4}, metric="reward")
    sweep = Run.create("grpo", settings, out=tmp_path / "sweeps")
    sweep.update(trials=[dict(number=0, values={"loss_type": "dapo"}, status="finished")])
    opened = open_sweep(sweep.path)
    assert opened.settings["space"] == {"loss": ["grpo", "dapo"]}
    assert opened.settings["fixed"] == {"num_generations": 4}
    assert opened.trials[0]["values"] == {"loss": "dapo"}
    place = tmp_path / "presets" / "grpo"
    place.mkdir(parents=True)
    (place / "mine.yaml").write_text("samples: 4\nloss_type: dapo\n")
    assert presets("grpo", tmp_path)["mine"] == dict(num_generations=4, loss="dapo")


def test_new_names_are_known_and_no_old_name_is_a_knob_again():
    for method, names in FORMER_KNOBS.items():
        fields = {k.name for k in knobs(find(method).settings)}
        assert fields.isdisjoint(names), method
    assert set(FORMER_METRICS.values()) | SPLIT_METRICS <= set(METRICS)
    assert set(METRICS).isdisjoint(FORMER_METRICS)


def test_any_record_is_translated_or_left_alone():
    rng = random.Random(0)
    odd = [None, 3, "x", [], {}, {"samples": 1}, [{"values": {"samples": 1}}], {"after": None}]
    for _ in range(300):
        record = dict(method=rng.choice(["grpo", "none", None, 3]), settings=rng.choice(odd))
        record |= {name: rng.choice(odd) for name in ("summary", "trials") if rng.random() < 0.7}
        found = current_record(record)
        assert set(found) == set(record)
    found = metrics_reader("rag", {})({"recall/5": 1, "eval/broken": 2})
    assert found == {"recall/5": 1, "eval/correct_to_incorrect": 2}
    for odd in (None, 3, "x", []):
        assert metrics_reader("dpo", odd)(odd) == odd


WHAT_ACCURACY_WAS = [  # method, settings, old name, name
    ("dpo", dict(data="chat"), "accuracy", "pair_accuracy"),
    ("dpo", dict(data="sums"), "accuracy", "pair_accuracy"),
    ("dpo", dict(data="chat#20"), "reward", "gold_score"),
    ("dpo", dict(data="sums", eval_data="chat"), "reward", "gold_score"),
    ("dpo", dict(data="sums"), "reward", "accuracy"),
    ("reward", dict(data="file.jsonl"), "accuracy", "pair_accuracy"),
    ("rlaif", dict(train="dpo", data="chat"), "accuracy", "pair_accuracy"),
    ("rlaif", dict(train="direct", data="chat"), "accuracy", "gold_score"),
    ("rlaif", dict(train="direct", data="chat"), "reward", "reward"),
    ("grpo", dict(data="chat"), "accuracy", "gold_score"),
    ("grpo", dict(data="sums"), "accuracy", "accuracy"),
    ("sft", dict(data="chatter.jsonl"), "accuracy", "accuracy"),
    ("selfrefine", dict(strategy="constitution", data=""), "accuracy/best", "gold_score/best"),
    ("selfrefine", dict(strategy="rci", data=""), "accuracy/best", "accuracy/best"),
    ("merge", dict(data=""), "accuracy/chat", "gold_score/chat"),
    ("merge", dict(data=""), "accuracy/sums", "accuracy/sums"),
    ("tour", {}, "reward", "gold_score"),
    ("tour", {}, "accuracy", "accuracy"),
    ("mine", dict(data="chat"), "accuracy", "accuracy"),
]


@pytest.mark.parametrize("method, settings, old, new", WHAT_ACCURACY_WAS)
def test_an_old_accuracy_is_what_it_was(method, settings, old, new, tmp_path):
    run = Run.create(method, settings, out=tmp_path)
    line = {"step": 1, old: 0.5, f"eval/{old}": 0.25}
    (run.path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    run.update(summary=dict(after={old: 0.75}))
    opened = open_run(run.path)
    current = {"step": 1, new: 0.5, f"eval/{new}": 0.25}
    assert opened.lines() == [current] == [opened.last_line()]
    assert opened.summary == dict(after={new: 0.75})
    assert set(Record(opened).columns) == set(current) - {"step"}
    opened.rewind(1)  # a resumed run writes on in the names of today
    assert json.loads((run.path / "metrics.jsonl").read_text()) == current


def test_a_metric_of_today_is_read_as_it_is(tmp_path):
    run = Run.create("dpo", dict(data="sums"), out=tmp_path)
    lines = [dict(step=1, loss=0.5, pair_accuracy=0.5, margin=0.1)]
    lines += [lines[0] | {"step": 2, "eval/pair_accuracy": 0.9, "eval/accuracy": 0.4}]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    after = dict(pair_accuracy=0.9, accuracy=0.4)
    run.update(summary=dict(after=after))
    opened = open_run(run.path)
    assert opened.lines() == lines
    assert opened.summary["after"] == after
    assert "eval/accuracy" in Record(opened).columns


@pytest.mark.parametrize(
    "method, fixed, name",
    [("dpo", {}, "pair_accuracy"), ("ppo", {}, "gold_score"), ("grpo", {}, "accuracy")],
)
def test_a_sweep_of_old_asks_for_the_metric_of_today(method, fixed, name, tmp_path):
    settings = dict(space={"learning_rate": [1e-4, 1e-3]}, fixed=fixed, metric="accuracy")
    sweep = Run.create(method, settings, out=tmp_path)
    assert open_sweep(sweep.path).settings["metric"] == name
    sweep.update(settings=settings | dict(metric="perplexity"))
    assert open_sweep(sweep.path).settings["metric"] == "perplexity"
