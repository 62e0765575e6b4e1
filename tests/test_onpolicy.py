"On-policy steps: closed forms of advantages, whitening and KL; groups, batches, watched answers."

import math
import random
from types import SimpleNamespace

import pytest
import torch

from polm_lab.data.rows import Row
from polm_lab.data.load import load_data
from polm_lab.core.knobs import WrongInput
from polm_lab.models.policy import Policy
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.training.advantages import (
    clipped_objective,
    group_advantages,
    kl_estimate,
    leave_one_out,
    masked_moments,
    whiten,
)
from polm_lab.training.onpolicy import (
    Group,
    OnPolicy,
    OnPolicySettings,
    align_to_tokens,
    draw_groups,
    make_batches,
    recorded_steps,
)
from polm_lab.training.onpolicy import (
    rewards_of,
    sample_rows,
    sequence_kl,
    token_stats,
    train_on_policy,
)
from polm_lab.core.run import Run
from polm_lab.training.loop import Meter
from polm_lab.data.tasks import TASKS
from polm_lab.reasoning.grpo import what_if_advantages, what_if_kl
from polm_lab.rewards.functions import as_reward_fn, make_rewards
from polm_lab.workbench.tokens import history_html, token_ids


@pytest.fixture(scope="module")
def loaded():
    return load_tokenizer("tiny"), Policy(load_model("tiny", dtype="float32", device="cpu"))


def test_advantages_of_a_group():
    rewards = torch.tensor(
        [1.0, 0, 0, 1, 2, 2, 2, 2, 3, 1, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan]
    )
    advantages, spread = group_advantages(rewards, 4)
    std = math.sqrt(1 / 3)
    expected = (
        [0.5 / (std + 1e-4) * s for s in (1, -1, -1, 1)]
        + [0.0] * 4
        + [1 / (math.sqrt(2) + 1e-4), -1 / (math.sqrt(2) + 1e-4)]
        + [0.0] * 6
    )
    assert torch.allclose(advantages, torch.tensor(expected))
    assert torch.allclose(spread, torch.tensor([std, 0, math.sqrt(2), 0]))
    assert (
        group_advantages(rewards, 4, "none")[0].tolist()
        == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0, 1, -1] + [0.0] * 6
    )
    known = rewards[:10]
    assert torch.allclose(
        group_advantages(rewards, 4, "batch")[0][:4],
        torch.tensor([0.5, -0.5, -0.5, 0.5]) / (known.std() + 1e-4),
    )
    other = torch.cat([rewards, rewards + 7])  # the spread of all processes' rewards
    assert (
        group_advantages(rewards, 4, "batch", batch=other)[0][0]
        < group_advantages(rewards, 4, "batch")[0][0]
    )
    assert not group_advantages(torch.full((4,), 0.1 + 0.2), 4)[0].any()


def test_clipping_has_no_gradient_beyond_the_bounds():
    ratio = torch.tensor([0.5, 0.75, 1.0, 1.25, 1.5] * 2, requires_grad=True)
    advantages = torch.tensor([2.0] * 5 + [-2.0] * 5)
    value = clipped_objective(ratio, advantages, 0.2, 0.3)
    value.sum().backward()
    assert torch.allclose(value, torch.tensor([1, 1.5, 2, 2.5, 2.6, -1.6, -1.6, -2, -2.5, -3]))
    assert ratio.grad.tolist() == [2, 2, 2, 2, 0, 0, 0, -2, -2, -2]


def test_kl_estimates_on_a_known_pair():
    logp, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    values = {kind: kl_estimate(logp, ref, kind).item() for kind in ("k1", "k2", "k3")}
    assert values == pytest.approx(
        {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 0.5 - 1 + math.log(2)}, abs=1e-6
    )
    assert kl_estimate(logp, logp, "k3").item() == 0.0


def test_batches_hold_each_completion_once_next_to_its_log_probs():
    row = Row({"prompt": "1+1="})
    groups = []
    for s, prompt in enumerate(([5], [5, 6])):
        completions = [[8] * (i + 1) for i in range(4)]
        logps = [[-float(s * 10 + i)] * (i + 1) for i in range(4)]
        ended = [True, True, True, False]
        groups.append(Group(s, row, prompt, completions, [""] * 4, logps, ended, {}, [0.0] * 4))
    batches = make_batches(groups, 3, 0)
    assert sorted(r for b in batches for r in b["rows"].tolist()) == list(range(8))
    assert [len(b["rows"]) for b in batches] == [3, 3, 2]
    for b in batches:
        for n, r in enumerate(b["rows"].tolist()):
            learned = b["completion_mask"][n].bool()
            assert b["old_logp"][n][learned].tolist() == groups[r // 4].logps[r % 4]
            assert not b["old_logp"][n][~learned].any()
            assert b["ended"][n].item() == (r % 4 < 3)
    assert align_to_tokens([[1.0]], [[1, 2]], 4).tolist() == [[0, 0, 1, 0]]


def test_samples_are_whole_groups_within_a_limit(loaded):
    tokenizer, _ = loaded
    group = Group(
        3,
        {"prompt": "1+1="},
        tokenizer("1+1=").input_ids,
        [tokenizer("the 2 of").input_ids] * 4,
        ["the 2 of"] * 4,
        [[-1.0] * 9] * 4,
        [True] * 4,
        {"f": [None] * 4},
        [0.0] * 4,
    )
    rows = sample_rows([group] * 5, torch.zeros(20), tokenizer, limit=10)
    assert len(rows) == 8
    assert "".join(rows[0]["tokens"]) == "the 2 of"
    assert "ref_logp" not in rows[0]
    assert rows[0]["group"] == 3


def test_a_group_is_the_same_whoever_draws_it(loaded):
    tokenizer, policy = loaded
    rows = TASKS["sums"].rows("prompt", 3)
    chosen = [(slot, row, tokenizer(row["prompt"]).input_ids) for slot, row in enumerate(rows)]
    judge, settings = (
        as_reward_fn(make_rewards("correct", TASKS["sums"].score)),
        OnPolicySettings(num_generations=4, max_new_tokens=8, batch_size=8),
    )
    together = draw_groups(policy, tokenizer, judge, chosen, settings, 5, 0)
    alone = [
        draw_groups(policy, tokenizer, judge, [one], settings, 5, 0)[0] for one in reversed(chosen)
    ][::-1]
    assert [g.completions for g in together] == [g.completions for g in alone]
    assert [g.completions for g in together] != [
        g.completions for g in draw_groups(policy, tokenizer, judge, chosen, settings, 5, 1)
    ]


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    nan = math.nan
    found = leave_one_out(
        torch.tensor(
            [1.0, 0, 0, 1, 5, 5, 5, 5, 3, 1, nan, nan, 2, nan, nan, nan, nan, nan, nan, nan]
        ),
        4,
    ).view(5, 4)
    assert torch.allclose(found[0], torch.tensor([2, -2, -2, 2]) / 3)
    assert not found[1].any()
    assert found[2].tolist() == [2, -2, 0, 0]
    assert not found[3:].any()
    rewards = torch.randn(3, 5, dtype=torch.float64)
    found = leave_one_out(rewards.flatten(), 5).view(3, 5)
    for i in range(5):
        others = [j for j in range(5) if j != i]
        assert torch.allclose(found[:, i], rewards[:, i] - rewards[:, others].mean(1))


def test_whitening_counts_learned_entries_only():
    x, mask = (
        torch.randn(4, 6) * 3 + 5,
        (torch.arange(6) < torch.tensor([[2], [6], [1], [4]])).long(),
    )
    white, kept = whiten(x, mask), whiten(x, mask, shift_mean=False)
    inside = mask.bool()
    assert white[inside].mean().abs() < 1e-6
    assert abs(white[inside].std().item() - 1) < 1e-6
    assert not white[~inside].any()
    assert not kept[~inside].any()
    assert torch.allclose(kept[inside], white[inside] + x[inside].mean())
    parts = [
        whiten(x[i : i + 1], mask[i : i + 1], moments=masked_moments(x, mask)) for i in range(4)
    ]
    assert torch.equal(torch.cat(parts), white)
    assert torch.isfinite(
        whiten(torch.ones(2, 2), torch.ones(2, 2))
    ).all()  # no spread, no infinity


def test_the_kl_of_a_completion_counts_its_tokens_only(loaded):
    groups = [
        Group(
            0,
            Row({"prompt": "1"}),
            [5, 6],
            [[8] * n for n in (1, 3)],
            [""] * 2,
            [[-1.0], [-1.0, -2.0, -3.0]],
            [True] * 2,
            {},
            [0.0] * 2,
            [[-1.5], [-1.0, -1.0, -1.0]],
        )
    ]
    assert sequence_kl(make_batches(groups, 1, 0), "k1").tolist() == [0.5, -3.0]
    assert sequence_kl(make_batches(groups, 2, 0), "k2").tolist() == [0.125, 2.5]


def example(loaded, tmp_path, judge, steps=3, **settings):
    tokenizer, policy = loaded
    settings = OnPolicySettings(
        **dict(
            num_generations=2,
            max_new_tokens=6,
            batch_size=4,
            steps=steps,
            device="cpu",
            dtype="float32",
        )
        | settings
    )
    return OnPolicy(
        Run.create("example", {}, out=tmp_path),
        settings,
        policy,
        tokenizer,
        load_data("sums#8", "prompt"),
        load_data("sums", "prompt", "test")[:4],
        judge,
    )


def test_two_held_out_answers_are_watched_at_each_recorded_step_off_the_randomness_of_training(
    loaded, tmp_path
):
    def judge(rows, texts, ids, ended):
        noise = [
            torch.rand(1).item() + random.random() for _ in rows
        ]  # a reward that draws from the global generators
        return SimpleNamespace(parts={"noise": noise}, total=noise)

    collector = example(loaded, tmp_path, judge)
    after = []
    for record in (True, False):
        torch.manual_seed(0), random.seed(0)
        groups, _ = collector.step(0, Meter())
        if record:
            collector.record(0, groups, torch.zeros(4))
        after.append((torch.rand(1).item(), random.random()))
    assert after[0] == after[1]
    collector.record(2, groups, torch.zeros(4))
    rows = collector.run.lines("samples")
    watched = [row for row in rows if "group" not in row]
    held_out = [row["prompt"] for row in load_data("sums", "prompt", "test")[:2]]
    assert [(row["step"], row["prompt"]) for row in watched] == [
        (1, held_out[0]),
        (1, held_out[1]),
        (3, held_out[0]),
        (3, held_out[1]),
    ]
    assert [row["completion"] for row in watched[:2]] == [
        row["completion"] for row in watched[2:]
    ]  # greedy: the same policy says the same
    assert all(
        "advantage" not in row and row["held_out"] and set(row["rewards"]) == {"noise"}
        for row in watched
    )
    assert (
        history_html(rows, watched[0]).count("<tr><td class='number'>") == 2
    )  # the cockpit shows how the answer changed over the steps
    tokenizer = loaded[0]
    for row in rows:
        assert len(row["ids"]) == len(row["tokens"])
        assert token_ids(tokenizer, row) == row["ids"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=True) == row["completion"]


def test_watched_answers_without_a_reward_are_no_fault(loaded, tmp_path):
    def judge(rows, texts, ids, ended):
        raise WrongInput("reward x: only None")

    collector = example(loaded, tmp_path, judge)
    assert [
        row["reward"] is None or math.isnan(row["reward"]) for row in collector.record.watch()
    ] == [True, True]


def judged_by_length(rows, texts, ids, ended):
    lengths = [float(len(i)) for i in ids]
    return SimpleNamespace(parts={"length": lengths}, total=lengths)


def trained(loaded, tmp_path, compare, **settings):
    "Batches that the loss saw, and the run, of one step of training with `compare`."
    tokenizer, seen = loaded[0], []
    fresh = Policy(load_model("tiny", dtype="float32", device="cpu"))
    collector = example(
        (tokenizer, fresh),
        tmp_path,
        judged_by_length,
        steps=1,
        batch_size=2,
        accumulate=4,
        save_every=0,
    )

    def loss(policy, batch, settings, meter):
        seen.append(batch)
        return token_stats(policy, batch, settings.temperature).logp.sum() * 0.0

    with collector.run.active():
        train_on_policy(collector, compare, loss, **settings)
    return seen, collector.run


def test_each_completion_learns_from_its_own_advantage(loaded, tmp_path):
    groups_seen = []

    def compare(groups, batches):
        groups_seen.append(groups)
        return 10 * torch.arange(8.0) + rewards_of(groups)

    seen, run = trained(loaded, tmp_path, compare, updates=2)
    [groups] = groups_seen  # sampled once, learned from twice
    assert len(seen) == 8
    assert sorted(r for b in seen[:4] for r in b["rows"].tolist()) == list(range(8))
    for batch in seen:
        assert batch["weight"] == 2.0
        assert batch["advantages"].tolist() == [
            10 * r + len(groups[r // 2].completions[r % 2]) for r in batch["rows"].tolist()
        ]
    rows = [row for row in run.lines("samples") if "group" in row]
    assert [row["advantage"] for row in rows] == [
        10 * r + row["reward"] for r, row in enumerate(rows)
    ]
    assert "advantages" not in rows[0]
    assert (run.path / "model" / "model.safetensors").exists()
    assert run.lines()[0]["advantage_std"] > 20


def test_a_method_may_give_each_token_its_advantage_and_say_what_it_weighs(loaded, tmp_path):
    def compare(groups, batches):
        for batch in batches:
            places = batch["completion_mask"].cumsum(1) * 1.0
            batch |= dict(advantages=places, weight=float(batch["completion_mask"].sum()))
        return torch.zeros(8)

    seen, run = trained(loaded, tmp_path, compare)
    assert [b["weight"] for b in seen] == [float(b["completion_mask"].sum()) for b in seen]
    assert all(b["advantages"].ndim == 2 for b in seen)
    rows = [row for row in run.lines("samples") if "group" in row]
    assert len(rows) == 8
    for row in rows:
        assert row["advantages"] == [n + 1.0 for n in range(len(row["ids"]))]


def test_groups_that_are_not_whole_are_refused_when_the_settings_are_made():
    with pytest.raises(WrongInput, match="multiple of num_generations = 8"):
        OnPolicySettings(num_generations=8, batch_size=12)
    assert OnPolicySettings(num_generations=8, batch_size=12, accumulate=2).num_generations == 8
    assert recorded_steps(1) == {0}
    assert recorded_steps(3) == {0, 1, 2}


def test_what_if_advantages_and_kl_are_the_closed_forms():
    found = what_if_advantages([1.0, 0, 0, 0])
    assert found["rloo"] == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert found["dr_grpo"] == [0.75, -0.25, -0.25, -0.25]
    assert found["grpo"][0] == pytest.approx(1.5, abs=1e-3)
    (k1, k2, k3), exact = what_if_kl(1.0)[0].values(), what_if_kl(1.0)[1]
    assert k1[0] == pytest.approx(exact) == pytest.approx(k3[0])
    assert k3[1] < k1[1] / 2
    assert abs(k2[0] / exact - 1) < 0.1
    assert what_if_kl(0.0)[1] == pytest.approx(0, abs=1e-12)
    torch.manual_seed(0)
    p = (3.0 * torch.linspace(-1, 1, 8)).softmax(0)
    gap = p.log()[torch.multinomial(p, 100_000, replacement=True)] - math.log(1 / 8)
    sampled = {"k1": gap, "k2": gap**2 / 2, "k3": (-gap).exp() - 1 + gap}
    for kind, (mean, noise) in what_if_kl(3.0)[0].items():
        assert sampled[kind].mean().item() == pytest.approx(mean, abs=5 * noise / 100_000**0.5)
        assert sampled[kind].std().item() == pytest.approx(noise, rel=0.1)
