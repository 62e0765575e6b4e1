"""RLOO, ReMax, REINFORCE++: closed forms, unbiased estimates, and equality with TRL.

Also runs that repeat to the bit, and wrong input.
"""

import copy
import itertools
import math

import datasets
import pytest
import torch
from trl import RLOOConfig, RLOOTrainer

import polm_lab as lab
from polm_lab.alignment.rloo import (
    ALGORITHMS,
    RLOO,
    answer_advantages,
    answer_loss,
    batch_loss,
    spread_over_tokens,
    token_advantages,
    token_loss,
    trl_config,
)
from polm_lab.data.load import load_data
from polm_lab.training.evaluate import scorer
from polm_lab.core.knobs import WrongInput
from polm_lab.models.policy import Policy
from polm_lab.core.metrics import metric
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.training.onpolicy import (
    draw_groups,
    make_batches,
    add_reference_logps,
    sequence_kl,
    token_values,
)
from polm_lab.models.rollout import end_tokens
from polm_lab.core.run import Run, Stopped
from polm_lab.training.loop import Meter
from polm_lab.rewards.functions import as_reward_fn, for_trl, make_rewards
from polm_lab.training.chain import create, execute

SHORT = dict(
    steps=3,
    batch_size=8,
    num_generations=4,
    eval_rows=2,
    max_new_tokens=8,
    device="cpu",
    dtype="float32",
    save_every=0,
)


# Closed forms -------------------------------------------------------------------------------------


def test_estimates_against_others_and_against_the_greedy_answer_are_unbiased():
    scores = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    worth, p = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64), scores.detach().softmax(0)
    [true] = torch.autograd.grad((scores.softmax(0) * worth).sum(), scores)
    slopes = torch.eye(3, dtype=torch.float64) - p
    for samples in (2, 3):
        for greedy in (None, worth[p.argmax()].expand(samples)):
            mean = 0
            for pair in map(list, itertools.product(range(3), repeat=samples)):
                mean = mean + p[pair].prod() * (
                    answer_advantages(worth[pair], samples, greedy)[:, None] * slopes[pair]
                ).mean(0)
            assert torch.allclose(mean, true, atol=1e-12)


def test_advantages_of_answers():
    nan = math.nan
    totals = torch.tensor([1.0, 0, 0, 0, 5, 5, nan, nan, 7, nan, nan, nan])
    plain, scaled = (
        answer_advantages(totals, 4, normalize=normalize) for normalize in (False, True)
    )
    assert torch.allclose(plain, torch.tensor([1, -1 / 3, -1 / 3, -1 / 3, 0, 0, 0, 0, 0, 0, 0, 0]))
    counted = plain[:6]  # an answer without a reward, or without another one, counts nowhere
    assert torch.allclose(scaled[:6], (counted - counted.mean()) / (counted.std() + 1e-4))
    assert not scaled[6:].any()
    assert answer_advantages(
        torch.tensor([1.0, nan, 3, 0]), 2, torch.tensor([0.0, 1, nan, 2])
    ).tolist() == [1, 0, 0, -2]


def test_a_token_is_charged_for_the_kl_from_its_own_place_on():
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]])
    found = token_advantages(
        torch.tensor([1.0, -2.0]), torch.tensor([[9.0, 1, 2, 3], [9, 4, 9, 9]]), mask, 0.5
    )
    assert torch.equal(found, torch.tensor([[0, 1 - 3, 1 - 2.5, 1 - 1.5], [0, -2 - 2, 0, 0]]))


def microbatches(rewards=(1.0, 0.0, 3.0, -1.0)):
    "Four answers of 1 to 4 tokens in two microbatches, by hand."
    batches = []
    for rows in ([3, 2], [1, 0]):
        mask = (torch.arange(5) < torch.tensor([[r + 2] for r in rows])).long() * (
            torch.arange(5) > 0
        ).long()
        batches.append(
            dict(
                rows=torch.tensor(rows),
                completion_mask=mask,
                old_logp=-1.0 * mask,
                ref_logp=-1.5 * mask,
            )
        )
    return torch.tensor(rewards), batches


def test_reinforce_plus_plus_whitens_over_all_tokens_of_the_step():
    rewards, batches = microbatches()
    means = spread_over_tokens(rewards, batches, 0.1)
    tokens = token_values(batches, "advantages")
    direct = []
    for n, r in enumerate(rewards.tolist()):
        direct.append([r - 0.1 * 0.5 * (n + 1 - t) for t in range(n + 1)])
    flat = torch.tensor([v for row in direct for v in row])
    expected = [((torch.tensor(row) - flat.mean()) / flat.std()).tolist() for row in direct]
    assert [len(row) for row in tokens] == [1, 2, 3, 4]
    for found, wanted, mean in zip(tokens, expected, means):
        assert found == pytest.approx(wanted, abs=1e-5)
        assert mean.item() == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)
    assert sum(b["weight"] for b in batches) == 10
    rewards, batches = microbatches((1.0, math.nan, 3.0, -1.0))
    means = spread_over_tokens(rewards, batches, 0.1)
    tokens = token_values(batches, "advantages")
    assert tokens[1] == []
    assert means[1] == 0
    assert sum(b["weight"] for b in batches) == 8


def test_the_first_update_is_reinforce():
    "At ratio 1 the gradient of both losses is -A on each learned token."
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
    for loss, advantages in (
        (answer_loss, torch.tensor([2.0, -1.0])),
        (token_loss, torch.tensor([[0.0, 2, 2], [0, -1, -1]])),
    ):
        logp = torch.full((2, 3), -1.0, requires_grad=True)
        loss(logp, logp.detach(), advantages, mask, 0.2, 0.2)[0].backward()
        assert logp.grad.tolist() == [[0, -2, -2], [0, 1, 0]]


def test_an_answer_is_clipped_as_one():
    mask, old = torch.ones(2, 3), torch.full((2, 3), -1.0)
    logp = (old + torch.tensor([[0.1], [0.05]])).requires_grad_()
    summed, ratio = answer_loss(logp, old, torch.tensor([1.0, 1.0]), mask, 0.2, 0.2)
    summed.backward()
    assert torch.allclose(ratio, torch.tensor([0.3, 0.15]).exp())
    assert not logp.grad[0].any()
    assert torch.allclose(logp.grad[1], -ratio[1].detach().expand(3))
    assert summed.item() == pytest.approx(-1.2 - math.exp(0.15))


# TRL ----------------------------------------------------------------------------------------------


def shaken(model, seed):
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data += 0.01 * torch.randn_like(p)
    return model


@pytest.mark.parametrize(
    "beta, normalize, updates", [(0.0, False, 2), (0.3, False, 1), (0.3, True, 2)]
)
def test_the_step_is_trls_from_rewards_to_gradient(beta, normalize, updates, tmp_path):
    tokenizer, start = load_tokenizer("tiny"), load_model("tiny", dtype="float32", device="cpu")
    settings = RLOO(
        num_generations=4,
        batch_size=12,
        max_new_tokens=8,
        updates=updates,
        beta=beta,
        normalize=normalize,
        clip_low=0.01,
        clip_high=0.02,
    )
    rows = load_data("sums#3", "prompt")
    rewards = make_rewards("correct:1.5,length", scorer("sums", rows), 8)
    old, reference = Policy(copy.deepcopy(start)), Policy(shaken(start, 1))
    groups = draw_groups(
        old,
        tokenizer,
        as_reward_fn(rewards),
        [(s, row, tokenizer(row["prompt"]).input_ids) for s, row in enumerate(rows)],
        settings,
        0,
        0,
    )
    [batch] = batches = make_batches(groups, 12, tokenizer.pad_token_id)
    add_reference_logps(reference, batches, groups, 1.0)
    totals = torch.tensor([r for g in groups for r in g.rewards]) - beta * sequence_kl(
        batches, "k1"
    )
    ours = answer_advantages(totals, 4, normalize=normalize)

    config = RLOOConfig(
        str(tmp_path),
        **trl_config(settings),
        reward_weights=[1.5, 1.0],
        per_device_train_batch_size=12,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    data = datasets.Dataset.from_list([dict(row) for row in rows for _ in range(4)])
    trainer = RLOOTrainer(
        old.model,
        for_trl(rewards, end_tokens(old.model, tokenizer)),
        config,
        train_dataset=data,
        processing_class=tokenizer,
    )
    if beta:
        trainer.ref_model.load_state_dict(reference.model.state_dict())
    trainer._generate_single_turn = lambda *_: [ids for g in groups for ids in g.completions]
    inputs = trainer._generate_and_score_completions([dict(row) for row in data])
    assert torch.allclose(ours, inputs["advantages"], atol=1e-4)
    assert ours.abs().max() > 0.1
    moved = (
        shaken(start, 2) if updates > 1 else start
    )  # with one update the policy is the one that sampled
    trainer.model.load_state_dict(moved.state_dict())
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs["advantages"] = ours  # a ratio of log-prob roundings is not what is compared
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()

    policy, meter = Policy(copy.deepcopy(moved)), Meter()
    batch["advantages"] = ours[batch["rows"]]
    loss = batch_loss(policy, batch, settings, meter) / 12
    loss.backward()
    g_ours = torch.cat([p.grad.flatten() for p in policy.parameters()])
    g_theirs = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert abs(loss.item() - theirs.item()) < 1e-5
    assert (g_ours - g_theirs).norm() < 1e-5 * g_theirs.norm()
    assert (
        updates == 1 or meter.means()["clip_fraction"] > 0.3
    )  # away from the first update, where much would be equal by itself


def test_trls_engine_leaves_the_record(runs):
    run = lab.run(
        "rloo",
        engine="trl",
        eval_rows=4,
        steps=2,
        batch_size=8,
        num_generations=4,
        max_new_tokens=8,
        max_length=64,
        device="cpu",
        dtype="float32",
    )
    rows = run.lines("samples")
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8
    assert all(len(row["ids"]) == len(row["tokens"]) for row in rows)
    for step, metrics in enumerate(run.lines(), 1):
        assert metrics["reward"] == pytest.approx(
            sum(row["reward"] for row in rows if row["step"] == step) / 8, abs=1e-5
        )
        assert "kl" in metrics
    assert sum(row["advantage"] for row in rows[:4]) == pytest.approx(0, abs=1e-4)
    assert run.summary["after"]["kl"] > 0


# Runs ---------------------------------------------------------------------------------------------


def weights(run):
    return (run.path / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_estimator_repeats_to_the_bit_stops_and_goes_on(algorithm, tmp_path, monkeypatch):
    settings = SHORT | dict(algorithm=algorithm, updates=2, save_every=1)
    first = lab.run("rloo", **settings, out=tmp_path / "whole")
    again = create("rloo", settings, out=tmp_path / "parts", via="bare")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "stop_requested", lambda self: self.record["step"] == 1)
        execute(again)
    assert again.status == "stopped"
    again = Run(again.path)
    execute(again)
    assert weights(first) == weights(again)
    assert (
        weights(first) != (lab.models.sources.model_path("tiny") / "model.safetensors").read_bytes()
    )
    assert first.lines("samples") == again.lines("samples")
    names = {name for row in [*first.lines(), *first.summary.values()] for name in row} - {
        "step",
        "seconds",
    }
    assert all(map(metric, names))
    assert {
        "reward",
        "reward_std",
        "kl",
        "entropy",
        "clip_fraction",
        "ratio_max",
        "advantage_std",
        "length",
        "zero_std_groups",
    } <= names
    learned = [row for row in first.lines("samples") if "group" in row]
    assert len(learned) == 24
    assert len(first.lines("samples")) == 30
    if algorithm == "reinforce++":
        assert all(len(row["advantages"]) == len(row["ids"]) for row in learned)


def test_estimators_learn_from_the_same_answers_but_differently(tmp_path):
    found = {
        e: lab.run("rloo", **SHORT | dict(steps=1), algorithm=e, out=tmp_path) for e in ALGORITHMS
    }
    first = []
    for run in found.values():
        first.append([row["completion"] for row in run.lines("samples") if "group" in row])
    assert first[0] == first[1] == first[2]
    assert len({weights(run) for run in found.values()}) == 3


def test_rewards_that_are_all_equal_change_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def same(completions):\n    return [3.0] * len(completions)\n"
    )
    for algorithm in ALGORITHMS:
        run = lab.run(
            "rloo",
            **SHORT,
            algorithm=algorithm,
            rewards=f"{tmp_path}/mine.py:same",
            beta=0.0,
            out=tmp_path,
        )
        assert [row["grad_norm"] for row in run.lines()] == pytest.approx([0.0] * 3, abs=1e-6)
        assert "kl" not in run.lines()[0]


REFUSED = {
    "groups are not whole": (dict(batch_size=6), "multiple of num_generations = 4"),
    "unknown estimator": (dict(algorithm="reinforce"), "one of rloo, remax, reinforce++"),
    "TRL has no ReMax": (dict(engine="trl", algorithm="remax"), "expected rloo"),
    "no room": (dict(max_length=9), "max_length - max_new_tokens = 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_settings_are_refused(name, tmp_path):
    changes, says = REFUSED[name]
    with pytest.raises(WrongInput) as wrong:
        lab.run("rloo", **SHORT | changes, out=tmp_path)
    assert says in str(wrong.value)
    assert "\n" not in str(wrong.value)
