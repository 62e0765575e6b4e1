"""Parsers on what chat models really write: results, verdicts, code, questions, steps.

Transcripts are in their style, none is quoted.
"""

import random

import pytest

from polm_lab.training.evaluate import matches
from polm_lab.rewards.sandbox import missing
from polm_lab.reasoning.refine.rounds import Feedback
from polm_lab.reasoning.refine.prompts import (
    StepPrompts,
    Prompts,
    boxed,
    code_of,
    result_in,
    without_thinking,
    without_markdown,
    verdict_in,
    wrong_step,
)

RESULTS = [
    ("68", "68"),
    ("68.", "68."),
    ("**68**", "68"),
    ("The answer is 42.", "42"),
    ("The answer is **42**.", "42"),
    ("**The answer is 42.**", "42"),
    ("The final answer is: 42", "42"),
    ("So the answer is $42$.", "42"),
    ("Therefore, the total is 3 + 4 = 7.\n\n**Answer:** 7", "7"),
    ("### Answer\n\nAnswer: 7 apples", "7 apples"),
    (
        "Let's see. 20+40=60, 3+5=8.\n\n**Final Answer: 68**\n\n"
        "Let me know if you want 2 more examples!",
        "68",
    ),
    ("Step 1: 20+40=60.\nStep 2: 60+8=68.\nANSWER: 68", "68"),
    ("ANSWER: **68**", "68"),
    ("ANSWER: 68 (that is 60 + 8)", "68"),
    ("The answer is 68, because 60 and 8 make 68 and not 70.", "68"),
    ("The answer is 68 since there are 2 numbers.", "68"),
    ("The result is 3.14. It is rounded to 2 places.", "3.14"),
    ("The correct answer is 68, not 67.", "68"),
    ("The answer is **68**, in 2 steps.", "68"),
    ("The answer is 1,250, roughly.", "1,250"),
    ("ANSWER: Paris, Texas", "Paris, Texas"),
    ("You're right, I made a mistake. 3+5 is 8.\n\nThe corrected answer is **68**.", "68"),
    ("The answer is not 67. The answer is 68.", "68"),
    ("The answer to the question is Paris.", "Paris"),
    ('The answer is "Paris".', "Paris"),
    ("ANSWER: Halmouth", "Halmouth"),
    ("Answer: B", "B"),
    ("The answer is (B).", "B"),
    ("We get \\boxed{68}.", "68"),
    ("We get $\\boxed{\\frac{3}{4}}$, which is 0.75 in 2 digits.", "\\frac{3}{4}"),
    ("\\[\\boxed{\\text{Paris}}\\]", "Paris"),
    ("The answer is 5, wait: \\boxed{6}", "6"),
    ("<think>The answer is 7? No, 8.</think>\n\nThe answer is 8.", "8"),
    ("Natalia sold 48/2 = 24 clips.\n#### 72", "72"),
    ("The answer is: $1,250.00", "1,250.00"),
    ("Answer: 1/2", "1/2"),
    ("Answer: -5", "-5"),
    ("Berlin is the capital of Germany.", "Berlin is the capital of Germany."),
]


@pytest.mark.parametrize("text, result", RESULTS)
def test_results_of_chatty_replies(text, result):
    assert result_in(text) == result


@pytest.mark.parametrize(
    "answer, texts",
    [
        (
            "68",
            [
                "68",
                "It is 68.",
                "**68**",
                "ANSWER: 68",
                "\\boxed{68} after 3 steps.",
                "The answer is 68, because 6 tens and 8 ones make it in 2 lines.",
                "#### 68",
            ],
        ),
        ("1250", ["The answer is $1,250.", "ANSWER: 1250.00", "1,250"]),
        (
            "Paris",
            [
                "Paris.",
                "**Paris**",
                "The answer is Paris.",
                "ANSWER: paris",
                "Well, France's capital comes to mind.\nFinal answer: **Paris**!",
                "\\boxed{\\text{Paris}}",
            ],
        ),
        ("B", ["B", "(B)", "The answer is (B).", "**Answer: B**", "The correct answer is B."]),
    ],
)
def test_a_right_reply_is_scored_as_right_and_another_is_not(answer, texts):
    row, words = dict(prompt="?", answer=answer), Prompts()
    for text in texts:
        assert matches(row, words.result(text)) == 1.0, text
        assert words.same(text, answer), text
    assert matches(row, words.result("The answer is 17.")) == 0.0
    assert not words.same("The answer is 17.", answer)


RIGHT = [
    "VERDICT: right",
    "VERDICT: right.",
    "**VERDICT: right**",
    "**VERDICT:** right",
    "Verdict: **Right**",
    "*Verdict*: `right`",
    "verdict - correct",
    "VERDICT: The answer is right",
    "VERDICT is right.",
    "3+5=8, 20+40=60, 60+8=68. All good.\n\nVERDICT: right",
    "At first it seems wrong, 60+8 being 68.\nVERDICT: right",
    "<think>It is wrong? No.</think>VERDICT: right",
    "No issues found.",
    "No issues found",
    "**No issues found.**",
    "I found no issues with the answer.",
    "I don't see any errors.",
    "I don\u2019t find any mistakes here.",
    "There are no errors in this solution.",
    "There is nothing wrong with it.",
    "I checked each step and could not find problems: no mistakes.",
    "Everything is correct.",
    "The answer is correct.",
    "It is correct.",
    "The solution looks good to me!",
    "LGTM!",
    "The code above is correct.",
    "That is right.",
    "No changes needed.",
    "No further improvements are needed.",
    "The calculation is entirely accurate.",
    "Correct.",
    "Correct! 23+45=68.",
    "Your answer is right, well done.",
    "Nothing to fix.",
    "All steps are correct.",
    "The answer is correct as it stands.",
    "No corrections necessary.",
]
WRONG = [
    "VERDICT: wrong",
    "**Verdict**: wrong.",
    "VERDICT: incorrect",
    "Verdict: **not correct**",
    "VERDICT: partially correct",
    "VERDICT: right? No.\n**Verdict**: wrong.",
    "VERDICT: The answer is wrong.",
    "VERDICT: not quite right",
    "It looks right at first, yet 60+8 is 68.\n\nVERDICT: wrong",
    "<think>VERDICT: right</think>VERDICT: wrong",
    "The answer is wrong.",
    "The answer is incorrect.",
    "That is not correct.",
    "That isn't right.",
    "That isn\u2019t quite right.",
    "The answer is not right: 3+5=8.",
    "There is an error in step 2.",
    "There's a mistake: there is a mistake in the sum.",
    "The solution contains a mistake.",
    "The code has a bug.",
    "The result is mostly correct.",
    "The answer is almost right.",
    "Step 1 is fine. The second step is wrong.",
    "The answer 67 is incorrect; the correct answer is 68.",
    "Incorrect. 3+5 is 8.",
    "Wrong: it is 68.",
    "This is mistaken.",
    "There are several problems with this answer.",
    "The reasoning is flawed.",
    "The answer was incorrect.",
    "There are no errors in step 1. However, step 2 is wrong.",
    "The code seems incorrect.",
]
NONE = [
    "",
    "Hm.",
    "<think>So the answer is wrong. VERDICT: wrong</think>\nLet me know.",
    "3+5=8\n20+40=60",
    "The correct answer is 68.",
    "I would need to know more.",
    "Is the sum 68?",
    "68",
    "It depends on what is meant.",
    "The right way to add is column by column.",
    "VERDICT:",
]


@pytest.mark.parametrize(
    "text, fine",
    [(t, True) for t in RIGHT] + [(t, False) for t in WRONG] + [(t, None) for t in NONE],
)
def test_verdicts_in_many_words(text, fine):
    assert verdict_in(text) is fine
    assert Prompts().verdict({}, "", text).fine is fine


@pytest.mark.parametrize(
    "lead",
    [
        "",
        "Sure! ",
        "Let's check this step by step.\n\n1. 3+5=8\n2. 20+40=60\n\n",
        "<think>Maybe it is wrong. VERDICT: wrong</think>\n",
        "## Review\n\n",
    ],
)
@pytest.mark.parametrize(
    "end", ["", "\n", "\n\nLet me know if you need anything else!", "\n\n(60 + 8 = 68.)"]
)
@pytest.mark.parametrize("mark", ["{}", "**{}**", "*{}*", "`{}`", "__{}__", "> {}", "- {}"])
def test_a_verdict_line_is_read_in_any_dress(lead, end, mark):
    assert verdict_in(lead + mark.format("VERDICT: right") + end) is True
    assert verdict_in(lead + mark.format("VERDICT: wrong") + end) is False
    assert matches(dict(answer="68"), result_in(lead + mark.format("ANSWER: 68") + end)) == 1.0


CODE = "def f(x):\n    return 2 * x"


@pytest.mark.parametrize(
    "text",
    [
        CODE,
        f"```python\n{CODE}\n```",
        f"```py\n{CODE}\n```",
        f"```Python3\n{CODE}\n```",
        f"```\n{CODE}\n```",
        f"Sure! Here is the code:\n\n```python\n{CODE}\n```\n\n"
        "It doubles x. Use it like this:\n\n```python\nprint(f(2))  # 4\n```",
        f"The bug is here:\n```python\nreturn x\n```\nFixed:\n```python\n{CODE}\n```\n"
        "And run it with\n```bash\npython f.py\n```",
        "```python\ndef f(x):\n    return x\n```\nNo, that is wrong. Better:\n"
        f"```python\n{CODE}\n```",
        f"<think>```python\ndef f(x): pass\n```</think>```python\n{CODE}\n```",
        f'```python title="f.py"\n{CODE}',
    ],
)
def test_code_is_found_among_chatter(text):
    assert code_of(text) == CODE
    assert Prompts().answer(dict(tests=["assert f(2) == 4"]), text) == CODE
    if not missing():
        from polm_lab.reasoning.refine.tools import run_tests, source_of

        assert (
            run_tests(
                source_of(
                    dict(prompt="Double x."), Prompts().answer(dict(tests=["f(2) == 4"]), text)
                ),
                ["f(2) == 4"],
            )
            == "passes"
        )


@pytest.mark.parametrize(
    "text",
    [
        "Is 3+5=8?\nIs 20+40=60?",
        "1. Is 3+5=8?\n2. Is 20+40=60?",
        "Sure! Here are two questions:\n\n1) **Is 3+5=8?**\n2) **Is 20+40=60?**\n\n"
        "Would you like me to answer them?",
        "- Is 3+5=8?\n- Is 20+40=60?",
        "* Is 3+5=8?\n* Is 20+40=60?",
        "• Is 3+5=8?\n• Is 20+40=60?",
        "Q1: Is 3+5=8?\nQ2: Is 20+40=60?",
        "**Question 1:** Is 3+5=8?\n**Question 2:** Is 20+40=60?",
        "<think>What should I ask?</think>\nIs 3+5=8?\n\nIs 20+40=60?",
    ],
)
def test_questions_of_a_plan(text):
    assert [prompt[0]["content"] for prompt in Prompts().listed(text)] == [
        "Is 3+5=8?",
        "Is 20+40=60?",
    ]


def test_no_more_than_three_questions_and_none_where_none_is():
    assert len(Prompts().listed("\n".join(f"{i}. Is it {i}?" for i in range(9)))) == 3
    assert Prompts().listed("I see nothing to ask.") == []


@pytest.mark.parametrize(
    "text, place",
    [
        ("Step 2 is wrong: 20+40=60", 2),
        ("**Step 2 is wrong:** 20+40=60", 2),
        ("Step 2 is incorrect.", 2),
        ("Step 1 is right. Step 2 is wrong.", 2),
        ("The first error is in step 3.", 3),
        ("There is a mistake in step 2: step 2 has an error.", 2),
        ("Step #2 contains a mistake.", 2),
        ("No step is wrong.", 0),
        ("**No step is wrong.**", 0),
        ("All steps are correct.", 0),
        ("All the steps are right!", 0),
        ("None of the steps is wrong.", 0),
        ("No errors found.", 0),
        ("Step 1 is not wrong. No step is wrong.", 0),
        ("Hm.", None),
        ("", None),
    ],
)
def test_the_wrong_step(text, place):
    assert wrong_step(text) == place
    assert StepPrompts().verdict({}, "", text).fine is (None if place is None else place == 0)


def test_what_a_critic_of_steps_is_taught_is_read_as_meant():
    words, right = StepPrompts(), ["3+5=8", "20+40=60", "60+8=68"]
    assert [wrong_step(words.finding(right, place)) for place in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("tests", [None, ["assert f(2) == 4"]])
def test_answer_check_and_correction_in_one_text(tests):
    words, row = Prompts(), dict(prompt="?", answer="68") | (dict(tests=tests) if tests else {})
    first, better = ("def f(x):\n    return x", CODE) if tests else ("67", "68")
    for check, fine in (("3+5 is 8. VERDICT: wrong", False), ("VERDICT: right", True)):
        text = words.joined(row, first, check, better)
        assert words.parted(row, text) == (first, Feedback(check, fine, first if fine else better))
    assert words.parted(row, first) == (first, Feedback("no check was written", None, first))
    dressed = (
        words.joined(row, first, "VERDICT: wrong", better)
        .replace("CHECK:", "**Check:**")
        .replace("REVISED:", "**Revised:**")
    )
    assert words.parted(row, dressed)[1].hint == better


def test_each_prompt_states_its_form_and_ends_with_the_user():
    words = Prompts()
    for row in (
        dict(prompt="What is 23+45?", answer="68"),
        dict(
            prompt=[
                dict(role="system", content="Be brief."),
                dict(role="user", content="What is 23+45?"),
            ],
            answer="68",
        ),
        dict(prompt="Write f.", tests=["f(2) == 4"]),
    ):
        form = "fenced code block" if "tests" in row else "ANSWER: ..."
        feedback = Feedback("No.", False)
        asked = [
            words.draft(row),
            words.draft(row, ["- carry"]),
            words.feedback(row, "67"),
            words.revision(row, "67", feedback),
            words.correction(row, "67"),
            words.edit(row, "67", "fails"),
            words.reflection(row, "67", feedback),
            words.plan(row, "67"),
            words.informed(row, ["68 is even."]),
            words.whole(row),
            *words.ways(row),
        ]
        for prompt in asked:
            assert prompt[-1]["role"] == "user", prompt
            assert any(form in turn["content"] for turn in prompt), prompt
            assert [turn["role"] for turn in prompt if turn["role"] != "system"][::2] == [
                "user"
            ] * ((len([t for t in prompt if t["role"] != "system"]) + 1) // 2)
        assert "VERDICT: right, or VERDICT: wrong" in words.feedback(row, "67")[-1]["content"]
    assert words.draft(dict(prompt="Write a poem.")) == [
        dict(role="user", content="Write a poem.")
    ], "what cannot be compared needs no form"


def test_readers_bear_anything():
    "Random marks, broken boxes, long lines: text out, never an error."
    rng, pieces = (
        random.Random(0),
        [
            "**",
            "`",
            "```",
            "```python\n",
            "\\boxed{",
            "}",
            "{",
            "ANSWER:",
            "VERDICT:",
            "right",
            "wrong",
            "not",
            "step 2",
            "is",
            "the answer",
            "no",
            "errors",
            "\n",
            " ",
            ".",
            "<think>",
            "</think>",
            "68",
            "$",
            "Ä",
            "\u2019",
            "?",
            "1.",
        ],
    )
    for n in range(400):
        text = "".join(
            rng.choice(pieces) + rng.choice(("", " ")) for _ in range(rng.randint(0, 40))
        )
        assert isinstance(result_in(text), str)
        assert isinstance(code_of(text), str)
        assert verdict_in(text) in (True, False, None)
        assert isinstance(without_thinking(text) + without_markdown(text), str)
        assert boxed(text) is None or isinstance(boxed(text), str)
        wrong_step(text), Prompts().listed(text), Prompts().parted(dict(prompt="?"), text)
    for text in (
        "the answer is " * 3000,
        "no " * 9000,
        "it " * 9000 + "is right",
        "\\boxed{" * 3000,
        "**" * 9000,
        "a" * 50_000,
    ):
        result_in(text), verdict_in(text), wrong_step(text), code_of(text), Prompts().listed(text)
