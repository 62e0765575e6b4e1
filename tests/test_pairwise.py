"""The shape of methods on pairs: what an objective sees, and the template against TRL.

Also an objective without a reference, doubts and further metrics.
"""

import json
import math
import re
import types

import pytest
import torch
from conftest import ROOT, shaken, trl_pairs

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.core.settings import Settings
from polm_lab.core.method import REGISTRY
from polm_lab.core.run import Run
from polm_lab.data.load import load_data
from polm_lab.models.policy import Policy
from polm_lab.training import pairwise
from polm_lab.training.answers import Answers, answer_batches, batch_answers, encode_answers
from polm_lab.training.answers import logps_table, side_logps, table_answers
from polm_lab.training.pairwise import Objective, train_pairs, wrong_way
from polm_lab.training.reference import no_reference

SHORT = dict(
    data="sums",
    steps=2,
    batch_size=4,
    eval_rows=4,
    max_length=64,
    device="cpu",
    dtype="float32",
    learning_rate=1e-3,
    warmup=0.0,
)


@pytest.fixture(scope="module")
def template():
    """The exported code of the template as a module.

    Its method is registered while the tests of this file run.
    """
    module = types.ModuleType("template_of_pairwise")
    for cell in json.loads((ROOT / "nbs/_template/pairwise.ipynb").read_text(encoding="utf-8"))[
        "cells"
    ]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^#\| *export\b", source, re.M):
            exec(source, vars(module))
    yield module
    REGISTRY.pop("ipo")


def run_of(objective, out, **changes) -> Run:
    "A short run of `train_pairs` with an objective."
    run = Run.create("example", {}, out=out)
    train_pairs(run, Settings(**SHORT | changes), objective)
    return run


def mean_logp(answers: Answers):
    return answers.logp / answers.tokens


def without_reference(**more) -> Objective:
    def loss(chosen, rejected, doubt):
        return -torch.nn.functional.logsigmoid(mean_logp(chosen) - mean_logp(rejected))

    return Objective(loss, mean_logp, reference=False, **more)


# What an objective sees ---------------------------------------------------------------------------


def test_a_batch_and_a_table_show_the_same_answers(tokenizer, start):
    "Padding changes neither log-probabilities nor lengths, and the prompt is no part of an answer."
    pairs = encode_answers(tokenizer, load_data("chat", "preference", "test")[:5], 128)
    policy, ref = Policy(start), torch.randn(5, 2)
    known = table_answers(pairs, logps_table(policy, pairs, tokenizer.pad_token_id, 1), ref)
    seen = 0
    for batch in answer_batches(pairs, 3, tokenizer.pad_token_id):
        rows = batch["rows"]
        for side, other in zip(
            batch_answers(policy, batch, lambda b: ref[b["rows"]].unbind(1)), known
        ):
            assert torch.allclose(side.logp, other.logp[rows], atol=2e-4)
            assert torch.equal(side.ref_logp, other.ref_logp[rows])
            assert torch.equal(side.tokens, other.tokens[rows])
        seen += len(rows)
    lengths = [sum(pair["rejected"]["completion_mask"]) for pair in pairs]
    assert seen == 5
    assert known[1].tokens.tolist() == lengths
    assert len(set(lengths)) > 1


def test_one_of_two_errors_turns_a_pair():
    assert wrong_way(0.1, 0.0) == 0.1
    assert wrong_way(0.0, 0.3) == 0.3
    assert wrong_way(0.5, 0.3) == 0.5
    assert wrong_way(0.1, 0.2) == pytest.approx(0.1 * 0.8 + 0.9 * 0.2)


# The template -------------------------------------------------------------------------------------


def test_ipo_by_hand(template):
    "Gains of 1/2 and -1/4 nats a token: a gap of 3/4, where 1/(2 · 0.4) is asked for."
    chosen = Answers(torch.tensor([-3.0]), torch.tensor([-5.0]), torch.tensor([4]))
    rejected = Answers(torch.tensor([-3.0]), torch.tensor([-2.5]), torch.tensor([2]))
    assert template.ipo_loss(chosen, rejected, 0.4).item() == pytest.approx((0.75 - 1.25) ** 2)
    assert template.ipo_loss(chosen, rejected, 0.4, 0.25).item() == pytest.approx(
        (0.75 - 0.625) ** 2
    )


def test_a_doubted_pair_pulls_like_the_mean_over_both_labels(template):
    a, b = (
        Answers(torch.randn(6, requires_grad=True), torch.randn(6), torch.arange(1, 7))
        for _ in range(2)
    )
    doubt = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
    mixed = (1 - doubt) * template.ipo_loss(a, b, 0.2) + doubt * template.ipo_loss(b, a, 0.2)
    found, expected = (
        torch.autograd.grad(x.sum(), a.logp)[0]
        for x in (template.ipo_loss(a, b, 0.2, doubt), mixed)
    )
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_ipo_loss_and_gradient_are_trls(template, tokenizer, start, tmp_path, tau):
    trainer, batch, theirs = trl_pairs(tokenizer, start, tmp_path, beta=tau, loss_type="ipo")
    with torch.no_grad():
        reference = side_logps(Policy(start), batch)
    model = shaken(start)
    chosen, rejected = batch_answers(Policy(model), batch, lambda batch: reference)
    ours = template.ipo_loss(chosen, rejected, tau).mean()
    ours.backward()
    assert abs(ours.item() - 0.25 / tau**2) > 1e-2  # far from the start, where all pairs are alike
    assert ours.item() == pytest.approx(theirs, rel=1e-5)
    for (name, p), q in zip(model.named_parameters(), trainer.model.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-4 * max(q.grad.norm().item(), 1e-3), name


def test_ipo_by_trl_trains_the_same_model(template, runs):
    more = dict(SHORT, clip=0.0, schedule="constant", tau=1.0)
    ours, theirs = (lab.run("ipo", **more, engine=engine) for engine in ("lab", "trl"))
    for a, b in zip(ours.lines(), theirs.lines(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-4)
        assert a["logp_chosen"] == pytest.approx(b["logp_chosen"], abs=2e-3)
    assert ours.lines()[0]["loss"] == pytest.approx(0.25, rel=1e-5)
    assert ours.summary["after"]["margin"] == pytest.approx(
        theirs.summary["after"]["margin"], abs=5e-3
    )
    assert ours.summary["before"]["margin"] == 0.0
    assert ours.summary["after"]["margin"] != 0.0


# Objectives of other kinds ------------------------------------------------------------------------


def test_an_objective_without_a_reference_asks_for_none(tmp_path, monkeypatch):
    "No pass over the training pairs, no knob, no line in the log; held-out pairs are still ranked."
    passes, original = [], pairwise.logps_table

    def counted(policy, pairs, *rest):
        passes.append(len(pairs))
        return original(policy, pairs, *rest)

    monkeypatch.setattr(pairwise, "logps_table", counted)
    monkeypatch.setattr(pairwise, "make_reference", None)
    run = run_of(without_reference(), tmp_path)
    assert passes == [4, 4]
    assert run.summary["after"]["margin"] != run.summary["before"]["margin"] != 0.0
    assert {"kl", "logp_chosen", "pair_accuracy", "accuracy"} <= set(run.summary["after"])
    assert "reference" not in "\n".join(
        run.path.joinpath("log.txt").read_text().splitlines()
        if run.path.joinpath("log.txt").exists()
        else []
    )
    sampled = run.lines("samples")
    first = sampled[0]
    assert first["reward"] == pytest.approx(sum(first["logp"]) / len(first["ids"]), abs=1e-3)
    assert no_reference(dict(rows=torch.arange(3), sides=2)).tolist() == [[0.0] * 3] * 2


def test_trl_is_refused_where_it_has_no_such_loss(tmp_path):
    with pytest.raises(WrongInput, match="TRL has no such loss on pairs"):
        run_of(without_reference(), tmp_path, engine="trl")


def test_doubts_of_the_data_reach_the_loss(tmp_path):
    data = tmp_path / "pairs.jsonl"
    rows = [
        dict(prompt=f"{i}+1=", chosen=str(i + 1), rejected=str(i + 2), probability=p)
        for i in range(20)
        for p in (0.6, 1.0)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = Objective(lambda a, b, doubt: doubt + 0 * a.logp, mean_logp, reference=False)
    found = run_of(objective, tmp_path / "runs", data=str(data), batch_size=16, steps=4).lines()
    assert 0.0 < sum(row["loss"] for row in found) / 4 < 0.4
    counts = [row["loss"] * 16 / 0.4 for row in found]  # how many of a batch are doubted
    assert counts == pytest.approx([round(n) for n in counts], abs=1e-4)
    assert sum(counts) > 0


def test_further_metrics_are_logged_with_and_without_training(tmp_path):
    objective = without_reference(metrics=lambda a, b: dict(length_chosen=a.tokens.float()))
    run = run_of(objective, tmp_path)
    assert run.lines()[0]["length_chosen"] >= 1
    assert run.summary["before"]["length_chosen"] >= 1
    assert math.isfinite(run.lines()[-1]["loss"])
