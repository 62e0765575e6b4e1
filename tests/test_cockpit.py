"The cockpit without a browser: traits are set, and what the page would show is read."

import html
import json
import math
import os
import re
import shutil
import threading
from html.parser import HTMLParser
from unittest import mock

import pytest

from polm_lab.core.run import Run, open_run
from polm_lab.runner import launch
from polm_lab.workbench.tokens import (
    COLORINGS,
    MOST_TOKENS,
    Models,
    ink,
    inspect_tokens,
    token_facts,
)
from polm_lab.workbench.cockpit import Cockpit
from polm_lab.workbench.tryit import TryIt, stream
from polm_lab.workbench.why import weights, why


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A short real run whose four prompts come back at every step."
    folder = tmp_path_factory.mktemp("cockpit")
    prompts = [dict(prompt=f"{a}+{a + 3}=", answer=str(2 * a + 3)) for a in (12, 25, 37, 51)]
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    data = dict(data=str(folder / "train.jsonl"), eval_data=str(folder / "test.jsonl"))
    return launch.run(
        "grpo",
        out=folder / "runs",
        steps=6,
        batch_size=16,
        num_generations=4,
        eval_rows=4,
        rewards="correct,format:0.2",
        **data,
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return launch.run(
        "dpo", out=tmp_path_factory.mktemp("pairs"), steps=3, batch_size=8, eval_rows=8
    )


def record(rows, **settings) -> Run:
    run = Run.create("grpo", dict(steps=1, **settings))
    (run.path / "samples.jsonl").write_text(
        "".join(json.dumps(dict(step=1) | row) + "\n" for row in rows)
    )
    run.update(status="finished")
    return run


def page(view) -> str:
    "All HTML that the view puts into the page; the table's cells are text, and not among it."
    found = (
        [view.value]
        if hasattr(view, "value") and isinstance(view.value, str) and type(view).__name__ == "HTML"
        else []
    )
    return "\n".join(found + [page(child) for child in getattr(view, "children", ())])


class Elements(HTMLParser):
    "Names of all elements and attributes of a page."

    def __init__(self, text):
        super().__init__()
        self.tags, self.names = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}


# Model output ------------------------------------------------------------------------------------

NASTY = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)//",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe src='javascript:alert(1)'>",
    "<a href='javascript:alert(1)'>x</a>",
    "' onmouseover='alert(1)",
    '" onfocus="alert(1)',
    "'><b onclick=alert(1)>",
    "</pre></div></span><h1>out</h1>",
    "<!--",
    "-->",
    "<style>*{display:none}</style>",
    "<base href=//evil>",
    "<form action=//evil><button>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    "<![CDATA[<b>]]>",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x00null",
    "\r\roverwrite",
    "\u202etxt.exe",
    "\u2066\u2067\u2069",
    "\u200bzero\u200dwidth\ufeff",
    "\u200f\u061c",
    "\ud800",
    "${alert(1)} {{7*7}} `x` \\u003cscript\\u003e",
    "a" * 2**20,
    "<b>" * 2**18,
    "\u202e" * 10**5,
    "\n" * 10**5,
    "",
]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_model_output_is_text(text):
    row = dict(
        group=0,
        prompt=text,
        completion=text,
        reward=1.0,
        rewards={text[:100] or "x": 1.0},
        advantage=0.5,
        ended=False,
    )
    row |= dict(tokens=[text, "x"], logp=[-1.0, -1.0], ref_logp=[-1.0, -2.0])
    plain = {k: v if k != "rewards" else {"x": 1.0} for k, v in row.items()} | dict(
        prompt="p", completion="c", tokens=["t", "x"]
    )
    view, calm = (Cockpit(record([r, dict(r, advantage=-0.5)])) for r in (row, plain))
    view.selected = 0
    shown, expected = Elements(page(view)), Elements(page(calm))
    assert shown.tags <= expected.tags | {"br", "small"}
    assert shown.names <= expected.names
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u061c\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]",
        page(view),
    )
    assert len(page(view)) < len(page(calm)) + 80_000
    # half a surrogate pair would not get through
    json.dumps(view.table.rows, ensure_ascii=False).encode()
    view.try_it.prompt.encode()
    try_it = view.try_it
    try_it._show(text, text)
    assert Elements(page(try_it)).tags <= expected.tags


def test_a_long_completion_shows_its_start():
    tokens = [f"t{i} " for i in range(10**5)]
    view = Cockpit(
        record([dict(prompt="p", completion="".join(tokens), reward=1.0, tokens=tokens)])
    )
    assert view.tokens.value.count("role='listitem'") == MOST_TOKENS
    assert f"{10**5 - MOST_TOKENS:,} more tokens" in view.tokens.value


ODD = [
    dict(),
    dict(reward="high"),
    dict(rewards=[1]),
    dict(tokens="abc"),
    dict(tokens=[1, None]),
    dict(logp=3, tokens=["a"]),
    dict(prompt=[1, 2]),
    dict(logp=["x"], ref_logp=[None], tokens=["a"]),
    dict(prompt={"a": 1}),
    dict(group=[1], reward=1.0),
    dict(step=[], reward=1.0),
    dict(ended="maybe"),
    dict(side="chosen", reward=1.0),
    dict(advantage=1.0, reward=1.0, group="x"),
    dict(side="chosen", reward=1.0, logp=["x"], ref_logp=[1]),
    dict(reward=math.inf),
    dict(advantages=[1.0], tokens=["a", "b"]),
    dict(ended=[1]),
    dict(rewards={"a": [1]}),
    dict(reward=10**400),
]


@pytest.mark.parametrize("row", ODD, ids=str)
def test_rows_that_no_method_writes(row):
    view = Cockpit(record([row, row]))
    view.selected = 0
    assert len(view.rows) == 2
    for name in COLORINGS:
        view.color_by = name
    if view._thread:
        view._thread.join()
    view.refresh()


# Why ---------------------------------------------------------------------------------------------


def test_the_sum_comes_out_as_recorded(trained):
    # the others are watched only, nothing is learned from them
    rows = [row for row in trained.lines("samples") if "group" in row]
    for row in rows:
        group = [r for r in rows if (r["step"], r["group"]) == (row["step"], row["group"])]
        sentences = why(row, group, trained.settings)
        assert not any("The record says" in s for s in sentences)
        correct, form = row["rewards"]["correct"], row["rewards"]["format"]
        assert sentences[2] == (
            f"Its reward is 1 × correct ({correct:.4g}) + 0.2 × format ({form:.4g}) = "
            f"{correct + 0.2 * form:.4g}."
        )
        assert ("more likely" in sentences[-1]) == (row["advantage"] > 0)
        assert row["completion"] in sentences[0]
        assert f"The correct answer is “{row['answer']}”" in sentences[1]


def test_what_is_read_off_an_answer_is_said():
    row = dict(
        prompt="61+22=",
        completion="83 and 5+25=51",
        answer="83",
        reward=0.0,
        rewards=dict(correct=0.0),
    )
    assert why(row, [row], dict(rewards="correct"))[:2] == [
        "To “61+22=” it answers “83 and 5+25=51”.",
        "The correct answer is “83”; the last number of the completion counts, here 51.",
    ]
    assert (
        why(row | dict(answer="a cat", completion="x" * 300), [row], dict(rewards="correct"))[1]
        == "The correct answer is “a cat”."
    )


def test_a_sum_that_does_not_come_out_is_told():
    row = dict(reward=0.9, rewards=dict(correct=1.0, steps=None), advantage=0.1)
    sentences = why(row, [row, dict(reward=0.1)], dict(rewards="correct,steps:0.5"))
    assert "steps (does not apply)" in sentences[1]
    assert "The record says 0.9." in sentences
    assert sentences[-1].startswith("The record says 0.1")


@pytest.mark.parametrize(
    "scale, words",
    [
        ("none", "1 − 0.5 = 0.5"),
        ("batch", "the spread of the whole batch = 0.5"),
        ("group", "(1 − 0.5) / 0.7071 = 0.707"),
    ],
)
def test_ways_to_scale(scale, words):
    row = dict(reward=1.0, advantage={"group": 0.707}.get(scale, 0.5))
    assert words in why(row, [row, dict(reward=0.0)], dict(scale=scale))[-1]


def test_equal_rewards_teach_nothing():
    row = dict(reward=1.0, advantage=0.0)
    assert "gives no gradient" in why(row, [row, dict(reward=1.0)], {})[-1]


def test_a_critics_advantages_are_told_by_token_and_a_baseline_by_the_others():
    sentences = why(
        dict(reward=1.0, advantage=0.5, advantages=[-1.0, 2.0]), [dict(reward=1.0)], dict(gamma=1.0)
    )
    assert "from -1 to 2, 0.5 on average" in sentences[2]
    group = [dict(reward=1.0, advantage=0.75), *[dict(reward=r) for r in (0.0, 0.0, 1.0)]]
    sentences = why(group[0], group, dict(algorithm="rloo", beta=0.0))
    assert "other 3 answers" in sentences[2]
    assert "differs from them by 0.6667" in sentences[2]
    assert "more likely" in sentences[-1]
    assert "greedy answer" in why(group[0], group, dict(algorithm="remax", beta=0.1))[2]


def test_a_reward_models_number_is_no_implicit_reward():
    pair = [
        dict(side="chosen", reward=2.0, completion="a"),
        dict(side="rejected", reward=0.5, completion="b"),
    ]
    sentences = why(pair[0], pair, dict(head="pointwise"))
    assert sentences[0].startswith("The reward model gives this answer 2;")
    assert "2 − 0.5 = 1.5" in sentences[1]
    assert not any("implicit" in s for s in sentences)


def test_names_of_rewards():
    assert weights(dict(rewards="correct,my.module:good:0.5,/a/b.py:fine:2")) == {
        "correct": 1.0,
        "good": 0.5,
        "fine": 2.0,
    }
    assert weights(dict(rewards=3)) == {}


def test_why_of_pairs(pairs):
    rows = pairs.lines("samples")
    for row in rows:
        sentences = why(row, [r for r in rows if r["prompt"] == row["prompt"]], pairs.settings)
        assert float(sentences[0].rstrip(".").split("= ")[-1]) == pytest.approx(
            row["reward"], abs=2e-4
        )
        assert any("σ(−margin)" in s for s in sentences) == (row["side"] != "sampled")
    view = Cockpit(pairs)
    assert view.group.value.count("role='listitem'") == 3
    assert view.try_it.conversation.value


# Tokens ------------------------------------------------------------------------------------------


def test_what_the_models_say_agrees_with_the_record(trained, pairs):
    models, rows = Models(trained), [row for row in trained.lines("samples") if "group" in row]
    for row in rows[:8]:  # of the first step: the policy was the start model
        asked = inspect_tokens(trained, row, models=models)
        assert [a["start"] for a in asked] == pytest.approx(row["logp"], abs=2e-4)
        for a in asked:
            text, now, start = a["alternatives"][0]
            assert a["kl"] > -1e-6
            assert a["entropy"] >= 0
            assert now == max(p for _, p, _ in a["alternatives"])
            assert 0 <= start <= 1
    models = Models(pairs)
    # written after the last step: the policy was the saved model
    for row in pairs.lines("samples"):
        asked = inspect_tokens(pairs, row, models=models)
        assert [a["now"] for a in asked] == pytest.approx(row["logp"], abs=2e-3)
        assert [a["start"] for a in asked] == pytest.approx(row["ref_logp"], abs=2e-3)


def test_entropy_and_kl_are_those_of_the_library(trained):
    import torch

    from polm_lab.models.policy import Policy

    models, row = Models(trained), trained.lines("samples")[-1]
    saved, start, tokenizer = models.load()
    asked = inspect_tokens(trained, row, models=models)
    ids = tokenizer(row["prompt"]).input_ids
    full = torch.tensor([ids + tokenizer("".join(row["tokens"])).input_ids])
    mask = torch.tensor([[0] * len(ids) + [1] * (full.shape[1] - len(ids))])
    stats = Policy(saved)(full, torch.ones_like(full), mask, entropy=True, reference=Policy(start))
    assert [a["entropy"] for a in asked] == pytest.approx(
        stats.entropy[0, len(ids) :].tolist(), abs=1e-4
    )
    assert [a["kl"] for a in asked] == pytest.approx(stats.kl[0, len(ids) :].tolist(), abs=1e-4)


def test_facts_of_tokens():
    row = dict(
        tokens=["a", "b"],
        logp=[-1.0, -2.0],
        ref_logp=[-1.5, -1.0],
        advantage=0.5,
        values=[0.1, 0.2],
    )
    asked = [dict(now=-0.5, start=-1.5, entropy=1.0, kl=0.2, alternatives=[])]
    first, second = token_facts(row, asked)
    assert (first["reference"], first["old"], first["value"], first["surprise"]) == (
        0.5,
        0.5,
        0.1,
        1.0,
    )
    assert "old" not in second
    assert token_facts(dict(tokens=["a"]), asked)[0]["reference"] == 1.0  # TRL records no log-probs


@pytest.mark.parametrize(
    "ground, text",
    [((255, 255, 255), (0x1C, 0x24, 0x30)), ((0x11, 0x11, 0x11), (0xE0, 0xE0, 0xE0))],
    ids=["light", "dark"],
)
@pytest.mark.parametrize("value", [-9.0, 9.0])
def test_text_stays_legible_on_the_strongest_color(ground, text, value):
    r, g, b, share = map(float, re.findall(r"[\d.]+", ink(value, COLORINGS["reference"])))
    mixed = [share * c + (1 - share) * under for c, under in zip((r, g, b), ground)]

    def light(color):
        return sum(
            w * ((c / 255 + 0.055) / 1.055) ** 2.4 for w, c in zip((0.2126, 0.7152, 0.0722), color)
        )

    high, low = sorted((light(mixed), light(text)), reverse=True)
    assert (high + 0.05) / (low + 0.05) > 4.5  # WCAG AA


# Try it ------------------------------------------------------------------------------------------


def test_a_stream_is_a_rollout(trained):
    from polm_lab.models.rollout import rollout

    saved, _, tokenizer = Models(trained).load()
    for text in ("12+34=", "Once"):
        ids = tokenizer(text).input_ids
        for seed, temperature in ((0, 1.0), (5, 0.7), (0, 0.0)):
            texts = [*stream(saved, tokenizer, ids, 12, temperature, seed)] or [""]
            assert (
                texts[-1]
                == rollout(
                    saved, tokenizer, [ids], max_new_tokens=12, temperature=temperature, seeds=seed
                ).texts[0]
            )


def test_try_it_answers_stops_and_says_what_is_wrong(trained):
    view = TryIt(trained)
    view.prompt, view.tokens.value = "12+34=", 8
    answered = threading.Event()
    with mock.patch.object(view, "answer", lambda: answered.wait(60)):
        view.ask()
        assert view._thread.is_alive()  # the kernel stays free while the answer is made
        answered.set()
        view._thread.join(60)
    view.ask()
    view._thread.join(60)
    assert all(re.search("<pre>.+</pre>", pane.value) for pane in view.panes)
    assert not view.ask_button.disabled
    view.prompt = "12" * 400
    view.answer()
    assert "role='alert'" in view.status.value
    assert "tokens; expected 1 to" in view.status.value
    unsaved = TryIt(record([], model="tiny"))
    unsaved.prompt = "1+1="
    unsaved.answer()
    assert "it has saved no model" in unsaved.status.value


# The whole ---------------------------------------------------------------------------------------


def test_choosing_coloring_and_asking(trained):
    view = Cockpit(trained, dark=True)
    assert view.row["advantage"] is not None
    assert not any("advantage" in row for row in view.rows[: view.selected])
    assert view.try_it.dark
    view.table.selected = [3]  # as the browser does
    assert view.selected == 3
    assert html.escape(why(view.rows[3], view.rows[:4], trained.settings)[0]) in view.why.value
    assert view.group.value.count("aria-current") == 1
    assert view.try_it.prompt == view.rows[3]["prompt"]
    view.color_by = "surprise"
    assert COLORINGS["surprise"].meaning in html.unescape(view.tokens.value)
    assert view.coloring.value == "surprise"
    assert view._thread is None
    view.color_by = "entropy"  # has to be asked for: in a thread
    view._thread.join(60)
    assert "most probable" in view.tokens.value
    assert "Not recorded" not in view.tokens.value
    view.selected = 4
    view._thread.join(60)
    view.selected = 3
    assert "most probable" in view.tokens.value


def test_how_an_answer_changed(trained):
    view = Cockpit(trained)
    steps = {row["step"] for row in view.rows}
    assert len(steps) == 6
    assert view.history.value.count("<tr>") == 1 + len(steps)


def test_a_month_later_it_shows_the_same(trained):
    first, second = Cockpit(trained), Cockpit(str(trained.path))
    assert page(first) == page(second)
    assert first.table.rows == second.table.rows


def test_it_follows_a_run_and_keeps_the_choice(trained):
    run = record(trained.lines("samples")[:8])
    run.update(status="running")
    view = Cockpit(run)
    view.selected, chosen = 2, view.rows[2]
    run._append("samples", trained.lines("samples")[8:12])
    view.refresh()
    assert len(view.table.rows) == 12
    assert view.row is chosen
    assert view.table.selected == [2]
    shown = view.status.value
    (run.path / "samples.jsonl").open("a").write('{"torn\n')
    view.refresh()
    assert "1 damaged lines" in view.status.value
    assert "damaged" not in shown
    (run.path / "run.json").write_text("{")
    view.refresh()
    assert "damaged" in view.status.value
    shutil.rmtree(run.path)
    view.refresh()
    assert "folder is gone" in html.unescape(view.status.value)
    assert view.row is chosen
    view.selected = 5
    view.inspect()
    assert "role='alert'" in view.message.value


def test_a_killed_run_and_no_run(trained):
    run = record(trained.lines("samples")[:4])
    run.update(status="running", pid=os.getpid())
    assert " dead: " in Cockpit(run).status.value
    assert "no such run" in page(Cockpit("nothing"))
    assert "recorded no samples" in Cockpit(record([])).status.value


def test_every_control_has_a_name(trained):
    view = Cockpit(open_run(trained))
    names = ("text", "temperature", "tokens", "seed", "conversation", "ask_button", "stop_button")
    for control in (
        view.coloring,
        view.ask_button,
        *(getattr(view.try_it, name) for name in names),
    ):
        assert control.description
        assert control.tooltip
    assert view.table.label
