"""RLAIF: both orders, a real endpoint that fails in every way, and keys that go nowhere.

Also labels that are kept, and the models that they train.
"""

import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import POLM
from serving import Endpoint, endpoint

import polm_lab as lab
from polm_lab.rewards import endpoint as page_endpoint
from polm_lab.rewards import judges as page_judges
from polm_lab.alignment.dpo import dpo_loss
from polm_lab.training.answers import answer_batches, encode_answers
from polm_lab.rewards.judges import (
    ContrastJudge,
    EndpointJudge,
    Label,
    ModelJudge,
    both_orders,
    kept_judge,
)
from polm_lab.rewards.judges import (
    label_pairs,
    make_judge,
    parse_judge,
    principle_of,
    read_constitution,
    verdict,
)
from polm_lab.rewards.endpoint import Kept, read_key, seconds_asked
from polm_lab.alignment.rlaif import RLAIF, judge_reward, label_facts, preference_rows, revise
from polm_lab.data.load import load_data
from polm_lab.core.knobs import WrongInput
from polm_lab.models.policy import Policy
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.training.evaluate import scorer
from polm_lab.core.run import Run, Stopped, all_runs, read_lines

KEY = "sk-Very+Secret/0123456789abcdef"
QUICK = dict(
    data="sums",
    judge="rule:correct",
    prompts=32,
    max_new_tokens=8,
    steps=2,
    batch_size=4,
    eval_rows=4,
    max_length=128,
    device="cpu",
    dtype="float32",
    warmup=0.0,
)
CONSTITUTION = [("Be polite.", "Be rude.")]


class Server(Endpoint):
    """It prefers the longer reply, with a taste for A; of two numbers the larger.

    Log-odds: (len(a) - len(b)) / 4 + taste.
    """

    logprobs, taste, says = True, 0.5, None

    def answer(self, body, echo):
        return {"choices": [self.choice(body, echo)]}

    def choice(self, body, echo):
        found = re.search(
            r"Reply A: (.*?)\n\nReply B: (.*?)\n\n", body["messages"][-1]["content"], re.S
        )
        if not found:  # it is asked to write, and repeats what it was sent
            return {"message": {"content": f"Of course! {echo}"}}
        worth = [
            int(text) if text.isdigit() else 4 * len(text) for text in found.groups()
        ]  # of two numbers the larger one
        odds = (worth[0] - worth[1]) / 16 + self.taste
        letter = "A" if odds > 0 else "B"
        top = [
            {"token": f" {name}", "logprob": -math.log1p(math.exp(-sign * odds))}
            for name, sign in (("A", 1), ("B", -1))
        ]
        reply = self.says or letter
        choice = {"message": {"content": reply}}
        if self.logprobs and "logprobs" in body and reply in ("A", "B"):
            token = next(t for t in top if t["token"].strip() == reply)
            choice["logprobs"] = {"content": [{**token, "top_logprobs": top}]}
        return choice

    def judge(self, **more):
        settings = dict(key="", tries=4, timeout=5.0, pause=0.001) | more
        self.notes = []
        return EndpointJudge(self.url, "small", CONSTITUTION, say=self.notes.append, **settings)


server = endpoint(Server)


@pytest.fixture(scope="module")
def tiny():
    return Policy(load_model("tiny", "float32", "cpu")), load_tokenizer("tiny")


def says(call, *args, **more):
    with pytest.raises(WrongInput) as caught:
        call(*args, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def everything(folder) -> bytes:
    return b"".join(
        str(p).encode() + p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    )


def weights(run):
    return b"".join(p.read_bytes() for p in sorted((run.path / "model").glob("*.safetensors")))


# Both orders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("taste", [-3.0, 0.0, 2.0])
def test_a_taste_for_a_place_never_turns_a_label_round(taste):
    judge = lambda row, first, second: 1 / (1 + math.exp(-(len(first) - len(second)) - taste))
    for size in (1, 2, 4, 6):
        label = both_orders(judge, {}, "x" * size, "xxx")
        assert (label.probability > 0.5) == (size > 3)
        assert math.isclose(
            both_orders(judge, {}, "xxx", "x" * size).probability, 1 - label.probability
        )
        assert (label.bias > 0) == (taste > 0)
        assert taste or label.bias == 0
    assert math.isclose(both_orders(lambda *_: 1.0, {}, "a", "b").bias, 1.0)
    assert both_orders(lambda *_: 0.0, {}, "a", "b").bias == -1.0


def test_an_order_that_cannot_matter_is_not_asked_twice():
    asked = []

    def judge(row, first, second):
        asked.append(first)
        return 0.75

    assert both_orders(judge, {}, "a", "b") == Label(0.75, 0.25)
    assert len(asked) == 2
    judge.two_orders = False
    assert both_orders(judge, {}, "a", "b") == Label(0.75, 0.75)
    assert len(asked) == 3


def test_soft_labels_reach_the_loss():
    row = dict(prompt="1+1=", chosen="2", rejected="3", probability=0.75)
    batch = answer_batches(
        encode_answers(load_tokenizer("tiny"), [row, dict(row, probability=1.0)], 64), 2, 0
    )[0]
    assert batch["doubt"].tolist() == [0.25, 0.0]
    margin = torch.full((2,), math.log(3.0), requires_grad=True)
    dpo_loss(margin, *torch.zeros(3, 2), 1.0, batch["doubt"]).sum().backward()
    assert abs(margin.grad[0]) < 1e-6
    assert math.isclose(
        margin.grad[1].item(), -0.25, rel_tol=1e-5
    )  # least where σ(margin) is the label
    assert (
        "doubt"
        not in answer_batches(
            encode_answers(load_tokenizer("tiny"), [dict(row, probability=1)], 64), 1, 0
        )[0]
    )
    for wrong in (1.5, -0.1, "much", True, float("nan"), None):
        assert "probability" in says(
            encode_answers, load_tokenizer("tiny"), [dict(row, probability=wrong)], 64
        )


# Judges -------------------------------------------------------------------------------------------


def test_a_local_reader_gives_the_share_of_the_letters(tiny):
    judge, row = ModelJudge(*tiny, CONSTITUTION), load_data("chat#1", "prompt")[0]
    prompt = [
        page_judges.user(
            page_judges.QUESTION.format(
                request=row["prompt"][-1]["content"], a="Yes.", b="No.", principle="Be polite."
            )
        )
    ]
    answers = [
        dict(prompt=prompt, completion=[dict(role="assistant", content=letter)]) for letter in "AB"
    ]
    a, b = map(math.exp, judge.logps(answers))
    assert math.isclose(judge(row, "Yes.", "No."), a / (a + b), rel_tol=1e-4)


def test_a_contrast_knows_polite_from_rude_in_any_order(tiny):
    judge, rows = ContrastJudge(*tiny, CONSTITUTION), load_data("chat#8", "prompt")
    for row in rows:
        polite, rude = (
            "Of course! Take your time. I hope this helps.",
            "Ugh. Take your time. Now go away.",
        )
        assert judge(row, polite, rude) > 0.5 > judge(row, rude, polite)
        assert math.isclose(judge(row, polite, rude) + judge(row, rude, polite), 1.0)
        assert len(judge.scores) % 2 == 0
    swapped = ContrastJudge(*tiny, [("Be rude.", "Be polite.")])
    assert math.isclose(swapped.score(rows[0], polite), -judge.score(rows[0], polite), rel_tol=1e-5)


def test_rules_of_the_library_and_of_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def brevity(completions, **columns):\n    return [-len(c) if isinstance(c, str) else "
        "-len(c[0]['content']) for c in completions]\n"
    )
    rows = load_data("sums#4", "prompt")
    judge = make_judge(f"rule:{tmp_path}/mine.py:brevity", rows)
    assert (judge(rows[0], "1", "22"), judge(rows[0], "22", "1"), judge(rows[0], "1", "2")) == (
        1.0,
        0.0,
        0.5,
    )
    gold = make_judge("rule:correct", rows, score=scorer("sums", rows))
    assert (gold(rows[0], rows[0]["answer"], "0"), gold(rows[0], "0", "1")) == (1.0, 0.5)
    steps = make_judge("rule:steps", rows)  # does not apply to what has no steps
    assert (
        steps(rows[0], "7", "1+1=2"),
        steps(rows[0], "1+1=2", "1+1=3"),
        steps(rows[0], "7", "8"),
    ) == (0.5, 1.0, 0.5)


def test_the_path_of_a_rule_is_whole_in_the_record(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def f(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert RLAIF(judge="rule:mine.py:f").judge == f"rule:{tmp_path}/mine.py:f"
    assert RLAIF(judge="contrast:self").judge == "contrast:self"


def test_a_constitution_of_a_file_gives_each_prompt_its_principle(tmp_path):
    (tmp_path / "rules.txt").write_text("Be polite. | Be rude.\n\nBe brief.\n")
    found = read_constitution(str(tmp_path / "rules.txt"))
    assert found == [("Be polite.", "Be rude."), ("Be brief.", "")]
    drawn = [principle_of(found, dict(prompt=f"{i}?")) for i in range(40)]
    assert set(drawn) == set(found)
    assert drawn == [principle_of(found, dict(prompt=f"{i}?")) for i in range(40)]
    assert "cannot be read" in says(read_constitution, str(tmp_path / "none.txt"))
    assert "no principle" in says(read_constitution, " | Be rude.")
    assert "no opposite" in says(
        make_judge, "contrast:tiny", constitution=str(tmp_path / "rules.txt")
    )


# The endpoint -------------------------------------------------------------------------------------


def test_soft_labels_from_log_probs(server):
    label = both_orders(server.judge(key=KEY), dict(prompt="Why?"), "x" * 8, "x" * 4)
    sigma = lambda x: 1 / (1 + math.exp(-x))
    assert math.isclose(label.first, sigma(1.5), rel_tol=1e-9)
    assert math.isclose(label.second, sigma(0.5), rel_tol=1e-9)
    assert server.notes == []
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers)
    assert {b["model"] for b in server.bodies} == {"small"}
    server.judge()(dict(prompt="Why?"), "a", "b")
    assert "Authorization" not in server.headers[-1], "without key_variable no key is sent"


def test_verdicts_as_servers_write_them():
    choice = lambda content, *top, **more: {
        "message": {"content": content},
        "logprobs": {"content": [{**top[0], "top_logprobs": list(top), **more}]} if top else None,
    }
    token = lambda text, p: {"token": text, "logprob": math.log(p)}
    assert verdict(
        choice("B", token(" B", 0.6), token(" A", 0.2), token("A", 0.1), token("The", 0.1))
    ) == (pytest.approx(1 / 3), True)
    assert verdict(choice("A", token("A", 0.8), top_logprobs=[])) == (pytest.approx(0.8), True)
    assert verdict(choice("B.", token("**B", 0.9), token("I", 0.1))) == (0.0, True)
    assert [verdict(choice(text)) for text in ("A", "**B**", "Reply A does.", "The answer: B")] == [
        (1.0, False),
        (0.0, False),
        (1.0, False),
        (0.0, False),
    ]
    for text in ("", None, "Both A and B", "I cannot say", "about"):
        with pytest.raises(page_endpoint.Unreadable):
            verdict(choice(text))
    with pytest.raises(ValueError):
        verdict(choice("A", token("A", 0.5) | {"logprob": float("nan")}))


def test_without_log_probs_the_letter_counts_and_that_is_said_once(server):
    server.logprobs, judge = False, server.judge()
    assert [judge(dict(prompt=f"{i}?"), "long reply", "short") for i in range(3)] == [1.0] * 3
    assert judge(dict(prompt="?"), "a", "a long reply") == 0.0
    assert server.notes == [
        "judge: answers come without log-probabilities; the letter alone counts, as 0 or 1"
    ]


def test_what_an_endpoint_does_not_take_is_left_out(server, monkeypatch):
    plain = Server.choice

    def picky(self, body, echo):
        refused = [name for name in ("logprobs", "max_tokens") if name in body]
        return {"refused": refused[0]} if refused else plain(self, body, echo)

    monkeypatch.setattr(Server, "choice", picky)
    handler = server.http.RequestHandlerClass
    send = handler.send

    def refusing(self, status, text, more=()):
        refused = json.loads(text)["choices"][0].get("refused") if status == 200 else None
        send(
            self,
            *(
                (400, json.dumps({"error": {"message": f"Unsupported parameter: '{refused}'"}}))
                if refused
                else (status, text)
            ),
            more,
        )

    monkeypatch.setattr(handler, "send", refusing)
    judge = server.judge()
    assert judge(dict(prompt="?"), "a long reply", "b") == 1.0
    assert judge(dict(prompt="?"), "b", "a long reply") == 0.0
    assert server.asked == 4
    assert "logprobs" not in server.bodies[-1]
    assert "max_tokens" not in server.bodies[-1]
    assert "temperature" in server.bodies[-1]
    assert sum("does not take logprobs" in note for note in server.notes) == 1
    assert len(server.notes) == 3


FAILURES = [
    429,
    500,
    502,
    503,
    408,
    "torn",
    "drop",
    "",
    "[]",
    "null",
    "not json",
    '{"choices": []}',
    '{"choices": [{"message": {}}]}'[:-2],
    '{"choices": [{"message": {"content": 7}}]}',
    '{"choices": [{"message": {"content": "A"}, '
    '"logprobs": {"content": [{"token": "A", "logprob": "much"}]}}]}',
    '{"choices": [{"message": {"content": "A"}, "logprobs": 3}]}',
]


@pytest.mark.parametrize("fail", FAILURES, ids=lambda f: str(f)[:24] or "empty")
def test_a_failure_that_passes_is_asked_again(server, fail):
    server.fails = [fail, fail]
    assert server.judge()(dict(prompt="?"), "x" * 8, "x" * 4) == pytest.approx(
        1 / (1 + math.exp(-1.5))
    )
    assert server.asked == 3


@pytest.mark.parametrize("fail", FAILURES, ids=lambda f: str(f)[:24] or "empty")
def test_a_failure_that_stays_ends_in_one_line(server, fail):
    judge = server.judge(key=KEY)
    judge(dict(prompt="?"), "a", "b")
    server.fails = [fail] * 9
    message = says(judge, dict(prompt="?"), "a", "b")
    assert "4 tries" in message
    assert server.asked == 5
    assert KEY not in message
    assert len(message) < 500


def test_slow_answers_are_asked_again(server):
    server.fails = ["slow"]
    judge = server.judge(timeout=0.2)
    assert judge(dict(prompt="?"), "a", "b") > 0.5
    assert server.asked == 2
    server.fails = ["slow"] * 2
    assert "no answer within 0.2 s, 2 tries" in says(
        server.judge(timeout=0.2, tries=2), dict(prompt="?"), "a", "b"
    )


@pytest.mark.parametrize(
    "status, word",
    [
        (401, "key_variable"),
        (403, "key_variable"),
        (404, "address"),
        (400, "address"),
        (302, "address"),
    ],
)
def test_what_asking_again_does_not_mend_is_asked_once(server, status, word):
    server.fails = [status] * 9
    message = says(server.judge(key=KEY), dict(prompt="?"), "a", "b")
    assert server.asked == 1
    assert word in message
    assert f"status {status}" in message
    assert KEY not in message
    assert "[key]" in message


def test_pauses_double_and_obey_the_endpoint(server, monkeypatch):
    import tenacity.nap

    pauses = []
    monkeypatch.setattr(tenacity.nap.time, "sleep", pauses.append)
    server.fails, server.after = [500, 500, 500], None
    server.judge(pause=1.0)(dict(prompt="?"), "a", "b")
    assert all(low <= pause <= low + 1 for low, pause in zip((1, 2, 4), pauses))
    assert len(pauses) == 3
    pauses.clear()
    server.fails, server.after = [429, 503], "7"
    server.judge(pause=1.0)(dict(prompt="?"), "a", "b")
    assert pauses == [7.0, 7.0]
    assert (
        seconds_asked(None),
        seconds_asked("soon"),
        seconds_asked("-3"),
        seconds_asked("9999"),
        seconds_asked("nan"),
    ) == (None, None, 0.0, 300.0, None)
    assert 0 <= seconds_asked("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_an_endpoint_that_is_not_there_is_said_at_once():
    message = says(make_judge, "openai:http://127.0.0.1:9/v1#m", load_data("chat#1", "prompt"))
    assert "cannot be reached" in says(
        make_judge, "openai:http://no such host/v1#m", load_data("chat#1", "prompt")
    )
    assert "cannot be reached" in message
    assert "start it" in message


def test_answers_that_name_no_reply_are_halves_and_a_judge_of_halves_is_refused(server):
    server.says, judge = "They are much alike.", server.judge()
    assert judge(dict(prompt="?"), "a", "b") == 0.5
    assert len(server.notes) == 1
    assert "neither reply" in server.notes[0]
    assert "neither reply in all of the first 6 pairs" in says(
        label_pairs, judge, [(dict(prompt=f"{i}?"), "a", "b") for i in range(6)]
    )


def test_a_judge_that_always_says_a_is_refused_after_32_pairs(server):
    server.says, server.logprobs, judge = "A", False, server.judge()
    message = says(
        label_pairs, judge, [(dict(prompt=f"{i}?"), "a", "a longer one") for i in range(100)]
    )
    assert "the first reply in both orders in all of the first 32 pairs" in message
    assert server.asked == 64


# Keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [KEY, "sk_lower", "A" * 65, "A B", "1A", "ABC\nDEF"])
def test_a_key_in_place_of_a_name_is_refused_and_not_repeated(name, runs):
    message = says(lab.run, "rlaif", judge="openai:http://localhost:1/v1#m", key_variable=name)
    assert name not in message
    assert not runs.exists()


def test_a_missing_or_odd_key_is_one_line(monkeypatch):
    assert "POLM_TEST_KEY" in says(read_key, "POLM_TEST_KEY")
    for value in ("", "  ", "two words", "line\nbreak", "schlüssel"):
        monkeypatch.setenv("POLM_TEST_KEY", value)
        message = says(read_key, "POLM_TEST_KEY")
        assert not value.strip() or value not in message
    monkeypatch.setenv("POLM_TEST_KEY", f" {KEY}\n")
    assert read_key("POLM_TEST_KEY") == KEY
    assert read_key("") == ""


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "rule",
        "rule:",
        "oracle:x",
        "openai:",
        "openai:localhost/v1#m",
        "openai:http://h/v1",
        "openai:ftp://h/v1#m",
        "openai:http://h:port/v1#m",
        "openai:http://u:p@h/v1#m",
        "openai:http://h/v1?key=sk-123#m",
        "sk-123456",
    ],
)
def test_a_wrong_spec_is_one_line_without_what_may_be_a_key(spec):
    message = says(RLAIF, judge=spec)
    assert "judge" in message
    assert "u:p" not in message
    assert "sk-123" not in message.replace("'sk-123456'", "")


def test_specs():
    assert parse_judge("openai:https://h:8000/v1/#org/m") == (
        "openai",
        "https://h:8000/v1",
        "org/m",
    )
    assert parse_judge("rule:my.py:f") == ("rule", "my.py:f", "")
    assert parse_judge("model:tiny") == ("model", "tiny", "")


@pytest.mark.parametrize("algorithm", ["dpo", "sft", "direct"])
def test_a_key_is_nowhere_in_a_run_that_works(server, runs, monkeypatch, algorithm):
    monkeypatch.setenv("POLM_TEST_KEY", KEY)
    more = dict(num_generations=4, prompts=8) if algorithm == "direct" else dict(prompts=12)
    run = lab.run(
        "rlaif",
        **QUICK
        | dict(judge=server.spec, key_variable="POLM_TEST_KEY", algorithm=algorithm, eval_rows=2)
        | more,
    )
    assert run.status == "finished"
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers)
    assert KEY.encode() not in everything(runs), "it was in an answer, and was taken out"
    assert algorithm != "sft" or b"[key]" in everything(runs), (
        "it was in an answer, and was taken out"
    )


def test_a_key_is_nowhere_in_a_notebook_and_a_run_that_fails(server, runs, polm):
    server.fails = [401] * 99
    words = [
        w
        for k, v in (
            QUICK | dict(judge=server.spec, key_variable="POLM_TEST_KEY", prompts=4)
        ).items()
        for w in ("-p", k, str(v))
    ]
    failed = polm("run", "rlaif", *words, POLM_TEST_KEY=KEY)
    assert failed.returncode == 2
    assert "status 401" in failed.stderr
    assert server.asked >= 1
    [run] = all_runs(runs)
    assert run.status == "failed"
    assert (run.path / "notebook.ipynb").exists()
    assert KEY.encode() not in everything(runs)
    assert KEY not in failed.stdout + failed.stderr
    assert b"[key]" in everything(runs)


# Labels are kept ----------------------------------------------------------------------------------


def test_no_label_is_lost_and_none_is_asked_twice(server, runs, monkeypatch):
    settings = QUICK | dict(judge=server.spec, tries=2, prompts=24)
    whole = lab.run("rlaif", **settings)
    needed = server.asked
    server.asked, monkeypatched = 0, page_endpoint.Endpoint.post
    monkeypatch.setattr(
        page_endpoint.Endpoint,
        "post",
        lambda self, *a: (
            setattr(server, "fails", [503] * 99) if server.asked >= 9 else None,
            monkeypatched(self, *a),
        )[1],
    )
    says(lab.run, "rlaif", **settings)
    run = next(r for r in all_runs(runs) if r.status == "failed")
    kept = len(read_lines(run.path / "labels.jsonl"))
    assert "503" in run.read()["reason"]
    assert "2 tries" in run.read()["reason"]
    assert 0 < kept < needed
    monkeypatch.setattr(page_endpoint.Endpoint, "post", monkeypatched)
    server.fails, server.asked = [], 0
    with open(run.path / "labels.jsonl", "a") as file:
        file.write('{"key": "torn')
    lab.resume(run)
    assert server.asked == needed - kept
    assert Run(run.path).status == "finished"
    assert weights(run) == weights(whole)
    assert (run.path / "preferences.jsonl").read_bytes() == (
        whole.path / "preferences.jsonl"
    ).read_bytes()


def test_what_an_endpoint_said_once_stays_though_it_says_otherwise_now(tmp_path):
    pairs, answers = [(dict(prompt=f"{i}?"), "a", "b") for i in range(4)], iter([0.9, 0.2] * 4)
    first = label_pairs(kept_judge(lambda *_: next(answers), Kept(tmp_path / "l.jsonl")), pairs)
    assert (
        label_pairs(
            kept_judge(lambda *_: pytest.fail("asked again"), Kept(tmp_path / "l.jsonl")), pairs
        )
        == first
        == [Label(0.9, 0.8)] * 4
    )


def test_a_torn_line_takes_no_other_with_it(tmp_path):
    (tmp_path / "l.jsonl").write_text('{"key": "torn')
    Kept(tmp_path / "l.jsonl").get(["a"], lambda: dict(probability=1.0))
    assert (
        Kept(tmp_path / "l.jsonl").get(["a"], lambda: pytest.fail("lost"))
        == read_lines(tmp_path / "l.jsonl")[0]
    )


def test_dpo_smooths_a_doubtful_pair(runs, tmp_path):
    rows = [
        dict(prompt=f"{a}+1=", chosen=str(a + 1), rejected=str(a), probability=p)
        for a in range(2, 42)
        for p in (0.6,)
    ]
    (tmp_path / "soft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "hard.jsonl").write_text(
        "".join(json.dumps(dict(row, probability=1)) + "\n" for row in rows)
    )
    more = dict(
        steps=2, batch_size=4, eval_rows=2, max_length=32, device="cpu", dtype="float32", clip=0.0
    )
    soft, hard = (
        lab.run("dpo", data=str(tmp_path / f"{name}.jsonl"), **more).lines()[0]["grad_norm"]
        for name in ("soft", "hard")
    )
    assert soft == pytest.approx(0.2 * hard, rel=1e-3), "at the start the pull is β/2 (2p - 1)"
    assert "probability" in says(
        lab.run, "dpo", data=str(tmp_path / "soft.jsonl"), engine="trl", **more
    )


@pytest.mark.parametrize("wrong", [1.5, -0.1, float("nan"), "A", None, True])
def test_what_is_no_probability_is_refused(tmp_path, wrong):
    assert "expected a probability" in says(
        kept_judge(lambda *_: wrong, Kept(tmp_path / "l.jsonl")), dict(prompt="?"), "a", "b"
    )
    assert not (tmp_path / "l.jsonl").exists()


def test_a_kill_while_it_labels_changes_nothing(server, runs, tmp_path):
    settings = QUICK | dict(judge=server.spec, prompts=24)
    whole = lab.run("rlaif", out=tmp_path / "whole", **settings)
    words = [w for k, v in settings.items() for w in ("-p", k, str(v))]
    plain = Server.choice
    server.choice = lambda body, echo: (time.sleep(0.15), plain(server, body, echo))[1]
    process = subprocess.Popen(
        [POLM, "run", "rlaif", "--bare", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    until = time.monotonic() + 90
    while not any(read_lines(p) for p in runs.glob("*/labels.jsonl")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    [run] = all_runs(runs)
    assert run.status == "dead"
    assert read_lines(run.path / "labels.jsonl")
    assert not (run.path / "preferences.jsonl").exists()
    server.choice = lambda body, echo: plain(server, body, echo)
    lab.resume(run)
    assert weights(run) == weights(whole)


def test_a_stop_while_it_labels_keeps_the_labels(runs, monkeypatch):
    monkeypatch.setattr(
        Run, "stop_requested", lambda self: len(read_lines(self.path / "labels.jsonl")) >= 3
    )
    with pytest.raises(Stopped):
        lab.run("rlaif", **QUICK)
    [run] = all_runs(runs)
    assert run.status == "stopped"
    assert 3 <= len(read_lines(run.path / "labels.jsonl")) < 32
    monkeypatch.undo()
    assert lab.resume(run).status == "finished"


# What they train ----------------------------------------------------------------------------------


def test_preferences_and_what_is_known_of_them():
    rows = [dict(prompt=f"{i}?", answer="1") for i in range(6)]
    pairs = [(row, "right", "wrong") for row in rows]
    labels = [
        Label(0.9, 0.7),
        Label(0.4, 0.2),
        Label(0.5, 0.5),
        Label(0.56, 0.5),
        Label(1.0, 0.0),
        Label(1.0, 1.0),
    ]
    found = preference_rows(pairs, labels, RLAIF(least=0.05))
    assert [(r["chosen"], round(r["probability"], 9), r["answer"]) for r in found] == [
        ("right", 0.8, "1"),
        ("wrong", 0.7, "1"),
        ("right", 1.0, "1"),
    ]
    assert [r["probability"] for r in preference_rows(pairs, labels, RLAIF(soft=False))] == [
        1.0
    ] * 4
    turned = preference_rows(pairs, labels, RLAIF(noise=1.0))
    assert [r["chosen"] for r in turned] == ["wrong", "right", "wrong", "wrong"]
    assert math.isclose(turned[0]["probability"], 0.8)
    facts = label_facts(pairs, labels, found, lambda row, text: float(text == "right"))
    assert facts["agreement"] == (3 + 2 * 0.5) / 6
    assert facts["agreement_learned"] == 2 / 3
    assert facts["undecided"] == 2
    assert facts["learned"] == 3
    assert facts["position_bias"] == pytest.approx((0.2 + 0.2 + 0 + 0.06 + 1 + 0) / 6)
    assert facts["turned_by_order"] == pytest.approx(2 / 6)
    assert "expected two at least" in says(preference_rows, pairs, [Label(0.5, 0.5)] * 6, RLAIF())


def test_noise_turns_its_share_and_more_noise_turns_the_same_pairs_too():
    pairs = [(dict(prompt=f"{i}?"), "a", "b") for i in range(1000)]
    turned = {}
    for noise in (0.1, 0.3):
        rows = preference_rows(pairs, [Label(1.0, 1.0)] * 1000, RLAIF(noise=noise))
        turned[noise] = {row["prompt"] for row in rows if row["chosen"] == "b"}
    assert 70 < len(turned[0.1]) < 130
    assert 250 < len(turned[0.3]) < 350
    assert turned[0.1] < turned[0.3]


def test_the_direct_reward_is_the_share_of_siblings_beaten(tmp_path):
    asked = []

    def judge(row, first, second):
        asked.append((row["answer"], first, second))
        return 1 / (1 + math.exp(-(len(first) - len(second)) - 1.0))

    reward = judge_reward(kept_judge(judge, Kept(tmp_path / "l.jsonl")), RLAIF())
    found = reward(
        ["p"] * 3 + ["q"] * 2,
        ["x", "xx", "xx", "y", "yyyy"],
        answer=[1, 1, 1, 2, 2],
        ended=[True] * 5,
    )
    p = both_orders(judge, dict(answer=1), "x", "xx").probability
    assert found[:3] == pytest.approx([p, (1 - p + 0.5) / 2, (1 - p + 0.5) / 2])
    assert found[3] < 0.5 < found[4]
    assert sum(found[:3]) / 3 == pytest.approx(0.5)
    assert not any(first == second for _, first, second in asked)
    assert {answer for answer, *_ in asked} == {1, 2}
    assert reward(["p"], ["alone"], answer=[1]) == [0.5]


def test_direct_trains_with_the_judge_as_reward_and_stops_and_resumes_alike(
    runs, monkeypatch, tmp_path
):
    settings = QUICK | dict(
        algorithm="direct", num_generations=4, batch_size=8, steps=2, save_every=1
    )
    whole = lab.run("rlaif", out=tmp_path / "whole", **settings)
    assert "reward/judge" in whole.lines()[-1]
    assert whole.samples().rewards.iloc[0].keys() == {"judge"}
    assert read_lines(whole.path / "labels.jsonl")
    monkeypatch.setattr(Run, "stop_requested", lambda self: self.record["step"] == 1)
    with pytest.raises(Stopped):
        lab.run("rlaif", **settings)
    monkeypatch.undo()
    [run] = all_runs(runs)
    assert weights(lab.resume(run)) == weights(whole)


def test_a_reward_model_learns_the_labels_and_ppo_climbs_it(runs):
    run = lab.run("rlaif", **QUICK | dict(algorithm="ppo", steps=1, batch_size=8))
    model = Run(run.path.parent / run.read()["stages"]["reward"])
    assert model.method == "reward"
    assert model.status == "finished"
    assert model.settings["data"] == str(run.path / "preferences.jsonl")
    assert model.id in run.read()["parents"]
    assert "reward/model" in run.lines()[-1]
    assert (run.path / "model").exists()


def test_revision_asks_for_a_critique_and_then_for_the_answer(server):
    judge, row = server.judge(), dict(prompt=[page_judges.user("How?")])
    found = revise(judge, row, "Ugh.", 3)
    first, second = (body["messages"] for body in server.bodies)
    assert [m["role"] for m in second] == ["user", "assistant", "user", "assistant", "user"]
    assert second[:3] == first
    assert first[1]["content"] == "Ugh."
    assert "Be polite." in first[2]["content"]
    assert second[3]["content"] == found["critique"]
    assert found["revision"].startswith("Of course!")
    assert "does not write" in says(revise, make_judge("rule:format"), row, "Ugh.", 0)


def test_revisions_are_learned_and_written_once(runs, monkeypatch):
    settings = QUICK | dict(
        data="chat", judge="contrast:self", algorithm="sft", prompts=12, max_new_tokens=48
    )
    written, plain = [], ModelJudge.write
    monkeypatch.setattr(
        ModelJudge,
        "write",
        lambda self, messages, seed: (written.append(seed), plain(self, messages, seed))[1],
    )
    run = lab.run("rlaif", **settings)
    rows = read_lines(run.path / "revisions.jsonl")
    assert 0 < len(rows) == len(written)
    assert {"prompt", "completion", "reply", "critique"} <= rows[0].keys()
    assert "perplexity" in run.summary["after"]


def test_no_pair_to_compare_is_one_line():
    assert "were cut at max_new_tokens = 1" in says(
        lab.run, "rlaif", **QUICK | dict(data="chat", max_new_tokens=1)
    )


def test_errors_of_the_judge_cost_the_policy():
    gold = {
        noise: lab.run(
            "rlaif",
            **QUICK
            | dict(
                prompts=256, steps=40, batch_size=8, eval_rows=128, learning_rate=3e-4, noise=noise
            ),
        ).summary["after"]
        for noise in (0.0, 0.5)
    }
    assert gold[0.0]["pair_accuracy"] > gold[0.5]["pair_accuracy"] + 0.15
    assert gold[0.0]["accuracy"] > gold[0.5]["accuracy"] + 0.05
