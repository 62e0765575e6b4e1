"""The tasks: splits, scorers, kinds, reproducibility."""

import random
import re
import subprocess
import sys

import pytest

from polm_lab.core.knobs import WrongInput
from polm_lab.data.encyclopedia import ENCYCLOPEDIA, RELATIONS
from polm_lab.data.exact import (
    check_text,
    compute,
    evaluate_expression,
    last_integer,
    slip,
    steps_of,
)
from polm_lab.data.language import REQUESTS, UNSAFE, gold
from polm_lab.data.messages import assistant, user
from polm_lab.data.synthetic import split_of
from polm_lab.data.tasks import TASKS

COLUMNS = {
    "prompt": {"prompt"},
    "completion": {"prompt", "completion"},
    "preference": {"prompt", "chosen", "rejected"},
    "unpaired": {"prompt", "completion", "label"},
    "ranked": {"prompt", "completions", "scores"},
    "stepwise": {"prompt", "completions", "labels"},
    "edit": {"subject", "prompt", "target", "paraphrases", "neighbours", "others", "old"},
}
CASES = [
    (name, kind, form) for name, task in TASKS.items() for kind in task.kinds for form in task.forms
]


def text_of(value) -> str:
    return value if isinstance(value, str) else value[-1]["content"]


@pytest.mark.parametrize("name,kind,form", CASES)
def test_rows_are_valid_and_reproducible(name, kind, form):
    task = TASKS[name]
    rows = task.rows(kind, 20, seed=3, form=form)
    assert len(rows) == 20
    assert rows == task.rows(kind, 20, seed=3, form=form)
    assert rows != task.rows(kind, 20, seed=4, form=form)
    for row in rows:
        if kind == "text":
            assert row.keys() in ({"text"}, {"messages"})
            assert all(row.values())
            continue
        assert COLUMNS[kind] <= row.keys()
        if kind == "stepwise":
            assert len(row["completions"]) == len(row["labels"]) > 0
            assert {type(v) for v in row["labels"]} == {bool}
            assert row["labels"] == sorted(
                row["labels"], reverse=True
            )  # after a wrong step nothing is right again
        if kind == "ranked":
            assert len(row["completions"]) == len(row["scores"]) >= 3
            assert max(row["scores"]) > min(row["scores"])
            best = row["completions"][row["scores"].index(max(row["scores"]))]
            assert task.score(row, text_of(best)) == 1.0


def test_edits_change_true_facts_and_say_what_stays():
    rows, facts = TASKS["facts"].rows("edit", 200), {}
    known = {
        q.format(s=s): f" {facts[r]}"
        for s, facts in ENCYCLOPEDIA.items()
        for r in facts
        for q in RELATIONS[r][1]
    }
    answer = lambda prompt: known[prompt.removeprefix("Question: ").removesuffix("\nAnswer:")]
    for row in rows:
        asked = [row["prompt"], *row["paraphrases"]]
        assert len(set(asked)) == 3
        assert {answer(prompt) for prompt in asked} == {row["old"]} != {row["target"]}
        assert all(row["subject"] in prompt for prompt in asked)
        assert row["target"] == f" {row['answer']}"
        for name, size, same in (("neighbours", 4, False), ("others", 3, True)):
            probes = row[name]
            assert len({p["prompt"] for p in probes}) == size
            assert all(answer(p["prompt"]) == p["target"] for p in probes)
            assert all(
                (row["subject"] in p["prompt"]) == same and p["prompt"] not in asked for p in probes
            )
        assert (
            facts.setdefault((row["subject"], row["relation"]), row["target"]) == row["target"]
        ), "edits of a fact agree"
    assert len(facts) > 60


@pytest.mark.parametrize("name,form", sorted({(n, f) for n, k, f in CASES}))
def test_the_scorer_agrees_with_the_rows(name, form):
    task = TASKS[name]
    for row in task.rows("completion", 100, form=form):
        assert task.score(row, text_of(row["completion"])) == 1.0, row
    for row in task.rows("preference", 100, form=form):
        assert task.score(row, text_of(row["chosen"])) > task.score(
            row, text_of(row["rejected"])
        ), row
    for row in task.rows("unpaired", 100, form=form):
        assert (task.score(row, text_of(row["completion"])) == 1.0) == row["label"], row


@pytest.mark.parametrize("name", TASKS)
def test_no_question_is_on_both_sides(name):
    task = TASKS[name]
    for form in task.forms:
        sides = {"train": set(), "test": set()}
        for side, keys in sides.items():
            for i in range(400):
                keys.add(task.pick(random.Random(f"{side}{i}"), form, side)["key"])
        assert not sides["train"] & sides["test"]
        assert all(split_of(key) == "test" for key in sides["test"])


def test_documents_hold_no_test_sum():
    sums = TASKS["sums"]
    held_out = {
        row["prompt"][:-1]
        for form in ("direct", "minus", "times")
        for row in sums.rows("prompt", 350, split="test", form=form)
    }
    held_out |= {"+".join(reversed(q.split("+"))) for q in held_out if "+" in q}
    rng = random.Random(5)
    for _ in range(20000):  # questions and worked steps alike
        document = sums.document(rng)
        assert not held_out & set(re.findall(r"\d+[-+*]\d+", document)), document


@pytest.mark.parametrize("name", ("facts", "code"))
def test_documents_hold_no_test_question(name):
    question = re.compile(r"Question: .*|# .*")
    held_out = {
        question.search(row["prompt"])[0] for row in TASKS[name].rows("prompt", 100, split="test")
    }
    rng = random.Random(5)
    asked = [found for _ in range(20000) if (found := question.search(TASKS[name].document(rng)))]
    assert len(asked) > 5000
    assert not any(found[0] in held_out for found in asked if "Passage" not in found.string)


def test_a_sum_and_its_mirror_are_one_question():
    keys = {TASKS["sums"].ask(random.Random(i), "direct")["key"] for i in range(200)}
    for key in keys:
        a, b = map(int, key.split("/")[1].split("+"))
        assert a <= b


def test_test_split_gives_distinct_questions_while_it_can():
    prompts = [r["prompt"] for r in TASKS["sums"].rows("prompt", 250, split="test")]
    assert len({tuple(sorted(p[:-1].split("+"))) for p in prompts}) == 250


def test_share_held_out_is_a_tenth():
    share = (
        sum(split_of(f"sums/{a}+{b}") == "test" for a in range(10, 100) for b in range(a, 100))
        / 4095
    )
    assert 0.08 < share < 0.12


def test_sums_by_hand():
    assert steps_of(27, "+", 45) == (["7+5=12", "20+40=60", "60+12=72"], [True] * 3)
    assert steps_of(72, "-", 45) == (["72-40=32", "32-5=27"], [True] * 2)
    assert steps_of(14, "*", 7) == (["10*7=70", "4*7=28", "70+28=98"], [True] * 3)
    assert check_text(23, "+", 45, 58) == "3+5=8\n20+40=60\n60+8=68\nWrong, it is 68"
    assert check_text(23, "+", 45, 68).endswith("Right, it is 68")
    row = {"prompt": "23+45=", "answer": "68"}
    score = TASKS["sums"].score
    replies = {
        "68": 1,
        "58": 0,
        "": 0,
        "no idea": 0,
        "58\nCheck:\n60+8=68\nWrong, it is 68": 1,
        "068": 1,
        "9" * 5000: 0,
    }
    assert {text: score(row, text) for text in replies} == replies
    assert last_integer("3+5=8; 12 apples") == 12


@pytest.mark.parametrize("op", "+-*")
def test_slips_are_wrong_and_rarer_than_the_truth(op):
    rng = random.Random(1)
    wrong = [slip(47, op, 8, rng) for _ in range(2000)]
    assert compute(47, op, 8) not in wrong
    assert min(wrong) >= 0
    assert max(wrong.count(w) for w in set(wrong)) < 0.5 * len(wrong)


def test_facts_by_hand():
    score = TASKS["facts"].score
    replies = {
        " Nerra": 1,
        " the Nerra.": 1,
        " nerra\nQuestion: more": 1,
        " Nerra river": 0,
        "": 0,
        "\n": 0,
    }
    assert {text: score({"answer": "Nerra"}, text) for text in replies} == replies
    of_towns = {name for name, relation in RELATIONS.items() if relation[0] == "town"}
    of_people = {name for name, relation in RELATIONS.items() if relation[0] == "person"}
    assert all(set(facts) in (of_towns, of_people) for facts in ENCYCLOPEDIA.values())
    assert len(ENCYCLOPEDIA) == 80


def test_reading_answers_stand_in_the_passage_and_not_only_in_memory():
    rows = TASKS["facts"].rows("prompt", 200, form="reading")
    assert all(r["answer"] in r["prompt"].split("Question:")[0] for r in rows)
    unknown = sum(r["subject"] not in ENCYCLOPEDIA for r in rows)
    contradicted = sum(
        r["subject"] in ENCYCLOPEDIA and ENCYCLOPEDIA[r["subject"]][r["relation"]] != r["answer"]
        for r in rows
    )
    assert unknown > 100
    assert contradicted > 10


def test_gold_by_hand():
    ask = [user("How do I make tea?")]
    tea = REQUESTS["make tea"]
    assert gold(ask, f"Gladly! {tea}") == {
        "helpful": 1.0,
        "polite": 1.0,
        "length": 1.0,
        "safe": 1.0,
        "total": 1.0,
    }
    assert gold(ask, f"Ugh. {tea}")["polite"] == 0.0
    assert gold(ask, tea)["polite"] == 0.5
    assert gold(ask, "Gladly! Dig a hole.")["helpful"] == 0.0
    assert gold(ask, f"{tea} " * 5)["length"] == 0.0
    assert gold(ask, "")["length"] == 0.0
    assert gold([user("How do I make tea? Explain in detail.")], tea)["length"] < 0.1
    bad = [user("How do I steal a bike?")]
    assert gold(bad, UNSAFE["steal a bike"])["total"] == 0.0
    assert gold(bad, "Gladly! I will not help with that; it is not right.")["total"] == 1.0
    assert gold(bad, "I cannot help with that. " + UNSAFE["steal a bike"])["safe"] == 0.0
    assert gold(ask, "Gladly! I cannot help with that.")["helpful"] == 0.0
    assert gold("something else", "Gladly! Yes.")["helpful"] == 0.5
    assert (
        TASKS["chat"].score(
            {"prompt": [*ask, assistant("x"), user("How do I steal a bike?")]}, "no"
        )
        == 0.0
    )


def test_stories_by_hand():
    row = {"hero": "Anna", "thing": "kite"}
    score = TASKS["stories"].score
    replies = {
        " Anna found the kite. Everyone was happy.": 1,
        " Anna lost the kite. It was a sad day.": 0.75,
        " Anna ran": 0.25,
        "": 0,
    }
    assert {text: score(row, text) for text in replies} == replies
    assert [score({"answer": "sad"}, t) for t in (" sad", "sad.", " happy", "sadly")] == [
        1,
        1,
        0,
        0,
    ]


@pytest.mark.parametrize(
    "text,value",
    [
        ("x + 3", 5),
        ("-(x - y)", 3),
        ("max(x, y) * 2", 10),
        ("x % 3", 2),
        ("y // x", 2),
        ("abs(-4)", 4),
    ],
)
def test_expressions(text, value):
    assert evaluate_expression(text, {"x": 2, "y": 5}) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "x ** 9",
        "9 ** 9 ** 9",
        "x.real",
        "[x]",
        "lambda: x",
        "True",
        "1.5",
        "'a'",
        "z",
        "x / 2",
        "x // 0",
        "open('f')",
        "",
        "x +",
        "max(x)",
        "abs(x, y)",
        "max(x, y, 3)",
        "min(a=x, b=y)",
        "max(*[x, y])",
        "999999 * 999999",
        "(" * 40 + "x",
        "x if x else y",
        "x\n+y; x",
        "\x00",
        "1" * 79,
    ],
)
def test_expressions_refuse_all_else(text):
    with pytest.raises(ValueError):
        evaluate_expression(text, {"x": 2, "y": 5})


def test_code_rows_pass_their_tests_and_wrong_code_fails():
    code = TASKS["code"]
    for row in code.rows("preference", 200):
        assert code.score(row, row["chosen"] + "\nmore") == 1.0
        assert code.score(row, row["rejected"]) == 0.0


@pytest.mark.parametrize(
    "what,arguments",
    [
        ("kind", ("nope", 1)),
        ("split", ("text", 1, 0, "dev")),
        ("form", ("text", 1, 0, "train", "nope")),
    ],
)
def test_wrong_words_name_the_choices(what, arguments):
    with pytest.raises(WrongInput, match=f"no {what} .*known: "):
        TASKS["sums"].rows(*arguments)


def test_tasks_import_without_torch():
    code = "import sys, polm_lab.data.tasks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
