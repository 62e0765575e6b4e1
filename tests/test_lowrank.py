"""Low rank: products, roots of singular matrices, ranks from a budget, trains, saving and loading, wrong input."""

import copy
import json

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.core.run import all_runs
from polm_lab.efficiency.lowrank import (
    ALGORITHMS,
    LowRank,
    best_product,
    factor_model,
    rank_of,
    root_of,
    share_ranks,
    tensor_train,
    three_factors,
    train_embedding,
)
from polm_lab.efficiency.quantize import Matrix
from polm_lab.models.attach import merge_adapter
from polm_lab.models.factors import Factored, set_factors
from polm_lab.models.layers import linear_layers
from polm_lab.models.load import load_model
from polm_lab.models.save import save_model
from polm_lab.models.sources import skeleton
from polm_lab.training.layerwise import Inputs

SHORT = dict(calibration_samples=2, max_length=64, eval_rows=4)


def matrix(rows=24, columns=32, seed=0):
    "Return weights and inputs of very different sizes; one input is always 0."
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator)
    X = torch.randn(columns, 500, generator=generator) * torch.logspace(1, -1, columns)[:, None]
    X[5] = 0
    return W, X


def asked(W, X, algorithm, **knobs):
    "Return a matrix with its inputs and made-up Fisher information, and settings."
    inputs = Inputs(hessian=True)
    inputs.add(X.T)
    fisher = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    return Matrix("w", W, inputs, fisher=fisher), LowRank(algorithm=algorithm, **knobs)


def says(call, *values, **more) -> str:
    with pytest.raises(WrongInput) as wrong:
        call(*values, **more)
    assert "\n" not in str(wrong.value)
    return str(wrong.value)


# One matrix -------------------------------------------------------------------------------------


def test_the_product_is_the_truncated_svd():
    W, _ = matrix()
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    found = best_product(W, 5)
    assert torch.allclose(found.product(), U[:, :5] * s[:5] @ V[:5], atol=1e-5)
    assert found.first.shape == (5, 32)
    assert found.second.shape == (24, 5)
    error = (W - found.product()).square().sum()
    assert torch.allclose(error, s[5:].square().sum(), rtol=1e-4)


def test_the_root_of_a_singular_matrix():
    _, X = matrix()
    H = X @ X.T
    S, inverse = root_of(H)
    assert torch.linalg.cholesky_ex(H).info > 0
    assert torch.allclose(S @ S.T, H, rtol=1e-3, atol=1e-2)
    assert torch.isfinite(inverse).all()
    # S S⁻¹ is the projection on the directions that have inputs
    assert torch.allclose(S @ inverse @ X, X, rtol=1e-3, atol=1e-3)
    assert torch.allclose((S @ inverse)[5], torch.zeros(32), atol=1e-5)


def test_few_tokens_give_a_product_without_error():
    W, _ = matrix()
    X = torch.randn(32, 6)  # six tokens, 32 inputs
    found = best_product(W, 6, whitening=root_of(X @ X.T))
    assert torch.allclose(found.product() @ X, W @ X, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 4, 12, 23])
def test_svd_llm_loses_what_it_cuts_off_and_no_other_loses_less(rank):
    W, X = matrix()
    loss = lambda product: ((W - product) @ X).square().sum().item()
    products = {}
    for name in ("svd", "fwsvd", "asvd", "svd_llm"):
        products[name] = ALGORITHMS[name](*asked(W, X, name), rank).product()
    cut = torch.linalg.svdvals(W @ root_of(X @ X.T)[0])[rank:].square().sum().item()
    assert loss(products["svd_llm"]) == pytest.approx(cut, rel=1e-2, abs=1e-2)
    for name in ("svd", "fwsvd", "asvd"):
        assert loss(products["svd_llm"]) < loss(products[name])


def test_fwsvd_has_the_smallest_error_weighed_by_rows():
    W, X = matrix()
    m, settings = asked(W, X, "fwsvd")
    rows = m.fisher.sum(1, keepdim=True)
    loss = lambda product: (rows * (W - product).square()).sum()
    own = loss(ALGORITHMS["fwsvd"](m, settings, 6).product())
    assert own < loss(ALGORITHMS["svd"](m, settings, 6).product())
    noise = torch.Generator().manual_seed(2)
    found = ALGORITHMS["fwsvd"](m, settings, 6)
    for _ in range(20):  # no small step away is better
        second = found.second + 1e-2 * torch.randn(found.second.shape, generator=noise)
        assert own < loss(second @ found.first)


def test_asvd_with_a_power_of_zero_is_svd():
    W, X = matrix()
    zero = ALGORITHMS["asvd"](*asked(W, X, "asvd", alpha=0.0), 6).product()
    assert torch.allclose(zero, best_product(W, 6).product(), atol=1e-4)


def test_losparse_spends_its_budget_and_keeps_what_is_left_of_the_best_columns():
    W, X = matrix()
    m, settings = asked(W, X, "losparse", ratio=0.2, rest=0.5)
    found = ALGORITHMS["losparse"](m, settings, 0)
    numbers = found.first.numel() + found.second.numel() + found.rest.numel()
    assert 0.8 * 0.8 * W.numel() < numbers <= 0.8 * W.numel()
    assert torch.allclose(found.product()[:, found.columns], W[:, found.columns], atol=1e-5)
    left = W - best_product(W, len(found.first)).product()
    worth = (left.abs() * m.fisher.sqrt()).sum(0)
    others = torch.ones(32, dtype=torch.bool)
    others[found.columns] = False
    assert worth[found.columns].min() >= worth[others].max()
    none = ALGORITHMS["losparse"](*asked(W, X, "losparse", rest=0.0), 0)
    assert none.rest is None


def test_repairs_lose_less_than_rounding_and_turns_help():
    W, X = matrix()
    lost = {}
    for rounds in (1, 5):
        found = ALGORITHMS["loftq"](*asked(W, X, "loftq", bits=2, rank=4, rounds=rounds), 0)
        lost[rounds] = (W - found.product()).norm()
        assert found.rest.shape == W.shape
        assert found.columns is None
        assert all(len(row.unique()) <= 4 for row in found.rest)  # one group: four numbers a row
    base = (W - ALGORITHMS["loftq"](*asked(W, X, "loftq", rank=1, rounds=1), 0).rest).norm()
    assert lost[5] < lost[1] < base
    outputs = {}
    for name in ("loftq", "eora"):
        found = ALGORITHMS[name](*asked(W, X, name, bits=2, rank=4, rounds=1), 0)
        outputs[name] = ((W - found.product()) @ X).norm()
    assert outputs["eora"] < outputs["loftq"]


# Ranks ------------------------------------------------------------------------------------------


def test_ranks_keep_the_budget_and_go_where_the_spectrum_is_flat():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (40, 40), "b": (40, 80), "c": (20, 40)}
    spectra = {
        name: torch.rand(min(shape), generator=generator).sort(descending=True).values
        for name, shape in shapes.items()
    }
    spectra["a"] = 0.5 ** torch.arange(40.0)
    for ratio in (0.1, 0.4, 0.8):
        ranks = share_ranks(spectra, shapes, ratio)
        numbers = sum(ranks[name] * sum(shapes[name]) for name in shapes)
        budget = (1 - ratio) * sum(m * n for m, n in shapes.values())
        assert numbers <= budget
        assert numbers > min(
            0.85 * budget, sum(rank_of(s, 0) * sum(s) for s in shapes.values()) - 1
        )
        assert all(1 <= ranks[name] <= rank_of(shapes[name], 0) for name in shapes)
    tight = share_ranks(spectra, shapes, 0.6)
    assert tight["a"] < rank_of(shapes["a"], 0.6)
    assert tight["c"] > rank_of(shapes["c"], 0.6)


# Trains -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, dims", [(160, (4, 5, 8)), (576, (8, 8, 9)), (7, (1, 1, 7))])
def test_a_width_as_three_factors(width, dims):
    assert three_factors(width) == dims


def test_a_train_of_full_rank_is_exact_and_a_smaller_one_is_the_nearest_of_its_kind():
    rows = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(tensor_train(rows, (2, 3, 4), (2, 4)), rows, atol=1e-5)
    one = tensor_train(rows, (2, 3, 4), (1, 4))  # rank 1 of a 2 × 12 matrix
    U, s, V = torch.linalg.svd(rows.view(6, 2, 12), full_matrices=False)
    nearest = (U[:, :, :1] * s[:, None, :1]) @ V[:, :1]
    assert torch.allclose(one, nearest.reshape(6, 24), atol=1e-5)
    # a tensor that is an outer product of three is a train of ranks 1
    a, b, c = (torch.randn(6, n) for n in (2, 3, 4))
    outer = torch.einsum("na,nb,nc->nabc", a, b, c).flatten(1)
    assert torch.allclose(tensor_train(outer, (2, 3, 4), (1, 1)), outer, atol=1e-5)


def test_trains_keep_their_budget():
    weight = torch.randn(50, 160)
    for ratio in (0.2, 0.6):
        made, numbers = train_embedding(weight, ratio)
        assert numbers <= (1 - ratio) * weight.numel()
        assert made.shape == weight.shape
    text = says(train_embedding, weight, 0.95)
    assert "ratio = 0.95" in text
    assert "lower it" in text


# Models -----------------------------------------------------------------------------------------


def small(kind: str):
    "Return a small model of random weights that has biases where the family has some."
    torch.manual_seed(0)
    if kind == "neox":
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
        config = GPTNeoXConfig(vocab_size=64, num_attention_heads=4, **sizes)
        return GPTNeoXForCausalLM(config).eval()
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, attention_bias=True, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["llama", "neox"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_factored_model_is_saved_and_read_again(tmp_path, kind, algorithm):
    model = small(kind)
    windows = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    settings, found = LowRank(algorithm=algorithm, rank=4, rest=0.3), {}
    list(factor_model(model, windows, settings, found))
    assert len(model.config.low_rank) == len(found) > 0
    with torch.no_grad():
        logits = model(windows).logits
    save_model(model, None, tmp_path / "model")
    again = load_model(tmp_path / "model", dtype="float32", device="cpu").eval()
    with torch.no_grad():
        assert torch.equal(again(windows).logits, logits)
    name, one = next(iter(found.items()))
    layer = again.get_submodule(name)
    assert isinstance(layer, Factored)
    assert torch.allclose(layer.product(), one.product(), atol=1e-5)
    x, bias = torch.randn(5, layer.in_features), layer.second.bias
    with torch.no_grad():
        wanted = x @ layer.product().T + (0 if bias is None else bias)
        assert torch.allclose(layer(x), wanted, atol=1e-4)
    assert sum(p.numel() for p in skeleton(tmp_path / "model").parameters()) == sum(
        p.numel() for p in model.parameters()
    )


def test_at_full_rank_the_model_stays():
    model = small("llama")
    windows = torch.randint(64, (4, 16))
    with torch.no_grad():
        before = model(windows).logits
    for name, layer in linear_layers(model.model).items():
        U, s, V = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        set_factors(model.model, name, s[:, None] * V, U)
    with torch.no_grad():
        assert torch.allclose(model(windows).logits, before, atol=1e-4)


def test_a_factored_model_trains_with_an_adapter_and_merges(tmp_path):
    run = lab.run("lowrank", **SHORT)
    tuned = lab.run(
        "sft", model=run.id, adapter="lora:r=4", steps=2, batch_size=4, eval_rows=4, data="sums#16"
    )
    merged = load_model(tuned.id, dtype="float32", device="cpu")
    assert any("first" in name for name, _ in merged.named_parameters())
    save_model(merge_adapter(merged), None, tmp_path / "merged")
    again = load_model(tmp_path / "merged", dtype="float32", device="cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = load_model(tuned.id, dtype="float32", device="cpu").eval()(ids).logits
        assert torch.allclose(again.eval()(ids).logits, wanted, atol=1e-4)
    assert again.config.low_rank == load_model(run.id, "float32", "cpu").config.low_rank


def test_a_file_that_does_not_fit_its_ranks_is_refused(tmp_path):
    model = small("llama")
    name = "model.layers.0.mlp.up_proj"
    set_factors(model, name, torch.randn(4, 32), torch.randn(48, 4))
    save_model(model, None, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"low_rank": {}}))
    assert "config.json" in says(load_model, tmp_path / "model")
    file.write_text(json.dumps(config | {"low_rank": {name: [5, 0]}}))
    assert "wrong shapes" in says(load_model, tmp_path / "model")
    file.write_text(json.dumps(config | {"low_rank": {"model.nowhere": [4, 0]}}))
    assert "cannot be loaded" in says(load_model, tmp_path / "model")
    file.write_text(json.dumps(config | {"architectures": ["os"]}))
    assert "no model of transformers" in says(load_model, tmp_path / "model")


# Runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "tensorgpt"])
def test_a_run_counts_what_it_stores(algorithm):
    run = lab.run("lowrank", algorithm=algorithm, **SHORT)
    before, after = run.summary["before"], run.summary["after"]
    assert before["bits_per_weight"] == pytest.approx(32)
    assert after["size_mib"] < before["size_mib"]
    ratio = after["bits_per_weight"] / before["bits_per_weight"]
    assert ratio == pytest.approx(after["size_mib"] / before["size_mib"])
    model = load_model(run.id, dtype="float32", device="cpu")
    if algorithm in ("loftq", "eora"):
        assert ratio < 0.35
    elif algorithm == "tensorgpt":
        assert not hasattr(model.config, "low_rank")
    else:
        numbers = sum(p.numel() for p in model.parameters())
        assert ratio == pytest.approx(numbers / before["size_mib"] / 2**20 * 4, rel=1e-3)


def test_the_spectrum_run_has_ranks_that_differ():
    run = lab.run("lowrank", ranks="spectrum", **SHORT)
    ranks = load_model(run.id, dtype="float32", device="cpu").config.low_rank
    same = [rank for name, (rank, _) in ranks.items() if name.endswith("up_proj")]
    assert len(set(same)) > 1


# Wrong input ------------------------------------------------------------------------------------


def test_a_factored_model_is_not_factored_again():
    run = lab.run("lowrank", algorithm="svd", **SHORT)
    text = says(lab.run, "lowrank", model=run.id, **SHORT)
    assert "already" in text
    assert run.id in text
    refused = [one for one in all_runs() if one.id != run.id]
    assert all("after" not in one.summary for one in refused)


def test_inputs_that_are_not_finite_are_refused():
    model = copy.deepcopy(small("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = float("nan")
    windows = torch.full((2, 8), 3)
    text = says(lambda: list(factor_model(model, windows, LowRank(), {})))
    assert "not a finite" in text


@pytest.mark.parametrize("knobs", [dict(ratio=0.0), dict(ratio=1.0), dict(rank=0), dict(bits=9)])
def test_settings_out_of_range_are_refused(knobs):
    assert next(iter(knobs)) in says(lab.run, "lowrank", **knobs)
