"Rewards: closed forms, TRL's functions unchanged, and messages for wrong ones."

import asyncio
import math
import time

import numpy as np
import pytest
import torch

from polm_lab.training.evaluate import scorer
from polm_lab.core.knobs import WrongInput
from polm_lab.data.tasks import TASKS
from polm_lab.rewards.functions import (
    Reward,
    call_rewards,
    consistency_reward,
    dialogue_reward,
    dry_run,
    for_trl,
    format_reward,
)
from polm_lab.rewards.functions import (
    length_reward,
    make_rewards,
    parse_rewards,
    repetition_reward,
    short_name,
    steps_reward,
    try_rewards,
)
from polm_lab.data.messages import as_completions

ROWS = TASKS["sums"].rows("prompt", 4)


class Bytes:
    eos_token_id = 0

    def __call__(self, text, **more):
        return type("Encoded", (), {"input_ids": list(text.encode())})


def scored(function, rows=ROWS, completions=None, weight=1.0):
    completions = completions or ["7"] * len(rows)
    return call_rewards(
        [Reward("f", weight, function)], rows, completions, [[1]] * len(rows), [True] * len(rows)
    )


def test_every_reward_of_the_library_on_known_text():
    assert format_reward(
        ["68", "6+8=14\n14", "so 68", "", "68"], ended=[True, True, True, True, False]
    ) == [1, 1, 0, 0, 0]
    assert steps_reward(["68", "3+5=8\n20+40=61", "9-4=5\n3*4=12"]) == [None, 0.5, 1.0]
    assert length_reward(10, 5)(completion_ids=[[0] * n for n in (1, 5, 6, 10, 12)]) == [
        0.0,
        0.0,
        -0.2,
        -1.0,
        -1.0,
    ]
    assert length_reward(10)(completion_ids=[[0] * 9]) == [-0.5]
    assert repetition_reward(completion_ids=[[1] * 5, [1, 2, 3, 4], [1]]) == [1 / 3 - 1, 0.0, 0.0]
    assert dialogue_reward(['"hi"', 'he called "come in now" and "go away"', 'an "open quote']) == [
        0.0,
        2 / 3,
        0.0,
    ]


def test_correct_follows_the_gold_rule_and_the_answer_column():
    [by_task] = make_rewards("correct", scorer("sums", ROWS))
    answers = [row["answer"] for row in ROWS[:3]] + ["1"]
    assert call_rewards([by_task], ROWS, answers, [[1]] * 4, [True] * 4).total == [1, 1, 1, 0]
    rows = [dict(prompt="how much?", answer="1250"), dict(prompt="who?", answer="Ann Lee")]
    [by_column] = make_rewards("correct", scorer("my.jsonl", rows))
    assert call_rewards(
        [by_column], rows, ["so 1,250.0 in all", "ann  lee."], [[1]] * 2, [True] * 2
    ).total == [1, 1]
    chat = TASKS["chat"].rows("completion", 3)
    [gold] = make_rewards("correct", scorer("chat", chat))
    assert (
        min(
            call_rewards(
                [gold], chat, [row["completion"] for row in chat], [[1]] * 3, [True] * 3
            ).total
        )
        > 0.6
    )


def test_trl_functions_work_unchanged():
    rewards = make_rewards("trl.rewards:think_format_reward")
    talk = [dict(prompt=[{"role": "user", "content": "hi"}])] * 2
    completions = as_completions(talk, ["<think>\nso\n</think>\nyes", "yes"])
    assert call_rewards(rewards, talk, completions, [[1]] * 2, [True] * 2).total == [1.0, 0.0]
    [ours] = for_trl(make_rewards("format"), end_tokens=[9])
    assert ours.__name__ == "format"
    assert ours(
        prompts=["a", "a"],
        completions=["7", "7"],
        completion_ids=[[1, 9], [1, 1]],
        trainer_state=None,
    ) == [1.0, 0.0]


def test_weights_and_none():
    two = [
        Reward("a", 2.0, lambda completions: [1.0, None, 3.0, None]),
        Reward("b", -0.5, lambda completions: [None, 4.0, 2.0, None]),
    ]
    scores = call_rewards(two, ROWS, ["x"] * 4, [[1]] * 4, [True] * 4)
    assert scores.total[:3] == [2.0, -2.0, 5.0]
    assert math.isnan(scores.total[3])
    assert scores.parts["b"] == [None, 4.0, 2.0, None]
    assert parse_rewards("correct:1.0, format:0.2,a.b:f,c.py:g:3") == [
        ("correct", 1.0),
        ("format", 0.2),
        ("a.b:f", 1.0),
        ("c.py:g", 3.0),
    ]


def test_what_a_function_may_take_and_give():
    assert scored(lambda completions: torch.tensor([1.0, 2, 3, 4])).total == [1, 2, 3, 4]
    assert scored(lambda prompts, answer: np.arange(4)).total == [0, 1, 2, 3]
    assert scored(
        lambda completions, **columns: [True, np.float32(2), torch.tensor(3.0), None]
    ).total[:3] == [1, 2, 3]
    seen = {}
    scored(lambda **columns: seen.update(columns) or [0.0] * 4)
    assert seen["answer"] == [row["answer"] for row in ROWS]
    assert {"prompts", "completions", "completion_ids", "ended", "log_metric"} <= set(seen)

    async def later(completions, **columns):
        await asyncio.sleep(0)
        return [0.5] * len(completions)

    assert scored(later).total == [0.5] * 4


def fails(**columns):
    raise ZeroDivisionError("no\nway")


BAD = {
    "raises": (fails, "raised ZeroDivisionError: no way"),
    "NaN": (lambda completions: [0.0, math.nan, 0.0, 0.0], "completion 1 got nan"),
    "infinite": (lambda completions: [0.0, 0.0, -math.inf, 0.0], "completion 2 got -inf"),
    "too few": (lambda completions: [0.0], "returned 1 rewards for 4 completions"),
    "too many": (lambda completions: [0.0] * 5, "returned 5 rewards for 4 completions"),
    "a table": (lambda completions: torch.zeros(4, 2), "completion 0 got [0.0, 0.0]"),
    "only None": (lambda completions: [None] * 4, "only None for all 4"),
    "nothing": (lambda completions: None, "returned NoneType"),
    "one number": (lambda completions: 1.0, "returned float"),
    "words": (lambda completions: ["1.0"] * 4, "completion 0 got '1.0' (str)"),
    "wants more": (lambda completions, solution: [0.0] * 4, "raised TypeError"),
    "missing column": (lambda **columns: columns["solution"], "raised KeyError: 'solution'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reward_is_refused_in_one_line(name):
    function, says = BAD[name]
    with pytest.raises(WrongInput) as wrong:
        scored(function)
    assert says in str(wrong.value)
    assert "\n" not in str(wrong.value)
    assert "expected" in str(wrong.value)


SPECS = {
    "": "expected name or name:weight",
    "corect": "did you mean 'correct'",
    "correct": "`answer` column",
    "format:nan": "expected name or name:weight",
    "format:much": "expected a number",
    "format,format:2": "format comes twice",
    "no_such_module_here:f": "importing no_such_module_here failed",
    "math:no_such": "has no function 'no_such'",
    "math:pi": "has no function 'pi'",
    "missing.py:f": "no file missing.py",
    "BROKEN:f": "importing",
}


@pytest.mark.parametrize("spec", SPECS)
def test_a_wrong_spec_is_refused_in_one_line(spec, tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(WrongInput) as wrong:
        make_rewards(spec.replace("BROKEN", str(tmp_path / "broken.py")))
    assert SPECS[spec] in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_the_trial_meets_an_empty_completion(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def f(completions, **columns):\n    return [1 / len(c) for c in completions]\n"
    )
    with pytest.raises(WrongInput, match=r"reward f: raised ZeroDivisionError.* at mine.py:2"):
        try_rewards(make_rewards(f"{tmp_path}/mine.py:f"), ROWS, Bytes())


def test_consistency_is_agreement_with_ones_siblings():
    prompts, texts = (
        ["a"] * 4 + ["b"] * 2 + ["c"],
        ["so 7", "7.0", "8", "it is 7", "Yes.", "yes", "1"],
    )
    assert consistency_reward(prompts, texts) == [2 / 3, 2 / 3, 0.0, 2 / 3, 1.0, 1.0, None]
    talk = [[dict(role="user", content="q")]] * 2
    assert consistency_reward(talk, [[dict(role="assistant", content=t)] for t in ("3", "3")]) == [
        1.0,
        1.0,
    ]


def test_gold_is_recorded_without_weight():
    rewards = make_rewards("format,gold:0", scorer("sums", ROWS))
    scores = call_rewards(rewards, ROWS, [row["answer"] for row in ROWS], [[1]] * 4, [True] * 4)
    assert scores.total == [1.0] * 4
    assert scores.parts["gold"] == [1.0] * 4
    assert [short_name(n) for n in ("gold", "model:a/b", "my.py:f", "x.y:g")] == [
        "gold",
        "model",
        "f",
        "g",
    ]


def test_a_dry_run_shows_what_is_wrong_and_refuses_nothing():
    def unsure(completions, **columns):
        return [math.nan, None] + [1.0] * (len(completions) - 2)

    def slow(completions):
        time.sleep(0.05)
        return [float(i) for i in range(len(completions))]

    table, samples = dry_run(
        ["correct,repetition:0.5", unsure, slow, BAD["raises"][0], lambda completions: [1.0]],
        prompts=3,
        samples=4,
        max_new_tokens=4,
    )
    assert list(table.index) == ["correct", "repetition", "unsure", "slow", "fails", "<lambda>"]
    assert len(samples) == 12
    assert (table.loc["unsure", "none"], table.loc["unsure", "not_finite"]) == (1, 1)
    assert "completion 0 got nan" in table.loc["unsure", "problem"]
    assert table.loc["slow", "ms"] >= 50
    assert table.loc["slow", "group_std"] == pytest.approx(np.std([0, 1, 2, 3], ddof=1))
    assert table.loc["slow", "equal_groups"] == 0
    assert "ZeroDivisionError" in table.loc["fails", "problem"]
    assert "returned 1 rewards for 12" in table.loc["<lambda>", "problem"]
    assert table.loc["correct", "problem"] == ""
    assert table.loc["repetition", "weight"] == 0.5
    assert table.loc["correct", "mean"] == samples["correct"].mean()
