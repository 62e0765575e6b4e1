"""Objectives on unpaired and ranked rows: what they see, closed forms, and methods of tests.

Those are three pages with a loss only, of the form of KTO, BCO and listwise DPO.
Each passes the conformance suite.
"""

import json
import math
import shutil
import sys
import types

import pytest
import torch
from conftest import ROOT, proof, shaken

from polm_lab.alignment.dpo import dpo_loss
from polm_lab.core.knobs import WrongInput
from polm_lab.core.settings import Settings
from polm_lab.core.method import REGISTRY
from polm_lab.core.run import Run
from polm_lab.data.load import load_data
from polm_lab.data.rows import Row
from polm_lab.models.policy import Policy, sharing_pays
from polm_lab.training.answers import (
    Answers,
    answer_batches,
    batch_answers,
    drop_equal,
    encode_answers,
)
from polm_lab.training.answers import (
    logps_table,
    marks_of,
    mismatched,
    sides_of,
    stacked,
    table_answers,
)
from polm_lab.training.pairwise import Objective, couples, train_pairs, with_baseline

START = """
from dataclasses import dataclass

import torch
from torch import Tensor

from polm_lab.core.knobs import knob
from polm_lab.core.settings import Settings, redefault
from polm_lab.core.method import method
from polm_lab.core.run import Run
from polm_lab.training.answers import Answers
from polm_lab.training.pairwise import Objective, train_pairs
from polm_lab.training.reference import reference_knob
"""
SETTINGS = """

@dataclass(kw_only=True)
class Mine(Settings):
    "Settings of a method of tests."

    beta: float = knob(0.1, "strength of the KL term", "reward/nat", low=1e-6, high=100)
    reference: str = reference_knob()
    data: str = redefault("data", "sums")


def ratio(answers: Answers) -> Tensor:
    return answers.logp - answers.ref_logp
"""
KTO = '''
def kto_loss(answers, labels, baseline, beta, good=1.0, bad=1.0):
    """lambda_y - v of each row [rows] (Ethayarajh et al. 2024, eq. 8); `baseline` is z_0, nats."""
    gap = beta * (ratio(answers) - baseline)
    return torch.where(labels, good * (1 - torch.sigmoid(gap)), bad * (1 - torch.sigmoid(-gap)))


def z0(answers, labels, last):
    """Mean log-ratio of answers to other prompts, at least 0: an estimate of the KL divergence."""
    return ratio(answers).mean().clamp(min=0)


@method(family="alignment", title="KTO-like", data="unpaired", needs=("reference",))
def ktolike(settings: Mine, run: Run) -> None:
    "Learn from answers that are good or bad."
    objective = Objective(
        lambda answers, labels, baseline: kto_loss(answers, labels, baseline, settings.beta),
        lambda answers: settings.beta * ratio(answers),
        kind="unpaired", baseline=z0, mismatch=True,
    )
    train_pairs(run, settings, objective)
'''
BCO = """
@method(family="alignment", title="BCO-like", data="unpaired", needs=("reference",))
def bcolike(settings: Mine, run: Run) -> None:
    "Tell good answers from bad ones, around a running mean of the rewards."

    def reward(answers):
        return settings.beta * ratio(answers)

    def running(answers, labels, last):
        now = reward(answers).mean() + 0.01  # not 0 at the start, where all rewards are
        return now if last is None else 0.5 * last + 0.5 * now

    def loss(answers, labels, baseline):
        gap = 10 * (reward(answers) - baseline)
        return torch.nn.functional.softplus(torch.where(labels, -gap, gap))

    train_pairs(run, settings, Objective(loss, reward, kind="unpaired", baseline=running))
"""
LISTWISE = '''
def plackett_luce(answers, scores, beta):
    """-log probability of the order of each row [rows] (Rafailov et al. 2023, appendix A.3)."""
    rewards = beta * ratio(answers)
    below = rewards.flip(1).logcumsumexp(1).flip(1)  # of an answer and all below it
    return (below - rewards).sum(1)


@method(family="alignment", title="Listwise DPO", data="ranked", needs=("reference",))
def listwise(settings: Mine, run: Run) -> None:
    "Learn an order of several answers."
    objective = Objective(
        lambda answers, scores: plackett_luce(answers, scores, settings.beta),
        lambda answers: settings.beta * ratio(answers), kind="ranked",
    )
    train_pairs(run, settings, objective)
'''
PAGES = {"ktolike": KTO, "bcolike": BCO, "listwise": LISTWISE}
SHORT = dict(
    data="sums",
    steps=3,
    batch_size=4,
    eval_rows=8,
    max_length=64,
    device="cpu",
    dtype="float32",
    learning_rate=1e-3,
    warmup=0.0,
)


@pytest.fixture(scope="module")
def page():
    "The code of all three pages; their methods are known while the tests of this file run."
    module = types.ModuleType("pages_of_tests")
    sys.modules["pages_of_tests"] = module
    exec(START + SETTINGS + KTO + BCO + LISTWISE, vars(module))
    yield module
    for name in PAGES:
        REGISTRY.pop(name)
    del sys.modules["pages_of_tests"]


def some_answers(*shape, seed=0) -> Answers:
    torch.manual_seed(seed)
    logp, ref = torch.randn(2, *shape, dtype=torch.float64)
    return Answers(logp.requires_grad_(), ref, torch.randint(1, 9, shape))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# What an objective sees ---------------------------------------------------------------------------


def test_couples_of_unpaired_rows_and_of_rankings():
    "Good over bad of all rows that are seen; higher over lower score of the same row, and no ties."
    answers = Answers(torch.arange(4.0), torch.zeros(4), torch.ones(4))
    better, worse = couples((answers,), dict(labels=torch.tensor([False, True, False, True])))
    assert list(zip(better.logp.tolist(), worse.logp.tolist())) == [(1, 0), (1, 2), (3, 0), (3, 2)]
    sides = tuple(
        Answers(torch.tensor([k, k + 10.0]), torch.zeros(2), torch.ones(2)) for k in range(3)
    )
    scores = torch.tensor([[2.0, 1.0, 1.0], [5.0, 4.0, torch.nan]])
    better, worse = couples(sides, dict(scores=scores))
    assert list(zip(better.logp.tolist(), worse.logp.tolist())) == [(0, 1), (0, 2), (10, 11)]
    nothing, _ = couples((answers,), dict(labels=torch.ones(4, dtype=torch.bool)))
    assert len(nothing.logp) == 0


@pytest.mark.parametrize("kind", ["unpaired", "ranked"])
def test_a_batch_and_a_table_show_the_same_answers(tokenizer, start, kind):
    "Each is plain log-softmax on the answer alone; rankings of unlike length stay apart."
    rows = load_data("chat", kind, "test")[:5]
    if kind == "ranked":
        rows = [
            rows[0],
            dict(rows[1], completions=rows[1]["completions"][:2], scores=rows[1]["scores"][:2]),
            *rows[2:],
        ]
    examples, pad, policy = (
        encode_answers(tokenizer, rows, 128, kind),
        tokenizer.pad_token_id,
        Policy(start),
    )
    table = logps_table(policy, examples, pad, 3)
    ref = torch.randn(table.shape)
    marks, known, seen = marks_of(examples), stacked(table_answers(examples, table, ref)), 0
    for batch in answer_batches(examples, 2, pad):
        count = batch["sides"]
        found = batch_answers(policy, batch, lambda b: ref[b["rows"], :count].unbind(1))
        found, at = stacked(found), (batch["rows"], slice(count))
        assert found.logp.shape == (len(batch["rows"]), count)
        assert torch.allclose(found.logp, known[at].logp, atol=2e-4)
        assert torch.equal(found.ref_logp, known[at].ref_logp)
        assert torch.equal(found.tokens, known[at].tokens)
        for name in ("labels", "scores"):
            if name in marks:
                assert torch.equal(
                    batch[name], marks[name][at] if name == "scores" else marks[name][at[0]]
                )
        seen += len(batch["rows"])
    assert seen == 5
    for example, values in zip(examples, table):
        for side, value in zip(sides_of(example), values.tolist()):
            ids, mask = torch.tensor(side["input_ids"]), torch.tensor(side["completion_mask"])
            logp = start(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            assert value == pytest.approx((logp * mask[1:]).sum().item(), abs=2e-4)
    if kind == "ranked":
        assert table[1].isnan().tolist() == [False, False] + [True] * (table.shape[1] - 2)


def test_the_best_answer_comes_first(tokenizer):
    row = dict(prompt="1+1=", completions=["3", "2", "4", "5"], scores=[0.5, 2, 0.5, -1])
    [example] = encode_answers(tokenizer, [row], 64, "ranked")
    texts = [
        tokenizer.decode(side["input_ids"], skip_special_tokens=True) for side in sides_of(example)
    ]
    assert [text.replace(" ", "")[-1] for text in texts] == ["2", "3", "4", "5"]
    assert example["scores"] == [2.0, 0.5, 0.5, -1.0]


def test_rankings_that_teach_nothing_are_left_out(tokenizer, tmp_path):
    "Equal scores, or equal tokens within `max_length`: no order is to be learned."
    same = "2, and once more: 1+1 is 2, and 1+1 is " * 4
    rows = [
        Row(dict(prompt="1+1=", completions=["2", "3"], scores=[1, 1]), "a:1"),
        Row(dict(prompt="1+1=", completions=["2", "3", "4"], scores=[1, 1, 0]), "a:2"),
        Row(dict(prompt="1+1=", completions=[f"{same}2", f"{same}3"], scores=[1, 0]), "a:3"),
    ]
    run, examples = (
        Run.create("example", {}, out=tmp_path),
        encode_answers(tokenizer, rows, 64, "ranked"),
    )
    left, kept = drop_equal(run, "train", rows, examples, 64)
    assert [row.where for row in left] == ["a:2"]
    assert kept[0]["row"] == 0
    assert run.read()["left_out"] == dict(train=dict(equal=2, pairs=3))
    with pytest.raises(
        WrongInput, match="1 of 1 rows .train. rank no two answers of different tokens"
    ):
        drop_equal(run, "train", rows[:1], examples[:1], 64)


def test_a_row_gets_the_answer_to_another_prompt(tokenizer):
    "As the row itself would be encoded with it; the last row takes from the first."
    rows = []
    for row in load_data("chat", "preference", "test")[:3]:
        for side in ("chosen", "rejected"):
            rows.append(dict(prompt=row["prompt"], completion=row[side], label=side == "chosen"))
    examples = encode_answers(tokenizer, rows, 128, "unpaired")
    others = mismatched(examples, 128)
    for n, taken in enumerate([2, 2, 4, 4, 0, 0]):
        row = dict(rows[n], completion=rows[taken]["completion"])
        [expected] = encode_answers(tokenizer, [row], 128, "unpaired")
        assert others[n]["row"] == 6 + n
        assert others[n]["input_ids"] == expected["input_ids"]
        assert others[n]["completion_mask"] == expected["completion_mask"]
    longest = max(len(other["input_ids"]) for other in others)
    assert (
        max(len(other["input_ids"]) for other in mismatched(examples, longest - 1)) == longest - 1
    )
    with pytest.raises(WrongInput, match="expected at least two prompts"):
        mismatched(examples[:2], 128)


def test_a_baseline_is_of_the_whole_step(page, tokenizer, start):
    "The same for one microbatch and several, of the policy as it is; the loss gets it."
    pad, examples = (
        tokenizer.pad_token_id,
        encode_answers(tokenizer, load_data("sums", "unpaired", "test")[:6], 64, "unpaired"),
    )
    others, policy, still = mismatched(examples, 64), Policy(shaken(start)), Policy(start)
    both = torch.stack([logps_table(p, others, pad, 3)[:, 0] for p in (policy, still)]).double()
    expected, asked = (both[0] - both[1]).mean().item(), []

    def baseline(answers, labels, last):
        asked.append((len(answers.logp), last))
        return page.ratio(answers).mean()

    objective = Objective(
        lambda answers, labels, z: page.kto_loss(answers, labels, z, 0.1),
        page.ratio,
        kind="unpaired",
        baseline=baseline,
        mismatch=True,
    )
    reference = lambda batch: [
        logps_table(still, [(examples + others)[i] for i in batch["rows"].tolist()], pad, 8)[:, 0]
    ]
    for size in (6, 2):
        source = with_baseline(
            policy,
            objective,
            lambda step, meter: [answer_batches(examples, size, pad)],
            reference,
            others,
            3,
            pad,
        )
        [batches] = source(0, None)
        assert len(batches) == 6 // size
        for batch in batches:
            z = batch["baseline"]
            assert z.item() == pytest.approx(expected, abs=1e-3)
            assert not z.requires_grad
            assert abs(expected) > 0.05
            sides = batch_answers(policy, batch, reference)
            assert torch.equal(
                objective.losses(sides, batch), page.kto_loss(sides[0], batch["labels"], z, 0.1)
            )
            assert not torch.equal(
                objective.losses(sides, batch), page.kto_loss(sides[0], batch["labels"], 0.0, 0.1)
            )
    [_] = source(1, None)
    assert [n for n, _ in asked] == [6] * 3
    assert asked[0][1] is None
    assert asked[1][1] is None
    assert asked[2][1].item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(kind="rank"), "kind = 'rank': "),
        (dict(kind="ranked", baseline=lambda *_: 0.0), "expected kind = 'unpaired'"),
    ],
)
def test_a_wrong_objective_is_refused_in_one_line(changes, words):
    with pytest.raises(WrongInput) as wrong:
        Objective(None, None, **changes)
    assert words in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_trl_and_wrong_data_are_refused(page, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps(dict(prompt="1+1=", chosen="2", rejected="3")) + "\n")
    for changes, words in (
        (dict(engine="trl"), "TRL has no such loss"),
        (dict(data=str(data)), "completions [+] scores"),
    ):
        run = Run.create("example", {}, out=tmp_path)
        with pytest.raises(WrongInput, match=words):
            train_pairs(
                run,
                Settings(**SHORT | changes),
                Objective(None, page.ratio, kind="ranked", reference=False),
            )


# Closed forms -------------------------------------------------------------------------------------


def test_kto_by_hand(page):
    "Values and gradients of eq. 8, for rows that are good and bad, above and below the baseline."
    answers, beta, z, good, bad = some_answers(6), 0.7, 0.3, 1.5, 0.8
    labels = torch.tensor([True, False, True, True, False, False])
    loss = page.kto_loss(answers, labels, torch.tensor(z, dtype=torch.float64), beta, good, bad)
    loss.sum().backward()
    rows = zip(
        answers.logp.tolist(),
        answers.ref_logp.tolist(),
        labels.tolist(),
        loss.tolist(),
        answers.logp.grad.tolist(),
    )
    for logp, ref, label, value, slope in rows:
        sign, weight = (1, good) if label else (-1, bad)
        s = sigmoid(sign * beta * (logp - ref - z))
        assert value == pytest.approx(weight - weight * s, rel=1e-9)
        assert slope == pytest.approx(-sign * weight * beta * s * (1 - s), rel=1e-9)
    logps = torch.tensor([1.0, 4.0]), torch.tensor([0.0, 1.0])
    assert page.z0(Answers(*logps, None), None, None) == 2.0
    assert page.z0(Answers(*logps[::-1], None), None, None) == 0.0


def test_plackett_luce_by_hand(page):
    "-log of a product of softmaxes over what is left; each softmax pulls on all that is left."
    answers, beta = some_answers(3, 4), 0.6
    loss = page.plackett_luce(answers, None, beta)
    loss.sum().backward()
    for logps, refs, value, slopes in zip(
        answers.logp.tolist(), answers.ref_logp.tolist(), loss.tolist(), answers.logp.grad.tolist()
    ):
        weights = [math.exp(beta * (logp - ref)) for logp, ref in zip(logps, refs)]
        expected, pulls = 0.0, [-beta] * 4
        for k in range(4):
            rest = sum(weights[k:])
            expected -= math.log(weights[k] / rest)
            for j in range(k, 4):
                pulls[j] += beta * weights[j] / rest
        assert value == pytest.approx(expected, rel=1e-9)
        assert slopes == pytest.approx(pulls, rel=1e-8, abs=1e-12)


def test_a_ranking_of_two_is_dpo(page):
    answers = some_answers(5, 2, seed=1)
    pair = [answers.logp[:, 0], answers.logp[:, 1], answers.ref_logp[:, 0], answers.ref_logp[:, 1]]
    assert torch.allclose(page.plackett_luce(answers, None, 0.3), dpo_loss(*pair, 0.3))


# Whole runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, first", [("ktolike", 0.5), ("listwise", math.log(120))])
def test_a_run_begins_undecided_and_learns(page, tmp_path, name, first):
    "At the start all orders of five answers are equal; ways to the reference agree."
    found, more = {}, dict(data="chat#128", steps=6, batch_size=8, learning_rate=3e-4)
    for way in ("copy", "precomputed"):
        run = found[way] = Run.create(name, {}, out=tmp_path)
        getattr(page, name)(page.Mine(**SHORT | more | dict(reference=way)), run)
    for a, b in zip(found["copy"].lines(), found["precomputed"].lines(), strict=True):
        for metric in ("loss", "margin", "reward_chosen"):
            assert a[metric] == pytest.approx(b[metric], abs=2e-4)
    before, after = (run.summary[when] for when in ("before", "after"))
    assert run.lines()[0]["loss"] == pytest.approx(first, rel=1e-5)
    assert before["margin"] == 0.0
    assert before["pair_accuracy"] == 0.5
    assert after["margin"] > 0.05
    assert after["pair_accuracy"] > 0.7
    assert {"perplexity", "kl", "gold_score", "logp_chosen"} <= set(after)
    assert after["kl"] > 0
    sides = [row["side"] for row in run.lines("samples")]
    assert set(sides) == {"chosen", "rejected", "sampled"}
    assert sides.count("sampled") == 8
    assert all(len(row["ids"]) == len(row["logp"]) for row in run.lines("samples"))


@pytest.mark.parametrize("kind", ["unpaired", "ranked"])
def test_the_data_of_a_run_may_be_a_file(page, tmp_path, kind):
    "Rankings of unlike length, and rows of one label only, which hold no couple."
    rows = [dict(prompt=f"{i}+1=", completion=str(i + 1), label=True) for i in range(12)]
    if kind == "ranked":
        rows = [
            dict(
                prompt=f"{i}+1=",
                completions=["x", str(i + 1), "y"][: 2 + i % 2],
                scores=[0, 1, -1][: 2 + i % 2],
            )
            for i in range(12)
        ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = "ktolike" if kind == "unpaired" else "listwise"
    run = Run.create(name, {}, out=tmp_path)
    getattr(page, name)(page.Mine(**SHORT | dict(data=str(data), eval_rows=4)), run)
    losses = [row["loss"] for row in run.lines()]
    assert len(losses) == 3
    assert run.summary["after"]["perplexity"] > 1
    assert (
        losses[0] == pytest.approx(0.5)
        if kind == "unpaired"
        else math.log(2) <= losses[0] <= math.log(6) + 1e-6
    )
    assert ("margin" in run.lines()[0]) == ("margin" in run.summary["after"]) == (kind == "ranked")


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    "What holds for each of the three pages, in a copy of the package."
    place = tmp_path_factory.mktemp("copy")
    for part in ("polm_lab", "data"):
        shutil.copytree(ROOT / part, place / part)
    for name, code in PAGES.items():
        (place / f"polm_lab/alignment/{name}.py").write_text(START + SETTINGS + code)
    return proof(place, PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_with_a_loss_only_passes_the_suite(proven, name):
    "Batches add up to the bit of rounding with a baseline too, and a running mean is resumed."
    found = proven[name]
    assert len(found) == 7, found
    assert all(found.values()), found


def test_the_prompt_of_a_pair_is_read_once(start, tokenizer, monkeypatch):
    # of a small model two calls cost more than they save
    prompts = torch.tensor([[0, 500], [0, 500], [7, 9]])  # 500 tokens are saved
    sizes = {48: False, 80: True}  # millions of weights
    for millions, pays in sizes.items():
        model = torch.nn.Linear(millions * 1000, 1000, device="meta")
        assert sharing_pays(model, prompts) is pays
    assert not sharing_pays(start, prompts)
    monkeypatch.setattr("polm_lab.models.policy.SHARING_PAYS", 1)
    long = " ".join(f"{n} + {n + 1} = {2 * n + 1}." for n in range(12))
    rows = [
        dict(prompt=f"{k} {long}", chosen=f" {k}", rejected=f" {k + 7} or so") for k in range(6)
    ]
    examples = encode_answers(tokenizer, rows, 512)
    policy, pad, read = Policy(shaken(start)), tokenizer.pad_token_id, []
    policy.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: read.append(args[0].numel())
    )
    table = logps_table(policy, examples, pad, 12)
    whole = sum(len(side["input_ids"]) for example in examples for side in sides_of(example))
    assert sum(read[1:]) < 0.7 * whole  # the first call looks at the head
    (batch,) = answer_batches(examples, 6, pad)
    assert "prefix" in batch
    shared = batch_answers(policy, batch, lambda b: table[b["rows"]].unbind(1))
    apart = batch_answers(policy, {**batch, "prefix": None}, lambda b: table[b["rows"]].unbind(1))
    for one, other in zip(shared, apart):
        torch.testing.assert_close(one.logp, other.logp, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(one.logp, one.ref_logp, atol=1e-4, rtol=1e-5)
