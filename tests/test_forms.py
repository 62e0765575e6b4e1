"""A model's files come in several forms, and the stream of weights takes all that load.

A tune merges with its own base as the Hub has it.
"""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from polm_lab.core.knobs import WrongInput
from polm_lab.models.load import load_model
from polm_lab.models.sources import model_path, skeleton, weight_names
from polm_lab.core.machine import quiet_libraries
from polm_lab.models.save import save_model
from polm_lab.models.weights import Weights, align_forms, open_weights
from polm_lab.integration.merge import merge_models, vector_table

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
GATED = dict(SIZES, num_key_value_heads=2, intermediate_size=48)
ARCHITECTURES = dict(
    gpt2=(
        "GPT2",
        dict(
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=1,
        ),
    ),
    llama=("Llama", dict(GATED, tie_word_embeddings=True)),
    qwen2=("Qwen2", dict(GATED, tie_word_embeddings=False)),
    gemma2=("Gemma2", dict(GATED, head_dim=8)),
    neox=("GPTNeoX", dict(SIZES, intermediate_size=48)),
    opt=("OPT", dict(SIZES, ffn_dim=48, word_embed_proj_dim=32)),
    mixtral=("Mixtral", dict(GATED, num_local_experts=4, num_experts_per_tok=2)),
    qwen3_moe=(
        "Qwen3Moe",
        dict(GATED, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8),
    ),
)
HEAD_NAMES = {"gpt2": "GPT2LMHeadModel"}


def words():
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w2"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="w1", pad_token="w0", unk_token="w2"
    )


def noisy(model, seed, size=0.2):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * size)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "Folders with a small model of each architecture, as transformers saves it."
    place = tmp_path_factory.mktemp("bases")
    for name, (kind, config) in ARCHITECTURES.items():
        head = getattr(transformers, HEAD_NAMES.get(name, f"{kind}ForCausalLM"))
        torch.manual_seed(0)
        with quiet_libraries():
            save_model(
                noisy(head(getattr(transformers, f"{kind}Config")(**config)), 1),
                words(),
                place / name,
            )
    return place


def logits(folder):
    with torch.no_grad():
        return (
            load_model(folder, "float32", "cpu")
            .eval()(torch.tensor([[3, 5, 7, 11, 13, 17]]), use_cache=False)
            .logits
        )


def bare(tensors):
    return {name.removeprefix("transformer."): t for name, t in tensors.items()}


def masks(tensors):
    extra = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    return bare(tensors) | extra | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}


def copied_head(tensors):
    source = next(name for name in tensors if "embed_tokens" in name or "wte" in name)
    return dict(tensors, **{"lm_head.weight": tensors[source].clone()})


def head_only(tensors):
    return {
        ("lm_head.weight" if "embed_tokens" in name else name): t for name, t in tensors.items()
    }


def frequencies(tensors):
    return dict(
        tensors,
        **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)},
    )


def neox_buffers(tensors):
    extra = {
        f"gpt_neox.layers.{i}.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)
        for i in range(2)
    }
    extra |= {f"gpt_neox.layers.{i}.attention.masked_bias": torch.tensor(-1e9) for i in range(2)}
    return dict(
        tensors,
        **extra,
        **{f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq": torch.ones(2) for i in range(2)},
    )


def decoder_only(tensors):
    return {name.removeprefix("model."): t for name, t in tensors.items()}


FORMS = dict(
    gpt2=[bare, masks, copied_head, lambda t: copied_head(masks(t))],
    llama=[frequencies, copied_head, head_only],
    qwen2=[frequencies],
    gemma2=[copied_head],
    neox=[neox_buffers],
    opt=[decoder_only, copied_head],
    mixtral=[dict],
    qwen3_moe=[dict],
)
CASES = [
    (name, i, sharded)
    for name, forms in FORMS.items()
    for i in range(len(forms))
    for sharded in (False, True)
    if i == 0 or not sharded
]


def hub_form(base, out, form, sharded):
    "The folder `base` with its tensors in another form, in one file or two."
    shutil.copytree(base, out)
    tensors = form(load_file(out / "model.safetensors"))
    (out / "model.safetensors").unlink()
    names = list(tensors)
    parts = [names[::2], names[1::2]] if sharded else [names]
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-00002.safetensors" if sharded else "model.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, out / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    if sharded:
        (out / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
    return out


@pytest.mark.parametrize("name, form, sharded", CASES)
def test_a_tune_merges_with_its_base_in_the_form_of_the_hub(bases, tmp_path, name, form, sharded):
    "The base plus the task vector is the tune, by logits and weights; half of it is half way."
    hub = hub_form(bases / name, tmp_path / "hub", FORMS[name][form], sharded)
    assert torch.equal(logits(hub), logits(bases / name))
    tune = save_model(noisy(load_model(hub, "float32", "cpu"), 2, 0.05), words(), tmp_path / "tune")
    done = merge_models(str(hub), [str(tune)], tmp_path / "merged", scaling=1.0)
    expected = logits(tune)
    assert (logits(done) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected - logits(hub)).abs().max() > 1e-2
    half = merge_models(str(hub), [str(tune)], tmp_path / "half", scaling=0.5)
    start, end, made = (load_model(f, "float32", "cpu").state_dict() for f in (hub, tune, half))
    assert all(torch.allclose(made[n], (start[n] + end[n]) / 2, atol=1e-6) for n in start)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("which", ["base", "tune"])
def test_experts_one_by_one_merge_with_experts_in_one_tensor(bases, tmp_path, name, which):
    tune = noisy(load_model(bases / name, "float32", "cpu"), 2, 0.05)
    folders = dict(base=load_model(bases / name, "float32", "cpu"), tune=tune)
    expected = {
        n: (a + b) / 2
        for (n, a), b in zip(folders["base"].state_dict().items(), tune.state_dict().values())
    }
    with quiet_libraries():
        for part, model in folders.items():
            save_model(model, words(), tmp_path / part)
            model.save_pretrained(tmp_path / part, save_original_format=part != which)
    base, other = (Weights(tmp_path / part) for part in ("base", "tune"))
    assert base.entries.keys() != other.entries.keys()
    done = merge_models(
        str(tmp_path / "base"),
        [str(tmp_path / "tune")],
        tmp_path / "merged",
        scaling=0.5,
        threads=2,
    )
    made = load_model(done, "float32", "cpu").state_dict()
    assert all(torch.allclose(made[n], value, atol=1e-6) for n, value in expected.items())


def test_a_tied_model_merges_with_an_untied_one(bases, tmp_path):
    model = load_model(bases / "llama", "float32", "cpu", adapter="lora:r=2,target_modules=lm_head")
    from polm_lab.models.attach import merge_adapter

    tune = save_model(merge_adapter(noisy(model.train(), 3, 0.01)), words(), tmp_path / "tune")
    assert not Weights(tune).config["tie_word_embeddings"]
    done = merge_models(str(bases / "llama"), [str(tune)], tmp_path / "merged", scaling=1.0)
    expected = logits(tune)
    assert (logits(done) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not Weights(done).config["tie_word_embeddings"]
    assert len(vector_table(bases / "llama", [tune, tune])) == len(Weights(tune))


def test_a_copy_of_the_head_that_differs_is_a_head_of_its_own(bases, tmp_path):
    def other_head(tensors):
        return dict(tensors, **{"lm_head.weight": tensors["model.embed_tokens.weight"] * 2})

    hub = hub_form(bases / "llama", tmp_path / "hub", other_head, False)
    done = merge_models(str(bases / "llama"), [str(hub)], tmp_path / "merged", scaling=1.0)
    assert torch.allclose(logits(done), logits(hub), atol=1e-5)
    assert not torch.allclose(logits(hub), logits(bases / "llama"), atol=1e-2)


def test_names_are_those_of_the_loaded_model(bases):
    for name in ARCHITECTURES:
        found = weight_names(bases / name, load_file(bases / name / "model.safetensors"))
        assert set(found.values()) <= set(skeleton(bases / name).state_dict()), name
    assert weight_names(
        bases / "gpt2", ["h.0.attn.bias", "h.0.attn.masked_bias", "h.0.ln_1.weight", "nonsense"]
    ) == {
        "h.0.attn.bias": None,
        "h.0.attn.masked_bias": None,
        "h.0.ln_1.weight": "transformer.h.0.ln_1.weight",
        "nonsense": "nonsense",
    }


def test_what_load_model_refuses_is_refused(bases, tmp_path):
    hub = hub_form(
        bases / "llama", tmp_path / "hub", lambda t: dict(t, nonsense=torch.ones(2)), False
    )
    with pytest.raises(WrongInput, match="nonsense"):
        load_model(hub, "float32", "cpu")
    with pytest.raises(WrongInput, match="has in excess nonsense"):
        merge_models(str(bases / "llama"), [str(hub)], tmp_path / "out")


# Adapters -----------------------------------------------------------------------------------------


def adapter_run(base, out, spec="lora:r=2", **more):
    model = load_model(base, "float32", "cpu", adapter=spec)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return save_model(model, words(), out)


@pytest.mark.parametrize(
    "spec", ["lora:r=2", "lora:r=2,target_modules=lm_head", "lora:r=2,modules_to_save=lm_head"]
)
def test_an_adapter_is_merged_with_others(bases, tmp_path, spec):
    adapter = adapter_run(bases / "llama", tmp_path / "adapter", spec)
    expected = logits(adapter)
    done = merge_models(
        str(bases / "llama"), [str(adapter)], tmp_path / "out" / "merged", scaling=1.0
    )
    assert (logits(done) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected - logits(bases / "llama")).abs().max() > 1e-2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["merged"], (
        "what was written on the way is gone"
    )
    # as the base
    other = merge_models(str(adapter), [str(bases / "llama")], tmp_path / "back", scaling=1.0)
    assert torch.allclose(logits(other), logits(bases / "llama"), atol=1e-4)


def test_an_adapter_that_cannot_be_merged_is_refused(bases, tmp_path):
    adapter = adapter_run(bases / "llama", tmp_path / "adapter", "prompt_tuning")
    with pytest.raises(WrongInput, match="prompt_tuning adapter cannot be merged") as error:
        merge_models(str(bases / "llama"), [str(adapter)], tmp_path / "merged")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(WrongInput, match="open_weights"):
        Weights(adapter)


def resized(base, out, rows, spec):
    "An adapter of a model that got more embeddings, as PEFT saves it."
    from peft import LoraConfig, get_peft_model

    model = load_model(base, "float32", "cpu")
    with quiet_libraries():
        model.resize_token_embeddings(rows, mean_resizing=False)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **spec))
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.get_input_embeddings().weight[64:] = torch.randn(rows - 64, 32, generator=g)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
    model.peft_config["default"].base_model_name_or_path = str(base)
    with torch.no_grad():
        found = model.eval()(torch.tensor([[3, 5, 7, 66, 13, 17]]), use_cache=False).logits
    return model, found


@pytest.mark.parametrize(
    "spec",
    [
        dict(target_modules=["q_proj"]),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ],
    ids=["alone", "modules"],
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_adapter_for_a_resized_vocabulary(bases, tmp_path, name, spec):
    model, expected = resized(bases / name, tmp_path, 70, spec)
    with quiet_libraries():
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)

    def close(model):
        with torch.no_grad():
            found = model.eval()(torch.tensor([[3, 5, 7, 66, 13, 17]]), use_cache=False).logits
        return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)

    again = load_model(tmp_path / "adapter", "float32", "cpu")
    assert close(again)
    assert close(load_model(save_model(again, None, tmp_path / "again"), "float32", "cpu")), (
        "saved with the rows that it brought"
    )
    assert close(load_model(tmp_path / "adapter", "float32", "cpu", adapter="lora:r=2")), (
        "a second adapter on top"
    )
    with quiet_libraries():
        model.save_pretrained(tmp_path / "short", save_embedding_layers=False)
    if "modules_to_save" not in spec:  # the rows are lost, and only the tokenizer tells
        words().save_pretrained(tmp_path / "short")
        grown = json.loads((tmp_path / "short" / "tokenizer.json").read_text())
        grown["added_tokens"].append(
            dict(
                id=69,
                content="new",
                single_word=False,
                lstrip=False,
                rstrip=False,
                normalized=False,
                special=True,
            )
        )
        (tmp_path / "short" / "tokenizer.json").write_text(json.dumps(grown))
        with pytest.raises(
            WrongInput, match="an adapter for 70 tokens, and its base .* has 64 embeddings"
        ) as error:
            load_model(tmp_path / "short", "float32", "cpu")
        assert "\n" not in str(error.value)


def test_an_adapter_on_the_rows_of_a_resized_vocabulary_is_refused(bases, tmp_path):
    model, _ = resized(bases / "llama", tmp_path, 70, dict(target_modules=["embed_tokens"]))
    with quiet_libraries():
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(WrongInput, match="an adapter for 70 tokens") as error:
        load_model(tmp_path / "adapter", "float32", "cpu")
    assert "\n" not in str(error.value)
    assert "base_model_name_or_path" in str(error.value)


def test_models_that_are_alike_are_read_as_they_are():
    tiny = align_forms([Weights("tiny"), open_weights("tiny", None)])
    assert all(model.entries == Weights("tiny").entries for model in tiny)
    assert model_path("tiny") == tiny[0].folder
