"""Export: packed words, compressed-tensors read by transformers, GGUF read back, tokenizers, wrong input."""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import polm_lab as lab
from conftest import POLM
from polm_lab.core.knobs import WrongInput
from polm_lab.runner.export import (
    GGUF_TYPES,
    export,
    export_gguf,
    export_packed,
    pack_words,
    permuted,
    pre_tokenizer_name,
)
from polm_lab.models.load import load_model
from polm_lab.models.save import save_model
from polm_lab.models.tokenizers import load_tokenizer

SHORT = dict(calibration_samples=2, max_length=64, eval_rows=2)
TEXTS = ("What is 17 + 26?", "  Two  spaces, and\nlines.", "Grüße, 世界! 12345", "don't we'll I'M")


def says(call, *values, **more) -> str:
    with pytest.raises(WrongInput) as wrong:
        call(*values, **more)
    assert "\n" not in str(wrong.value)
    return str(wrong.value)


def small(kind: str, **more):
    "Return a small model whose rows are multiples of 32, with two query heads for a key head."
    torch.manual_seed(0)
    size = len(load_tokenizer("tiny")) + 8  # Qwen's tokenizer class adds a token
    sizes = dict(vocab_size=size, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128) | more
    kinds = dict(
        llama=(LlamaConfig, LlamaForCausalLM),
        mistral=(MistralConfig, MistralForCausalLM),
        qwen2=(Qwen2Config, Qwen2ForCausalLM),
        gemma2=(Gemma2Config, Gemma2ForCausalLM),
    )
    config, model = kinds[kind]
    if kind == "gemma2":
        sizes |= dict(head_dim=16, sliding_window=32)
    made = model(config(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "Folders of small models with the embedded model's tokenizer."
    folder = tmp_path_factory.mktemp("saved")
    for kind in ("llama", "mistral", "qwen2", "gemma2"):
        save_model(small(kind), load_tokenizer("tiny"), folder / kind)
    many = small("llama", num_key_value_heads=4, attention_bias=True)
    save_model(many, load_tokenizer("tiny"), folder / "heads")
    return folder


IDS = torch.arange(5, 45)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


# Words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", [1, 8, 33, 64])
def test_words_are_those_of_compressed_tensors(bits, width):
    from compressed_tensors.compressors.pack_quantized import helpers

    codes = np.random.default_rng(0).integers(0, 2**bits, (6, width), dtype=np.uint8)
    signed = torch.from_numpy(codes.astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(
        torch.from_numpy(pack_words(codes, bits)), helpers.pack_to_int32(signed, bits)
    )


# compressed-tensors -----------------------------------------------------------------------------


def read_by_transformers(folder, symmetric):
    from transformers import CompressedTensorsConfig

    # transformers 5.23 with compressed-tensors 0.20 reads zero points only where it unpacks at once
    more = {} if symmetric else dict(quantization_config=CompressedTensorsConfig(dequantize=True))
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, **more
    )


@pytest.mark.parametrize(
    "knobs",
    [
        dict(algorithm="gptq", bits=4),
        dict(algorithm="gptq", bits=4, symmetric=True, act_order=False),
        dict(algorithm="gptq", bits=8, group_size=0),
        dict(algorithm="rtn", bits=3),
        dict(algorithm="obq", bits=4, group_size=16),
        dict(algorithm="awq", bits=4),
    ],
    ids=lambda knobs: "-".join(map(str, knobs.values())),
)
@pytest.mark.parametrize("kind", ["heads", "llama", "qwen2"])
def test_transformers_reads_the_weights_of_the_run(saved, tmp_path, kind, knobs):
    run = lab.run("quantize", model=str(saved / kind), **knobs, **SHORT)
    lines = []
    folder = export_packed(run, tmp_path / "packed", lines.append)
    ours = load_model(run.id, dtype="float32", device="cpu")
    theirs = read_by_transformers(folder, run.settings["symmetric"])
    assert (logits(theirs) - logits(ours)).abs().max() < 1e-4
    shared = knobs["algorithm"] == "awq" and kind != "heads"  # o_proj's scale has nowhere to go
    assert bool(lines) == shared
    if shared:
        assert "as they are" in lines[0]
        assert "o_proj" in lines[0]
        assert "down_proj" not in lines[0]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == knobs["bits"]
    assert (
        AutoTokenizer.from_pretrained(folder)("17 + 26").input_ids
        == load_tokenizer("tiny")("17 + 26").input_ids
    )


def test_short_groups_are_stored_in_bytes_and_named(tmp_path):
    run, lines = lab.run("quantize", bits=4, symmetric=True, **SHORT), []
    folder = export_packed(run, tmp_path / "packed", lines.append)
    assert lines[0].startswith("5 layers are stored with 8 bits")
    assert lines[0].count("down_proj") == 5
    model = load_model(run.id, dtype="float32", device="cpu")
    for name, layer in model.named_modules():
        if name.endswith("down_proj"):  # what the export says that it stores
            scale = layer.weight.abs().amax(1, keepdim=True) / 127
            layer.weight.data = (layer.weight / scale).round() * scale
    assert (logits(read_by_transformers(folder, True)) - logits(model)).abs().max() < 1e-3


def test_the_size_on_disk_is_what_the_bits_say(saved, tmp_path):
    config = dict(hidden_size=256, intermediate_size=512, num_key_value_heads=4)
    save_model(small("llama", **config), load_tokenizer("tiny"), tmp_path / "wide")
    run = lab.run("quantize", model=str(tmp_path / "wide"), bits=4, group_size=64, **SHORT)
    folder = export_packed(run, tmp_path / "packed")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
    model = load_model(run.id, dtype="float32", device="cpu")
    count = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    # a scale is written in the type of the model, 32 bits here, and counts as 16
    expected = run.summary["after"]["size_mib"] + count / 64 * 2 / 2**20
    assert size == pytest.approx(expected, rel=0.03)


# GGUF -------------------------------------------------------------------------------------------


def test_queries_are_permuted_as_llama_cpp_turns_them():
    weight = np.arange(16.0).reshape(8, 2)
    found = permuted(weight, 2)
    assert found[:4, 0].tolist() == [0, 4, 2, 6]
    assert found[4:, 0].tolist() == [8, 12, 10, 14]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma2"])
@pytest.mark.parametrize("to", GGUF_TYPES)
def test_a_gguf_file_is_read_back(saved, tmp_path, kind, to):
    file = export_gguf(str(saved / kind), tmp_path / "m.gguf", to)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    ours = logits(load_model(str(saved / kind), dtype="float32", device="cpu"))
    gap = (logits(again) - ours).abs().max() / ours.abs().max()
    if kind == "mistral":  # read as a Llama
        assert again.config.model_type == "llama"
    assert gap < dict(f16=2e-3, q8_0=0.03, q4_0=0.6)[to]
    assert to == "f16" or gap > 1e-4


def test_the_order_of_queries_matters(tmp_path, monkeypatch):
    monkeypatch.setattr("polm_lab.runner.export.permuted", lambda weight, heads: weight)
    file = export_gguf("tiny", tmp_path / "m.gguf", "f16")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    ours = logits(load_model("tiny", dtype="float32", device="cpu"))
    apart = (logits(again) - ours).abs().amax(-1)[0]
    assert apart[0] < 0.01 * ours.abs().max()
    assert apart[20:].max() > 0.1 * ours.abs().max()


def test_rows_that_do_not_fit_a_block_have_sixteen_bits(tmp_path):
    lines = []
    file = export_gguf("tiny", tmp_path / "tiny.gguf", "q4_0", lines.append)
    assert "5 matrices" in lines[0]
    from gguf import GGUFReader

    kinds = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_the_tokenizer_comes_back(tmp_path):
    file = export_gguf("tiny", tmp_path / "tiny.gguf", "f16")
    ours, again = load_tokenizer("tiny"), load_tokenizer(str(file))
    for text in TEXTS[:1] + TEXTS[3:]:
        assert again(text).input_ids == ours(text).input_ids
        assert again.decode(ours(text).input_ids) == text
    assert again.chat_template == ours.chat_template
    assert again.eos_token_id == ours.eos_token_id


def test_a_model_of_gguf_is_a_model_again(tmp_path):
    file = export("tiny", "gguf", tmp_path, "q8_0", lambda line: None)
    assert file.name == "tiny-q8_0.gguf"
    run = lab.run(
        "sft", model=str(file), data="sums#16", steps=1, batch_size=4, eval_rows=4, dtype="float32"
    )
    assert run.status == "finished"


def test_smol_comes_back_and_its_size_is_that_of_its_bits(smol, tmp_path):
    file = export_gguf("smol", tmp_path / "smol.gguf", "q4_0")
    model = load_model("smol", dtype="bfloat16", device="cpu")
    table = model.get_input_embeddings().weight.numel()
    rest = sum(p.numel() for p in model.parameters()) - table
    expected = (table * 8.5 + rest * 4.5) / 8
    from gguf import GGUFReader

    weights = sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)
    assert weights == pytest.approx(expected, rel=0.005)
    assert file.stat().st_size - weights < 4 * 2**20  # the tokenizer
    ours, again = (
        load_tokenizer("smol"),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name),
    )
    for text in TEXTS:
        assert again(text).input_ids == ours(text).input_ids


def test_the_names_of_how_text_is_split():
    digits = {"type": "Digits", "individual_digits": True}
    level = {"type": "ByteLevel", "use_regex": True}
    assert pre_tokenizer_name({"pre_tokenizer": level}) == "gpt-2"
    both = {"type": "Sequence", "pretokenizers": [digits, level]}
    assert pre_tokenizer_name({"pre_tokenizer": both}) == "smollm"
    start = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    end = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers, name in ((r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}", "qwen2")):
        split = {"type": "Split", "pattern": {"Regex": start + numbers + end}}
        parts = [split, {"type": "ByteLevel", "use_regex": False}]
        pre = {"type": "Sequence", "pretokenizers": parts}
        assert pre_tokenizer_name({"pre_tokenizer": pre}) == name
    text = says(pre_tokenizer_name, {"pre_tokenizer": {"type": "Whitespace"}})
    assert "Whitespace" in text


# Wrong input ------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_refused(saved, tmp_path):
    assert "did you mean 'gguf'" in says(export, "tiny", "ggfu", tmp_path / "x")
    assert "is no run" in says(export, "tiny", "compressed-tensors", tmp_path / "x")
    (tmp_path / "there").mkdir()
    pruned = lab.run("prune", algorithm="magnitude", **SHORT)
    assert "has no codes" in says(export, pruned.id, "compressed-tensors", tmp_path / "x")
    table = lab.run("quantize", algorithm="squeezellm", bits=3, **SHORT)
    text = says(export, table.id, "compressed-tensors", tmp_path / "x")
    assert "squeezellm" in text
    assert "gptq" in text
    good = lab.run("quantize", algorithm="rtn", bits=4, **SHORT)
    assert "is there already" in says(export, good.id, "compressed-tensors", tmp_path / "there")
    assert "q8_0" in says(export_gguf, "tiny", tmp_path / "x.gguf", "q8_00")
    thin = lab.run("lowrank", algorithm="svd", **SHORT)
    assert "low_rank" in says(export_gguf, thin.id, tmp_path / "x.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "there"]


def test_the_command(tmp_path):
    run = lab.run("quantize", algorithm="rtn", bits=4, **SHORT)
    command = [POLM, "export", run.id, "--to", "gguf", "--type", "f16", str(tmp_path / "m.gguf")]
    env = os.environ | {"POLM_RUNS": str(run.path.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "m.gguf") in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, env=env)
    assert again.returncode == 2
    assert "is there already" in again.stderr
