"""The formulas inside of a run, recomputed from its own record.

The KL of RLOO and GRPO, PPO's entropy bonus, perplexity, forgetting.
"""

import math

import pytest
import torch

from polm_lab.training import conformance as check
from polm_lab.data import load as data
from polm_lab.training.evaluate import Evaluation, mean_nll, perplexity, with_rows
from polm_lab.data.encode import encode
from polm_lab.models.policy import Policy
from polm_lab.core.method import find
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.training.advantages import group_advantages, leave_one_out
from polm_lab.data.tasks import TASKS

# A large learning rate moves the policy away from its reference in a step or two, so that the KL
# has as much weight as the reward.
FAR = dict(
    data="sums",
    steps=3,
    batch_size=8,
    num_generations=4,
    max_new_tokens=12,
    eval_rows=2,
    save_every=0,
    learning_rate=3e-3,
    schedule="constant",
    updates=1,
)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(data, "TRAIN_ROWS", 32)


def steps_of(run):
    "The sampled answers of each step after the first, in which the policy is still its reference."
    rows = [row for row in run.lines("samples") if "advantage" in row and row["step"] > 1]
    found = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        found.setdefault(row["step"], []).append(row)
    return found


def gaps(row):
    "log π - log π_ref of each token of an answer."
    return torch.tensor(row["logp"], dtype=torch.float64) - torch.tensor(
        row["ref_logp"], dtype=torch.float64
    )


def k3(gap):
    return torch.expm1(-gap) + gap


@pytest.mark.parametrize("algorithm, beta", [("rloo", 0.05), ("rloo", 0.5), ("reinforce++", 0.5)])
def test_rloo_takes_beta_times_the_kl_off_the_reward(algorithm, beta, tmp_path):
    run = check.short_run(find("rloo"), tmp_path, algorithm=algorithm, beta=beta, **FAR)
    found = steps_of(run)
    assert list(found) == [2, 3]
    assert all(len(rows) == 8 for rows in found.values())
    tolls = []
    for rows in found.values():
        rewards, each = (
            torch.tensor([row["reward"] for row in rows], dtype=torch.float64),
            [gaps(row) for row in rows],
        )
        recorded = torch.tensor([row["advantage"] for row in rows], dtype=torch.float64)
        if algorithm == "rloo":
            kl = torch.stack([gap.sum() for gap in each])
            expected = leave_one_out(rewards - beta * kl, 4)
        else:  # whitened over the tokens of the step, as the page says
            tokens = [
                reward - beta * gap.flip(0).cumsum(0).flip(0) for reward, gap in zip(rewards, each)
            ]
            every = torch.cat(tokens)
            tokens = [(t - every.mean()) / (every.var() + 1e-8).sqrt() for t in tokens]
            expected, kl = (
                torch.stack([t.mean() for t in tokens]),
                torch.stack([gap.sum() for gap in each]),
            )
            for row, t in zip(rows, tokens):
                assert torch.tensor(row["advantages"], dtype=torch.float64) == pytest.approx(
                    t, abs=0.02
                )
        assert recorded == pytest.approx(expected, abs=0.02 if algorithm != "rloo" else 2e-3)
        tolls.append(beta * (kl - kl.mean()).abs().max().item())
    assert max(tolls) > 0.02  # with the other sign, or another β, the advantages would be others


@pytest.mark.parametrize("beta", [0.04, 1.0])
def test_grpo_adds_beta_times_k3_to_the_loss(beta, tmp_path):
    run = check.short_run(find("grpo"), tmp_path, beta=beta, kl="k3", **FAR)
    logged = {row["step"]: row for row in run.lines()}
    assert logged[1]["loss"] == pytest.approx(
        0.0, abs=1e-4
    )  # advantages add up to 0, and the policy is its reference
    for step, rows in steps_of(run).items():
        divergence = torch.stack([k3(gaps(row)).mean() for row in rows]).mean().item()
        advantage = torch.tensor([row["advantage"] for row in rows]).mean().item()
        assert divergence > 0.01
        assert logged[step]["loss"] == pytest.approx(
            beta * divergence - advantage, rel=5e-3, abs=2e-5
        )
        tokens = torch.cat([k3(gaps(row)) for row in rows])
        assert logged[step]["kl"] == pytest.approx(tokens.mean().item(), rel=5e-3)


@pytest.mark.parametrize("kl", ["k1_reward", "k2_reward", "k3_reward"])
def test_grpo_takes_beta_times_the_kl_off_the_reward(kl, tmp_path):
    beta = 0.3
    estimate = dict(
        k1_reward=lambda gap: gap, k2_reward=lambda gap: gap.square() / 2, k3_reward=k3
    )[kl]
    run = check.short_run(find("grpo"), tmp_path, beta=beta, kl=kl, scale="none", **FAR)
    logged = {row["step"]: row for row in run.lines()}
    for step, rows in steps_of(run).items():
        rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
        tolls = beta * torch.stack([estimate(gaps(row)).sum() for row in rows])
        expected, _ = group_advantages(rewards - tolls, 4, "none")
        assert torch.tensor(
            [row["advantage"] for row in rows], dtype=torch.float64
        ) == pytest.approx(expected, abs=3e-3)
        assert (tolls - tolls.mean()).abs().max() > 0.03
        assert logged[step]["loss"] == pytest.approx(0.0, abs=1e-4)  # none of it is in the loss


def test_ppo_takes_the_entropy_off_its_loss(tmp_path):
    shared = dict(
        data="sums",
        steps=1,
        batch_size=8,
        max_new_tokens=8,
        epochs=1,
        minibatches=1,
        eval_rows=2,
        save_every=0,
        value="shared:0.1",
    )
    losses, entropies = {}, set()
    for weight in (0, 0.5, 2):
        details = "whiten_advantages,missing_eos" + (f",entropy:{weight}" if weight else "")
        (row,) = check.short_run(find("ppo"), tmp_path, details=details, **shared).lines()
        losses[weight] = row["loss"]
        entropies.add(row["entropy"])
        assert row["entropy_coefficient"] == weight
    (entropy,) = entropies  # of the same answers by the same policy
    assert entropy > 0.1
    assert losses[0.5] == pytest.approx(losses[0] - 0.5 * entropy, abs=1e-5)
    assert losses[2] == pytest.approx(losses[0] - 2 * entropy, abs=1e-5)


@pytest.fixture(scope="module")
def tiny():
    return Policy(load_model("tiny", "float32", "cpu")), load_tokenizer("tiny")


def test_perplexity_is_of_learned_tokens_alone(tiny):
    policy, tokenizer = tiny
    rows = [
        encode(tokenizer, row, "completion", 256)
        for row in TASKS["chat"].rows("completion", 5, 1, "test")
    ]
    learned, every = [], []
    for row in rows:  # one by one, without padding
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logp = torch.log_softmax(policy.model(ids).logits[0, :-1].double(), -1)
        of_tokens = logp.gather(1, ids[0, 1:, None])[:, 0]
        every.append(of_tokens)
        learned.append(of_tokens[torch.tensor(row["completion_mask"][1:]).bool()])
    pad, mean = tokenizer.pad_token_id, -torch.cat(learned).mean().item()
    assert mean_nll(policy, rows, pad) == pytest.approx(mean, rel=1e-5)
    assert perplexity(policy, rows, pad) == pytest.approx(math.exp(mean), rel=1e-5)
    assert abs(-torch.cat(every).mean().item() - mean) > 0.05
    assert len(torch.cat(every)) > 1.5 * len(torch.cat(learned))
    assert perplexity(policy, rows, pad, rows=2) == pytest.approx(math.exp(mean), rel=1e-5)


def test_forgetting_is_above_zero_where_other_text_got_worse(tiny):
    _, tokenizer = tiny
    policy, rows = (
        Policy(load_model("tiny", "float32", "cpu")),
        TASKS["sums"].rows("completion", 3, 1, "test"),
    )
    evaluation = Evaluation(
        policy, tokenizer, rows, "completion", max_length=64, others=("chat", "facts")
    )
    before = evaluation()
    assert "forgetting" not in before
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    after = evaluation()
    worse = [
        math.log(after[f"perplexity/{name}"]) - math.log(before[f"perplexity/{name}"])
        for name in ("chat", "facts")
    ]
    assert min(worse) > 0.05
    assert after["forgetting"] == pytest.approx(sum(worse) / 2, rel=1e-9)
    assert after == with_rows(
        after, 3, {"perplexity/chat": 16, "perplexity/facts": 16, "forgetting": 32}
    )
