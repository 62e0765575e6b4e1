"""What comes in goes out: each method that saves weights keeps the type of its input files.

`save_dtype` sets another type. `after` is measured on the saved weights.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from polm_lab.training import conformance as check
from polm_lab.training.evaluate import other_tasks
from polm_lab.core.settings import knobs
from polm_lab.core.method import find, methods
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.models.attach import merge_adapter
from polm_lab.models.sources import model_path
from polm_lab.models.save import round_weights, save_model
from polm_lab.core.run import Run, Stopped


def has_knob(method, name: str) -> bool:
    return any(knob.name == name for knob in knobs(method.settings))


SAVING = [name for name, method in methods().items() if has_knob(method, "save_dtype")]
TYPES = dict(bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32)
SHORT = dict(steps=1, batch_size=4, eval_rows=2, save_every=0, learning_rate=1e-3, max_length=96)
OWN = dict(  # knobs that make the runs that are no training by steps short
    prune=dict(calibration_samples=2, max_length=64),
    quantize=dict(calibration_samples=2, max_length=64, bits=4),
    activations=dict(calibration_samples=2, max_length=64, activation_bits=16),
    lowrank=dict(calibration_samples=2, max_length=64),
    slim=dict(calibration_samples=2, max_length=64, ratio=0.2),
    merge=dict(eval_rows=2, tasks="sums"),
    fuse=dict(eval_rows=2, tasks="sums,sums", calibration_samples=2),
    reft=dict(
        questions=4,
        warmup_steps=1,
        steps=1,
        batch_size=4,
        num_generations=2,
        max_new_tokens=4,
        judge_steps=0,
        votes=2,
        prompts=2,
    ),
)
# metrics that need nothing but the model
KEPT = (
    "perplexity",
    "accuracy",
    "pair_accuracy",
    "gold_score",
    "loss",
    "reward",
    "length",
    "mrr",
    "recall/1",
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "`tiny` in each type."
    place = tmp_path_factory.mktemp("bases")
    for name, dtype in TYPES.items():
        shutil.copytree(model_path("tiny"), place / name)
        tensors = load_file(place / name / "model.safetensors")
        save_file(
            {n: t.to(dtype) for n, t in tensors.items()},
            place / name / "model.safetensors",
            {"format": "pt"},
        )
        config = json.loads((place / name / "config.json").read_text())
        (place / name / "config.json").write_text(json.dumps(config | {"dtype": name}))
    return place


def short(name, out, model, **more):
    method = find(name)
    known = {k.name for k in knobs(method.settings)}
    values = {k: v for k, v in check.SMALL.items() if k in known}
    values |= {
        k: v
        for k, v in {**SHORT, **method.small, **OWN.get(name, {}), "model": str(model)}.items()
        if k in known
    }
    if name in ("merge", "fuse"):
        values |= dict(models=f"{model},{model}")
    if name == "rlaif":
        values |= dict(prompts=32)
    settings = find(name).settings(**values | more)
    run = Run.create(name, {k.name: getattr(settings, k.name) for k in knobs(settings)}, out=out)
    with check.replaced_everywhere(other_tasks, lambda *args: ()):
        return check.continue_run(method, run)


def types_of(folder):
    files = [load_file(f) for f in folder.glob("*.safetensors")]
    return {t.dtype for tensors in files for t in tensors.values() if t.is_floating_point()}


def size_of(folder):
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def test_the_knob_is_with_the_methods_that_save_weights():
    training = "sft reft dpo ppo reward rlaif rloo grpo critic reader retriever qat distill"
    others = "prune slim quantize lowrank activations merge fuse"
    assert sorted(SAVING) == sorted([*training.split(), *others.split()])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SAVING)
def test_what_comes_in_goes_out(bases, tmp_path, name, dtype):
    trains = find(name).trains
    run = short(
        name, tmp_path, bases / dtype, **({"steps": 0} if trains and dtype != "bfloat16" else {})
    )
    made = run.path / "model"
    assert types_of(made) == {TYPES[dtype]}
    assert json.loads((made / "config.json").read_text())["dtype"] == dtype
    if name == "reader":
        assert not (run.path / "encoder").exists() or types_of(run.path / "encoder") == {
            torch.float32
        }
    # these three measure what they read from the disk
    if dtype != "bfloat16" or name in ("merge", "fuse", "reft"):
        return
    more = {"steps": 0} if trains else {}
    more |= {"encoder": str(run.path / "encoder")} if name == "reader" else {}
    more |= {"student": "same"} if name == "distill" else {}  # it is half of a model already
    reads = "prune" if name == "lowrank" else name  # whose result it does not take again
    again = short(reads, tmp_path / "again", made, **more)
    after, fresh = run.summary["after"], again.summary["before"]
    # these ask the model that the run began with
    relative = ("pair_accuracy", "margin") if name in ("dpo", "rlaif") else ()
    names = [n for n in KEPT if n in after and n in fresh and n not in relative]
    assert names, {n: (after[n], fresh[n]) for n in names}
    assert all(after[n] == pytest.approx(fresh[n], rel=1e-6) for n in names), {
        n: (after[n], fresh[n]) for n in names
    }


@pytest.mark.parametrize("asked", TYPES)
@pytest.mark.parametrize("name", ["sft", "prune", "merge", "fuse", "reward"])
def test_save_dtype_says_otherwise(bases, tmp_path, name, asked):
    run = short(name, tmp_path, bases / "bfloat16", save_dtype=asked)
    assert types_of(run.path / "model") == {TYPES[asked]}
    assert json.loads((run.path / "model" / "config.json").read_text())["dtype"] == asked


def test_training_keeps_its_weights_in_32_bits(bases, tmp_path):
    "Two steps of 1e-6 vanish in bf16 one by one; the checkpoint holds them."
    run = short("sft", tmp_path, bases / "bfloat16", steps=2, learning_rate=1e-6, save_every=1)
    start = load_file(bases / "bfloat16" / "model.safetensors")
    end = load_file(run.path / "model" / "model.safetensors")
    kept = next((run.path / "checkpoints" / "step-00000002").glob("*.safetensors"))
    kept = {name.removeprefix("model."): t for name, t in load_file(kept).items()}
    moved = [(kept[n].float() - t.float()).abs().max().item() for n, t in start.items()]
    assert all(t.dtype == torch.float32 for t in kept.values())
    assert 1e-7 < max(moved) < 3e-6
    assert all(torch.equal(end[n], kept[n].bfloat16()) for n in start)


@pytest.mark.parametrize("adapter", ["none", "lora:r=2"])
def test_killed_and_resumed_gives_the_same_bits(bases, tmp_path, adapter, monkeypatch):
    runs = []
    for stop in (None, 2):
        with monkeypatch.context() as patch:
            if stop:
                patch.setattr(Run, "stop_requested", lambda self: self.record["step"] == stop)
                with pytest.raises(Stopped):
                    short("sft", tmp_path / "stopped", bases / "float16", steps=4, adapter=adapter)
        if stop:
            run = Run(next((tmp_path / "stopped").iterdir()))
            with check.replaced_everywhere(other_tasks, lambda *args: ()):
                runs.append(check.continue_run(find("sft"), run))
        else:
            runs.append(
                short("sft", tmp_path / "whole", bases / "float16", steps=4, adapter=adapter)
            )
    assert check.weights_file(runs[0]) == check.weights_file(runs[1])
    assert types_of(runs[0].path / "model") == {torch.float16}
    assert runs[0].summary["after"] == runs[1].summary["after"]


# Adapters -----------------------------------------------------------------------------------------


def test_a_new_adapter_comes_in_its_bases_type_and_goes_on_in_its_own(bases, tmp_path):
    first = short("sft", tmp_path, bases / "bfloat16", adapter="lora:r=2")
    second = short("sft", tmp_path, first.path, steps=2)  # the adapter goes on
    assert types_of(first.path / "model") == types_of(second.path / "model") == {torch.bfloat16}
    wide = short("sft", tmp_path, first.path, save_dtype="float32")
    assert types_of(wide.path / "model") == {torch.float32}
    assert types_of(short("sft", tmp_path, wide.path).path / "model") == {torch.float32}
    again = short("sft", tmp_path, first.path, steps=0)
    assert first.summary["after"]["perplexity"] == pytest.approx(
        again.summary["before"]["perplexity"], rel=1e-6
    )
    pruned = short("prune", tmp_path, first.path)  # merges it: the base's type
    assert types_of(pruned.path / "model") == {torch.bfloat16}


@pytest.mark.parametrize("name", ["reward", "retriever"])
def test_an_adapter_that_is_merged_in_the_end_is_measured_so(bases, tmp_path, name):
    run = short(name, tmp_path, bases / "bfloat16", adapter="lora:r=2", learning_rate=1e-2)
    assert types_of(run.path / "model") == {torch.bfloat16}
    assert not (run.path / "model" / "adapter_config.json").exists()
    again = short(name, tmp_path / "again", run.path / "model", steps=0)
    names = [n for n in KEPT if n in run.summary["after"]]
    assert names
    assert all(
        run.summary["after"][n] == pytest.approx(again.summary["before"][n], rel=1e-5)
        for n in names
    )


KINDS = [
    "lora:r=2",
    "lora:r=2,use_dora=true",
    "adalora:init_r=4,target_r=2",
    "vera:r=4",
    "oft:oft_block_size=16",
    "ia3",
    "prompt_tuning",
    "prefix_tuning:prefix_projection=true",
    "ln_tuning",
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_adapter_computes_is_what_its_file_computes(bases, tmp_path, kind):
    kind += ",total_step=10" if kind.startswith("adalora") else ""
    model = load_model(bases / "bfloat16", "float32", "cpu", adapter=kind)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.05)
    assert not round_weights(model)
    save_model(model, None, tmp_path / "adapter")
    again = load_model(tmp_path / "adapter", "float32", "cpu")
    with torch.no_grad():
        ids = torch.arange(20, 40)[None]
        a, b = (m.eval()(input_ids=ids, use_cache=False).logits for m in (model, again))
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert types_of(tmp_path / "adapter") == {
        torch.float32 if "projection" in kind else torch.bfloat16
    }


# Files of several types, and weights that do not fit ----------------------------------------------


def mixed(bases, out):
    shutil.copytree(bases / "bfloat16", out)
    tensors = load_file(out / "model.safetensors")
    wide = load_file(bases / "float32" / "model.safetensors")
    tensors |= {n: wide[n] + 1e-4 for n in tensors if "norm" in n}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("name", ["sft", "prune", "merge", "fuse"])
def test_each_tensor_of_a_mixed_model_goes_back_to_its_own_type(bases, tmp_path, name):
    run = short(name, tmp_path, mixed(bases, tmp_path / "mixed"))
    made = load_file(run.path / "model" / "model.safetensors")
    assert {n: t.dtype for n, t in made.items()} == {
        n: torch.float32 if "norm" in n else torch.bfloat16 for n in made
    }
    if name in ("sft", "prune", "fuse"):
        assert "several types" in (run.path / "log.txt").read_text()


def test_a_weight_beyond_float16_is_saved_in_32_bits_and_reported(bases, tmp_path):
    model = load_model(bases / "float16", "float32", "cpu")
    model.lm_head.weight.data[0, 0] = 1e5
    notes = round_weights(model)
    assert len(notes) == 1
    assert "65504" in notes[0]
    assert "float32" in notes[0]
    save_model(model, load_tokenizer("tiny"), tmp_path / "out")
    assert types_of(tmp_path / "out") == {torch.float32}
    assert load_model(tmp_path / "out", "float32", "cpu").lm_head.weight[0, 0] == 1e5


def test_a_model_that_nobody_rounded_is_saved_as_it_is(bases, tmp_path):
    save_model(load_model(bases / "bfloat16", "float32", "cpu"), None, tmp_path / "wide")
    assert types_of(tmp_path / "wide") == {torch.float32}
    model = merge_adapter(load_model(bases / "bfloat16", "float32", "cpu", adapter="lora:r=2"))
    round_weights(model)
    save_model(model, None, tmp_path / "merged")
    assert types_of(tmp_path / "merged") == {torch.bfloat16}
    assert size_of(tmp_path / "merged") < 0.6 * size_of(tmp_path / "wide")


def test_trls_engine_saves_the_same_way(bases, tmp_path):
    for adapter in ("none", "lora:r=2"):
        run = short("sft", tmp_path, bases / "bfloat16", engine="trl", adapter=adapter)
        assert types_of(run.path / "model") == {torch.bfloat16}
        again = short("sft", tmp_path / "again", run.path, steps=0)
        assert run.summary["after"]["perplexity"] == pytest.approx(
            again.summary["before"]["perplexity"], rel=1e-6
        )


def test_fuse_takes_an_adapters_run_next_to_a_whole_model(bases, tmp_path):
    """A head of its own on one side: all are untied, and the adapter counts.

    With two equal tunes, their mean is the tune.
    """
    first = short(
        "sft",
        tmp_path,
        bases / "bfloat16",
        adapter="lora:r=2,target_modules=lm_head",
        learning_rate=1e-2,
    )
    made = short(
        "fuse",
        tmp_path,
        bases / "bfloat16",
        models=f"{first.path},{first.path}",
        algorithm="fisher",
        tasks="sums",
        data="sums,sums",
        save_dtype="float32",
    )
    with torch.no_grad():
        ids = torch.arange(20, 40)[None]
        tuned, fused, base = (
            load_model(f, "float32", "cpu").eval()(input_ids=ids, use_cache=False).logits
            for f in (first.path, made.path, bases / "bfloat16")
        )
    assert (fused - tuned).abs().max() < 1e-5 * tuned.abs().max() < (tuned - base).abs().max()
    assert made.record["parents"] == [first.id]
    assert not (list(made.path.glob("tmp*")))
