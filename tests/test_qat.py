"""Training with rounded weights: gradients, grids, cut ends, products that become zero points, runs, wrong input."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.core.method import find
from polm_lab.core.run import all_runs
from polm_lab.data.batches import collate
from polm_lab.data.encode import encode_rows
from polm_lab.data.load import load_data
from polm_lab.efficiency.compression.numbers import fit_grid, spread
from polm_lab.efficiency.compression.rounding import gptq, nearest
from polm_lab.efficiency.qat import (
    ALGORITHMS,
    QAT,
    CutOnGrid,
    Direction,
    LearnedStep,
    NormalFloat,
    OnGrid,
    ZeroPoints,
    confidence,
    cut_ends,
    double_rounded,
    round_model,
    rounded_layers,
    settle,
)
from polm_lab.efficiency.quantize import unpack_bits
from polm_lab.models.layers import blocks_of, linear_layers
from polm_lab.models.load import load_model
from polm_lab.models.logprobs import dense_kl
from polm_lab.models.policy import Policy
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.runner.export import export
from polm_lab.runner.seeds import read_results
from polm_lab.training import conformance as check
from polm_lab.training.layerwise import calibration

SHORT = dict(steps=3, batch_size=4, eval_rows=4, max_length=64, calibration_samples=2)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def says(call, *values, **more) -> str:
    with pytest.raises(WrongInput) as wrong:
        call(*values, **more)
    assert "\n" not in str(wrong.value)
    return str(wrong.value)


@pytest.fixture(scope="module")
def made():
    "A short run of each algorithm."
    return {name: lab.run("qat", algorithm=name, **SHORT) for name in ALGORITHMS}


# One matrix -------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_straight_through_has_the_rounded_value_and_the_whole_gradient(symmetric):
    W, way = seeded(6, 40).requires_grad_(), seeded(6, 40, seed=1)
    layer = OnGrid(W, None, QAT(bits=2, group_size=16, symmetric=symmetric))
    (layer(W) * way).sum().backward()
    assert torch.equal(layer(W), nearest(W.detach(), 2, 16, symmetric).weight())
    assert torch.equal(W.grad, way)


def lsq_by_hand(v, s, z, most):
    "Return what LSQ's eq. 1 to 3 say of one weight: its number, and its slopes by v and by s."
    x = v / s + z
    if x < 0 or x > most:
        code = 0 if x < 0 else most
        return s * (code - z), 0.0, code - z
    return s * (round(x) - z), 1.0, round(x) - x


def test_the_gradients_of_lsq_are_those_of_the_paper():
    W = seeded(3, 20).double()
    layer = LearnedStep(W.float(), None, QAT(bits=3, group_size=8)).double()
    moved = (1.3 * W + 0.05).requires_grad_()  # some weights are beyond the first grid
    slopes = []
    for row in range(3):
        for column in range(20):
            s, z = layer.scale[row, column // 8].item(), layer.zero[row, column // 8].item()
            slopes.append(lsq_by_hand(moved[row, column].item(), s, z, 7))
    numbers, by_weight, by_scale = (torch.tensor(x).view(3, 20).double() for x in zip(*slopes))
    assert (by_weight == 0).any()
    layer(moved).sum().backward()
    assert torch.allclose(layer(moved), numbers, atol=1e-12)
    assert torch.equal(moved.grad, by_weight)
    groups = torch.stack([part.sum(1) for part in by_scale.split(8, 1)], 1)
    assert torch.allclose(layer.scale.grad, groups / math.sqrt(8 * 7), atol=1e-9)


def test_lsq_begins_with_the_nearest_numbers_and_keeps_codes_of_its_scale():
    W = seeded(5, 24)
    layer = LearnedStep(W, None, QAT(bits=2, group_size=8))
    assert torch.allclose(layer(W), nearest(W, 2, 8).weight(), atol=1e-6)
    with torch.no_grad():
        layer.scale.mul_(0.7)
    assert torch.allclose(layer.quantized(W).weight(), layer(W), atol=1e-6)


def test_dl_qat_moves_on_the_first_grid_and_scales_by_its_magnitude():
    W = seeded(6, 32)
    settings = QAT(algorithm="dl_qat", group_size=16, rank=3, lora_alpha=6)
    layer, first = Direction(W, None, settings), fit_grid(W, 2, 16)
    assert torch.allclose(layer(W), nearest(W, 2, 16).weight(), atol=1e-6)  # B is 0
    with torch.no_grad():
        layer.second.copy_(seeded(6, 3, seed=2))
        layer.magnitude.mul_(1.5)
    codes = first.encode(W + 2 * layer.second @ layer.first)
    scale, zero = first.spread(32)
    assert torch.allclose(layer(W), 1.5 * scale * (codes - zero), atol=1e-5)
    made = layer.quantized(W)
    assert torch.equal(made.codes, codes)
    assert torch.allclose(made.weight(), layer(W), atol=1e-5)
    assert torch.equal(made.form.zero, made.form.zero.round())  # it can be packed


@pytest.mark.parametrize("columns", [32, 44])
def test_qa_lora_is_lora_of_pooled_inputs_and_ends_in_the_zero_points(columns):
    W, X = seeded(6, columns), seeded(columns, 300, seed=1)
    settings = QAT(algorithm="qa_lora", bits=3, group_size=16, rank=2, lora_alpha=8)
    layer = ZeroPoints(W, X @ X.T, settings)
    start = layer.start(W)
    assert torch.allclose(start, gptq(W, X @ X.T, 3, 16, False, True).weight(), atol=1e-6)
    assert torch.equal(layer(start), start)
    with torch.no_grad():
        layer.second.copy_(seeded(6, 2, seed=2))
    pooled = torch.stack([part.sum(0) for part in X.split(16)])
    beside = start @ X + 4 * layer.second @ (layer.first @ pooled)
    assert torch.allclose(layer(start) @ X, beside, atol=1e-3)
    made = layer.quantized(start)
    assert torch.allclose(made.weight() @ X, beside, atol=1e-3)
    assert made.stored_bits() == 3 * W.numel() + 32 * made.form.scale.numel()
    assert (made.form.zero != made.form.zero.round()).any()


def test_qlora_stores_normal_float_with_scales_of_eight_bits():
    W = seeded(64, 256)
    layer = NormalFloat(W, None, QAT(algorithm="qlora", bits=4, group_size=64, rank=2))
    start = layer.start(W)
    assert torch.equal(layer(start), start)
    bits = layer.quantized(start).stored_bits() / W.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / W.numel())  # 0.127, as in §3
    error = (start - W).norm() / W.norm()
    plain = (nearest(W, 4, 64, True).weight() - W).norm() / W.norm()
    assert error < plain


def test_scales_that_are_all_alike_survive_the_second_rounding():
    same, _ = double_rounded(torch.full((3, 5), 0.3))
    assert torch.allclose(same, torch.full((3, 5), 0.3))
    scales = seeded(20, 40).abs() + 0.5
    twice, bits = double_rounded(scales)
    assert ((twice - scales).abs() <= (scales - scales.mean()).abs() / 15 + 1e-3).all()
    assert bits == 8 * 800 + 32 * (4 + 1)


def test_cut_ends_are_the_best_of_all_pairs():
    W, X = seeded(4, 16), seeded(16, 100, seed=1)
    W[:, 3] += 4
    H = X @ X.T
    low, high = (spread(end, 8, 16) for end in cut_ends(W, H, 2, 8, False))
    cut = nearest(W.clamp(low, high), 2, 8).weight()
    loss = lambda made, part: ((made - W)[:, part] @ X[part]).square().sum(1)
    for part in (slice(0, 8), slice(8, 16)):
        best = torch.full((4,), math.inf)
        for below in torch.linspace(1, 0.5, 6):
            for above in torch.linspace(1, 0.5, 6):
                own = W[:, part]
                ends = own.amin(1, keepdim=True) * below, own.amax(1, keepdim=True) * above
                tried = W.clone()
                tried[:, part] = own.clamp(*ends)
                best = torch.minimum(best, loss(nearest(tried, 2, 8).weight(), part))
        assert (loss(cut, part) <= best * 1.05 + 1e-4).all()
    plain = nearest(W, 2, 8).weight()
    assert ((cut - W) @ X).norm() < 0.9 * ((plain - W) @ X).norm()


def test_cut_weights_are_cut_once():
    W, X = seeded(8, 32), seeded(32, 100, seed=1)
    layer = CutOnGrid(W, X @ X.T, QAT(group_size=8))
    start = layer.start(W)
    assert (start != W).any()
    assert torch.allclose(layer.start(start), start)
    assert torch.allclose(layer(start), nearest(start, 2, 8).weight(), atol=1e-6)


# The loss of BitDistiller -----------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_mixture_of_both_divergences_in_value_and_gradient(share):
    model, other = (
        load_model("tiny", "float32", "cpu"),
        load_model("tiny", "float32", "cpu", seed=1),
    )
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * seeded(*p.shape))
    ids = torch.randint(
        0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0)
    )
    kl = Policy(model)(ids, reference=Policy(other), reverse=share, logprobs=False).kl[:, 1:].sum()
    kl.backward()
    found = model.model.layers[1].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    logits, ref = model(ids).logits[:, :-1].flatten(0, 1), other(ids).logits[:, :-1].flatten(0, 1)
    wanted = (1 - share) * dense_kl(logits, ref) + share * dense_kl(logits, ref, reverse=True)
    wanted.sum().backward()
    assert torch.allclose(kl, wanted.sum(), rtol=1e-5)
    assert torch.allclose(found, model.model.layers[1].mlp.up_proj.weight.grad, atol=1e-5)


def test_confidence_is_the_mean_over_rows_of_the_mean_probability():
    model = load_model("tiny", "float32", "cpu").eval()
    ids = torch.randint(10, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    learned = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0, 0, 0]])
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), completion_mask=learned)
    logp = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    p, m = logp.exp(), learned[:, 1:].bool()
    wanted = (p[0][m[0]].mean() + p[1][m[1]].mean()) / 2
    assert confidence(Policy(model), [batch]) == pytest.approx(wanted.item(), rel=1e-4)


def test_the_loss_of_a_run_is_the_mixture_by_confidence():
    settings = dict(
        algorithm="bitdistiller", data="chat#4", steps=1, batch_size=4, learning_rate=0.0
    )
    run = lab.run("qat", eval_rows=4, calibration_samples=2, max_length=64, **settings)
    tokenizer, model = load_tokenizer("tiny"), load_model("tiny", "float32", "cpu").eval()
    rows = encode_rows(tokenizer, load_data("chat#4", "completion"), "completion", 64)
    batch = collate(rows, tokenizer.pad_token_id)
    teacher = load_model("tiny", "float32", "cpu").eval()
    share = confidence(Policy(teacher), [batch])
    windows = calibration(tokenizer, "chat#4", 2, 64, 0)
    round_model(model, QAT(algorithm="bitdistiller"), windows)
    learned = batch["completion_mask"][:, 1:].bool()
    with torch.no_grad():
        ids, real = batch["input_ids"], batch["attention_mask"]
        one, other = (
            m(input_ids=ids, attention_mask=real).logits[:, :-1] for m in (model, teacher)
        )
    student, whole = one[learned], other[learned]
    wanted = share * dense_kl(student, whole) + (1 - share) * dense_kl(student, whole, reverse=True)
    assert 0.2 < share < 0.95
    assert run.lines()[0]["loss"] == pytest.approx(wanted.mean().item(), rel=1e-3)


# Whole models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_trains(name):
    model = load_model("tiny", "float32", "cpu")
    windows = torch.randint(10, 90, (2, 32), generator=torch.Generator().manual_seed(0))
    round_model(model, QAT(algorithm=name), windows)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    own = {"dl_qat": {"first", "second", "magnitude"}, "qa_lora": {"first", "second"}}
    own["qlora"] = own["qa_lora"]
    own["lsq"] = {"original", "weight", "scale"}
    assert trained == own.get(name, {"original", "weight"})
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (count < 0.15 * 1.7e6) == ALGORITHMS[name].freezes
    assert len(rounded_layers(model)) == 35


@pytest.mark.parametrize("name", ALGORITHMS)
def test_settling_changes_no_output(name):
    model = load_model("tiny", "float32", "cpu").eval()
    ids = torch.randint(10, 90, (2, 32), generator=torch.Generator().manual_seed(0))
    round_model(model, QAT(algorithm=name), ids)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.ndim == 2:
                p.add_(0.05 * p.std() * seeded(*p.shape) if p.any() else 0.02 * seeded(*p.shape))
        before, found = model(ids).logits, {}
        settle(model, found)
        assert not any(parametrize.is_parametrized(m) for m in model.modules())
        assert torch.allclose(model(ids).logits, before, atol=2e-4)
    assert len(found) == 35
    for place, codes in found.items():
        layer = model.get_submodule(place)
        kept = getattr(layer, "rest", layer).weight  # qlora has thin matrices next to its codes
        assert torch.allclose(codes.weight(), kept, atol=1e-5)


def test_other_architectures_keep_their_biases():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    text = says(round_model, GPT2LMHeadModel(config), QAT())  # its layers are no linear layers
    assert "linear layers" in text
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=2)
    model, found = Qwen2ForCausalLM(Qwen2Config(**sizes)), {}
    bias = model.model.layers[0].self_attn.q_proj.bias
    round_model(model, QAT(algorithm="qlora"))
    nn.init.normal_(bias)
    ids = torch.arange(20)[None]
    before = model(ids).logits
    settle(model, found)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)


# Runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    "An algorithm as a method, and a run to which the others are compared."
    method = find("qat")
    method = dataclasses.replace(method, small=method.small | dict(algorithm=request.param))
    return method, check.short_run(method, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(
    "base", ["lsq", "bitdistiller", "dl_qat", "qa_lora", "qlora"], indirect=True
)
@pytest.mark.parametrize(
    "prop",
    (check.resumed_is_uninterrupted, check.batches_add_up, check.record_complete),
    ids=lambda p: p.__name__,
)
def test_every_algorithm_conforms(base, prop, tmp_path):
    figure, holds = prop(base[0], tmp_path, base[1])
    assert holds, f"{prop.__name__} = {figure:.3g}"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_holds_codes_that_are_its_weights(made, name):
    run = made[name]
    model = load_model(run.path / "model", "float32", "cpu")
    with safe_open(run.path / "codes.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["matrices"])
        for layer in ("model.layers.0.self_attn.q_proj", "model.layers.4.mlp.down_proj"):
            shape, size = facts[layer]["shape"], facts[layer]["group_size"]
            codes = unpack_bits(file.get_tensor(f"{layer}.codes"), shape[1])
            part = model.get_submodule(layer)
            weight = (part.rest if name == "qlora" else part).weight.detach()
            if name == "qlora":
                table = file.get_tensor(f"{layer}.table").float()
                groups = torch.arange(shape[1]) // size
                made = table[torch.arange(shape[0])[:, None], groups[None], codes.long()]
                assert torch.allclose(made, weight, rtol=1e-3, atol=1e-4)
                continue
            scale, zero = (file.get_tensor(f"{layer}.{part}").float() for part in ("scale", "zero"))
            spread = lambda x: x.repeat_interleave(size, 1)[:, : shape[1]]
            made = spread(scale) * (codes - spread(zero))
            assert torch.allclose(made, weight, atol=2e-3)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_summary_counts_bits(made, name):
    before, after = made[name].summary["before"], made[name].summary["after"]
    assert before["bits_per_weight"] == 32
    least = {"qlora": 7, "qa_lora": 5.5}.get(name, 5)  # embeddings keep their 32 bits
    assert least < after["bits_per_weight"] < least + 1
    assert after["size_mib"] == pytest.approx(
        before["size_mib"] * after["bits_per_weight"] / 32, rel=1e-6
    )


def test_without_steps_a_run_rounds_to_the_nearest():
    rounded = lab.run("qat", **SHORT | dict(steps=0))
    plain = lab.run("quantize", algorithm="rtn", calibration_samples=2, eval_rows=4, max_length=64)
    one, other = (load_model(r.path / "model", "float32", "cpu") for r in (rounded, plain))
    for name, layer in linear_layers(blocks_of(one)).items():
        assert torch.equal(layer.weight, linear_layers(blocks_of(other))[name].weight)
    assert rounded.summary["before"]["perplexity"] < rounded.summary["after"]["perplexity"]


def test_evaluated_on_the_way_and_saved_in_sixteen_bits():
    run = lab.run("qat", save_dtype="bfloat16", eval_every=1, **SHORT)
    lines = run.lines()
    assert "eval/perplexity" in lines[0]
    again = load_model(run.path / "model", "float32", "cpu")
    assert again.file_dtypes[""] == torch.bfloat16
    assert torch.isfinite(next(again.parameters())).all()


def test_a_run_goes_on_from_one_with_an_adapter(tmp_path):
    tuned = lab.run("sft", adapter="lora:r=2", steps=1, eval_rows=4, batch_size=4)
    run = lab.run("qat", model=tuned.id, **SHORT)
    assert AutoModelForCausalLM.from_pretrained(run.path / "model").config.model_type == "llama"
    assert not hasattr(load_model(run.path / "model", "float32", "cpu"), "peft_config")


@pytest.mark.parametrize("name", ["ste", "lsq", "dl_qat", "bitdistiller"])
def test_grids_are_exported(made, name, tmp_path):
    run = made[name]
    place = export(str(run.path), "compressed-tensors", tmp_path / "packed")
    config = json.loads((place / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    from transformers import CompressedTensorsConfig

    read = AutoModelForCausalLM.from_pretrained(
        place, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).float()
    ours = load_model(run.path / "model", "float32", "cpu")
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, ours(ids).logits, atol=1e-4)


@pytest.mark.parametrize("name", ["qa_lora", "qlora"])
def test_grids_with_other_zeros_are_refused(made, name, tmp_path):
    text = says(export, str(made[name].path), "compressed-tensors", tmp_path / "x")
    assert name in text


def test_an_adapter_is_refused_before_a_run_has_a_model():
    count = len(list(all_runs()))
    text = says(lab.run, "qat", adapter="lora:r=4", **SHORT)
    assert "adapter" in text
    assert "dl_qat" in text
    failed = [run for run in all_runs() if run.status == "failed"]
    assert len(list(all_runs())) <= count + 1
    assert all(not (run.path / "model").exists() for run in failed)


@pytest.mark.parametrize(
    "knobs", [dict(bits=0), dict(bits=9), dict(rank=0), dict(algorithm="gptq"), dict(group_size=-1)]
)
def test_wrong_knobs(knobs):
    assert next(iter(knobs)) in says(lab.run, "qat", **knobs)


# What was measured ------------------------------------------------------------------------------


def test_training_wins_back_most_of_what_rounding_costs_in_every_seed():
    rows = [row for row in read_results("qat") if row["metric"] == "perplexity"]
    assert {row["seed"] for row in rows} == {"0", "1", "2"}
    loss = lambda row, when: math.log(float(row[when]))
    rounded = {row["seed"]: row for row in rows if row["setting"] == "rounding alone"}
    for row in rows:
        alone = loss(rounded[row["seed"]], "after")
        cost = alone - loss(row, "before")
        won = (alone - loss(row, "after")) / cost
        assert cost > 0.05
        assert row["setting"] == "rounding alone" or won >= 0.7, (row["setting"], won)


def test_of_those_that_train_all_weights_the_teacher_forgets_least():
    rows = [row for row in read_results("qat") if row["metric"] == "forgetting"]
    value = {(row["setting"], row["seed"]): float(row["after"]) for row in rows}
    for seed in "012":
        others = min(value[name, seed] for name in ("straight through", "LSQ"))
        assert value["BitDistiller", seed] < 0.5 * others
