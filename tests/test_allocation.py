"""The more sensitive a block, the fewer of its weights go, with the values written out.

OWL goes by outliers, SAMSP by the trace of the loss's second derivatives.
"""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import polm_lab as lab
from polm_lab.training.layerwise import Inputs, calibration
from polm_lab.models.layers import blocks_of, linear_layers
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.core.knobs import OFF, WrongInput
from polm_lab.core.settings import make_settings, part_knobs, value_named
from polm_lab.efficiency.prune import Prune, allocate, block_sensitivity, hessian_traces
from polm_lab.efficiency.prune import parse_allocation, sparsities
from polm_lab.runner import launch, sweep
from polm_lab.workbench.controls import Form

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
    """S_i = s + mean(λ-scaled D) − 2λ (D_i − min D) / (max D − min D).

    The sign is what makes it OWL. Yin et al. 2023, §3.2.
    """
    found = allocate(torch.tensor([0.0, 0.5, 1.0]), 0.5, 0.1, torch.ones(3))
    assert found == pytest.approx([0.6, 0.5, 0.4])
    assert allocate(torch.tensor([7.0, 3.0, 5.0]), 0.7, 0.08, torch.ones(3)) == pytest.approx(
        [0.62, 0.78, 0.7]
    )


def test_the_mean_counts_weights_and_not_blocks():
    sizes = torch.tensor([1.0, 1.0, 2.0])
    found = allocate(torch.tensor([0.0, 0.5, 1.0]), 0.5, 0.1, sizes)
    assert found == pytest.approx([0.625, 0.525, 0.425])
    assert (torch.tensor(found) * sizes).sum().item() / 4 == pytest.approx(0.5)


def test_equal_blocks_and_limits():
    assert allocate(torch.tensor([2.0, 2.0]), 0.5, 0.1, torch.ones(2)) == pytest.approx([0.5, 0.5])
    assert allocate(torch.tensor([0.0, 1.0]), 0.95, 0.1, torch.ones(2)) == pytest.approx(
        [0.99, 0.85]
    )
    assert allocate(torch.tensor([0.0, 1.0]), 0.05, 0.1, torch.ones(2)) == pytest.approx(
        [0.15, 0.0]
    )


@pytest.mark.parametrize(
    "large, share", [(6.0, 0.0), (7.0, 1 / 16), (-7.0, 1 / 16), (100.0, 1 / 16)]
)
def test_an_outlier_is_over_five_times_the_mean_of_its_block(large, share):
    "Sixteen scores, fifteen of them 1: 7 is over 5 · 22/16 = 6.9, and 6 is not over 5 · 21/16 = 6.6."
    weight = torch.ones(4, 4)
    weight[1, 2] = large
    assert block_sensitivity(None, group([weight], torch.eye(4)), "outliers") == share


@pytest.mark.parametrize("factor, share", [(4.9, 1 / 16), (5.2, 0.0), (1.0, 1 / 16), (100.0, 0.0)])
def test_the_factor_is_how_far_above_the_mean_an_outlier_is(factor, share):
    "Fifteen scores of 1 and a 7: a mean of 22/16, and 7 is 5.09 times that."
    weight = torch.ones(4, 4)
    weight[1, 2] = 7.0
    assert block_sensitivity(None, group([weight], torch.eye(4)), "outliers", factor) == share


def test_outliers_count_inputs_and_all_layers_of_a_block():
    x = torch.diag(torch.tensor([1.0, 1.0, 1.0, 40.0]))  # norms of the inputs
    # 32 scores: 24 of 1 and 8 of 40, a mean of 10.75: 40 is not over 5 times that
    # with a single large column in one of two layers it is
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


def test_traces_are_those_of_the_second_derivatives():
    "Each eᵢᵀHeᵢ of a very small model, next to the mean over many random signs."
    torch.manual_seed(0)
    sizes = dict(vocab_size=12, hidden_size=4, intermediate_size=4, num_hidden_layers=2)
    config = LlamaConfig(num_attention_heads=1, num_key_value_heads=1, **sizes)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8)  # curved enough to be seen
    windows = torch.randint(12, (1, 8))
    exact = []
    for block in blocks_of(model):
        weights = [layer.weight for layer in linear_layers(block).values()]
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(windows, labels=windows, use_cache=False).loss
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        slopes = torch.cat([slope.flatten() for slope in slopes])
        total = 0.0
        for i in range(len(slopes)):
            row = torch.autograd.grad(slopes[i], weights, retain_graph=True)
            total += torch.cat([part.flatten() for part in row])[i].item()
        exact.append(total / len(slopes))
    found = hessian_traces(model, windows.repeat(400, 1), 1)
    assert found == pytest.approx(exact, rel=0.2)
    assert abs(exact[0] / exact[1] - 1) > 0.3  # the two differ by more than that


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
            scores = torch.cat(
                [(m.weight.detach().double().abs() * squares[m].sqrt()).flatten() for m in own]
            )
            found.append((scores > 5 * scores.mean()).double().mean().item())
        else:
            found.append(
                torch.cat(
                    [
                        (0.5 * m.weight.detach().double().square() * squares[m] / tokens).flatten()
                        for m in own
                    ]
                )
                .mean()
                .item()
            )
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_measured_block_by_block(kind, base, windows):
    minds = torch.tensor(plain_sensitivity(base, windows, kind))
    shares = torch.tensor(sparsities(base, windows, kind, 0.5, 0.08, 2))
    expected = 0.5 - 0.16 * (minds - minds.min()) / (minds.max() - minds.min())
    expected += 0.5 - expected.mean()
    assert torch.allclose(shares, expected, atol=1e-3)
    assert shares.argmin() == minds.argmax()
    assert shares.argmax() == minds.argmin()
    assert shares.mean().item() == pytest.approx(0.5, abs=1e-6)
    assert (shares.max() - shares.min()).item() == pytest.approx(0.16, abs=1e-6)


def test_a_factor_changes_the_shares_and_five_is_the_rule_without_one(base, windows):
    shares = lambda text: sparsities(base, windows, text, 0.5, 0.08, 2)
    assert shares("outliers:factor=5") == shares("outliers") != shares("outliers:factor=3")
    assert shares("outliers:factor=on") == shares("outliers:factor=off") == shares("outliers")


# A short string with parts


def written(text: str, **parts) -> str:
    "The allocation `text` with values for its parts."
    parts = {f"allocation.{name}": value for name, value in parts.items()}
    return make_settings(Prune, {"allocation": text} | parts).allocation


@pytest.mark.parametrize(
    "text, parts, found",
    [
        ("uniform", dict(rule="outliers", factor=7), "outliers:factor=7"),
        ("outliers", dict(factor="2.5"), "outliers:factor=2.5"),
        ("outliers:factor=7", dict(factor=3), "outliers:factor=3"),
        ("outliers:factor=7", dict(factor=OFF), "outliers"),
        ("outliers:factor=7", dict(rule="outliers"), "outliers:factor=7"),
        ("outliers:factor=7", dict(rule="hessian"), "hessian"),
        ("hessian", dict(factor=OFF), "hessian"),
        ("0.4,0.5", dict(factor=OFF), "0.4,0.5"),
    ],
)
def test_a_factor_is_written_into_the_rule(text, parts, found):
    assert written(text, **parts) == found
    parse_allocation(found)


def test_strings_with_and_without_a_factor_are_read():
    for text, rule, factor in (
        ("uniform", "uniform", OFF),
        ("outliers", "outliers", OFF),
        ("outliers:factor=7", "outliers", 7.0),
        ("hessian", "hessian", OFF),
        ("0.4,0.5", "own", OFF),
        ("outliers_of_mine", "own", OFF),
    ):
        assert make_settings(Prune, dict(allocation=text)).allocation == text  # as a record has it
        values = dict(allocation=text)
        assert value_named(Prune, values, "allocation.rule") == rule
        assert value_named(Prune, values, "allocation.factor") == factor
    assert parse_allocation("outliers") == ("outliers", 5.0)
    assert parse_allocation("outliers:factor=7") == ("outliers", 7.0)
    assert parse_allocation("0.4,0.5")[0] == "0.4,0.5"
    assert part_knobs(Prune)["allocation.factor"].default == OFF


@pytest.mark.parametrize(
    "text, found",
    [
        (
            "outliers:factr=7",
            "allocation = 'outliers:factr=7': expected outliers, or outliers:factor=7",
        ),
        ("outliers:factor=0", "allocation.factor = '0': expected a number ≥ 1 and ≤ 100, or off"),
        ("outliers:factor=much", "allocation.factor = 'much': expected a number"),
        ("outliers:", "allocation = 'outliers:': expected uniform"),
        ("hessian:factor=7", "allocation = 'hessian:factor=7': expected uniform"),
        ("outliers,factor=7", "allocation = 'outliers,factor=7': expected uniform"),
    ],
)
def test_a_wrong_factor_is_refused_in_one_line(text, found, base, windows):
    with pytest.raises(WrongInput) as wrong:
        sparsities(base, windows, text, 0.5, 0.08, 2)
    assert str(wrong.value).startswith(found)
    assert "\n" not in str(wrong.value)


def test_a_factor_needs_its_rule():
    for text in ("uniform", "hessian", "0.4,0.5"):
        with pytest.raises(WrongInput, match="expected rule = outliers; give the rule too"):
            written(text, factor=7)
    form = Form("prune")
    fields = form.parts["allocation"].fields
    fields["allocation.factor"].control.value = "7"
    assert "give the rule too" in fields["allocation.factor"].problem
    assert form.values == {}
    fields["allocation.rule"].control.value = "outliers"
    fields["allocation.factor"].control.value = "7"
    assert form.values == dict(allocation="outliers:factor=7")
    assert not form.problem
    fields["allocation.rule"].control.value = "hessian"
    assert form.values == dict(allocation="hessian")
    assert fields["allocation.factor"].value == OFF


def test_a_sweep_varies_the_factor():
    grid = {"allocation.factor": "3,off,7"}
    name, asked, points = sweep.plan(
        "prune", grid, dict(allocation="outliers"), metric="perplexity"
    )
    made = [launch.check_settings(name, asked["fixed"] | point)[1].allocation for point in points]
    assert made == ["outliers:factor=3", "outliers", "outliers:factor=7"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_prunes_the_sensitive_blocks_less(kind, base, runs):
    run = lab.run(
        "prune",
        algorithm="wanda",
        allocation=kind,
        sparsity=0.5,
        calibration_samples=4,
        eval_rows=4,
        max_length=64,
        device="cpu",
        dtype="float32",
    )
    minds = torch.tensor(
        plain_sensitivity(base, calibration(load_tokenizer("tiny"), "chat", 4, 64), kind)
    )
    expected = 0.58 - 0.16 * (minds - minds.min()) / (minds.max() - minds.min())
    expected += 0.5 - expected.mean()
    found = torch.tensor([row["sparsity"] for row in run.lines()])
    assert torch.allclose(found, expected, atol=0.01)
    assert found.argmin() == minds.argmax()
    assert found.argmax() == minds.argmin()
    assert run.summary["after"]["sparsity"] == pytest.approx(0.5, abs=0.01)
