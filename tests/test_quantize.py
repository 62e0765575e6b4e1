"""Quantization: numbers, algorithms on one matrix, whole models, what is stored, wrong input."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.core.run import all_runs
from polm_lab.efficiency.compression.codebooks import binary_scales, hqq, lut, weighted_means
from polm_lab.efficiency.compression.numbers import (
    Grid,
    as_float8,
    fit_grid,
    microscaled,
    normal_float,
    scaled_table,
)
from polm_lab.efficiency.compression.rounding import (
    awq,
    awq_gain,
    best_grid,
    gptq,
    nearest,
    obq,
    output_loss,
    owq,
    quip,
    random_rotation,
    spqr,
)
from polm_lab.efficiency.quantize import (
    ALGORITHMS,
    Quantize,
    bits_of,
    pack_bits,
    quantize_model,
    read_mixed,
    share_out,
    unpack_bits,
)
from polm_lab.models.layers import linear_layers
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer

# The table of bitsandbytes, as published in its source.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def matrix(rows=24, columns=80, seed=0):
    "Return weights, inputs that are correlated, and their H."
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0.5, -1, columns)
    X = mix @ torch.randn(columns, 2048, generator=generator)
    return torch.randn(rows, columns, generator=generator), X, X @ X.T


def says(call, *values, **more) -> str:
    with pytest.raises(WrongInput) as wrong:
        call(*values, **more)
    assert "\n" not in str(wrong.value)
    return str(wrong.value)


# Numbers ----------------------------------------------------------------------------------------


def test_normal_float_is_the_published_table():
    assert (normal_float(4) - torch.tensor(NF4)).abs().max() < 1e-6
    assert len(normal_float(3).unique()) == 8


@pytest.mark.parametrize(
    "kind, mantissa, least, most", [("e4m3", 3, -6, 448), ("e5m2", 2, -14, 57344)]
)
def test_floats_of_eight_bits_are_rounded_to_the_nearest_even(kind, mantissa, least, most):
    x = torch.cat([torch.linspace(-600, 600, 4001), torch.logspace(-8, 4, 2001)])
    exponent = torch.floor(torch.log2(x.abs().double())).clamp_min(least)
    step = 2.0 ** (exponent - mantissa)
    wanted = ((x / step).round() * step).clamp(-most, most).float()
    assert torch.equal(as_float8(x, kind), wanted)


def test_a_microscaled_block_has_a_power_of_two_and_loses_nothing_that_fits():
    x = torch.tensor([[0.5, 1.0, -6.0, 3.0] * 8])
    assert torch.equal(microscaled(x * 8, "fp4"), x * 8)
    assert torch.equal(microscaled(x / 1024, "e4m3"), x / 1024)
    assert torch.equal(microscaled(torch.zeros(2, 40)), torch.zeros(2, 40))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_weight_moves_by_more_than_half_a_step(bits, symmetric):
    W, _, _ = matrix()
    grid = fit_grid(W, bits, 32, symmetric)
    scale, _ = grid.spread(80)
    moved = (grid.decode(grid.encode(W)) - W).abs()
    # the zero point is rounded too: one end of the range may lie a further half step outside
    assert (moved <= scale * 1.0001).all()
    assert (moved <= scale * 0.5001).float().mean() > 0.9
    assert grid.encode(W).int().max() < 2**bits


def test_zero_stays_zero_and_a_short_group_is_a_group():
    W, _, _ = matrix(columns=70)
    W[:, 5] = 0
    grid = fit_grid(W, 3, 32)
    assert grid.scale.shape == (24, 3)
    assert (grid.decode(grid.encode(W))[:, 5] == 0).all()
    alone = fit_grid(W[:, 64:], 3, 32)
    assert torch.equal(grid.scale[:, 2], alone.scale[:, 0])
    flat = fit_grid(torch.zeros(2, 8), 3, 4)
    assert torch.equal(flat.decode(flat.encode(torch.zeros(2, 8))), torch.zeros(2, 8))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_codes_are_packed_and_unpacked(bits, columns):
    codes = torch.randint(2**bits, (5, columns), dtype=torch.uint8)
    planes = pack_bits(codes, bits)
    assert planes.shape == (bits, 5, math.ceil(columns / 8))
    assert torch.equal(unpack_bits(planes, columns), codes)


# One matrix -------------------------------------------------------------------------------------


def test_gptq_is_obq_in_one_order():
    "A dense OBQ in 64 bits that takes the columns from left to right."
    W, _, H = matrix(8, 40)
    for bits in (2, 4):
        grid = fit_grid(W, bits, 16)
        scale, zero = (part.double() for part in grid.spread(40))
        damped = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(40).double()
        for row in range(8):
            w, left = W[row].double(), list(range(40))
            codes = []
            for j in range(40):
                inverse = torch.linalg.inv(damped[left][:, left])
                code = (w[j] / scale[row, j] + zero[row, j]).round().clamp(0, 2**bits - 1)
                error = w[j] - scale[row, j] * (code - zero[row, j])
                w[left] -= error / inverse[0, 0] * inverse[0]
                codes.append(int(code))
                left = left[1:]
            assert gptq(W, H, bits, 16, block=16, strip=8).codes[row].tolist() == codes


def test_obq_is_the_greedy_order():
    "A row at a time in 64 bits, with a new inverse for each step."
    W, _, H = matrix(3, 40, seed=1)
    grid = fit_grid(W, 3, 16)
    scale, zero = (part.double() for part in grid.spread(40))
    damped = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(40).double()
    for row in range(3):
        w, left, codes = W[row].double(), list(range(40)), torch.zeros(40)
        while left:
            inverse = torch.linalg.inv(damped[left][:, left])
            code = (w / scale[row] + zero[row]).round().clamp(0, 7)
            error = w - scale[row] * (code - zero[row])
            cost = error[left] ** 2 / inverse.diagonal()
            cost[error[left].abs() > scale[row, left] * 0.500001] = -1
            at = int(cost.argmin())
            j = left[at]
            codes[j] = code[j]
            w[left] -= error[j] / inverse[at, at] * inverse[at]
            left.remove(j)
        assert (obq(W, H, 3, 16).codes[row] == codes).float().mean() >= 0.95


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", [80, 130])
def test_blocks_and_strips_change_nothing(act_order, columns):
    W, _, H = matrix(columns=columns)
    one = gptq(W, H, 3, 32, act_order=act_order, block=1024, strip=1024)
    for block, strip in ((1, 1), (32, 8), (48, 16)):
        other = gptq(W, H, 3, 32, act_order=act_order, block=block, strip=strip)
        assert (one.codes == other.codes).float().mean() > 0.999


def test_every_way_beats_the_nearest_on_its_own_loss():
    W, X, H = matrix()
    gain = awq_gain([W], H, X.abs().mean(1), 3, 16)
    ways = dict(
        gptq=gptq(W, H, 3, 16),
        ordered=gptq(W, H, 3, 16, act_order=True),
        obq=obq(W, H, 3, 16),
        owq=owq(W, H, 3, 16),
        spqr=spqr(W, H, 3, 16),
        quip=quip(W, H, 3, 16),
        awq=awq(W, H, gain, 3, 16),
    )
    plain = output_loss(W - nearest(W, 3, 16).weight(), H)
    for name, found in ways.items():
        share = 0.9 if name == "awq" else 0.7
        assert output_loss(W - found.weight(), H) < share * plain, name
    assert output_loss(W - ways["gptq"].weight(), H) == pytest.approx(
        ((W - ways["gptq"].weight()) @ X).square().sum().item(), rel=1e-3
    )


def test_an_input_that_is_always_zero_disturbs_nothing():
    W, X, _ = matrix()
    X[3] = 0
    H = X @ X.T
    for found in (gptq(W, H, 3, 16), obq(W, H, 3, 16), spqr(W, H, 3, 16), owq(W, H, 3, 16)):
        assert torch.isfinite(found.weight()).all()
        assert output_loss(W - found.weight(), H) < 0.1 * output_loss(W, H)


@pytest.mark.parametrize("size", [1, 6, 43, 64, 172])
def test_a_rotation_is_one(size):
    turn = random_rotation(size, torch.Generator().manual_seed(0))
    assert torch.allclose(turn @ turn.T, torch.eye(size), atol=1e-5)


def test_kept_weights_are_kept_and_counted():
    W, _, H = matrix()
    found = owq(W, H, 3, 16, share=0.05)
    assert found.kept[0].sum() == 4
    assert (found.kept == found.kept[:1]).all()
    assert found.stored_bits() == 24 * 80 * 3 + 24 * 5 * 19 + 4 * (24 * 13 + 16)
    outliers = spqr(W, H, 3, 16, threshold=0.05)
    some = int(outliers.kept.sum())
    assert some > 0
    assert outliers.stored_bits() == 24 * 80 * 3 + 24 * 5 * 10 + 32 * some


def test_the_best_range_is_no_worse_than_the_whole():
    W, _, _ = matrix()
    whole, best = fit_grid(W, 2, 16), best_grid(W, 2, 16)
    lost = lambda grid: (grid.decode(grid.encode(W)) - W).square().sum()
    assert lost(best) < lost(whole)


def test_tables_and_binary_codes():
    W, _, _ = matrix()
    centers, codes = weighted_means(W, torch.ones_like(W), 3)
    assert (centers.diff(dim=1) >= 0).all()
    assert torch.equal(codes, (W[:, :, None] - centers[:, None]).abs().argmin(2))
    signs, scales, offset = binary_scales(W, 3, 16)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    spread = lambda x: x.repeat_interleave(16, 1)
    terms = sum(signs[k] * spread(scales[..., k]) for k in range(3)) + spread(offset)
    assert torch.allclose(terms, lut(W, 3, 16).weight(), atol=1e-4)
    equal = torch.ones(2, 32)
    assert torch.allclose(lut(equal, 3, 16).weight(), equal, atol=1e-2)
    table = scaled_table(W, normal_float(), 4, 16)
    assert torch.equal(
        table.decode(table.encode(W)),
        table.values.gather(
            2, (W.view(24, 5, 16, 1) - table.values[:, :, None]).abs().argmin(3)
        ).flatten(1),
    )
    assert (hqq(W, 2, 16).weight() - W).abs().mean() < (nearest(W, 2, 16).weight() - W).abs().mean()


# Models -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_layer(start, tmp_path_factory):
    "A folder with the first layer of the embedded model."
    config = type(start.config).from_dict(start.config.to_dict() | {"num_hidden_layers": 1})
    model = type(start)(config)
    model.load_state_dict({name: start.state_dict()[name] for name in model.state_dict()})
    folder = tmp_path_factory.mktemp("one") / "model"
    model.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_writes_what_it_counts(algorithm, one_layer, tmp_path):
    run = lab.run(
        "quantize",
        model=str(one_layer) if algorithm == "obq" else "tiny",  # it takes a cube of the width
        algorithm=algorithm,
        bits=3,
        out=tmp_path,
        calibration_samples=4,
        max_length=64,
        eval_rows=8,
    )
    before, after = run.summary["before"], run.summary["after"]
    assert after["perplexity"] < 1.2 * before["perplexity"]
    model = load_model(run.path / "model", dtype="float32", device="cpu")
    weights = sum(p.numel() for p in model.parameters())
    matrices = {name: part for name, part in linear_layers(model).items() if "layers" in name}
    rounded = sum(part.weight.numel() for part in matrices.values())
    saved = before["size_mib"] - after["size_mib"]
    assert saved > 0.7 * before["size_mib"] * rounded / weights
    assert after["bits_per_weight"] == pytest.approx(after["size_mib"] * 2**23 / weights)
    with safe_open(run.path / "codes.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["matrices"])
        assert set(facts) == set(matrices)
        last = len(model.model.layers) - 1
        for name in ("model.layers.0.self_attn.q_proj", f"model.layers.{last}.mlp.down_proj"):
            fact = facts[name]
            codes = unpack_bits(file.get_tensor(f"{name}.codes"), fact["shape"][1])
            assert list(codes.shape) == fact["shape"]
            if algorithm in ("rtn", "obq", "gptq"):
                scale, zero = (
                    file.get_tensor(f"{name}.{part}").float() for part in ("scale", "zero")
                )
                form = Grid(scale, zero, 3, fact["group_size"])
                assert torch.equal(form.decode(codes), model.get_submodule(name).weight)


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "squeezellm"])
def test_a_model_of_16_bits(algorithm, tmp_path):
    run = lab.run(
        "quantize",
        algorithm=algorithm,
        dtype="bfloat16",
        bits=4,
        out=tmp_path,
        calibration_samples=4,
        max_length=64,
        eval_rows=8,
    )
    assert run.summary["after"]["perplexity"] < 1.05 * run.summary["before"]["perplexity"]
    assert run.summary["before"]["bits_per_weight"] == 32  # as the file has it


def test_the_same_run_twice_is_the_same(tmp_path):
    values = dict(algorithm="quip", calibration_samples=4, max_length=64, eval_rows=8)
    one, two = (lab.run("quantize", out=tmp_path, **values) for _ in range(2))
    read = lambda run: (run.path / "codes.safetensors").read_bytes()
    assert read(one) == read(two)


def test_bits_are_shared_out():
    losses = [{2: 9.0, 3: 3.0, 4: 2.9}, {2: 4.0, 3: 3.5, 4: 3.4}]
    assert share_out(losses, 3) == [3, 3]
    assert share_out(losses, 2) == [2, 2]
    assert read_mixed("4, 2,3", 3) == [2, 3, 4]
    model = load_model("tiny", dtype="float32", device="cpu").eval()
    windows = torch.randint(512, (4, 32), generator=torch.Generator().manual_seed(0))
    settings, found = Quantize(algorithm="rtn", bits=2, mixed="1,2,3"), {}
    facts = list(quantize_model(model, windows, settings, found))
    assert sum(one.form.bits for one in found.values()) <= 2 * len(found)
    assert len({one.form.bits for one in found.values()}) > 1
    assert len(facts) == 5


def test_the_bits_of_a_model_count_what_is_tied_once():
    model = load_model("tiny", dtype="float32", device="cpu")
    weights = sum(p.numel() for p in model.parameters())
    assert bits_of(model, {}) == 32 * weights
    name = "model.layers.0.mlp.up_proj"
    less = model.get_submodule(name).weight.numel()
    assert bits_of(model, {name: 5}) == 32 * (weights - less) + 5


@pytest.mark.parametrize(
    "values, text",
    [
        (dict(bits=9), "bits"),
        (dict(bits=0), "bits"),
        (dict(mixed="2"), "two or more numbers"),
        (dict(mixed="3,4", bits=2), "bits = 2"),
        (dict(mixed="two,3"), "mixed"),
        (dict(algorithm="gtpq"), "did you mean 'gptq'"),
        (dict(calibration_samples=10**6), "tokens of calibration text"),
        (dict(group_size=-1), "group_size"),
    ],
)
def test_wrong_settings_are_refused(values, text, tmp_path):
    assert text in says(lab.run, "quantize", out=tmp_path, **values)


def test_obq_is_refused_before_anything_is_evaluated(tmp_path):
    wide = dict(hidden_size=64, intermediate_size=1100, num_hidden_layers=1)
    config = LlamaConfig(**wide, num_attention_heads=2, vocab_size=1024)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    load_tokenizer("tiny").save_pretrained(tmp_path / "wide")
    values = dict(model=str(tmp_path / "wide"), algorithm="obq", calibration_samples=2)
    assert "1100 inputs" in says(lab.run, "quantize", out=tmp_path, **values)
    [run] = all_runs(tmp_path)
    assert run.summary == {}


def test_a_model_that_is_not_sound_is_refused():
    W, _, _ = matrix()
    assert "bits = 9" in says(fit_grid, W, 9)
    assert "finite" in says(fit_grid, W / 0, 4)
    assert "obq" in says(obq, torch.zeros(2, 2000), torch.eye(2000), 4)
    windows = torch.arange(32).view(2, 16)
    model = load_model("tiny", dtype="float32", device="cpu").eval()
    model.model.layers[0].mlp.down_proj.weight.data.fill_(1e38)
    assert "block 1: an input of self_attn.q_proj" in says(
        list, quantize_model(model, windows, Quantize(), {})
    )
    model = load_model("tiny", dtype="float32", device="cpu").eval()
    model.model.layers[0].expert = torch.nn.Linear(8, 8)
    assert "no calibration token reaches expert" in says(
        list, quantize_model(model, windows, Quantize(), {})
    )
