"""Each exported objective against numbers that are computed here with plain arithmetic.

So no sign, term or constant can change unseen.
"""

import itertools
import math

import pytest
import torch

from polm_lab.alignment import dpo, ppo, rloo
from polm_lab.rewards import distance as epic
from polm_lab.alignment import reward as reward_reward
from polm_lab.rewards import learned as reward_learned
from polm_lab.training import evaluate
from polm_lab.models import logprobs
from polm_lab.models.policy import TokenStats
from polm_lab.training import advantages as shared
from polm_lab.training import answers, pairwise
from polm_lab.training import loop as train
from polm_lab.efficiency import prune
from polm_lab.efficiency.adaptation import formulas as adapters
from polm_lab.efficiency.compression import sparse
from polm_lab.finetuning import sft
from polm_lab.integration import fuse, reader, retriever
from polm_lab.integration.merging import task_vectors
from polm_lab.reasoning import grpo
from polm_lab.rewards import functions as rewards
from polm_lab.recipes import overoptimization


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, tolerance=1e-9):
    found = found.tolist() if torch.is_tensor(found) else found
    assert found == pytest.approx(expected, abs=tolerance)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# Pairs --------------------------------------------------------------------------------------------


def test_dpo():
    close(dpo.implicit_reward(t(-2.0), t(-3.0), 0.5), [0.5])
    margin = 0.5 * ((-2.0 + 3.0) - (-4.0 + 1.0))
    plain, turned = -math.log(sigmoid(margin)), -math.log(sigmoid(-margin))
    close(dpo.dpo_loss(t(-2.0), t(-4.0), t(-3.0), t(-1.0), 0.5), [plain])
    close(
        dpo.dpo_loss(t(-2.0), t(-4.0), t(-3.0), t(-1.0), 0.5, 0.25), [0.75 * plain + 0.25 * turned]
    )
    objective = pairwise.Objective(
        None, lambda side: dpo.implicit_reward(side.logp, side.ref_logp, 0.5)
    )
    metrics = objective.watched(
        answers.Answers(t(-2.0), t(-3.0), t(5)), answers.Answers(t(-4.0), t(-1.0), t(7))
    )
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        dict(
            pair_accuracy=1.0,
            margin=2.0,
            reward_chosen=0.5,
            reward_rejected=-1.5,
            logp_chosen=-2.0,
            logp_rejected=-4.0,
        )
    )
    ref, worth = t(math.log(0.25), math.log(0.75)), t(1.0, 0.0)
    weights = [0.25 * math.exp(2.0), 0.75]
    close(dpo.optimal_policy(ref, worth, 0.5).exp(), [w / sum(weights) for w in weights])


def test_reward_model():
    loss = (
        -0.8 * math.log(sigmoid(1.5 - 0.25))
        - 0.2 * math.log(sigmoid(-1.5 - 0.25))
        + 0.01 * (1.0 - 0.5) ** 2
    )
    close(reward_reward.reward_loss(t(1.0), t(-0.5), 0.25, 0.2, 0.01), [loss])
    table, error = reward_reward.calibration(t(2.0, -2.0, 0.1), bins=2)
    sure, unsure = sigmoid(2.0), sigmoid(0.1)
    assert [row["pairs"] for row in table] == [1, 2]
    close(error, (1 * (1 - unsure) + 2 * abs(0.5 - sure)) / 3)
    close(reward_reward.length_bias(t(1.0, 1.0, -1.0, 1.0), t(3, 2, 1, 0)), 2 / 3 - 1.0)
    close(reward_learned.together(torch.tensor([[1.0, 4.0], [3.0, 0.0]])), [2.0, 2.0])
    close(reward_learned.together(torch.tensor([[1.0, 4.0], [3.0, 0.0]]), "min"), [1.0, 0.0])


def test_distances_of_rewards():
    one = torch.tensor([[[0.0, 1.0], [2.0, 0.0]], [[1.0, 0.0], [0.0, 3.0]]], dtype=torch.float64)
    mean = [sum(one[s].flatten().tolist()) / 4 for s in range(2)]
    expected = []
    for s, a, n in itertools.product(range(2), repeat=3):
        expected.append(one[s, a, n].item() + 0.9 * mean[n] - mean[s] - 0.9 * sum(mean) / 2)
    half = t(0.5, 0.5)
    found = epic.epic_form(one, 0.9, half, half)
    close(found.flatten(), torch.tensor(expected).tolist(), 1e-6)
    close(epic.half_distance(t(3.0, 0.0), t(0.0, 5.0)), math.sqrt(2) / 2)
    stay = torch.zeros(2, 2, 2).double()
    stay[:, 0, 0], stay[:, 1, 1] = 1.0, 1.0  # action 0 leads to state 0, action 1 to state 1
    paid = [[0.0, 0.0], [1.0, 3.0]]
    gamma, mean_paid = 0.5, [0.0, 2.0]
    total = sum(mean_paid) / (1 - gamma) / 2  # mean of the two values
    value = [m + gamma * total for m in mean_paid]
    advantages = [paid[s][a] + gamma * value[a] - value[s] for s in range(2) for a in range(2)]
    close(epic.starc_form(one, stay, gamma).flatten(), advantages)
    close(epic.answer_distance(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 7.0]])), 0.0, 1e-7)
    close(epic.answer_distance(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])), 1.0)


# One's own answers --------------------------------------------------------------------------------


def test_advantages_of_groups():
    spread = math.sqrt((1.5**2 + 0.5**2 + 0.5**2 + 1.5**2) / 3)
    found, spreads = shared.group_advantages(t(0.0, 1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 5.0), 4)
    close(spreads, [spread, 2.0])
    close(found[:4], [x / (spread + 1e-4) for x in (-1.5, -0.5, 0.5, 1.5)])
    close(shared.group_advantages(t(0.0, 1.0), 2, "none")[0], [-0.5, 0.5])
    whole = math.sqrt(5 / 3)
    close(
        shared.group_advantages(t(0.0, 1.0, 2.0, 3.0), 2, "batch")[0],
        [x / (whole + 1e-4) for x in (-0.5, 0.5, -0.5, 0.5)],
    )
    close(shared.leave_one_out(t(0.0, 3.0, 6.0), 3), [-4.5, 0.0, 4.5])
    close(shared.leave_one_out(t(1.0, math.nan, 3.0), 3), [-2.0, 0.0, 2.0])
    close(
        shared.whiten(t(1.0, 3.0, 9.0), t(1, 1, 0)),
        [-1 / math.sqrt(2), 1 / math.sqrt(2), 0.0],
        1e-6,
    )
    close(
        shared.whiten(t(1.0, 3.0), t(1, 1), shift_mean=False),
        [2 - 1 / math.sqrt(2), 2 + 1 / math.sqrt(2)],
        1e-6,
    )


def test_clipping_and_kl():
    close(
        shared.clipped_objective(
            t(1.5, 0.5, 1.5, 0.5, 1.1), t(1.0, 1.0, -1.0, -1.0, 2.0), 0.2, 0.3
        ),
        [1.3, 0.5, -1.5, -0.8, 2.2],
    )
    gap = -1.0 + 1.5
    close(shared.kl_estimate(t(-1.0), t(-1.5), "k1"), [gap])
    close(shared.kl_estimate(t(-1.0), t(-1.5), "k2"), [gap**2 / 2])
    close(shared.kl_estimate(t(-1.0), t(-1.5), "k3"), [math.exp(-gap) - 1 + gap])


def test_grpo():
    one = dict(clip_low=0.2, clip_high=0.2)
    logp, old, ref = t(-1.0)[None], t(-1.2)[None], t(-1.5)[None]
    ratio, k3 = math.exp(0.2), math.exp(-0.5) - 1 + 0.5
    close(grpo.token_loss(logp, old, t(0.5), **one)[0], [-0.5 * min(ratio, 1.2)])
    close(grpo.token_loss(logp, old, t(-0.5), ref, beta=0.1, **one)[0], [0.5 * ratio + 0.1 * k3])
    close(
        grpo.token_loss(logp, old, t(-0.5), ref, beta=0.1, kl="k3_weighted", **one)[0],
        [0.5 * ratio + 0.1 * k3 * ratio],
    )
    close(
        grpo.token_loss(logp, old, t(-0.5), ref, beta=0.1, kl="k1_reward", **one)[0], [0.5 * ratio]
    )
    losses, mask = (
        torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]),
        torch.tensor([[1, 1, 0], [1, 0, 0]]),
    )
    for kind, summed, weight in (
        ("grpo", 1.5 + 4.0, 2),
        ("dr_grpo", 7.0, 20),
        ("dapo", 7.0, 3),
        ("bnpo", 7.0 * 2 / 3, 2),
    ):
        close(grpo.summed_loss(losses, mask, kind), summed, 1e-6)
        assert grpo.loss_weight(mask, kind, 10) == weight


def test_rloo():
    close(rloo.answer_advantages(t(1.0, 2.0, 3.0, 6.0), 2), [-1.0, 1.0, -3.0, 3.0])
    close(rloo.answer_advantages(t(1.0, 2.0), 2, greedy=t(0.5, 0.5)), [0.5, 1.5])
    spread = math.sqrt(20 / 3)
    close(
        rloo.answer_advantages(t(1.0, 2.0, 3.0, 6.0), 2, normalize=True),
        [x / (spread + 1e-4) for x in (-1, 1, -3, 3)],
    )
    found = rloo.token_advantages(t(1.0), t(0.1, 0.2, 0.4)[None], t(1, 1, 0)[None], 0.5)
    close(found[0], [1 - 0.5 * 0.3, 1 - 0.5 * 0.2, 0.0])
    logp, old, mask = t(-1.0, -2.0, -5.0)[None], t(-1.1, -2.2, 0.0)[None], t(1, 1, 0)[None]
    loss, ratio = rloo.answer_loss(logp, old, t(2.0), mask, 0.2, 0.2)
    close(ratio, [math.exp(0.3)])
    close(loss, -2.0 * 1.2)
    loss, ratio = rloo.token_loss(logp, old, t(2.0, -1.0, 7.0)[None], mask, 0.2, 0.2)
    close(ratio, [math.exp(0.1), math.exp(0.2)])
    close(loss, -(2.0 * math.exp(0.1) - math.exp(0.2)))


def test_ppo():
    rewards_, values, mask = t(0.0, 1.0, 5.0)[None], t(0.5, 0.25, 7.0)[None], t(1, 1, 0)[None]
    last = 1.0 - 0.25
    first = 0.0 + 0.9 * 0.25 - 0.5 + 0.9 * 0.8 * last
    advantages, returns = ppo.gae(rewards_, values, mask, 0.9, 0.8)
    close(advantages[0], [first, last, 0.0])
    close(returns[0], [first + 0.5, 1.0, 0.0])
    close(ppo.token_rewards(t(2.0), t(0.1, 0.3, 0.5)[None], mask, 0.5)[0], [-0.05, 2.0 - 0.15, 0.0])
    close(ppo.value_loss(t(1.0), t(0.0), t(2.0)), [0.5])
    close(ppo.value_loss(t(1.0), t(0.0), t(2.0), 0.2), [1.8**2 / 2])
    close(ppo.value_loss(t(1.0), t(0.0), t(-2.0), 0.2), [9 / 2])
    assert ppo.adapt_kl_coefficient(0.1, 0.2, 0.1) == pytest.approx(0.1 * 1.02)
    assert ppo.adapt_kl_coefficient(0.1, 0.095, 0.1) == pytest.approx(0.1 * (1 - 0.005))
    assert ppo.entropy_weight(0.1, 2.0, 0.5) == pytest.approx(0.1 * (1 - math.exp(-1)))
    assert ppo.entropy_weight(0.1, -2.0, 0.5) == pytest.approx(0.1 * math.exp(-1))


def test_rewards():
    close(
        rewards.length_reward(10, 4)(completion_ids=[[0] * 6, [0] * 8, [0] * 20]), [0.0, -0.5, -1.0]
    )
    close(rewards.repetition_reward([[1, 2, 1, 2, 1], [1, 2]], size=2), [2 / 4 - 1, -0.0])
    close(rewards.consistency_reward(["a", "a", "a"], ["4", "4", "5"]), [0.5, 0.5, 0.0])
    two = [rewards.Reward("x", 2.0, None), rewards.Reward("y", -1.0, None)]
    assert rewards.weighted(two, dict(x=[1.0, None], y=[3.0, 0.5])) == [-1.0, -0.5]
    assert overoptimization.best_of_n_kl(4) == pytest.approx(math.log(4) - 3 / 4)


# Supervised, evaluation, the loop -----------------------------------------------------------------


def test_log_probs_of_rows():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 4, generator=generator), torch.randn(5, 4, generator=generator)
    bias, targets = torch.randn(5, generator=generator), torch.tensor([0, 4, 2])
    for row, (logp, entropy) in enumerate(
        zip(*logprobs.selected_logprobs(hidden, weight, targets, bias, 0.7, True, 2, 0.5, 3.0))
    ):
        z = [(hidden[row] @ weight[k] + bias[k]).item() for k in range(5)]
        z = [3.0 * math.tanh(0.5 * v / 3.0) / 0.7 for v in z]
        total = math.log(sum(math.exp(v) for v in z))
        p = [math.exp(v - total) for v in z]
        assert logp.item() == pytest.approx(z[targets[row]] - total, abs=1e-5)
        assert entropy.item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-5)
    other = torch.randn(3, 4, generator=generator)
    q, p = torch.log_softmax(other @ weight.T, -1), torch.log_softmax(hidden @ weight.T, -1)
    close(
        logprobs.full_kl(hidden, weight, other, weight), (p.exp() * (p - q)).sum(1).tolist(), 1e-5
    )
    close(
        logprobs.full_kl(hidden, weight, other, weight, reverse=True),
        (q.exp() * (q - p)).sum(1).tolist(),
        1e-5,
    )


class Known(torch.nn.Module):
    "A policy that gives each learned token the log-probability of its column."

    def __init__(self, columns):
        super().__init__()
        self.columns = torch.nn.Parameter(torch.tensor(columns))

    def forward(self, input_ids, attention_mask, completion_mask, **more):
        logp = self.columns[: input_ids.shape[1]].expand(input_ids.shape) * completion_mask
        return TokenStats(logp, None, None, None)


def test_perplexity_is_of_learned_tokens():
    rows = [
        dict(input_ids=[5, 6, 7], completion_mask=[0, 1, 1]),
        dict(input_ids=[5, 6, 7, 8], completion_mask=[0, 0, 0, 1]),
    ]
    policy = Known([-9.0, -1.0, -2.0, -4.0])
    assert evaluate.learned_tokens(rows) == 3
    assert evaluate.mean_nll(policy, rows, 0) == pytest.approx(7 / 3)
    assert evaluate.perplexity(policy, rows, 0) == pytest.approx(math.exp(7 / 3))
    assert evaluate.pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    assert evaluate.win_rate([1.0, 2.0, 3.0], [1.0, 3.0, 0.0]) == pytest.approx(1.5 / 3)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate(schedule, expected):
    settings = sft.SFT(steps=6, warmup=0.3, schedule=schedule, learning_rate=2.0)
    assert [train.learning_rate_at(step, settings) for step in range(6)] == pytest.approx(
        [2 * x for x in expected]
    )


def test_wsd_falls_in_the_last_fifth():
    settings = sft.SFT(steps=20, warmup=0.0, schedule="wsd", learning_rate=1.0)
    assert [
        train.learning_rate_at(step, settings) for step in (0, 15, 16, 18, 19)
    ] == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.25])


# Few weights, fewer weights -----------------------------------------------------------------------


def test_adapters():
    x, weight = t(1.0, 2.0)[None], torch.tensor([[1.0, 0.0], [0.5, -1.0]]).double()
    a, b = (
        torch.tensor([[1.0, 1.0], [0.0, 2.0]]).double(),
        torch.tensor([[1.0, 0.0], [2.0, 1.0]]).double(),
    )
    low = [3.0, 4.0]  # x aᵀ
    change = [1.0 * low[0], 2.0 * low[0] + 1.0 * low[1]]
    close(adapters.lora(x, weight, a, b, 3.0)[0], [1.0 + 1.5 * change[0], -1.5 + 1.5 * change[1]])
    close(
        adapters.lora(x, weight, a, b, 3.0, True)[0],
        [1.0 + 3 / math.sqrt(2) * change[0], -1.5 + 3 / math.sqrt(2) * change[1]],
    )
    moved = weight + 1.5 * b @ a
    lengths = [math.hypot(*row) for row in moved.tolist()]
    found = adapters.dora(x, weight, a, b, 3.0, t(2.0, 3.0))[0]
    close(
        found,
        [m * (row[0] + 2 * row[1]) / n for m, row, n in zip((2.0, 3.0), moved.tolist(), lengths)],
    )
    close(adapters.rank_errors(torch.diag(t(3.0, 4.0))), [1.0, 3 / 5, 0.0])


def test_the_norm_of_dora_gets_no_gradient():
    x, weight, a = t(1.0, 2.0)[None], torch.eye(2).double(), torch.tensor([[1.0, 1.0]]).double()
    b = torch.tensor([[0.5], [1.0]]).double().requires_grad_()
    adapters.dora(x, weight, a, b, 1.0, t(1.0, 1.0)).sum().backward()
    moved = weight + b.detach() @ a
    low = (x @ a.T).item()
    close(
        b.grad.flatten(), [low / math.hypot(*row) for row in moved.tolist()]
    )  # of the direction alone: no term of the norm


def test_sparsity():
    weight, norm = torch.tensor([[1.0, -2.0, 3.0, -4.0]]), torch.tensor([4.0, 1.0, 0.5, 0.75])
    close(sparse.wanda_score(weight, norm)[0], [4.0, 2.0, 1.5, 3.0])
    assert sparse.smallest(sparse.wanda_score(weight, norm), 0.5).tolist() == [
        [False, True, True, False]
    ]
    assert sparse.smallest(weight.abs(), 0.0, (2, 4)).tolist() == [[True, True, False, False]]
    hessian = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    mean = 2.5
    damped = torch.tensor([[2.0 + 0.01 * mean, 1.0], [1.0, 3.0 + 0.01 * mean]])
    factor = sparse.inverse_factor(hessian, 0.01)
    close((factor.T @ factor).flatten(), torch.linalg.inv(damped).flatten().tolist(), 1e-5)
    fitted = sparse.sparsegpt(
        torch.tensor([[0.1, 1.0]]), hessian, 0.5, block=2
    )  # the first weight goes, the second takes over its part of the output
    close(fitted[0], [0.0, 1.0 + 0.1 * 1.0 / (3.0 + 0.01 * mean)], 1e-5)


def test_sensitive_blocks_keep_more():
    shares = prune.allocate(t(0.1, 0.3, 0.5), 0.5, 0.1, t(1.0, 1.0, 2.0))
    close(shares, [0.5 + 0.125 - 0.0, 0.5 + 0.125 - 0.1, 0.5 + 0.125 - 0.2])


# Merged weights -----------------------------------------------------------------------------------


def test_merging():
    close(task_vectors.linear([t(1.0), t(4.0)], [1.0, 2.0]), [3.0])
    close(task_vectors.add_up([t(1.0), t(4.0)], [0.5, -2.0]), [-7.5])
    close(
        task_vectors.slerp(t(1.0, 0.0), t(0.0, 2.0), 1 / 3),
        [math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)],
    )
    close(
        task_vectors.slerp(t(1.0, 0.0), t(0.5, math.sqrt(0.75)), 0.5),
        [math.cos(math.pi / 6), math.sin(math.pi / 6)],
    )
    close(task_vectors.metagpt_weights([1.0, 3.0]), [0.25, 0.75])
    close(task_vectors.trim(t(1.0, -3.0, 2.0, 0.5).float(), 0.5), [0.0, -3.0, 2.0, 0.0])
    close(
        task_vectors.disjoint_mean([t(1.0, -1.0, 2.0, -3.0), t(3.0, 4.0, -1.0, 1.0)], [1.0, 1.0]),
        [2.0, 4.0, 2.0, -3.0],
    )
    close(
        task_vectors.ties(t(1.0, 1.0), [t(2.0, 0.0), t(4.0, 2.0)], [1.0, 1.0], 1.0, 0.5),
        [1 + 0.5 * 2.0, 1 + 0.5 * 1.0],
    )
    close(
        task_vectors.della_density(t(3.0, -1.0, 2.0)[None].float(), 0.5, 0.4)[0],
        [0.7, 0.3, 0.5],
        1e-6,
    )
    kept = task_vectors.dare(torch.ones(20_000), 0.25, torch.Generator().manual_seed(0))
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert kept.mean().item() == pytest.approx(1.0, abs=0.05)


def test_fusing():
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    grams = [torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 1.0]))]
    close(fuse.regmean([one, two], grams)[0], [3 / 4, 2 / 2], 1e-5)
    crossed = [
        torch.tensor([[2.0, 1.0], [1.0, 2.0]]),
        torch.eye(2),
    ]  # shrunk by half: [[2, 1/2], [1/2, 2]]
    close(
        fuse.regmean([one, two], crossed, shrink=0.5)[0],
        [(3 * 2.0 - 0.5 * 2.5) / 8.75, (3 * 2.5 - 0.5 * 2.0) / 8.75],
        1e-5,
    )
    half = fuse.ensemble([t(math.log(0.2)), t(math.log(0.6))], [1.0, 3.0])
    close(half.exp(), [0.25 * 0.2 + 0.75 * 0.6])


# Found passages -----------------------------------------------------------------------------------


def test_retrieval():
    q, d = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0], [0.25, 1.0], [9.0, 0.0]])
    loss = retriever.contrastive_loss(
        q, d, torch.tensor([1]), torch.tensor([[True, True, False]]), 0.5
    )
    close(loss, [math.log(math.exp(1.0) + math.exp(0.5)) - 0.5], 1e-6)
    target = torch.tensor([[math.log(0.9), math.log(0.1)]])
    p = [math.exp(1.0), math.exp(0.5)]
    p = [x / sum(p) for x in p]
    found = retriever.distillation_loss(q, d[None, :2], target, 0.5)
    close(
        found,
        [p[0] * (math.log(p[0]) - math.log(0.9)) + p[1] * (math.log(p[1]) - math.log(0.1))],
        1e-6,
    )


def test_readers():
    weights, mask = (
        torch.tensor([[math.log(0.25), math.log(0.75)]]),
        torch.tensor([[1.0, 1.0, 0.0]]),
    )
    logp = torch.tensor(
        [[[math.log(0.5), math.log(0.2), -9.0], [math.log(0.1), math.log(0.4), -9.0]]]
    )
    close(
        reader.sequence_loss(weights, logp, mask),
        [-math.log(0.25 * 0.5 * 0.2 + 0.75 * 0.1 * 0.4)],
        1e-6,
    )
    tokens = [0.25 * 0.5 + 0.75 * 0.1, 0.25 * 0.2 + 0.75 * 0.4]
    close(reader.token_loss(weights, logp, mask), [-sum(map(math.log, tokens))], 1e-6)
    close(reader.each_loss(logp, mask), [-(math.log(0.5 * 0.2) + math.log(0.1 * 0.4)) / 2], 1e-6)
    whole = [0.25 * 0.1, 0.75 * 0.04]
    close(reader.responsibilities(weights, logp, mask)[0], [w / sum(whole) for w in whole], 1e-6)
