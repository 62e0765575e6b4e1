"""Models: bad folders are named, what is saved comes back, adapters by name, the Hub's cache."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from polm_lab.core.knobs import WrongInput
from polm_lab.models.tokenizers import CHAT_TEMPLATES, has_chat_template, load_tokenizer
from polm_lab.models.attach import adapter_names, count_parameters, parse_adapter, size_mib
from polm_lab.models.sources import built_in_models, model_path
from polm_lab.core.machine import data_folder, pick_device, pick_dtype
from polm_lab.models.load import load_model
from polm_lab.models.save import save_model

IDS = torch.tensor([[0, 40, 41, 42, 43, 44]])
CPU = dict(dtype="float32", device="cpu")


def make_tokenizer(**special):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **(special or dict(bos_token="<s>", eos_token="</s>"))
    )


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    "The folder of a small Llama with tied embeddings."
    folder = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return save_model(LlamaForCausalLM(config), make_tokenizer(), folder)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    "No runs, no network, an empty Hub cache."
    import huggingface_hub.constants as hub

    monkeypatch.setenv("POLM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))


def edit(file, **values):
    "Change a JSON file; None takes a key out."

    def change(folder):
        new = {**json.loads((folder / file).read_text()), **values}
        (folder / file).write_text(json.dumps({k: v for k, v in new.items() if v is not None}))

    return change


def reweigh(change):
    def apply(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def cut(file, keep):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:keep])


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shards(weight_map):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(weight_map)

    return change


UP = "model.layers.1.mlp.up_proj.weight"
BAD_MODELS = {  # name: (change of the folder, parts of the message)
    "truncated in the weights": (
        cut("model.safetensors", 200_000),
        ["model.safetensors", "truncated"],
    ),
    "truncated in the header": (cut("model.safetensors", 100), ["model.safetensors", "truncated"]),
    "empty weight file": (cut("model.safetensors", 0), ["model.safetensors", "0 bytes"]),
    "no safetensors at all": (
        lambda f: (f / "model.safetensors").write_bytes(b"x" * 999),
        ["model.safetensors", "damaged"],
    ),
    "pickle weights": (pickled, ["pytorch_model.bin", "never opened", "safetensors"]),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        ["model.safetensors", "not there"],
    ),
    "shard missing": (
        shards('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        ["model-00001-of-00002.safetensors", "not there"],
    ),
    "index damaged": (shards("[]"), ["index.json", "not an index"]),
    "weight missing": (reweigh(lambda w: w.pop(UP)), ["lacks", UP]),
    "weights unknown": (
        reweigh(lambda w: w.update(one=torch.ones(2), two=torch.ones(2))),
        ["unknown one", "1 more"],
    ),
    "weight of another shape": (
        reweigh(lambda w: w.update({UP: torch.ones(3, 3)})),
        [UP, "[3, 3] instead of [128, 64]"],
    ),
    "config missing": (lambda f: (f / "config.json").unlink(), ["config.json", "not there"]),
    "config damaged": (cut("config.json", 30), ["config.json", "JSON"]),
    "config of no model": (
        lambda f: (f / "config.json").write_text("{}"),
        ["config.json", "no model_type"],
    ),
    "unknown architecture": (
        edit("config.json", model_type="lamma", architectures=None),
        ["lamma"],
    ),
    "not a causal model": (
        edit("config.json", model_type="t5", architectures=None),
        ["t5", "no causal language model"],
    ),
    "code of its own": (
        edit(
            "config.json",
            model_type="mine",
            auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
        ),
        ["mine", "custom code"],
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model_is_one_clear_line(small, tmp_path, name):
    change, parts = BAD_MODELS[name]
    folder = shutil.copytree(small, tmp_path / "model")
    change(folder)
    with pytest.raises(WrongInput) as caught:
        load_model(folder, **CPU)
    message = str(caught.value)
    assert "\n" not in message, message
    assert all(part in message for part in [str(folder), *parts]), message


BAD_TOKENIZERS = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["no tokenizer"]),
    "damaged": (cut("tokenizer.json", 50), ["cannot be read"]),
    "no end token": (edit("tokenizer_config.json", eos_token=None), ["no eos_token"]),
    "of another model": (edit("config.json", vocab_size=100), ["258 tokens", "100 embeddings"]),
}


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_bad_tokenizer(small, tmp_path, name):
    change, parts = BAD_TOKENIZERS[name]
    folder = shutil.copytree(small, tmp_path / "model")
    change(folder)
    with pytest.raises(WrongInput) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert "\n" not in message, message
    assert all(part in message for part in [str(folder), *parts]), message


BAD_SPECS = {
    "unknown name": ("tyni", ["'tyni'", "Hub"]),
    "unknown Hub id": ("org/none", ["'org/none'", "Hub"]),
    "missing folder": ("/nowhere/at/all", ["no such folder"]),
    "empty": ("", ["no such folder"]),
    "a folder without a model": (".", ["config.json", "not there"]),
}


@pytest.mark.parametrize("name", BAD_SPECS)
def test_bad_spec(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec, parts = BAD_SPECS[name]
    with pytest.raises(WrongInput) as caught:
        load_model(spec, **CPU)
    assert "\n" not in str(caught.value), caught.value
    assert all(part in str(caught.value) for part in parts), caught.value


BAD_SETTINGS = {
    "dtype": (dict(dtype="float8"), "dtype 'float8'"),
    "device": (dict(device="tpu"), "device 'tpu'"),
    "device that is not there": (dict(device="cuda:77"), "cuda:77"),
    "unknown adapter": (dict(adapter="lorra"), "did you mean 'lora'"),
    "unknown setting": (dict(adapter="lora:rank=8"), "no setting 'rank'"),
    "setting of a wrong type": (dict(adapter="lora:r=eight"), "expected int"),
    "setting out of its choices": (dict(adapter="lora:bias=some"), "bias = 'some'"),
    "setting that PEFT refuses": (dict(adapter="lora:r=0"), "does not fit this llama model"),
    "adapter of another architecture": (
        dict(adapter="lora:target_modules=c_attn"),
        "llama has no layer 'c_attn'",
    ),
    "one of two layers unknown": (
        dict(adapter="lora:target_modules=q_proj,c_attn"),
        "llama has no layer 'c_attn'",
    ),
    "adapter too wide": (dict(adapter="vblora"), "must be divisible"),
    "adapter that needs more": (dict(adapter="poly"), "task id"),
    "settings of none": (dict(adapter="none:r=8"), "none has no settings"),
    "no name": (dict(adapter="lora:8"), "'8' is no setting"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_setting(small, name):
    settings, part = BAD_SETTINGS[name]
    with pytest.raises(WrongInput) as caught:
        load_model(small, **{**CPU, **settings})
    assert "\n" not in str(caught.value), caught.value
    assert part in str(caught.value), caught.value


def test_built_in_models(tmp_path, monkeypatch):
    monkeypatch.setenv("POLM_CACHE", str(tmp_path))
    assert "tiny" in built_in_models()
    for name, folder in built_in_models().items():
        assert model_path(name) == folder == data_folder() / name
        assert count_parameters(load_model(name, **CPU)) > 0
        assert has_chat_template(load_tokenizer(name))


def test_runs_and_folders(small, tmp_path):
    for run in ("sft-1", "sft-2"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "run.json").write_text("{}")
    model = shutil.copytree(small, tmp_path / "runs" / "sft-1" / "model")
    assert (
        model_path("sft-1")
        == model_path(tmp_path / "runs" / "sft-1")
        == model_path(str(model))
        == model
    )
    with pytest.raises(WrongInput, match="sft-2: this run has left no model"):
        model_path("sft-2")
    with pytest.raises(WrongInput, match="did you mean 'sft-1'"):
        model_path("sft-11")


def test_hub_cache(small, tmp_path):
    revisions = {
        "main": "0123456789abcdef0123456789abcdef01234567",
        "v2": "89abcdef0123456789abcdef0123456789abcdef",
    }
    repo = tmp_path / "hub" / "models--org--small"
    for folder in ("blobs", "refs", *(f"snapshots/{r}" for r in revisions.values())):
        (repo / folder).mkdir(parents=True)
    for branch, revision in revisions.items():
        (repo / "refs" / branch).write_text(revision)
        for file in small.iterdir():
            shutil.copy(file, repo / "blobs" / file.name)
            (repo / "snapshots" / revision / file.name).symlink_to(f"../../blobs/{file.name}")
    assert model_path("org/small") == repo / "snapshots" / revisions["main"]
    assert model_path("org/small@v2") == repo / "snapshots" / revisions["v2"]
    with torch.no_grad():
        assert torch.equal(
            load_model("org/small", **CPU)(IDS).logits, load_model(small, **CPU)(IDS).logits
        )
    assert len(load_tokenizer("org/small")) == 258
    tuned = load_model("org/small", **CPU, adapter="lora:r=2")
    assert tuned.peft_config["default"].base_model_name_or_path == "org/small"
    (repo / "snapshots" / revisions["v2"] / "model.safetensors").unlink()
    with pytest.raises(WrongInput, match="model.safetensors: it is not there"):
        load_model("org/small@v2", **CPU)


def test_hub_cache_by_environment(small, tmp_path):
    "The same in a process of its own, with nothing but HF_HOME and HF_HUB_OFFLINE."
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "home" / "hub" / "models--org--small"
    shutil.copytree(small, repo / "snapshots" / revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    code = (
        "from polm_lab.models.attach import *; from polm_lab.models.load import *; from "
        "polm_lab.models.tokenizers import *; print(count_parameters(load_model('org/small', "
        "device='cpu')), len(load_tokenizer('org/small')))"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.stdout.split() == ["90560", "258"], out.stderr


def test_tokenizer_gets_a_pad_token_and_no_new_one(small, tmp_path):
    tokenizer = load_tokenizer(small)
    assert (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer)) == ("</s>", "right", 258)
    assert not has_chat_template(tokenizer)
    for name in CHAT_TEMPLATES:
        chatty = load_tokenizer(small, chat_template=name)
        talk = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
        ]
        asked = chatty.apply_chat_template(talk[:2], tokenize=False, add_generation_prompt=True)
        whole = chatty.apply_chat_template(talk, tokenize=False)
        assert whole.startswith(asked)
        assert "Hello.</s>" in whole
        assert "Be kind." in whole
        assert len(chatty) == 258
        marked = chatty.apply_chat_template(
            talk, return_dict=True, return_assistant_tokens_mask=True
        )
        learned = chatty.decode(
            [t for t, m in zip(marked["input_ids"], marked["assistant_masks"]) if m]
        )
        assert learned.strip() == "Hello.</s>"
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    assert (
        load_tokenizer(small, chat_template=str(tmp_path / "own.jinja")).apply_chat_template(
            talk[1:2], tokenize=False
        )
        == "Hi"
    )
    with pytest.raises(WrongInput, match="did you mean 'transcript'"):
        load_tokenizer(small, chat_template="transkript")


def test_dtype_and_device(small):
    assert pick_dtype("cpu") == torch.float32  # on every CPU, whatever it is good at
    assert load_model(small, device="cpu").dtype == torch.float32
    for name in ("float32", "bfloat16", "float16"):
        assert load_model(small, dtype=name, device="cpu").dtype == getattr(torch, name)
    assert pick_device("auto").type == (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_saved_comes_back(tmp_path, kind, tied):
    torch.manual_seed(1)
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=258,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                tie_word_embeddings=tied,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=258,
                n_embd=32,
                n_layer=2,
                n_head=4,
                bos_token_id=0,
                eos_token_id=1,
                tie_word_embeddings=tied,
            )
        )
    model.generation_config.update(do_sample=False, temperature=0.5, max_new_tokens=7)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATES["alpaca"].replace("{BOS}", "")
    for _ in range(2):  # the second time it replaces the first
        save_model(model, tokenizer, tmp_path / "model")
    again = load_model(tmp_path / "model", **CPU)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in again.state_dict().items()
    }
    assert load_tokenizer(tmp_path / "model").chat_template == tokenizer.chat_template
    assert again.generation_config.max_new_tokens == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert not list((tmp_path / "model").glob("*.bin"))
    assert count_parameters(again) == count_parameters(model)
    assert size_mib(again) == pytest.approx(size_mib(model))


def test_failed_save_leaves_the_old_model(small, tmp_path):
    class Full:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    folder = shutil.copytree(small, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(OSError, match="No space"):
        save_model(load_model(small, **CPU).half(), Full(), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(WrongInput, match="a file is in the way"):
        save_model(None, None, folder / "config.json")


def test_killed_save_leaves_no_half_model(small, tmp_path):
    "Kill a process that saves over and over: the folder holds one whole model, or nothing."
    code = (
        "import sys, torch; from polm_lab.models.load import *; from polm_lab.models.tokenizers "
        "import *; m = load_model(sys.argv[1], device='cpu', dtype='float32'); t = "
        "load_tokenizer(sys.argv[1])\n"
        "for i in range(10**6):\n    [p.data.fill_(i % 100) for p in m.parameters()]; "
        "save_model(m, t, sys.argv[2]); print(i, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(small), str(tmp_path / "model")],
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    if (tmp_path / "model").exists():
        values = {
            p.unique().tolist()[0] for p in load_model(tmp_path / "model", **CPU).parameters()
        }
        assert len(values) == 1
        assert len(load_tokenizer(tmp_path / "model")) == 258
    # leftovers are no obstacle
    save_model(load_model(small, **CPU), load_tokenizer(small), tmp_path / "model")
    assert [p.name for p in tmp_path.glob("*model*")] + [p.name for p in tmp_path.glob(".*")] == [
        "model"
    ]


# Adapters


def test_adapter_specs():
    assert parse_adapter("none") == parse_adapter("") == ("none", {})
    assert parse_adapter("LoRA: r=4, target_modules=q_proj,v_proj, use_dora=true") == (
        "lora",
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_dora": True},
    )
    assert parse_adapter("lora:target_modules=q_proj")[1] == {"target_modules": ["q_proj"]}
    assert parse_adapter("lora:target_modules=all-linear")[1] == {"target_modules": "all-linear"}
    assert parse_adapter("lora:layers_to_transform=0,1")[1] == {"layers_to_transform": [0, 1]}
    assert parse_adapter("lora:lora_dropout=0")[1] == {"lora_dropout": 0.0}
    assert parse_adapter("lora:init_lora_weights=pissa_niter_4")[1] == {
        "init_lora_weights": "pissa_niter_4"
    }
    assert {"lora", "ia3", "loha", "vera", "prefix_tuning", "p_tuning"} <= set(adapter_names())
    assert "poly" not in adapter_names()


def trained(model) -> list:
    "The weights that train."
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "adapter",
    [
        "lora:r=2",
        "lora:r=2,use_dora=true",
        "ia3",
        "loha:r=2",
        "vera:r=4",
        "oft",
        "ln_tuning",
        "prompt_tuning:num_virtual_tokens=3",
        "prefix_tuning:num_virtual_tokens=3",
    ],
)
def test_adapter_is_seeded_trains_and_comes_back(small, tmp_path, adapter):
    one, same, other = (load_model(small, **CPU, adapter=adapter, seed=seed) for seed in (1, 1, 2))
    assert one.fresh_adapter
    weights = [trained(m) for m in (one, same, other)]
    assert all(map(torch.equal, weights[0], weights[1]))
    assert count_parameters(one, trainable=True) < count_parameters(one) / 2
    if adapter[:4] in ("lora", "pref"):
        assert not all(map(torch.equal, weights[0], weights[2]))
    one.train()
    one(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in weights[0])
    with torch.no_grad():
        for p in weights[0]:
            p += 0.1 * torch.rand_like(p)
    save_model(one, load_tokenizer(small), tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = load_model(tmp_path / "adapter", **CPU)
    assert not again.fresh_adapter
    assert count_parameters(again, trainable=True) == count_parameters(one, trainable=True)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, one.eval()(input_ids=IDS).logits)


def test_adapter_on_an_adapter(small, tmp_path):
    tuned = load_model(small, **CPU, adapter="lora:r=2")
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_()
    save_model(tuned, None, tmp_path / "first")
    assert len(load_tokenizer(tmp_path / "first")) == 258  # the base model's
    second = load_model(tmp_path / "first", **CPU, adapter="lora:r=4")
    save_model(second, None, tmp_path / "second")
    for model in (second, load_model(tmp_path / "second", **CPU)):
        with torch.no_grad(), model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, tuned(IDS).logits)
    soft = load_model(small, **CPU, adapter="prompt_tuning")
    save_model(soft, None, tmp_path / "soft")
    with pytest.raises(WrongInput, match="prompt_tuning adapter cannot be merged"):
        load_model(tmp_path / "soft", **CPU, adapter="lora")


BAD_ADAPTERS = {
    "truncated": (
        cut("adapter_model.safetensors", 500),
        ["adapter_model.safetensors", "truncated"],
    ),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        ["adapter_model.bin", "never opened"],
    ),
    "weights missing": (
        lambda f: save_file({"x": torch.ones(1)}, f / "adapter_model.safetensors"),
        ["lacks", "lora"],
    ),
    "base model gone": (
        edit("adapter_config.json", base_model_name_or_path="/nowhere/small"),
        ["/nowhere/small", "no such folder"],
    ),
    "no base model": (
        edit("adapter_config.json", base_model_name_or_path=None),
        ["no base_model_name_or_path"],
    ),
    "settings damaged": (cut("adapter_config.json", 40), ["adapter_config.json", "cannot be read"]),
    "of another architecture": (
        edit("adapter_config.json", target_modules=["c_attn"]),
        ["does not fit its base model"],
    ),
    "of another size": (edit("adapter_config.json", r=7), ["does not fit its base model"]),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_bad_saved_adapter(small, tmp_path, name):
    change, parts = BAD_ADAPTERS[name]
    save_model(load_model(small, **CPU, adapter="lora:r=2"), None, tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(WrongInput) as caught:
        load_model(tmp_path / "adapter", **CPU)
    assert "\n" not in str(caught.value), caught.value
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("adapter", ["none", "lora:r=2"])
def test_gradient_checkpointing_changes_no_gradient(small, adapter):
    plain, saving = (
        load_model(small, **CPU, adapter=adapter, gradient_checkpointing=on).train()
        for on in (False, True)
    )
    for model in (plain, saving):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-7)


def test_loading_is_quiet_and_leaves_the_random_state(small, capfd):
    torch.manual_seed(3)
    expected = copy.copy(torch.get_rng_state())
    load_model(small, **CPU, adapter="lora", seed=5)
    load_tokenizer(small)
    assert torch.equal(torch.get_rng_state(), expected)
    out = capfd.readouterr()
    assert out.out == ""
    assert out.err == ""


def test_models_imports_without_torch():
    code = (
        "import sys, polm_lab.models.load, polm_lab.models.save; print([m for m in ('torch', "
        "'transformers', 'peft', 'huggingface_hub') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
