"""The common knob `adapter` in every registered training method.

Only the adapter moves, and the saved files load and are the tuned model.
"""

import shutil

import pytest
import torch
from conftest import shaken
from safetensors.torch import load_file

from polm_lab.training import conformance as check
from polm_lab.core.knobs import WrongInput
from polm_lab.core.method import find, methods
from polm_lab.models.load import load_model
from polm_lab.models.rollout import rollout
from polm_lab.models.sources import model_path
from polm_lab.models.tokenizers import load_tokenizer

# qat decides itself what trains, and refuses an adapter: see test_qat
TRAINED = [name for name, m in methods().items() if m.trains and name != "qat"]
ADAPTERS = ["lora:r=2,target_modules=q_proj,v_proj", "ia3"]
SHORT = dict(steps=2, batch_size=4, eval_rows=2, save_every=0, learning_rate=1e-2)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    "A function from a method to settings that make its run short, and its adapter possible."
    teacher = tmp_path_factory.mktemp("teacher")

    def settings(name: str) -> dict:
        if name != "distill":
            return SHORT
        # half of a model has no adapter, and the whole one needs another teacher than itself
        shutil.copytree(model_path("tiny"), teacher, dirs_exist_ok=True)
        shaken(load_model("tiny", "float32", "cpu")).save_pretrained(teacher)
        return SHORT | dict(student="same", teacher=str(teacher))

    return settings


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["lora", "ia3"])
@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_is_what_moves(name, adapter, tmp_path, short):
    method = find(name)
    run = check.short_run(
        method,
        tmp_path,
        **short(name) | {k: v for k, v in method.small.items() if k in ("batch_size", "samples")},
        adapter=adapter,
    )
    assert run.status == "finished"
    assert len(run.lines()) == 2
    folder, base = run.path / "model", load_file(model_path("tiny") / "model.safetensors")
    if (folder / "adapter_model.safetensors").exists():
        moved = load_file(folder / "adapter_model.safetensors")
        assert moved, list(moved)[:3]
        assert all(adapter[:3] in key for key in moved if "score" not in key), list(moved)[:3]
        start = load_model("tiny", "float32", "cpu", adapter=adapter, seed=run.settings["seed"])
        assert sum(v.numel() for v in moved.values()) < 0.05 * sum(v.numel() for v in base.values())
        assert start.fresh_adapter
    else:  # merged before saving: the layers with the adapter have changed, and no others
        after = load_file(folder / "model.safetensors")
        changed = {
            key.split(".")[-2]
            for key, value in base.items()
            if key in after and not torch.equal(after[key], value)
        }
        assert changed == (
            {"q_proj", "v_proj"} if "lora" in adapter else {"k_proj", "v_proj", "down_proj"}
        ), changed
    tuned = load_model(folder, "float32", "cpu", head="any")
    plain = load_model("tiny", "float32", "cpu")
    with torch.no_grad():
        hidden = [
            model(input_ids=torch.arange(20, 60)[None], output_hidden_states=True).hidden_states[-1]
            for model in (tuned, plain)
        ]
    assert (hidden[0] - hidden[1]).abs().max() > 1e-5, "the tuned model is the base"


@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_for_layers_that_do_not_exist_is_refused_before_anything_is_computed(
    name, tmp_path, short
):
    with pytest.raises(WrongInput, match="llama has no layer 'c_attn'") as error:
        check.short_run(find(name), tmp_path, **short(name), adapter="lora:target_modules=c_attn")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*/model"))


@pytest.mark.parametrize("adapter", ["ln_tuning", "lora:r=2", "prefix_tuning:num_virtual_tokens=2"])
def test_a_16_bit_model_samples_while_its_adapter_is_kept_in_32_bits(adapter):
    model = load_model("tiny", "bfloat16", "cpu", adapter=adapter)
    tokenizer = load_tokenizer("tiny")
    for weight in model.parameters():  # as the loop does
        if weight.requires_grad:
            weight.data = weight.data.float()
    found = rollout(model, tokenizer, [[5, 6, 7], [8, 9]], max_new_tokens=3, seeds=0)
    assert all(len(ids) > 0 for ids in found.completions)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
