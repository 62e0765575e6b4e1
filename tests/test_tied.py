"""An adapter on a weight that is tied.

With the adapter on, merged, saved and read again, the model computes the same. Weights that the
adapter does not touch stay.
"""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import polm_lab.models.attach as page
from polm_lab.core.knobs import WrongInput
from polm_lab.models.attach import adapter_names, can_merge, merge_adapter, untie
from polm_lab.models.load import load_model
from polm_lab.core.machine import quiet_libraries
from polm_lab.models.save import save_model

IDS = torch.tensor([[3, 5, 7, 11, 13, 17]])
SUITED = {
    "adalora": "total_step=10,init_r=4,target_r=2",
    "c3a": "block_size=16",
    "fourierft": "n_frequency=50",
    "delora": "delora_lambda=1",
    "vblora": "vector_length=16,num_vectors=8",
    "road": "group_size=16",
    "miss": "r=8",
    "waveft": "n_frequency=100",
    "trainable_tokens": "token_indices=3,5,9",
    "ia3": "feedforward_modules={}",
}
ON_A_HEAD = {  # the kinds of the installed PEFT that sit on a head of 64 tokens and can be merged
    "adalora",
    "boft",
    "c3a",
    "deft",
    "delora",
    "fourierft",
    "frod",
    "glora",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "ln_tuning",
    "loha",
    "lokr",
    "lora",
    "miss",
    "oft",
    "osf",
    "peanut",
    "psoft",
    "supertuning",
    "tinylora",
    "trainable_tokens",
    "unilora",
    "pvera",
    "randlora",
    "road",
    "vblora",
    "vera",
    "waveft",
}
ON_AN_EMBEDDING = {"hira", "ln_tuning", "lora", "oft", "tinylora", "trainable_tokens"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    common = dict(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        bos_token_id=None,
        eos_token_id=1,
    )
    made = dict(
        llama=LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=True)),
        gemma2=Gemma2ForCausalLM(Gemma2Config(**common, head_dim=8)),
        gpt2=GPT2LMHeadModel(
            GPT2Config(
                vocab_size=64,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=32,
                bos_token_id=0,
                eos_token_id=1,
            )
        ),
    )
    g = torch.Generator().manual_seed(0)
    for name, model in made.items():
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.normal_(0, 0.2, generator=g)
        save_model(model, None, place / name)
    return place


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def far(found, expected):
    "The largest difference, in parts of the largest logit."
    return ((found - expected).abs().max() / expected.abs().max()).item()


def moved(model, size=0.1):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * size)
    return model


def plain(base):
    return load_model(base, "float32", "cpu")


def check(base, spec, folder, start=True):
    "Every use of an adapter gives the same logits as the model with the adapter on."
    model = load_model(base, "float32", "cpu", adapter=spec)
    if start:
        assert far(logits(model), logits(plain(base))) < 1e-5, (
            "a new adapter leaves the model as it was"
        )
    on = logits(moved(model))
    assert far(on, logits(plain(base))) > 1e-3
    with torch.no_grad(), model.disable_adapter():
        off = logits(model)
    save_model(model, None, folder / "adapter")
    merged = merge_adapter(model)
    found = {
        "merged": merged,
        "read again": load_model(folder / "adapter", "float32", "cpu"),
        "saved": load_model(save_model(merged, None, folder / "merged"), "float32", "cpu"),
        "a second adapter": load_model(folder / "adapter", "float32", "cpu", adapter="ia3"),
    }
    apart = {name: far(logits(made), on) for name, made in found.items()}
    assert max(apart.values()) < 1e-5, apart
    return merged, off


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("kind", adapter_names())
def test_every_kind_that_can_be_merged(bases, tmp_path, kind, target):
    expected = kind in (ON_A_HEAD if target == "lm_head" else ON_AN_EMBEDDING)
    spec = f"{kind}:" + ",".join(
        filter(None, [SUITED.get(kind, "").format(target), f"target_modules={target}"])
    )
    try:
        model = load_model(bases / "llama", "float32", "cpu", adapter=spec)
    except WrongInput as refused:
        assert not expected, refused
        assert "\n" not in str(refused), refused
        return
    if kind == "shadow" or not can_merge(model):
        assert not expected
        return
    try:
        merge_adapter(model)
    except WrongInput as refused:
        assert not expected
        assert "cannot be merged" in str(refused)
        assert "\n" not in str(refused)
        return
    assert expected, "this kind can be merged: add it to the lists"
    changed, _ = check(
        bases / "llama",
        spec,
        tmp_path,
        start=kind not in ("c3a", "fourierft", "unilora", "vblora", "vera", "waveft"),
    )
    # PEFT changes the head's rows with the embedding's
    tied = kind == "trainable_tokens" and target == "embed_tokens"
    assert changed.config.tie_word_embeddings == tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) != tied


START = ["pissa", "olora", "orthogonal", "gaussian"]


@pytest.mark.parametrize("start", START)
def test_an_adapter_that_begins_by_changing_the_weight_it_sits_on(bases, tmp_path, start):
    "PiSSA and OLoRA take their factors out of the matrix: the embedding must keep what was taken."
    check(
        bases / "llama",
        f"lora:r=4,init_lora_weights={start},target_modules=lm_head",
        tmp_path,
        start=start != "orthogonal",
    )


@pytest.mark.parametrize(
    "name, head, words", [("gemma2", "lm_head", "embed_tokens"), ("gpt2", "lm_head", "wte")]
)
def test_other_models(bases, tmp_path, name, head, words):
    for number, target in enumerate((head, words, f"{head},{words}")):
        check(bases / name, f"lora:r=2,target_modules={target}", tmp_path / str(number))


def test_a_whole_head_that_is_trained(bases, tmp_path):
    merged, _ = check(
        bases / "llama", "lora:r=2,target_modules=q_proj,modules_to_save=lm_head", tmp_path
    )
    words, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert torch.equal(words, plain(bases / "llama").get_input_embeddings().weight)
    assert not torch.equal(words, head)


@pytest.mark.parametrize("spec", ["lora:r=2", "lora:r=2,target_modules=q_proj", "ia3"])
def test_what_no_adapter_touches_stays_tied(bases, tmp_path, spec):
    model = load_model(bases / "llama", "float32", "cpu", adapter=spec)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    merged, _ = check(bases / "llama", spec, tmp_path)
    assert all(p.requires_grad for p in merged.parameters()), (
        "whoever trains the merged model trains all of it"
    )
    assert merged.config.tie_word_embeddings
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


def test_a_peft_model_that_was_made_elsewhere(bases):
    from peft import LoraConfig, get_peft_model

    with quiet_libraries():
        model = moved(
            get_peft_model(
                plain(bases / "llama"),
                LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"),
            )
        )
    assert model.get_base_model().lm_head.base_layer.weight is model.get_input_embeddings().weight
    on = logits(model)
    assert far(logits(merge_adapter(model)), on) < 1e-5


def test_untie(bases):
    model, before = plain(bases / "llama"), logits(plain(bases / "llama"))
    untie(model).get_output_embeddings().weight.data.mul_(2)
    assert far(logits(model), 2 * before) < 1e-6
    assert not model.config.tie_word_embeddings
    assert merge_adapter(model) is model


def test_before_pruning_the_adapter_is_merged_in_the_same_way(bases, tmp_path):
    from polm_lab.core.method import find

    model = moved(
        load_model("tiny", "float32", "cpu", adapter="lora:r=2,target_modules=lm_head"), 0.01
    )
    on = logits(model)
    save_model(model, None, tmp_path / "adapter")
    run = short_run_of(find("prune"), tmp_path, model=str(tmp_path / "adapter"), sparsity=0.0)
    assert far(logits(plain(run.path / "model")), on) < 1e-5


def short_run_of(method, out, **values):
    from polm_lab.training.conformance import continue_run
    from polm_lab.core.settings import knobs, make_settings
    from polm_lab.core.run import Run

    settings = make_settings(
        method.settings,
        dict(
            calibration_samples=2,
            max_length=32,
            device="cpu",
            dtype="float32",
            algorithm="magnitude",
        )
        | values,
    )
    run = Run.create(
        method.name, {k.name: getattr(settings, k.name) for k in knobs(settings)}, out=out
    )
    return continue_run(method, run)


def test_one_function_merges_everywhere():
    "Nobody calls PEFT's own merge: it does not untie."
    from pathlib import Path

    package = Path(page.__file__).parent.parent
    found = {p.name for p in package.rglob("*.py") if ".merge_and_unload(" in p.read_text()}
    assert found == {"attach.py"}
