"PPO: closed forms, equality with REINFORCE to the bit, state after a stop, wrong input."

import json
import math
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import polm_lab as lab
from polm_lab.alignment import ppo
from polm_lab.alignment.ppo import (
    CRITIC,
    DETAILS,
    PPO,
    ActorCritic,
    batch_loss,
    split_minibatches,
    experience,
    entropy_weight,
    gae,
)
from polm_lab.alignment.ppo import (
    load_critic,
    read_values,
    adapt_kl_coefficient,
    pad_rows,
    token_rewards,
    value_loss,
    add_experience,
)
from polm_lab.rewards.prepare import learned_reward
from polm_lab.training.chain import create, execute, subrun
from polm_lab.training.evaluate import win_rate_against
from polm_lab.data.load import load_data
from polm_lab.core.knobs import WrongInput
from polm_lab.models.policy import Policy
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.training.onpolicy import draw_groups, make_batches, token_stats
from polm_lab.core.run import Run, Stopped
from polm_lab.training.loop import Meter
from polm_lab.data.tasks import TASKS
from polm_lab.rewards.functions import as_reward_fn, make_rewards

SHORT = dict(
    steps=4,
    batch_size=8,
    value="own",
    rewards="correct",
    data="sums",
    eval_rows=2,
    max_new_tokens=8,
    device="cpu",
    dtype="float32",
    save_every=0,
    minibatches=2,
    epochs=2,
    details="whiten_advantages,normalize,clip_value,missing_eos,adaptive_kl:0.001,entropy,explore",
)


# Closed forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0), (0.0, 1.0)]
)
def test_gae_is_its_double_sum(gamma, gae_lambda):
    torch.manual_seed(0)
    rewards, values, mask = (
        torch.randn(3, 9, dtype=torch.float64),
        torch.randn(3, 9, dtype=torch.float64),
        torch.zeros(3, 9),
    )
    spans = [(0, 9), (2, 7), (4, 5)]
    for row, (first, last) in enumerate(spans):
        mask[row, first:last] = 1
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    expected = torch.zeros(3, 9, dtype=torch.float64)
    for row, (first, last) in enumerate(spans):
        for t in range(first, last):
            for later in range(t, last):
                after = values[row, later + 1] if later + 1 < last else 0.0
                expected[row, t] += (gamma * gae_lambda) ** (later - t) * (
                    rewards[row, later] + gamma * after - values[row, later]
                )
    assert torch.allclose(advantages, expected, atol=1e-12)
    assert torch.allclose(returns, (expected + values) * mask, atol=1e-12)


def test_gae_at_its_ends():
    rewards, values, mask = (
        torch.tensor([[0.0, 0.5, 1.0]]),
        torch.tensor([[0.3, 0.6, 0.2]]),
        torch.ones(1, 3),
    )
    assert torch.allclose(gae(rewards, values, mask, 1.0, 1.0)[0], torch.tensor([[1.2, 0.9, 0.8]]))
    assert torch.allclose(gae(rewards, values, mask, 1.0, 1.0)[1], torch.tensor([[1.5, 1.5, 1.0]]))
    assert torch.allclose(gae(rewards, values, mask, 1.0, 0.0)[0], torch.tensor([[0.3, 0.1, 0.8]]))
    assert torch.equal(
        gae(rewards, torch.zeros(1, 3), mask, 1.0, 1.0)[0], torch.tensor([[1.5, 1.5, 1.0]])
    )


def test_the_score_is_at_the_last_token_and_the_kl_penalty_at_each():
    mask, kl = torch.tensor([[1.0, 1, 1], [1, 0, 0]]), torch.tensor([[0.1, -0.2, 0.3], [0.4, 9, 9]])
    assert torch.allclose(
        token_rewards(torch.tensor([2.0, -1.0]), kl, mask, 0.5),
        torch.tensor([[-0.05, 0.1, 1.85], [-1.2, 0, 0]]),
    )


def test_beta_is_steered_by_at_most_two_percent():
    assert adapt_kl_coefficient(0.1, 0.05, 0.05) == 0.1
    assert adapt_kl_coefficient(0.1, 0.055, 0.05) == pytest.approx(0.101)
    assert adapt_kl_coefficient(0.1, 5.0, 0.05) == pytest.approx(0.102)
    assert adapt_kl_coefficient(0.1, -1.0, 0.05) == pytest.approx(0.098)


def test_exploration_falls_or_rises_with_the_variance():
    assert entropy_weight(0.1, 0, 0.3) == 0.1
    variances = (0.0, 0.1, 1.0)
    described = [entropy_weight(0.1, 2.0, variance) for variance in variances]
    printed = [entropy_weight(0.1, -2.0, variance) for variance in variances]
    expected = [0, 0.1 * (1 - math.exp(-0.2)), 0.1 * (1 - math.exp(-2))]
    assert described == pytest.approx(expected)
    assert printed == pytest.approx([0.1, 0.1 * math.exp(-0.2), 0.1 * math.exp(-2)])


def test_a_clipped_value_stops_only_on_the_way_to_its_return():
    values = torch.tensor([0.1, 0.3, -0.3, 0.3], requires_grad=True)
    loss = value_loss(values, torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, -1.0]), 0.2)
    loss.sum().backward()
    assert torch.allclose(loss, torch.tensor([0.405, 0.32, 0.845, 0.845]))
    assert torch.allclose(values.grad, torch.tensor([-0.9, 0, -1.3, 1.3]))
    assert torch.allclose(
        value_loss(values, torch.zeros(4), torch.ones(4)), (values - 1).square() / 2
    )


@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_rows_are_dealt_evenly_and_alike_by_any_number_of_processes(minibatches):
    whole = split_minibatches(16, minibatches, 5)
    assert sorted(sum(whole, [])) == list(range(16))
    assert {len(hand) for hand in whole} == {16 // minibatches}
    halves = [split_minibatches(8, minibatches, 5, first) for first in (0, 8)]
    for hand, (a, b) in zip(whole, zip(*halves)):
        assert sorted(hand) == sorted(a + [8 + row for row in b])
    assert minibatches == 1 or whole != split_minibatches(16, minibatches, 6)


# The actor ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked():
    "Tokenizer, settings without any detail, groups sampled from `tiny`, and their batches."
    settings = PPO(
        **(
            SHORT
            | dict(
                epochs=1,
                minibatches=1,
                gamma=1.0,
                gae_lambda=1.0,
                beta=0.0,
                details="",
                num_generations=2,
            )
        )
    )
    tokenizer, policy = (
        load_tokenizer("tiny"),
        Policy(load_model("tiny", dtype="float32", device="cpu")),
    )
    judge = as_reward_fn(make_rewards("correct", TASKS["sums"].score))
    chosen = [
        (slot, row, tokenizer(row["prompt"]).input_ids)
        for slot, row in enumerate(load_data("sums#8", "prompt"))
    ]
    groups = draw_groups(policy, tokenizer, judge, chosen, settings, 0)
    return tokenizer, settings, groups, make_batches(groups, 16, tokenizer.pad_token_id)


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_without_its_parts_it_is_reinforce_to_the_bit(asked, kind):
    tokenizer, settings, groups, batches = asked
    policy = Policy(load_model("tiny", dtype="float32", device="cpu"))
    actor = ActorCritic(policy, load_critic(settings, kind))
    batch = add_experience(batches[0], experience(actor, groups, batches, settings, {}, Meter()))
    batch_loss(actor, batch, settings, {}, Meter()).backward()
    ours = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    rewards = torch.tensor([r for group in groups for r in group.rewards])[batch["rows"]]
    (-token_stats(policy, batch, 1.0).logp * rewards[:, None]).sum().backward()
    assert 0 < rewards.mean() < 1
    assert all(torch.equal(a, p.grad) for a, p in zip(ours, policy.parameters()))
    assert max(a.abs().max() for a in ours) > 0
    assert actor.head.bias.grad.abs() > 0, "the critic learns anyway"


def test_values_belong_to_the_state_before_each_token(asked):
    tokenizer, settings, groups, batches = asked
    actor = ActorCritic(Policy(load_model("tiny", dtype="float32", device="cpu")))
    torch.nn.init.normal_(actor.head.weight)
    found = read_values(actor, batches, 16)
    model = actor.policy.model
    for row in (0, 5, 15):
        group, ids = groups[row // 2], groups[row // 2].completions[row % 2]
        with torch.no_grad():
            states = model.model(torch.tensor([group.prompt + ids])).last_hidden_state[0]
            assert torch.allclose(
                torch.tensor(found[row]),
                actor.head(states)[len(group.prompt) - 1 : -1, 0],
                atol=1e-4,
            )


def test_running_statistics_are_those_of_all_rewards_and_part_of_the_state():
    actor, whole = (
        ActorCritic(Policy(load_model("tiny", dtype="float32", device="cpu"))) for _ in range(2)
    )
    scores = torch.tensor([3.0, 1.0, math.nan, 10.0, -4.0, 2.5, 0.0])
    for part in scores.split([1, 3, 2, 1]):
        last = actor.normalized(part)
    known = scores[scores.isfinite()]
    assert torch.allclose(actor.seen, torch.tensor([6.0, known.mean(), known.var() * 5]))
    assert torch.allclose(last, (known[-1:] - known.mean()) / known.std(), atol=1e-5)
    assert torch.allclose(whole.normalized(scores)[-1], last[0], atol=1e-5)
    assert whole.normalized(scores)[2].isnan()
    assert {"seen", "beta"} <= set(actor.state_dict())


def test_details_change_what_is_learned_from(asked):
    tokenizer, settings, groups, batches = asked

    def seen(details, **change):
        actor = ActorCritic(Policy(load_model("tiny", dtype="float32", device="cpu")), beta=0.1)
        return experience(
            actor, groups, batches, PPO(**(vars(settings) | change)), details, Meter()
        ), actor

    raw, plain = torch.tensor([r for group in groups for r in group.rewards]), seen({})[0]
    mask = plain["mask"].bool()
    assert torch.equal(plain["returns"][:, 0], raw), "gamma = gae_lambda = 1 and no value"
    white = seen({"whiten_advantages": 1.0})[0]["advantages"][mask]
    assert abs(white.mean()) < 1e-5
    assert abs(white.std() - 1) < 1e-4
    ended = torch.tensor([e for group in groups for e in group.ended])
    assert torch.allclose(seen({"missing_eos": 0.5})[0]["returns"][:, 0], raw - 0.5 * ~ended)
    assert seen({"normalize": 1.0, "clip_reward": 0.3})[0]["returns"].abs().max() == pytest.approx(
        0.3
    )
    assert seen({"adaptive_kl": 0.05})[1].beta.item() == pytest.approx(0.098), (
        "no KL yet: the coefficient falls"
    )
    assert seen({"entropy": 0.2, "explore": 3.0})[0]["entropy_weight"] == pytest.approx(
        0.2 * (1 - math.exp(-3 * raw.var().item()))
    )


# Runs ---------------------------------------------------------------------------------------------


def weights(run):
    return (run.path / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def run():
    return lab.run("ppo", **SHORT)


def test_the_record_is_whole(run):
    rows = run.lines()
    wanted = {
        "reward",
        "reward/correct",
        "reward_std",
        "kl",
        "value_loss",
        "explained_variance",
        "clip_fraction",
        "ratio_max",
        "entropy",
        "length",
        "truncated",
        "kl_coefficient",
        "entropy_coefficient",
    }
    assert all(wanted <= set(row) for row in rows)
    assert 0 <= run.summary["after"]["win_rate"] <= 1
    sampled = [row for row in run.lines("samples") if "advantage" in row]
    assert sampled
    assert all(
        len(row["values"])
        == len(row["advantages"])
        == len(row["logp"])
        == len(row["ref_logp"])
        == len(row["tokens"])
        == len(row["ids"])
        for row in sampled
    )
    assert rows[0]["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["kl_coefficient"] == pytest.approx(0.05)
    assert rows[-1]["kl_coefficient"] != rows[0]["kl_coefficient"]


@pytest.mark.parametrize("value", ["own", "shared"])
def test_stopped_and_resumed_is_uninterrupted(run, value):
    whole = run if value == "own" else lab.run("ppo", **SHORT | dict(value=value))
    other = create("ppo", SHORT | dict(value=value))
    with (
        mock.patch.object(Run, "stop_requested", lambda self: self.record["step"] == 2),
        pytest.raises(Stopped),
    ):
        execute(other)
    execute(other := Run(other.path))
    timed = ("seconds", "tokens_per_second", "memory_mib")
    untimed = lambda row: {name: value for name, value in row.items() if name not in timed}
    assert [untimed(row) for row in other.lines()] == [untimed(row) for row in whole.lines()], (
        "rewards, values, beta and statistics go on as they were"
    )
    assert weights(other) == weights(whole)
    assert other.lines("samples") == whole.lines("samples")


def test_a_reward_model_is_trained_first_where_it_is_asked_for(monkeypatch):
    short = lambda run, label, name, **values: subrun(
        run, label, name, **values | dict(steps=2, eval_rows=4)
    )
    monkeypatch.setattr("polm_lab.rewards.prepare.chain", short)
    found = lab.run(
        "ppo",
        **SHORT | dict(rewards="learned:0.5,length:0.1", data="chat", steps=2, max_new_tokens=16),
    )
    row, judge = found.lines()[0], found.record["parents"][-1]
    assert {"reward/model", "reward/length", "reward/gold"} <= set(row)
    assert row["reward"] == pytest.approx(
        0.5 * row["reward/model"] + 0.1 * row["reward/length"], abs=1e-5
    )
    assert found.settings["rewards"] == f"model:{found.path.parent / judge}:0.5,length:0.1,gold:0"
    critic = load_critic(PPO(**SHORT), str(found.path.parent / judge))
    trained = load_model(
        found.path.parent / judge / "model", dtype="float32", device="cpu", head="score"
    )
    assert torch.equal(
        critic.model.model.layers[0].mlp.up_proj.weight, trained.model.layers[0].mlp.up_proj.weight
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(details="whiten"), "did you mean 'whiten"),
        (dict(details="clip_value:-1"), "a number from 0 up"),
        (dict(value="own:x"), "weight: found 'x'"),
        (dict(value=""), "expected own, shared"),
        (dict(minibatches=3), "minibatches = 3"),
        (dict(rewards="corect"), "did you mean 'correct'"),
        (dict(value="nowhere:1"), "nowhere"),
        (dict(max_length=4), "max_length"),
    ],
)
def test_what_is_refused(change, words):
    with pytest.raises(WrongInput, match=None) as refused:
        lab.run("ppo", **SHORT | change)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_details_are_read_as_they_are_listed():
    read = lambda text: DETAILS.values(text, "details")
    assert read("") == {}
    assert read("explore:-2") == {"explore": -2.0}
    assert read(" entropy , clip_value:0.5 ") == {"entropy": 0.01, "clip_value": 0.5}
    assert CRITIC.values("shared:0.1", "value") == dict(kind="shared", weight=0.1)
    assert CRITIC.values("some/run", "value") == dict(kind="some/run", weight=0.5)
    assert pad_rows([[1, 2], [3]]).tolist() == [[1, 2], [3, 0]]
    assert learned_reward(PPO(rewards="correct,length:0.2"), None, True) == "correct,length:0.2"


def test_the_win_rate_is_of_the_policys_answers_over_those_of_the_base():
    class Frame:
        "An evaluation whose answers score by their letter; the last answers are there already."

        policy, rolled = "ours", SimpleNamespace(texts=["b", "b", "c", "b"])

        def sample(self):
            return SimpleNamespace(texts=["a", "a", "d", "b"] if self.policy == "base" else None)

        def scores(self, texts):
            return [ord(text) for text in texts]

    frame = Frame()
    assert win_rate_against(frame, "base") == (2 + 0.5) / 4
    assert frame.policy == "ours"


def test_the_what_if_cell_takes_many_tokens():
    path = Path(__file__).parent.parent / "nbs" / "alignment" / "ppo.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    [source] = [
        "".join(c["source"]) for c in cells if "skip-execution" in c["metadata"].get("tags", [])
    ]
    names = dict(vars(ppo))
    exec(source, names)
    names["draw"](", ".join(["0.5"] * 100), 1.0, 0.99, 0.95, 0.2)
    value, advantage, good, bad = names["figure"].data
    assert len(value.y) == len(advantage.y) == 100
    assert advantage.y[-1] == 0.5
    assert max(good.y) == pytest.approx(1.2)
    assert min(bad.y) == -2
    with pytest.raises(WrongInput, match="expected numbers"):
        names["draw"]("a, b", 1.0, 1.0, 0.9, 0.2)


@pytest.mark.parametrize("adapter", ["none", "lora:r=8"])
def test_the_base_of_the_win_rate_has_no_adapter(tmp_path, adapter):
    "Scores are 0 or 1 and the random numbers equal, so the rate follows from both accuracies."
    run = lab.run(
        "ppo",
        out=tmp_path,
        data="sums",
        adapter=adapter,
        steps=4,
        batch_size=16,
        eval_rows=48,
        max_new_tokens=8,
        learning_rate=1e-2,
        device="cpu",
        dtype="float32",
    )
    before, after = (run.summary[when]["accuracy"] for when in ("before", "after"))
    assert before != after
    assert run.summary["after"]["win_rate"] == pytest.approx(0.5 + (after - before) / 2)
