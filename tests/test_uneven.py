"Models whose blocks have unequal sizes, or a turn on each residual connection: made, saved, used."

import copy
import json

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.efficiency.compression.rotation import check_slicing, fold_norms, rotate
from polm_lab.efficiency.compression.rotation import stream_covariances
from polm_lab.efficiency.compression.structured_surgery import layers_of
from polm_lab.efficiency.slim import Slim, check_cut, cut_across, cut_units, importance_of
from polm_lab.efficiency.slim import kept_across
from polm_lab.efficiency.slim import slice_model
from polm_lab.models.factors import class_with_own_layers, own_entries
from polm_lab.models.load import load_model
from polm_lab.models.rollout import rollout
from polm_lab.models.save import save_model
from polm_lab.models.sources import skeleton
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.runner.export import export_gguf, export_packed
from polm_lab.training.layerwise import BlockInputs, calibration, walk

LITTLE = dict(
    calibration_samples=4, calibration_batch_size=2, max_length=64, eval_rows=4, device="cpu"
)
WAYS = {
    "unequal": dict(algorithm="flap", within="model", ratio=0.3),
    "turned": dict(algorithm="slicegpt", rotations="each", ratio=0.2),
}


@pytest.fixture(scope="module")
def base():
    return load_model("tiny", dtype="float32", device="cpu").eval()


@pytest.fixture(scope="module")
def windows():
    return calibration(load_tokenizer("tiny"), "chat", 8, 64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A run of each way, with its model."
    found = {}
    for name, values in WAYS.items():
        folder = tmp_path_factory.mktemp("runs")
        run = lab.run("slim", **values, dtype="float32", out=folder, **LITTLE)
        found[name] = run, load_model(str(run.path), dtype="float32", device="cpu").eval()
    return found


def qwen(**more):
    "A small random model of Qwen 2, with biases at q, k and v and two heads to a key."
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3)
    heads = dict(num_attention_heads=6, num_key_value_heads=3)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=1024, **sizes, **heads, **more)).eval()


# What goes


def test_units_of_all_blocks_go_by_their_score_until_the_budget_is_spent():
    scores = [
        dict(n=torch.tensor([0.1, 0.2, 9.0]), h=torch.tensor([0.15, 5.0])),
        dict(n=torch.tensor([0.3, 8.0, 7.0]), h=torch.tensor([6.0, 0.05])),
    ]
    costs = dict(n=1, h=10)  # 6 neurons and 4 heads: 46 in all
    kept = kept_across(scores, costs, 12 / 46)
    # .05 costs 10, .1 and then .15 (10 more): at 11 the budget of 12 is nearest
    assert [{k: v.tolist() for k, v in block.items()} for block in kept] == [
        dict(n=[1, 2], h=[0, 1]),
        dict(n=[0, 1, 2], h=[0]),
    ]
    everything = kept_across(scores, costs, 0)
    assert [len(v) for block in everything for v in block.values()] == [3, 2, 3, 2]
    least = kept_across(scores, costs, 0.9)
    assert [{k: v.tolist() for k, v in block.items()} for block in least] == [
        dict(n=[2], h=[1]),
        dict(n=[1], h=[0]),
    ]


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("target", ["both", "neurons", "heads"])
def test_the_budget_is_one_of_weights(ratio, target, base, windows):
    model = copy.deepcopy(base)
    list(cut_across(model, windows, ratio, target, compensate=False, rows=4))
    kinds = dict(neurons=("gate", "up", "down"), heads=("q_", "k_", "v_", "o_"))
    names = kinds.get(target, kinds["neurons"] + kinds["heads"])
    count = lambda m: sum(
        p.numel() for name, p in m.named_parameters() if any(f".{part}" in name for part in names)
    )
    head = 4 * 32 * 160 / count(base)  # the share of one head
    assert abs(1 - count(model) / count(base) - ratio) <= (
        0.51 * head if target != "neurons" else 0.001
    )
    others = [
        name
        for name, p in model.named_parameters()
        if p.shape != base.get_parameter(name).shape and not any(f".{n}" in name for n in names)
    ]
    assert others == []


def test_scores_are_compared_in_deviations_of_their_layer(base, windows):
    "A layer with ten times as large weights gets the same scores, and units of all layers mix."
    loud, found = copy.deepcopy(base), []
    with torch.no_grad():
        loud.model.layers[0].mlp.down_proj.weight *= 10
    for model in (loud, base):
        inputs = next(map(BlockInputs._make, walk(model, windows, 4)))
        score, _ = importance_of(inputs.block, inputs, "flap", 32, standard=True)
        found.append(score)
    for kind in ("down_proj", "o_proj"):
        assert torch.allclose(found[0][kind], found[1][kind], atol=1e-4)
    assert abs(found[1]["down_proj"].mean().item()) < 1e-5
    assert abs(found[1]["down_proj"].std().item() - 1) < 1e-5


def test_the_bias_is_the_mean_of_what_goes(base):
    block = copy.deepcopy(base.model.layers[1])
    layers, generator = layers_of(block), torch.Generator().manual_seed(0)
    means = dict(
        down_proj=torch.randn(432, generator=generator),
        o_proj=torch.randn(160, generator=generator),
    )
    kept = dict(down_proj=torch.arange(100), o_proj=torch.tensor([0, 2, 3]))
    expected = dict(
        down_proj=layers["down_proj"].weight[:, 100:] @ means["down_proj"][100:],
        o_proj=layers["o_proj"].weight[:, [*range(32, 64), *range(128, 160)]]
        @ means["o_proj"][[*range(32, 64), *range(128, 160)]],
    )
    cut_units(block, kept, means, 32)
    for name, bias in expected.items():
        assert torch.allclose(layers_of(block)[name].bias, bias, atol=1e-6)


# Turns


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_rotation_of_each_norm_leaves_the_logits(kind, base, windows):
    model = copy.deepcopy(base) if kind == "llama" else qwen()
    expected, generator = model(windows[:2]).logits, torch.Generator().manual_seed(1)
    norms, width = fold_norms(model), model.config.hidden_size
    every = [torch.linalg.qr(torch.randn(width, width, generator=generator)).Q for _ in norms]
    turned = rotate(model, every)
    assert turned.config.turned_blocks
    gap = (turned(windows[:2]).logits - expected).norm() / expected.norm()
    assert gap < 1e-5
    check_slicing(model, width - 30, each=True)


def test_each_rotation_loses_less_variance_than_one(base, windows):
    lost = {way: slice_model(base, windows, 0.3, 4, way)[1] for way in ("one", "each")}
    assert all(own <= one + 1e-6 for own, one in zip(lost["each"], lost["one"]))
    assert sum(lost["each"]) < 0.6 * sum(lost["one"])


def test_what_is_lost_is_the_smallest_eigenvalues(base, windows):
    model = copy.deepcopy(base)
    covariances = stream_covariances(model, fold_norms(model), windows, 4)
    _, lost = slice_model(base, windows, 0.3, 4, "each")
    for c, share in zip(covariances, lost):
        values = torch.linalg.eigvalsh(c.double())
        assert abs(share - (values[: 160 - 115].sum() / values.sum()).item()) < 1e-4


# Saved, read and used


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_read_as_it_was_saved(way, made, tmp_path):
    run, model = made[way]
    assert list(own_entries(model.config)) == [
        {"unequal": "layer_sizes", "turned": "turned_blocks"}[way]
    ]
    save_model(model, load_tokenizer("tiny"), tmp_path / "model")
    again = load_model(tmp_path / "model", dtype="float32", device="cpu").eval()
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(model(ids).logits, again(ids).logits)
    shapes = {name: p.shape for name, p in skeleton(tmp_path / "model").named_parameters()}
    assert shapes == {name: p.shape for name, p in model.named_parameters()}
    assert (
        abs(run.summary["after"]["size_mib"] - sum(p.nbytes for p in model.parameters()) / 2**20)
        < 0.1
    )
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert class_with_own_layers(config).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("way", WAYS)
def test_sampling_with_a_cache_is_reading_without(way, made):
    _, model = made[way]
    tokenizer = load_tokenizer("tiny")
    prompts = [tokenizer("What is 17 + 26?").input_ids, tokenizer("Tell me a story").input_ids]
    batch = rollout(model, tokenizer, prompts, max_new_tokens=8, temperature=0.0)
    for prompt, answer in zip(prompts, batch.completions):
        ids = torch.tensor([prompt + list(answer)])
        greedy = model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        assert greedy == list(answer)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "method, values",
    [
        ("sft", dict(steps=2, batch_size=2, adapter="lora:r=2", data="chat")),
        ("sft", dict(steps=2, batch_size=2, gradient_checkpointing=True, data="chat")),
        ("prune", LITTLE | dict(algorithm="wanda")),
        ("quantize", LITTLE | dict(algorithm="gptq", bits=4)),
        ("lowrank", LITTLE | dict(algorithm="svd")),
    ],
)
def test_methods_go_on_from_it(way, method, values, made, tmp_path):
    run, _ = made[way]
    more = dict(model=str(run.path), dtype="float32", device="cpu", eval_rows=2)
    after = lab.run(method, **more | values, out=tmp_path)
    assert after.status == "finished"
    again = load_model(str(after.path), dtype="float32", device="cpu").eval()
    assert set(own_entries(run_config(run))) <= set(own_entries(again.config))
    assert torch.isfinite(again(torch.arange(20)[None]).logits).all()


def run_config(run) -> dict:
    return json.loads((run.path / "model/config.json").read_text())


@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_take_it_says_so(way, made, tmp_path):
    run, model = made[way]
    with pytest.raises(WrongInput, match="only this package reads"):
        export_gguf(str(run.path), tmp_path / "x.gguf")
    for values in (dict(algorithm="flap"), dict(algorithm="depth"), WAYS[way]):
        with pytest.raises(WrongInput, match="the model that it was made from"):
            check_cut(model, Slim(**values))
    coded = lab.run(
        "quantize",
        model=str(run.path),
        algorithm="rtn",
        bits=4,
        dtype="float32",
        out=tmp_path,
        **LITTLE,
    )
    with pytest.raises(WrongInput, match="only this package reads"):
        export_packed(coded, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_choice_that_an_algorithm_does_not_have_is_refused(base):
    for values, what in (
        (dict(algorithm="taylor", within="model"), "within = model"),
        (dict(algorithm="depth", within="model"), "within = model"),
        (dict(algorithm="flap", rotations="each"), "rotations = each"),
    ):
        with pytest.raises(WrongInput, match=what):
            check_cut(base, Slim(**values))


def test_other_families():
    "Qwen 2 has biases that cut_across keeps; Gemma 2 has norms that a turned block would not."
    model, windows = (
        qwen(),
        torch.randint(1024, (4, 16), generator=torch.Generator().manual_seed(0)),
    )
    check_cut(model, Slim(algorithm="flap", within="model"))
    list(cut_across(model, windows, 0.4, rows=2))
    sizes = model.config.layer_sizes
    assert [sizes[f"model.layers.0.self_attn.{p}_proj"][2] for p in "qkvo"] == [True] * 4
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    gemma = Gemma2ForCausalLM(
        Gemma2Config(head_dim=8, num_attention_heads=4, num_key_value_heads=2, **shape)
    ).eval()
    with pytest.raises(WrongInput):
        check_cut(gemma, Slim(algorithm="slicegpt", rotations="each"))


@pytest.mark.parametrize(
    "entry",
    [
        {"layer_sizes": {"model.nowhere": [4, 4, False]}},
        {"layer_sizes": {"model.layers.0.mlp.up_proj": [160, -4, False]}},
        {"layer_sizes": {"model.layers.0.mlp.up_proj": [160, 5, False]}},
        {"layer_sizes": ["up"]},
        {"turned_blocks": True},
    ],
)
def test_a_configuration_that_lies_is_refused(entry, made, tmp_path):
    _, model = made["unequal"]
    save_model(model, load_tokenizer("tiny"), tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    with pytest.raises(WrongInput) as found:
        load_model(tmp_path / "model", dtype="float32", device="cpu")
    assert "\n" not in str(found.value)
