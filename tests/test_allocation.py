"Which block gives up more: the more a block minds, the fewer of its weights go (OWL by outliers, SAMSP by the Hessian), with the values written out."

import pytest
import torch
from torch import nn

import polm_lab as lab
from polm_lab.training.layerwise import Inputs, calibration
from polm_lab.models.layers import blocks_of
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.efficiency.prune import allocate, block_sensitivity, sparsities

KINDS = ("outliers", "hessian")


@pytest.fixture(scope="module")
def base():
    return load_model("tiny", dtype="float32", device="cpu").eval()


@pytest.fixture(scope="module")
def windows():
    return calibration(load_tokenizer("tiny"), "chat", 4, 64)


def group(weights, x) -> list[Inputs]:
    "Layers with these weights that read the same inputs `x` [tokens, in]."
    found = Inputs(False)
    for i, weight in enumerate(weights):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight
        found.layers[f"layer{i}"] = layer
    found.add(x)
    return [found]


def test_the_most_sensitive_block_keeps_most():
    "S_i = s + mean(λ-scaled D) − 2λ (D_i − min D) / (max D − min D): the sign is what makes it OWL (Yin et al. 2023, §3.2)."
    found = allocate(torch.tensor([0.0, 0.5, 1.0]), 0.5, 0.1, torch.ones(3))
    assert found == pytest.approx([0.6, 0.5, 0.4])
    assert allocate(torch.tensor([7.0, 3.0, 5.0]), 0.7, 0.08, torch.ones(3)) == pytest.approx([0.62, 0.78, 0.7])


def test_the_mean_counts_weights_and_not_blocks():
    sizes = torch.tensor([1.0, 1.0, 2.0])
    found = allocate(torch.tensor([0.0, 0.5, 1.0]), 0.5, 0.1, sizes)
    assert found == pytest.approx([0.625, 0.525, 0.425]) and (torch.tensor(found) * sizes).sum().item() / 4 == pytest.approx(0.5)


def test_equal_blocks_and_limits():
    assert allocate(torch.tensor([2.0, 2.0]), 0.5, 0.1, torch.ones(2)) == pytest.approx([0.5, 0.5])
    assert allocate(torch.tensor([0.0, 1.0]), 0.95, 0.1, torch.ones(2)) == pytest.approx([0.99, 0.85])
    assert allocate(torch.tensor([0.0, 1.0]), 0.05, 0.1, torch.ones(2)) == pytest.approx([0.15, 0.0])


@pytest.mark.parametrize("large, share", [(6.0, 0.0), (7.0, 1 / 16), (-7.0, 1 / 16), (100.0, 1 / 16)])
def test_an_outlier_is_over_five_times_the_mean_of_its_block(large, share):
    "Sixteen scores, fifteen of them 1: 7 is over 5 · 22/16 = 6.9, and 6 is not over 5 · 21/16 = 6.6."
    weight = torch.ones(4, 4)
    weight[1, 2] = large
    assert block_sensitivity(None, group([weight], torch.eye(4)), "outliers") == share


def test_outliers_count_inputs_and_all_layers_of_a_block():
    x = torch.diag(torch.tensor([1.0, 1.0, 1.0, 40.0]))  # norms of the inputs
    # 32 scores: 24 of 1 and 8 of 40, a mean of 10.75: 40 is not over 5 times that; with a single large column in one of two layers it is
    assert block_sensitivity(None, group([torch.ones(4, 4)] * 2, x), "outliers") == 0.0
    quiet = torch.ones(4, 4)
    quiet[:, 3] = 0.0
    quiet[0, 3] = 1.0
    assert block_sensitivity(None, group([quiet, quiet], x), "outliers") == 2 / 32


def test_saliency_is_half_the_curvature_times_the_square():
    "½ h_jj w² a weight, with h_jj the mean square of input j over tokens."
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])  # mean squares 5 and 2
    weight = torch.tensor([[1.0, -1.0], [2.0, 3.0]])
    expected = 0.5 * (5 * 1 + 2 * 1 + 5 * 4 + 2 * 9) / 4
    assert block_sensitivity(None, group([weight], x), "hessian") == pytest.approx(expected)


def plain_sensitivity(model, windows, kind) -> list[float]:
    "The same from one pass through the whole model, with hooks on every linear layer."
    squares, tokens = {}, windows.numel()

    def look(layer, args):
        squares[layer] = args[0].detach().flatten(0, -2).double().square().sum(0)

    layers = [m for m in blocks_of(model).modules() if isinstance(m, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    with torch.no_grad():
        model(windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = []
    for block in blocks_of(model):
        own = [m for m in block.modules() if isinstance(m, nn.Linear)]
        if kind == "outliers":
            scores = torch.cat([(m.weight.detach().double().abs() * squares[m].sqrt()).flatten() for m in own])
            found.append((scores > 5 * scores.mean()).double().mean().item())
        else:
            found.append(torch.cat([(0.5 * m.weight.detach().double().square() * squares[m] / tokens).flatten() for m in own]).mean().item())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_measured_block_by_block(kind, base, windows):
    minds = torch.tensor(plain_sensitivity(base, windows, kind))
    shares = torch.tensor(sparsities(base, windows, kind, 0.5, 0.08, 2))
    expected = 0.5 - 0.16 * (minds - minds.min()) / (minds.max() - minds.min())
    expected += 0.5 - expected.mean()
    assert torch.allclose(shares, expected, atol=1e-3) and shares.argmin() == minds.argmax() and shares.argmax() == minds.argmin()
    assert shares.mean().item() == pytest.approx(0.5, abs=1e-6) and (shares.max() - shares.min()).item() == pytest.approx(0.16, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_prunes_the_sensitive_blocks_less(kind, base, runs):
    run = lab.run("prune", how="wanda", allocation=kind, sparsity=0.5, samples=4, eval_rows=4, max_length=64, device="cpu", dtype="float32")
    minds = torch.tensor(plain_sensitivity(base, calibration(load_tokenizer("tiny"), "chat", 4, 64), kind))
    expected = 0.58 - 0.16 * (minds - minds.min()) / (minds.max() - minds.min())
    expected += 0.5 - expected.mean()
    found = torch.tensor([row["sparsity"] for row in run.lines()])
    assert torch.allclose(found, expected, atol=0.01) and found.argmin() == minds.argmax() and found.argmax() == minds.argmin()
    assert run.summary["after"]["sparsity"] == pytest.approx(0.5, abs=0.01)
