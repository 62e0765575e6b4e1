"""Data specs: how they are parsed, and which rows an evaluation sees.

Also the results of each method on a task, a part of it, and a file.
"""

import functools
import json
import math

import pytest

from polm_lab.training import chain
from polm_lab.training import conformance as check
from polm_lab.data import load as data_load
from polm_lab.data import rows as data_rows
from polm_lab.data.load import (
    DataSpec,
    held_out,
    load_data,
    load_held_out,
    natural_kind,
    parse_spec,
)
from polm_lab.training.evaluate import Evaluation, other_tasks, with_rows, task_names
from polm_lab.core.knobs import WrongInput
from polm_lab.core.settings import make_settings
from polm_lab.models.policy import Policy
from polm_lab.core.method import find, methods
from polm_lab.core.metrics import is_count, metric
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.core.run import Run
from polm_lab.data.tasks import TASKS
from polm_lab.integration.retrieval.library import open_library
from polm_lab.rewards.functions import make_rewards, on_held_out

TRAIN, SEEN, GIVEN = (
    48,
    8,
    5,
)  # rows of a task, rows of the evaluation at most, rows of a file to evaluate on


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def facts(rows):
    "A found evaluation without its counts of rows."
    return {name: value for name, value in rows.items() if not is_count(name)}


def made(name, **settings):
    "A run of a method, from here."
    return chain.execute(chain.create(name, settings | dict(device="cpu", dtype="float32")))


# specs


def test_each_kind_of_spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, odd = (
        written(tmp_path / "rows.jsonl", [{"text": "a"}]),
        written(tmp_path / "odd#3.jsonl", [{"text": "a"}]),
    )
    (tmp_path / "sums").mkdir()
    entry = next(name for name, one in data_load.CATALOG.items() if one.hub)
    expected = {
        "sums": DataSpec("sums", "task", "sums"),  # a folder of that name does not hide the task
        "./sums": DataSpec("./sums", "folder", "./sums"),
        "chat#200": DataSpec("chat", "task", "chat", limit=200),
        "chat# 200 , skip": DataSpec("chat", "task", "chat", limit=200, skip=True),
        file: DataSpec(file, "file", file),
        f"{file}#5,skip": DataSpec(file, "file", file, limit=5, skip=True),
        odd: DataSpec(odd, "file", odd),
        "rows.jsonl#5": DataSpec("rows.jsonl", "file", "rows.jsonl", limit=5),
        entry: DataSpec(entry, "catalogue", entry),
        f"{entry}@rows.jsonl#7": DataSpec(
            f"{entry}@rows.jsonl", "catalogue", entry, "rows.jsonl", limit=7
        ),
        "org/name": DataSpec("org/name", "hub", "org/name"),
        "org/name:main#train_sft,9": DataSpec(
            "org/name:main", "hub", "org/name", "main", "train_sft", 9
        ),
        "org/name:some/rows.jsonl": DataSpec(
            "org/name:some/rows.jsonl", "hub file", "org/name", "some/rows.jsonl"
        ),
        "gone.jsonl": DataSpec("gone.jsonl", "missing", "gone.jsonl"),
        "x" * 5000 + "/": DataSpec("x" * 5000 + "/", "missing", "x" * 5000 + "/"),
        "": DataSpec("", "missing", ""),
    }
    assert {spec: parse_spec(spec) for spec in expected} == expected
    assert [name for name in expected if parse_spec(name).task] == [
        "sums",
        "chat#200",
        "chat# 200 , skip",
    ]


@pytest.mark.parametrize("spec", ["sums#0", "sums#some", "sums#5,5x!", "sums#-3", "org/name#a,b"])
def test_what_is_wrong_behind_the_sign_is_refused(spec):
    with pytest.raises(WrongInput, match="after #"):
        parse_spec(spec)


def test_a_file_has_no_splits(tmp_path):
    with pytest.raises(WrongInput, match="'train' after #, and a file has no splits"):
        load_data(written(tmp_path / "rows.jsonl", [{"text": "a"}]) + "#train", "text")


def test_a_run_keeps_the_full_path_of_a_part_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path / "rows.jsonl", TASKS["sums"].rows("completion", 4))
    (tmp_path / "chat").mkdir()
    entry = next(iter(data_load.CATALOG))
    kept = {
        "rows.jsonl": file,
        "rows.jsonl#3,skip": f"{file}#3,skip",
        f"{entry}@rows.jsonl#2": f"{entry}@{file}#2",
        "chat": "chat",
        "./chat": str(tmp_path / "chat"),
        "chat#5": "chat#5",
        "org/name#part": "org/name#part",
        "": "",
    }
    for spec, full in kept.items():
        assert chain.check_settings("sft", dict(data="sums", eval_data=spec))[1].eval_data == full
    assert chain.check_settings("sft", dict(data="rows.jsonl#3"))[1].data == f"{file}#3"


# rows to evaluate on


def test_rows_to_evaluate_on(tmp_path):
    rows = TASKS["sums"].rows("prompt", 40)
    file, other = written(tmp_path / "a.jsonl", rows), written(tmp_path / "b.jsonl", rows[:7])
    folder = tmp_path / "folder"
    folder.mkdir()
    written(folder / "train.jsonl", rows)
    split = tmp_path / "split"
    split.mkdir()
    written(split / "train.jsonl", rows[:30]), written(split / "test.jsonl", rows[30:])
    entry = next(
        name
        for name, one in data_load.CATALOG.items()
        if "completion" in one.kinds
        and not one.whole
        and one.rows is data_load.CATALOG["dolly-15k"].rows
    )
    copy = written(
        tmp_path / "dolly.jsonl",
        [
            dict(instruction=f"Say {i}.", context="", response=f"{i}", category="x")
            for i in range(40)
        ],
    )
    found = {
        "a file whole": len(load_held_out("sums", file, "prompt", 99)),
        "a file that is learned from too": len(load_held_out(file, file, "prompt", 99)),
        "at most": len(load_held_out("sums", file, "prompt", 3)),
        "its first rows": len(load_held_out("sums", file + "#9", "prompt", 99)),
        "of the data": len(load_held_out(file, "", "prompt", 99)),
        "a folder without a test split": len(load_held_out("sums", str(folder), "prompt", 99)),
        "the same folder": len(load_held_out(str(folder), str(folder), "prompt", 99)),
        "a test split": len(load_held_out("sums", str(split), "prompt", 99)),
        "a file of the catalogue": len(load_held_out("sums", f"{entry}@{copy}", "completion", 99)),
        "a task": len(load_held_out(other, "sums", "prompt", 999)),
        "a part of a task": len(load_held_out(other, "sums#6", "prompt", 99)),
        "a number of rows to learn from": len(load_held_out("sums#6", "", "prompt", 99)),
    }
    assert found == {
        "a file whole": 40,
        "a file that is learned from too": 40,
        "at most": 3,
        "its first rows": 9,
        "of the data": 2,
        "a folder without a test split": 40,
        "the same folder": 2,
        "a test split": 10,
        "a file of the catalogue": 40,
        "a task": data_rows.TEST_ROWS,
        "a part of a task": 6,
        "a number of rows to learn from": 99,
    }


def test_counts_of_rows():
    found = with_rows({"accuracy": 0.5, "kl": 0.1}, 8, {"kl": 16, "accuracy": 8, "margin": 4})
    assert found == {"accuracy": 0.5, "kl": 0.1, "rows": 8, "rows/kl": 16}
    assert not metric("rows").better
    assert metric("rows/perplexity/sums").meaning.endswith("perplexity/sums")
    assert [
        is_count(name) for name in ("rows", "rows/kl", "eval/rows", "eval/rows/kl", "rowsum", "kl")
    ] == [True] * 4 + [False] * 2


# where rows are from


def test_rows_that_a_run_wrote_are_from_its_data(tmp_path):
    run = Run.create("rlaif", dict(data="chat#20", model="tiny"))
    made = written(run.path / "preferences.jsonl", [{"a": 1}])
    later = Run.create("sft", dict(data=made, model="tiny"))
    again = written(later.path / "rows.jsonl", [{"a": 1}])
    itself = Run.create("sft", dict(data="", model="tiny"))
    itself.update(settings=dict(data=str(itself.path / "x.jsonl")))
    written(itself.path / "x.jsonl", [{"a": 1}])
    plain = written(tmp_path / "plain.jsonl", [{"a": 1}])
    (tmp_path / "run.json").write_text("[]")
    specs = {
        "chat#3": {"chat"},
        made: {"chat"},
        made + "#2": {"chat"},
        again: {"chat"},
        str(itself.path / "x.jsonl"): set(),
        plain: set(),
        "": set(),
        "org/name": set(),
    }
    assert {spec: task_names(spec) for spec in specs} == specs
    settings = make_settings(find("sft").settings, dict(data="chat#200", eval_data="sums#9"))
    assert other_tasks(settings, load_tokenizer("tiny")) == ("facts", "stories", "code")


# every method that trains

TRAINED = [name for name, found in methods().items() if found.trains]
SOURCES, GIVENS = ("task", "part", "file"), ("none", "file")
ON_POLICY = ("ppo", "rloo", "grpo")  # the reward is `correct`, so it is the accuracy
SAMPLES = {
    "rlaif": dict(prompts=16),
    "critic": dict(prompt_style="sums", questions=8),
    "reader": dict(steps=1),
    "retriever": dict(steps=1),
}


def of_answers(found):
    "What the gold rule says of answers: the share of right ones, or the mean of their grades."
    return found["gold_score"] if "gold_score" in found else found["accuracy"]


def task_of(method):
    return method.small.get("data") or method.settings.__dataclass_fields__["data"].default


def rows_for(method, n, split):
    "Rows of the method's task as a person would have them in a file."
    task = task_of(method)
    if task == "facts":
        places = ["Alba", "Bern", "Cork", "Dijon", "Essen", "Faro", "Ghent", "Hull"]
        return [
            dict(
                question=f"Where is house {i}?",
                answer=places[i % 8],
                context=f"House {i} is in {places[i % 8]}.",
            )
            for i in range(n)
        ]
    kind = (
        "preference" if method.name == "rlaif" and split == "test" else method.data
    )  # it learns from the pairs that it makes
    return TASKS[task].rows(kind, n, 3, split)


def all_rows(task):
    "How many rows of a task there are to learn from."
    return len(open_library("facts")[1]) if task == "facts" else TRAIN


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Runs of methods on data and evaluation data of some kind, each made once.

    The tasks have few rows.
    """
    folder = tmp_path_factory.mktemp("specs")

    @functools.cache
    def run(name, source, given):
        method = find(name)
        task, place = task_of(method), folder / f"{name}-{source}-{given}"
        place.mkdir()
        specs = {
            "task": task,
            "part": f"{task}#{all_rows(task)}",
            "file": written(place / "train.jsonl", rows_for(method, TRAIN, "train")),
            "none": "",
            "given": written(place / "given.jsonl", rows_for(method, GIVEN, "test")),
        }
        small = dict(steps=2, eval_rows=SEEN, save_every=0) | SAMPLES.get(name, {})
        return check.short_run(
            method,
            place,
            data=specs[source],
            eval_data=specs["given" if given == "file" else "none"],
            **small,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_load, "TRAIN_ROWS", TRAIN)
        yield run


@pytest.mark.parametrize("given", GIVENS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", TRAINED)
def test_every_method_on_every_kind_of_data(ended, name, source, given):
    method = find(name)
    task = task_of(method)
    if (
        task == "facts" and source != "file" and given == "file"
    ):  # the invented library has its own questions
        with pytest.raises(
            WrongInput, match="the invented library has held-out questions of its own"
        ):
            ended(name, source, given)
        return
    run = ended(name, source, given)
    before, after = run.summary["before"], run.summary["after"]

    rows = GIVEN if given == "file" else SEEN
    if source == "file" and given == "none":
        learned = run.path / "preferences.jsonl"  # of rlaif, whose pairs are what is learned from
        rows = min(
            SEEN,
            len(held_out(len(learned.read_text().splitlines()) if learned.exists() else TRAIN)),
        )
    assert before["rows"] == after["rows"] == rows

    others = {key.partition("/")[2] for key in after if key.startswith("perplexity/")}
    if name not in ("reward", "critic", "retriever"):  # they measure no other text
        assert others == set(TASKS) - ({task} if source != "file" else set())
        assert all(after[f"rows/perplexity/{other}"] == 16 for other in others)
    if "forgetting" in after:
        rises = [
            math.log(after[f"perplexity/{other}"] / before[f"perplexity/{other}"])
            for other in others
        ]
        assert after["forgetting"] == pytest.approx(sum(rises) / len(rises), abs=1e-9)
        assert after["rows/forgetting"] == 16 * len(others)
    if name in ON_POLICY:
        assert after["reward"] == pytest.approx(of_answers(after), abs=1e-6)
        assert before["reward"] == pytest.approx(of_answers(before), abs=1e-6)
        assert {key for key in after if is_count(key)} == {
            "rows",
            "rows/forgetting",
            *(f"rows/perplexity/{other}" for other in others),
        }
    if name == "dpo":  # pairs in a file have no answer that a rule could look at
        assert ("gold_score" in after) == (source != "file" and given == "none")
    if name == "critic":
        assert 0 <= after["accuracy"] <= 1
    assert not [key for row in run.lines() for key in row if is_count(key)]


@pytest.mark.parametrize("given", GIVENS)
@pytest.mark.parametrize("name", TRAINED)
def test_a_task_is_the_same_with_all_its_rows_named(ended, name, given):
    if task_of(find(name)) == "facts" and given == "file":  # refused for both, as above
        return
    whole, part = ended(name, "task", given), ended(name, "part", given)
    assert part.settings["data"] == f"{whole.settings['data']}#{all_rows(whole.settings['data'])}"
    assert part.summary == whole.summary
    assert [row["loss"] for row in part.lines()] == [row["loss"] for row in whole.lines()]


# held-out rows are scored by their own rule


@pytest.mark.parametrize("name", ON_POLICY)
def test_held_out_rows_are_rewarded_by_their_own_rule(name, tmp_path, monkeypatch):
    monkeypatch.setattr(data_load, "TRAIN_ROWS", TRAIN)
    for source, given in (("sums", "chat"), ("chat", "sums#6")):
        after = check.short_run(
            find(name),
            tmp_path,
            data=source,
            eval_data=given,
            steps=0,
            eval_rows=SEEN,
            max_new_tokens=24,
        ).summary["after"]
        assert after["reward"] == pytest.approx(of_answers(after), abs=1e-6)
        assert of_answers(after) > 0
        assert after["rows"] == (6 if given == "sums#6" else SEEN)
        assert not {"perplexity/sums", "perplexity/chat"} & set(after)


def test_a_reward_that_applies_to_some_rows_says_to_how_many(tmp_path, monkeypatch):
    monkeypatch.setattr(data_load, "TRAIN_ROWS", TRAIN)
    rows = TASKS["sums"].rows("prompt", GIVEN, 3, "test")
    given, code = written(tmp_path / "given.jsonl", rows), tmp_path / "some.py"
    code.write_text(
        "def some(prompts, completions, **columns):\n    return [None if p == "
        f"{rows[0]['prompt']!r} else 0.25 for p in prompts]\n"
    )
    after = check.short_run(
        find("grpo"), tmp_path, data="sums", eval_data=given, steps=0, rewards=f"{code}:some"
    ).summary["after"]
    assert (after["rows"], after["rows/reward"], after["reward"]) == (4, 3, 0.25)
    assert "rows/accuracy" not in after


def test_a_reward_that_nothing_can_give_on_held_out_rows():
    rewards = make_rewards("correct:1,format:0.5", TASKS["sums"].score)
    assert on_held_out(rewards, "", []) == rewards
    with pytest.raises(
        WrongInput, match="eval_data 'x.jsonl', reward correct: nothing tells what is correct"
    ):
        on_held_out(rewards, "x.jsonl", [dict(prompt="1+1=")])
    unweighted = make_rewards("format:0.5,gold:0", TASKS["sums"].score)
    assert [r.name for r in on_held_out(unweighted, "x.jsonl", [dict(prompt="1+1=")])] == ["format"]
    own = on_held_out(rewards, "x.jsonl", [dict(prompt="Capital?", answer="Paris")])
    assert own[0].function(["Capital?"] * 2, ["Paris.", "42"], answer=["Paris"] * 2) == [1.0, 0.0]
    assert own[1] is rewards[1]


def test_labels_of_held_out_answers_follow_their_own_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(data_load, "TRAIN_ROWS", TRAIN)
    shared = dict(
        algorithm="direct",
        judge="rule:correct",
        steps=0,
        eval_rows=4,
        num_generations=4,
        batch_size=8,
        max_new_tokens=24,
    )
    alone = check.short_run(
        find("rlaif"), tmp_path / "a", data="sums", eval_data="chat", **shared
    ).summary["after"]
    both = check.short_run(
        find("rlaif"), tmp_path / "b", data="chat", eval_data="chat", **shared
    ).summary["after"]
    assert alone["reward"] == both["reward"]
    assert alone["rows"] == 4


def test_held_out_rows_of_the_wrong_kind_are_refused_before_the_judge_is_asked(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(data_load, "TRAIN_ROWS", TRAIN)
    prompts = written(tmp_path / "prompts.jsonl", TASKS["sums"].rows("prompt", GIVEN))
    with pytest.raises(WrongInput, match="expected prompt . chosen . rejected"):
        check.short_run(find("rlaif"), tmp_path / "runs", eval_data=prompts, prompts=8)
    assert not [
        *(tmp_path / "runs").rglob("labels.jsonl"),
        *(tmp_path / "runs").rglob("preferences.jsonl"),
    ]


@pytest.mark.parametrize("given, kind", [("sums#6", "completion"), ("text", "text")])
def test_a_compressed_model_is_measured_by_the_rule_of_what_it_is_measured_on(
    given, kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(data_load, "TRAIN_ROWS", TRAIN)
    spec = (
        written(
            tmp_path / "text.jsonl",
            [dict(text=f"The sum of {i} and {i} is {2 * i}.") for i in range(6)],
        )
        if given == "text"
        else given
    )
    run = made("prune", data="chat", eval_data=spec, **OTHERS["prune"][0])
    rows = load_held_out("", spec, kind, 99)
    assert natural_kind(spec) == kind
    assert len(rows) == 6
    again = Evaluation(
        Policy(load_model("tiny", "float32", "cpu")),
        load_tokenizer("tiny"),
        rows,
        kind,
        max_length=256,
        data=spec,
        seed=0,
    )()
    before = run.summary["before"]
    assert before["rows"] == 6
    assert ("accuracy" in before) == (kind == "completion")
    assert {name: before[name] for name in again} == pytest.approx(again)


# methods that do not train: how many rows they saw

OTHERS = {  # settings that make a run short, and what its counts are
    "prune": (
        dict(calibration_samples=4, max_length=32, eval_rows=SEEN, algorithm="magnitude"),
        dict(rows=SEEN),
    ),
    "quantize": (
        dict(calibration_samples=4, max_length=32, eval_rows=SEEN, algorithm="rtn"),
        dict(rows=SEEN),
    ),
    "activations": (
        dict(calibration_samples=4, max_length=32, eval_rows=SEEN, algorithm="plain"),
        dict(rows=SEEN),
    ),
    "kvcache": (dict(max_length=48, eval_rows=SEEN, algorithm="streaming"), dict(rows=SEEN)),
    "lowrank": (
        dict(calibration_samples=4, max_length=32, eval_rows=SEEN, algorithm="svd"),
        dict(rows=SEEN),
    ),
    "slim": (
        dict(calibration_samples=4, max_length=32, eval_rows=3, algorithm="depth", data="sums#40"),
        dict(rows=3),
    ),
    "fuse": (
        dict(
            models="sums#16,chat",
            tasks="sums,chat",
            eval_rows=3,
            expert_steps=1,
            calibration_samples=2,
        ),
        {"rows": 6, "rows/perplexity/sums": 3, "rows/gold_score/chat": 3},
    ),
    "merge": (
        dict(models="sums#16,chat", tasks="sums#7,FILE", eval_rows=9, expert_steps=1),
        {"rows": 7 + GIVEN, "rows/perplexity/sums#7": 7, "rows/accuracy/FILE": GIVEN},
    ),
    "peft": (
        dict(adapters="ia3", data="sums#16", steps=1, batch_size=4, eval_rows=3),
        {"rows": 3, "rows/forgetting": 64},
    ),
    "rag": (
        dict(search="bm25", data="facts#4", eval_rows=13, max_new_tokens=4),
        {"rows": 13, "rows/stage_ms/read": 12},
    ),
    "reft": (
        dict(
            data="sums#8",
            questions=9,
            warmup_steps=1,
            steps=1,
            judge_steps=0,
            votes=2,
            num_generations=2,
            prompts=3,
            batch_size=4,
            max_new_tokens=8,
        ),
        dict(rows=3),
    ),
    "select": (dict(algorithm="random", data="sums#9", eval_rows=3), dict(rows=9)),
    "selfrefine": (
        dict(
            algorithm="rci",
            data="sums#99",
            questions=3,
            rounds=1,
            num_generations=1,
            max_new_tokens=8,
        ),
        dict(rows=3),
    ),
    "tour": (dict(sft_steps=1, dpo_steps=1, grpo_steps=1, prompts=4), {"rows": 4, "rows/kl": 8}),
    "overoptimization": (
        dict(sizes="16", proxy_steps=1, rl_steps=5, rl_every=5, prompts=4, num_generations=2),
        dict(rows=4),
    ),
}


def test_no_method_is_left_out():
    assert sorted([*TRAINED, *OTHERS]) == sorted(methods())


def on_few_rows(whole, label, name, **values):
    "A part of a recipe, which learns from and is evaluated on few rows."
    rows = min(4, values.get("eval_rows", 4))
    return chain.subrun(whole, label, name, **values | dict(eval_rows=rows, batch_size=8))


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_method_says_how_many_rows_it_saw(name, tmp_path, monkeypatch):
    monkeypatch.setattr(data_load, "TRAIN_ROWS", TRAIN)
    file = written(tmp_path / "given.jsonl", TASKS["sums"].rows("completion", GIVEN, 3, "test"))
    settings, counts = OTHERS[name]
    if name in ("tour", "overoptimization"):  # their parts have the defaults of their methods
        monkeypatch.setattr(f"polm_lab.recipes.{name}.subrun", on_few_rows)
    settings = {
        key: value.replace("FILE", file) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    run = made(name, **settings)
    after = run.summary["after"]
    assert {key: after.get(key.replace("FILE", file)) for key in counts} == counts
    assert run.summary["before"]["rows"] == after["rows"]
    assert not [key for row in run.lines() for key in row if is_count(key)]


def test_a_part_of_the_sums_is_what_reft_learns_from(tmp_path):
    reft = find("reft")
    load = __import__(reft.function.__module__, fromlist=["x"]).load_questions
    whole, part = (
        load(make_settings(reft.settings, dict(data=spec, questions=9, prompts=3)), "train")
        for spec in ("sums", "sums#8")
    )
    assert len(whole) == 9
    assert part == whole[:8]


# what is shown of a run


def test_counts_are_no_results_where_runs_are_shown(tmp_path):
    from polm_lab.workbench.app import summary_html
    from polm_lab.workbench.compare import leaderboard
    from polm_lab.runner.launch import compare
    from polm_lab.workbench.panels import shown_metrics, summary_table

    runs = []
    for rows in (64, 64, 32):
        run = Run.create("sft", dict(model="tiny", data="sums"))
        with run.active():
            for when in ("before", "after"):
                run.frame(when, {"accuracy": 0.5, "rows": rows, "rows/kl": 16})
        runs.append(run)
    table = summary_table(runs[0])
    assert "metric on 64 rows" in table
    assert table.count("<tr>") == 2
    assert "rows/kl" not in table
    assert "rows" not in summary_html(runs[0].summary)
    assert shown_metrics(["loss", "eval/rows", "rows/kl", "rows"]) == ["loss"]
    assert list(compare(runs[0].id, runs[1].id).index) == ["accuracy"]
    assert list(compare(runs[0].id, runs[2].id).index) == ["accuracy", "rows"]
    with pytest.raises(WrongInput, match="known: accuracy$"):
        leaderboard(metric_name="accuracyy")


def test_the_command_line_says_how_many_rows(tmp_path, capsys):
    from polm_lab.cli import _report

    run = Run.create("sft", dict(model="tiny", data="sums"))
    run.frame("after", {"accuracy": 0.5, "rows": 64})
    _report(run, False)
    said = capsys.readouterr().out
    assert "rows:      64 seen by the evaluation" in said
    assert said.count("rows") == 1
