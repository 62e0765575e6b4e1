"""The over-optimization lab: best-of-n against all draws, its KL against a sum.

Also the curve of a record, and wrong input.
"""

import itertools
import math

import pytest
import torch

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.core.run import Run
from polm_lab.recipes.overoptimization import best_of_n, best_of_n_kl, curve_of


def test_best_of_n_is_the_mean_over_all_draws():
    maker = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(3, 6, generator=maker), torch.randn(3, 6, generator=maker)
    for n in range(1, 7):
        draws = list(itertools.combinations(range(6), n))
        by_hand = []
        for p in range(3):
            best = [max(draw, key=proxy[p].__getitem__) for draw in draws]
            by_hand.append(sum(gold[p, i] for i in best) / len(draws))
        assert torch.allclose(best_of_n(proxy, gold, n), torch.stack(by_hand).double(), atol=1e-6)
    assert torch.allclose(best_of_n(proxy, proxy, 6), proxy.max(1).values.double(), atol=1e-7)
    for n in (0, 7):
        with pytest.raises(WrongInput, match="expected from 1 to 6"):
            best_of_n(proxy, gold, n)


def test_kl_of_best_of_n_bounds_the_exact_one():
    for answers in (3, 50, 2000):
        p = torch.arange(1, answers + 1, dtype=torch.float64) / answers
        for n in (1, 2, 5, 30):
            chance = p**n - (p - 1 / answers) ** n
            exact = torch.xlogy(chance, chance * answers).sum().item()
            assert exact <= best_of_n_kl(n) + 1e-9
            assert answers < 2000 or exact == pytest.approx(best_of_n_kl(n), abs=0.01)
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)


def test_the_curve_is_read_from_the_record(tmp_path):
    run = Run.create("grpo", dict(steps=4), out=tmp_path)
    point = lambda kl, reward, gold: dict(kl=kl, length=10.0, reward=reward, gold_score=gold)
    run.frame("before", point(0.0, -1.0, 0.5))
    for step in range(1, 5):
        run.log(
            step,
            reward=step,
            **({f"eval/{k}": v for k, v in point(0.2, 1.0, 0.8).items()} if step == 2 else {}),
        )
    run.frame("after", point(0.9, 2.0, 0.7))
    found = curve_of(run)
    assert [(p["step"], round(p["kl"], 6), p["proxy"], p["gold"]) for p in found] == [
        (0, 0.0, -1.0, 0.5),
        (2, 2.0, 1.0, 0.8),
        (4, 9.0, 2.0, 0.7),
    ]


def test_wrong_sizes_are_refused(tmp_path):
    with pytest.raises(WrongInput, match="whole numbers with commas"):
        lab.run("overoptimization", out=tmp_path, sizes="many")
