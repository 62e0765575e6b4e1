"""Cuts through models that are not Llama.

Each leaves the logits as they are where nothing is lost, or is refused in one line before anything
is computed.
"""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from zoo import FAMILIES, gap, ids, make

import polm_lab as lab
from polm_lab.models.layers import blocks_of
from polm_lab.training.evaluate import eval_no_grad
from polm_lab.core.knobs import WrongInput
from polm_lab.models.policy import Policy
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.models.save import save_model
from polm_lab.efficiency import slim
from polm_lab.efficiency.compression.structured_surgery import (
    block_facts,
    check_depth,
    check_same,
    cut,
)
from polm_lab.efficiency.compression.structured_surgery import (
    drop_blocks,
    fits,
    kept_entries,
    layers_of,
    rebuild,
)
from polm_lab.efficiency.compression.rotation import embedding_scale, fold_norms, gain_of
from polm_lab.efficiency.compression.rotation import read_stream, rotate
from polm_lab.efficiency.slim import Slim, check_cut, cut_widths, slice_model, sliced_width

# The families that SliceGPT works on, then the others with their messages.
SLICED = (
    "llama",
    "llama tied",
    "llama biases",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "phi3",
    "granite",
    "smollm3",
    "glm",
    "ernie4_5",
    "seed_oss",
    "hunyuan_v1_dense",
    "arcee",
    "apertus",
    "ministral",
)
UNSLICED = {
    "no linear layer reads": (
        "gemma2",
        "gemma3_text",
        "olmo2",
        "olmo3",
        "glm4",
        "exaone4",
        "bloom",
    ),
    "does not give x / rms(x)": (
        "phi",
        "opt",
        "gpt_neox",
        "gptj",
        "codegen",
        "gpt_neo",
        "stablelm",
        "cohere",
        "cohere2",
        "falcon",
        "starcoder2",
        "mpt",
        "gpt_bigcode",
        "nemotron",
        "persimmon",
    ),
    "does not read a norm with a weight": ("olmo",),
    "are in linear layers": ("gpt2", "mixtral", "qwen3_moe", "gpt_oss"),
    "where the stream has 48": ("mamba", "deepseek_v3"),
    "not allowed by HeliumConfig": ("helium",),
}
# What heads and neurons can be cut from.
NARROWED = (
    "llama",
    "llama tied",
    "llama biases",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo",
    "cohere",
    "cohere2",
    "granite",
    "smollm3",
    "exaone4",
    "ernie4_5",
    "seed_oss",
    "hunyuan_v1_dense",
    "ministral",
)
UNCUT = {
    "not allowed by": ("stablelm", "olmo2", "olmo3", "helium"),
    "are in linear layers": ("gpt2", "mixtral", "qwen3_moe", "gpt_oss"),
}
UNCUT["its blocks have the linear layers"] = tuple(
    set(FAMILIES) - {*NARROWED, *UNCUT["not allowed by"], *UNCUT["are in linear layers"]}
)


def refusals(table: dict) -> list:
    return [(family, words) for words, families in table.items() for family in sorted(families)]


def reloaded(model, folder):
    save_model(model, None, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_every_family_is_in_one_list():
    assert (
        sorted(FAMILIES)
        == sorted([*SLICED, *(f for f, _ in refusals(UNSLICED))])
        == sorted([*NARROWED, *(f for f, _ in refusals(UNCUT))])
    )


# Dimensions of the residual stream ----------------------------------------------------------------


@pytest.mark.parametrize("family", SLICED)
@torch.no_grad()
def test_slicing_nothing_leaves_the_logits(family, tmp_path):
    model, text = make(family), ids()
    before = copy.deepcopy(model.state_dict())
    expected = model(text).logits
    check_cut(model, Slim(algorithm="slicegpt", ratio=0.25))
    whole = slice_model(model, text, 0.0, 2)[0]
    assert gap(whole(text).logits, expected) < 1e-5
    # the model itself stays
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    small = slice_model(model, text, 0.25, 2)[0]
    assert small.config.hidden_size == 36
    assert gap(reloaded(small, tmp_path / "small")(text).logits, small(text).logits) < 1e-6


@pytest.mark.parametrize("family", ["llama biases", "gemma", "granite", "phi3", "glm"])
@torch.no_grad()
def test_dimensions_that_are_empty_can_go(family):
    """Cut a stream that is 0 from dimension 36 on, in a model that was turned.

    √width of Gemma, the mean over fewer squares, and biases come out right.
    """
    model, text = make(family), ids()
    fold_norms(model)
    model.get_input_embeddings().weight[:, 36:] = 0
    for layer in read_stream(model)[1]:
        layer.weight[36:] = 0
        if layer.bias is not None:
            layer.bias[36:] = 0
    expected = model(text).logits
    Q = torch.linalg.qr(torch.randn(36, 36, generator=torch.Generator().manual_seed(0))).Q
    small = rotate(model, torch.eye(48)[:, :36] @ Q)
    assert small.config.hidden_size == 36
    assert gap(small(text).logits, expected) < 1e-5


@pytest.mark.parametrize("family, words", refusals(UNSLICED))
def test_what_cannot_be_sliced_is_refused(family, words):
    with pytest.raises(WrongInput) as error:
        check_cut(make(family), Slim(algorithm="slicegpt", ratio=0.25))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_gains_are_measured():
    "Gemma keeps the gain less 1, and multiplies embeddings by √48; Granite by 3."
    for family, offset, scale in (
        ("llama", 0.0, 1.0),
        ("gemma", 1.0, 48**0.5),
        ("granite", 0.0, 3.0),
    ):
        model = make(family)
        norm = model.model.layers[1].input_layernorm
        gain, one = gain_of(norm)
        assert torch.equal(gain, norm.weight.detach() + offset)
        assert one == 1 - offset
        assert embedding_scale(model) == pytest.approx(scale, rel=1e-5)
        assert len(fold_norms(model)) == 9
        assert (norm.weight == one).all()
    with pytest.raises(WrongInput, match="such as a position"):
        embedding_scale(make("opt"))


def test_readers_and_writers_are_found_without_names():
    model = make("phi3")
    norms, writers = read_stream(model)
    names = {m: n for n, m in model.named_modules()}
    first = []
    for norm, layers in (norms[0], norms[1], norms[-1]):
        first.append((names[norm], [names[layer] for layer in layers]))
    assert first == [
        ("model.layers.0.input_layernorm", ["model.layers.0.self_attn.qkv_proj"]),
        ("model.layers.0.post_attention_layernorm", ["model.layers.0.mlp.gate_up_proj"]),
        ("model.norm", ["lm_head"]),
    ]
    assert [names[layer].split(".", 3)[3] for layer in writers] == [
        "self_attn.o_proj",
        "mlp.down_proj",
    ] * 4


@pytest.mark.parametrize("algorithm", ["slicegpt", "taylor", "depth"])
def test_a_model_that_does_something_else_is_seen_by_its_logits(algorithm):
    "Blocks act on some dimensions, neurons or numbers in ways that no name or shape shows."
    model = make("llama")

    class Odd(type(model.model.layers[0])):
        def forward(self, hidden, *args, **kwargs):
            out = super().forward(hidden, *args, **kwargs)
            place = self.self_attn.layer_idx
            return (
                out * (1 + 0.1 * (torch.arange(out.shape[-1]) < 9))
                if algorithm == "slicegpt"
                else out * (1 + 0.1 * place)
                if algorithm == "depth"
                else out + 0.1 * self.mlp.gate_proj.weight.shape[0]
            )

    class Odder(type(model)):
        def __init__(self, config):
            super().__init__(config)
            for block in self.model.layers:
                block.__class__ = Odd

    odd = Odder(model.config).eval()
    odd.load_state_dict(model.state_dict())
    with pytest.raises(WrongInput, match="changes the logits of a short random text by"):
        check_cut(odd, Slim(algorithm=algorithm, ratio=0.25))
    check_cut(model, Slim(algorithm=algorithm, ratio=0.25))


def test_logits_that_differ_by_more_than_rounding_are_no_longer_the_same():
    a = torch.tensor([[-4.0, 1.0, 2.0]])
    check_same(a + 3e-4, a, "", "")
    for other in (a + 5e-4, a * float("nan")):
        with pytest.raises(WrongInput, match="of the largest"):
            check_same(other, a, "this", "stop")


def test_an_unforeseen_family_ends_in_one_line(monkeypatch):
    def fails(model, kept, each):
        raise AttributeError("'X' object has no attribute 'norm'\nand more")

    monkeypatch.setattr(slim, "check_slicing", fails)
    with pytest.raises(WrongInput) as error:
        check_cut(make("llama"), Slim(algorithm="slicegpt"))
    assert "has no attribute 'norm'" in str(error.value)
    assert "\n" not in str(error.value)


# Heads and neurons --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NARROWED)
@torch.no_grad()
def test_heads_and_neurons_that_give_nothing_can_go(family, tmp_path):
    model, text = make(family), ids()
    width = layers_of(blocks_of(model)[0])["k_proj"].out_features // 3
    check_cut(model, Slim(algorithm="taylor", ratio=0.25))
    for ratio in (0.0, 0.25):
        with torch.enable_grad():
            *_, (_, sizes) = cut_widths(copy.deepcopy(model), text, "taylor", ratio, rows=2)
        assert (sizes["intermediate_size"], sizes["num_key_value_heads"], sizes["head_dim"]) == (
            (80, 3, width),
            (60, 2, width),
        )[ratio > 0]
    for algorithm in ("taylor", "flap"):
        same = copy.deepcopy(model)
        with torch.enable_grad():
            *_, (_, nothing) = cut_widths(same, text, algorithm, 0.0, rows=2)
        assert torch.equal(rebuild(same, **nothing)(text).logits, model(text).logits)
    for block in blocks_of(model):
        layers = layers_of(block)
        layers["down_proj"].weight[:, 60:] = 0
        layers["o_proj"].weight[:, 2 * width : 4 * width] = 0  # the two heads that share key 1
    expected = model(text).logits
    for block in blocks_of(model):
        cut(block, torch.arange(60), torch.tensor([0, 2]), width)
    small = rebuild(model, **sizes)
    assert gap(small(text).logits, expected) < 1e-5
    assert gap(reloaded(small, tmp_path / "small")(text).logits, small(text).logits) < 1e-6


@pytest.mark.parametrize("family, words", refusals(UNCUT))
def test_what_cannot_be_narrowed_is_refused(family, words):
    with pytest.raises(WrongInput) as error:
        check_cut(make(family), Slim(algorithm="taylor", ratio=0.25))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bias_that_the_family_lacks_is_refused_before():
    for family, names in (
        ("mistral", "mlp_bias"),
        ("qwen3", "mlp_bias"),
        ("smollm3", None),
        ("llama", None),
    ):
        settings = Slim(algorithm="flap", ratio=0.25)
        if names is None:
            check_cut(make(family), settings)
        else:
            with pytest.raises(WrongInput, match=names):
                check_cut(make(family), settings)
    with pytest.raises(WrongInput, match="block 1 is"):
        model = make("llama")
        cut(model.model.layers[1], torch.arange(60))
        check_cut(model, Slim(algorithm="flap"))


# Blocks -------------------------------------------------------------------------------------------


def skipping(model, kept):
    "A copy whose other blocks give on what they get."

    def past(block, args, kwargs, out):
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if torch.is_tensor(out) else (hidden, *out[1:])

    model = copy.deepcopy(model)
    for i, block in enumerate(blocks_of(model, linear=False)):
        if i not in kept:
            block.register_forward_hook(past, with_kwargs=True)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_of_fewer_blocks_is_the_model_that_skips_them(family, tmp_path):
    model, text = make(family), ids(2, 24)
    kept = [1, 2, 3] if family != "phi3" else [0, 3]
    expected = skipping(model, kept)(text, use_cache=False).logits
    check_cut(model, Slim(algorithm="depth", ratio=0.25))
    assert torch.equal(check_depth(model, [0, 1, 2, 3])(text).logits, model(text).logits)
    small = check_depth(model, kept)
    again = reloaded(small, tmp_path / "small")
    assert small.config.num_hidden_layers == len(kept)
    assert gap(small(text, use_cache=False).logits, expected) < 1e-6
    assert gap(again(text, use_cache=False).logits, expected) < 1e-6
    # with a cache, which looks blocks up by their numbers
    assert gap(again(text).logits, expected) < 1e-6


PER_BLOCK = [
    ("gemma3_text", "layer_types", ["sliding_attention", "sliding_attention", "full_attention"]),
    ("qwen2", "layer_types", ["full_attention", "sliding_attention", "sliding_attention"]),
    ("smollm3", "no_rope_layers", [0, 1, 1]),
    ("gpt_neo", "attention_layers", ["local", "global", "local"]),
    ("qwen3_moe", "mlp_only_layers", [0]),
]


@pytest.mark.parametrize("family, name, expected", PER_BLOCK)
def test_what_is_said_of_each_block_follows_it(family, name, expected, tmp_path):
    model = make(family)
    model.config.eos_token_id = [2, 3, 4, 5]  # as many as there are blocks
    was = {i: block_facts(block) for i, block in enumerate(blocks_of(model, linear=False))}
    again = reloaded(drop_blocks(copy.deepcopy(model), [1, 2, 3]), tmp_path / "small")
    assert getattr(again.config, name) == expected
    assert again.config.eos_token_id == [2, 3, 4, 5]
    assert [block_facts(block) for block in blocks_of(again, linear=False)] == [
        was[1],
        was[2],
        was[3],
    ]


def test_entries_of_a_configuration():
    assert kept_entries(["F", "S", "S", "F"], [1, 2, 3], 4, "layer_types") == ["S", "S", "F"]
    assert kept_entries([80, 96, 112], [0, 2], 3, "intermediate_size") == [80, 112]
    assert kept_entries([[["a", "b"], 2]], [1, 2], 4, "attention_types") == [[["b"], 1], [["a"], 1]]
    assert kept_entries([0, 3, 5], [1, 3, 5], 6, "mlp_only_layers") == [1, 2]
    assert kept_entries([0, 1, 2], [0, 2], 3, "mlp_only_layers") == [0, 1]
    assert kept_entries([0, 1, 1], [0, 2], 3, "no_rope_layers") == [0, 1]
    for value, name in (
        ([1, 2, 3], "eos_token_id"),
        (["Llama"], "architectures"),
        ([1, 2], "sizes"),
        ("full", "kind"),
        ([], "mlp_only_layers"),
        (None, "x"),
    ):
        assert kept_entries(value, [0, 2], 3, name) == value


def test_a_block_that_would_become_another_is_refused(monkeypatch):
    model = make("gemma3_text")
    monkeypatch.setattr(
        "polm_lab.efficiency.compression.structured_surgery.kept_entries",
        lambda value, kept, count, name="": (
            value[: len(kept)] if isinstance(value, list) and len(value) == count else value
        ),
    )
    with pytest.raises(WrongInput, match="as block 0, block 1 of a gemma3_text model would have"):
        check_depth(model, [1, 2, 3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_and_angles_do_not_become_coarse(dtype):
    model, text = make("llama").to(dtype), ids()
    # as when it is loaded in 16 bits
    model.model.rotary_emb.inv_freq = make("llama").model.rotary_emb.inv_freq
    small = check_depth(model, [0, 2])
    assert small.dtype == dtype
    assert small.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(small(text).logits, skipping(model, [0, 2])(text).logits)
    check_cut(model, Slim(algorithm="slicegpt", ratio=0.25))
    check_cut(model, Slim(algorithm="flap", ratio=0.25))


# Runs ---------------------------------------------------------------------------------------------


def saved(family, folder):
    "A tiny model of `family` with the tokenizer of the embedded one."
    tokenizer = load_tokenizer("tiny")
    save_model(
        make(family, vocab_size=len(tokenizer), max_position_embeddings=512, max_seq_len=512),
        tokenizer,
        folder,
    )
    return str(folder)


SHORT = dict(calibration_samples=2, eval_rows=2, max_length=32, device="cpu", dtype="float32")


@pytest.mark.parametrize("family", ["phi3", "opt", "gpt2", "mixtral"])
def test_depth_needs_no_names(family, runs, tmp_path):
    run = lab.run(
        "slim", model=saved(family, tmp_path / "model"), algorithm="depth", ratio=0.25, **SHORT
    )
    again = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert len(run.record["kept"]) == 3 == again.config.num_hidden_layers
    assert run.summary["after"]["size_mib"] < run.summary["before"]["size_mib"]


@pytest.mark.parametrize(
    "family, algorithm",
    [
        ("gemma2", "slicegpt"),
        ("opt", "slicegpt"),
        ("phi3", "flap"),
        ("mistral", "flap"),
        ("gpt2", "taylor"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused_before_anything_is_evaluated(
    family, algorithm, runs, tmp_path
):
    with pytest.raises(WrongInput) as error:
        lab.run("slim", model=saved(family, tmp_path / "model"), algorithm=algorithm, **SHORT)
    assert "\n" not in str(error.value)
    [record] = runs.glob("*/run.json")
    assert not json.loads(record.read_text()).get("summary")
    assert not (record.parent / "model").exists()


def test_widths_are_rounded_to_what_is_allowed():
    model = make("llama")
    assert sliced_width(model, 0.25) == 36
    assert sliced_width(model, 0.0) == 48
    assert sliced_width(model, 0.9) == 6
    assert fits(make("gpt2").config, "num_hidden_layers", 2, 4) == 2


def test_dropout_stays_off_after_an_evaluation():
    """A model that a wrapper reads stays in its mode.

    Calibration after the first evaluation would be noise otherwise.
    """
    model = make("gpt2")
    assert model.transformer.drop.p == 0.1
    policy = Policy(model)
    with eval_no_grad(policy):
        assert not policy.training
    assert policy.training
    assert not any(m.training for m in model.modules())
    model.train()
    with eval_no_grad(policy):
        assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.modules())
