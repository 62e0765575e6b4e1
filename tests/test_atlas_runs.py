"Atlas rows that run by a function or an adapter: the run is made, the call recorded."

import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import polm_lab as lab
from polm_lab.training.chain import subrun
from polm_lab.core.method import methods
from polm_lab.core.settings import knobs, make_settings
from polm_lab.models.load import load_model
from polm_lab.training.loop import load_policy
from polm_lab.finetuning.sft import SFT
from polm_lab.site import atlas as page

ROWS = page.systems()
HERE = {f["name"]: f for f in page.survey("systems")}
KNOWN = methods()
LITTLE = dict(dtype="float32", device="cpu")
SAMPLED = LITTLE | dict(
    data="sums",
    steps=1,
    batch_size=8,
    num_generations=4,
    max_new_tokens=12,
    eval_rows=2,
    save_every=0,
)
SHORT = {
    "grpo": SAMPLED,
    "ppo": SAMPLED | dict(minibatches=1, num_generations=1),
    "sft": LITTLE | dict(steps=1, batch_size=4, eval_rows=2, save_every=0),
    "reward": LITTLE | dict(steps=1, batch_size=4, eval_rows=2, save_every=0),
    "reft": LITTLE
    | dict(
        questions=4,
        warmup_steps=1,
        steps=1,
        batch_size=4,
        num_generations=2,
        max_new_tokens=12,
        judge_steps=1,
        votes=2,
        prompts=2,
    ),
    "activations": LITTLE | dict(calibration_samples=2, eval_rows=2, max_length=32),
    "distill": LITTLE
    | dict(
        teacher="tiny",
        teacher_steps=1,
        rows=8,
        steps=1,
        batch_size=4,
        eval_rows=2,
        max_new_tokens=8,
        save_every=0,
    ),
    "prune": LITTLE | dict(calibration_samples=2, eval_rows=2, max_length=32),
    "select": LITTLE
    | dict(data="sums#12", steps=1, batch_size=4, eval_rows=2, experience=4, max_length=64),
    "reader": LITTLE
    | dict(
        data="facts",
        steps=3,
        top_k_passages=2,
        batch_size=2,
        eval_rows=2,
        max_length=128,
        save_every=0,
    ),
}


RECORDED: dict[tuple, set[str]] = {}  # a run is made once, whoever asks


def named_functions() -> list[str]:
    """Return the distinct places of rows that run by a function that a run calls.

    They run in full or in part.
    """
    found = {HERE[r["name"]]["here"] for r in ROWS if r["state"] in ("runs", "partial")}
    return sorted(h for h in found if "." in h.partition("?")[0] or " > " in h)


def called_in(run) -> set[str]:
    """Return page.name of every function of the package that is called while `run()` runs.

    Calls in other threads count too.
    """
    seen = set()

    def note(frame, event, argument):
        if event == "call":
            seen.add((frame.f_code.co_filename, frame.f_code.co_name))

    sys.setprofile(note), threading.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None), threading.setprofile(None)
    return {f"{Path(file).stem}.{name}" for file, name in seen if "polm_lab" in file}


@pytest.mark.parametrize("here", named_functions())
def test_a_run_calls_the_function_that_its_row_names(here, tmp_path, monkeypatch):
    "The method runs with the row's values, and the call is recorded, not read off the syntax."
    monkeypatch.chdir(tmp_path)
    pointer, _, called = here.partition(" > ")
    place = page.look(here, KNOWN)
    values = (
        dict(pair.split("=", 1) for pair in pointer.partition("?")[2].split("&") if pair)
        if called
        else {}
    )
    if "learned" in values.get("rewards", ""):  # the reward model is trained on one step
        values |= dict(data="chat", max_length=128)
        short = lambda run, name, method, **more: subrun(
            run, name, method, **more | dict(steps=1, batch_size=4, save_every=0, eval_rows=2)
        )
        monkeypatch.setattr("polm_lab.rewards.prepare.chain", short)
    if values.get("algorithm") in ("ensemble", "born_again"):  # these train their teachers
        values |= dict(teacher="")
    given = SHORT[place.method] | values
    settings = make_settings(KNOWN[place.method].settings, given)
    key = (place.method, *((k.name, getattr(settings, k.name)) for k in knobs(settings)))
    if key not in RECORDED:
        RECORDED[key] = called_in(lambda: lab.run(place.method, **given))
    assert (called or pointer) in RECORDED[key]


ADAPTERS = sorted(
    {
        HERE[r["name"]]["here"].removeprefix("adapter:")
        for r in ROWS
        if HERE[r["name"]]["here"].startswith("adapter:")
    }
)


@pytest.mark.parametrize("spec", ADAPTERS)
def test_an_adapter_that_a_row_names_learns(spec):
    "It goes onto the embedded model; what is trained gets a gradient, the model's weights none."
    sizes = ":adapter_len=4,adapter_layers=2" if spec == "adaption_prompt" else ""
    model = load_policy(SFT(adapter=spec + sizes, steps=4, **LITTLE))[0].model
    model.train()
    ids = torch.arange(12, 24)[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    logits[0, -1].log_softmax(-1)[7].neg().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
    if "prefix_projection" in spec:
        assert any("transform.2.weight" in name for name in trained), "the MLP of Li & Liang 2021"
    if "LSTM" in spec:
        assert any("lstm_head.weight_ih_l0_reverse" in name for name in trained), (
            "the bi-LSTM of Liu et al. 2021"
        )


def test_the_mlp_of_prefix_tuning_is_dropped_after_training(tmp_path):
    model = load_model("tiny", "float32", "cpu", adapter="prefix_tuning:prefix_projection=true")
    model.save_pretrained(tmp_path)
    (kept,) = load_file(tmp_path / "adapter_model.safetensors").values()
    config = model.config
    assert kept.shape == (
        20,
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * (config.hidden_size // config.num_attention_heads),
    )
