"""Distances between rewards: invariances, opposite ends, the triangle inequality.

Also the effect of rewriting on a reward, and wrong shapes.
"""

import random

import pytest
import torch

from polm_lab.rewards.distance import (
    REWRITES,
    agreement,
    answer_distance,
    epic,
    epic_form,
    half_distance,
    rewritten,
    starc,
    starc_form,
)
from polm_lab.core.knobs import WrongInput
from polm_lab.data.tasks import TASKS
from polm_lab.data.language import gold

MAKER = torch.Generator().manual_seed(3)
N, M, GAMMA = 5, 3, 0.8
R, Q, T = (torch.randn(N, M, N, generator=MAKER).double() for _ in range(3))
TAU = torch.randn(N, M, N, generator=MAKER).double().softmax(-1)
PHI = torch.randn(N, generator=MAKER).double()
SHAPING = GAMMA * PHI - PHI[:, None, None]
DISTANCES = {"epic": lambda a, b: epic(a, b, GAMMA), "starc": lambda a, b: starc(a, b, TAU, GAMMA)}


@pytest.mark.parametrize("name", DISTANCES)
def test_shaping_and_scale_are_nothing_and_the_opposite_is_everything(name):
    d = DISTANCES[name]
    assert d(R, 4 * R + SHAPING) < 1e-7
    assert d(R, -0.1 * R + SHAPING) == pytest.approx(1.0)
    assert d(R, R + 0.7) < 1e-7, "a constant is shaping"
    wrong = PHI - GAMMA * PHI[:, None, None]  # the discount on the wrong side is no shaping
    assert d(R, R + 3 * wrong) > 0.01
    assert d(R, Q) == pytest.approx(d(Q, R))
    assert d(R, T) <= d(R, Q) + d(Q, T) + 1e-9
    assert 0 < d(R, Q) < 1


def test_epic_form_by_its_definition():
    states, actions = (
        torch.rand(N, generator=MAKER).double().softmax(0),
        torch.rand(M, generator=MAKER).double().softmax(0),
    )
    found = epic_form(R, GAMMA, states, actions)
    mean = lambda f: sum(
        states[i] * actions[a] * states[j] * f(i, a, j)
        for i in range(N)
        for a in range(M)
        for j in range(N)
    )
    s, a, t = 1, 2, 4
    by_hand = R[s, a, t] + mean(
        lambda i, b, j: GAMMA * R[t, b, j] - R[s, b, j] - GAMMA * R[i, b, j]
    )
    assert found[s, a, t].item() == pytest.approx(by_hand.item())


def test_starc_form_is_the_advantage_of_the_policy():
    form, policy = starc_form(R, TAU, GAMMA), torch.full((N, M), 1 / M, dtype=torch.float64)
    assert (form * policy).sum(1).abs().max() < 1e-9, "the mean advantage is 0"
    value = torch.zeros(N).double()
    for _ in range(400):  # iterated policy evaluation
        value = (policy * (TAU * (R + GAMMA * value)).sum(-1)).sum(1)
    assert torch.allclose(form, (TAU * (R + GAMMA * value)).sum(-1) - value[:, None], atol=1e-8)
    moved = torch.randn(N, M, N, generator=MAKER).double()
    moved -= (moved * TAU).sum(-1, keepdim=True)
    assert starc(R, R + moved, TAU, GAMMA) < 1e-7 < epic(R, R + moved, GAMMA)


def test_answers_to_prompts():
    r = torch.randn(30, 4, generator=MAKER).double()
    assert answer_distance(r, 5 * r + torch.randn(30, 1, generator=MAKER).double()) < 1e-7
    assert answer_distance(r, -r) == pytest.approx(1.0)
    assert answer_distance(r, torch.zeros(30, 4)) == pytest.approx(0.5)
    assert half_distance(torch.zeros(3), torch.zeros(3)) == 0.0
    advantage = r - r.mean(1, keepdim=True)
    assert answer_distance(r, advantage) < 1e-7, "a reward and its advantage within the group"


def test_rewrites_keep_what_gold_sees_and_change_the_words():
    rows = TASKS["chat"].rows("preference", 30, seed=5, split="test")
    for how in REWRITES:
        said = [
            (row["prompt"], row["chosen"], rewritten(row["chosen"], how, random.Random(1)))
            for row in rows
        ]
        assert all(
            abs(gold(p, a[-1]["content"])["total"] - gold(p, b[-1]["content"])["total"]) < 0.1
            for p, a, b in said
        )
        assert sum(a != b for _, a, b in said) >= 5
        assert all(len(b) == 1 and b[0]["role"] == "assistant" for _, _, b in said)
    assert rewritten("Gladly! So.", "opening", random.Random(0)) != "Gladly! So."


def test_agreement_tells_a_reward_of_meaning_from_one_of_words():
    rows = TASKS["chat"].rows("preference", 20, seed=6, split="test")
    words = lambda prompts, completions: [
        float("Gladly!" in c[-1]["content"]) + len(c[-1]["content"]) / 1000 for c in completions
    ]
    table = agreement(words, rows)
    assert table.loc["opening", "kept"] < 1
    assert table.loc["opening", "moved"] > table.loc["spaces", "moved"] > 0
    constant = agreement(lambda prompts, completions: [0.0] * len(prompts), rows)
    assert (constant.kept == 1).all()
    assert (constant.moved == 0).all()


def test_wrong_shapes_are_refused():
    with pytest.raises(WrongInput, match="states, actions, states"):
        epic(R[:, :, :2], R[:, :, :2], GAMMA)
    with pytest.raises(WrongInput, match="states, actions, states"):
        starc(R[0], R[0], TAU, GAMMA)
    with pytest.raises(WrongInput, match="two answers or more"):
        answer_distance(R[:, 0, :1], R[:, 0, :1])
