"""`engine="trl"`: TRL's trainers have our tokens, loss, gradient and schedule, and our record."""

import contextlib
import copy
import json
import math
import sys
import types

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import polm_lab as lab
from polm_lab.data.batches import collate
from polm_lab.data.encode import encode
from polm_lab.data.load import load_data, load_held_out
from polm_lab.training.engine import (
    labelled_rows,
    last_checkpoint,
    our_metrics,
    paired_collator,
    paired_rows,
    train_with_trl,
    trl_arguments,
    trl_optimizers,
)
from polm_lab.training.evaluate import perplexity
from polm_lab.core.knobs import WrongInput
from polm_lab.core.settings import Settings
from polm_lab.models.policy import Policy
from polm_lab.core.metrics import metric
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.training.loop import Meter, Updater, learning_rate_at, make_accelerator
from polm_lab.core.run import Run, Stopped, all_runs

COMMON = dict(
    data="sums",
    eval_rows=4,
    steps=6,
    batch_size=4,
    learning_rate=1e-2,
    max_length=64,
    device="cpu",
    dtype="float32",
    save_every=2,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "Folder of a random Llama of some 20 k weights that reads bytes."
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {
        token: i
        for i, token in enumerate(
            ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        )
    }
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)  # far from uniform, so that a shifted or missing target shows
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def examples(small):
    tokenizer = load_tokenizer(small)
    return [
        encode(tokenizer, row, "completion", 64) for row in load_data("sums", "completion")[:16]
    ]


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def error(a, b) -> float:
    "Largest difference, relative to the largest entry."
    return ((a - b).abs().max() / b.abs().max()).item()


def sft_trainer(model, tokenizer, examples, folder, **config):
    settings = Settings(**{**COMMON, "model": "none"})
    run = Run.create("sft", dict(steps=6), out=folder)
    arguments = {
        **trl_arguments(settings, run),
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        **config,
    }
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments),
        train_dataset=Dataset.from_list(labelled_rows(examples)),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("padding_free", [False, True])
def test_sft_loss_and_gradient_equal_trls_on_its_own_batch(
    small, tmp_path, completion_only, padding_free
):
    from polm_lab.finetuning.sft import sft_loss

    model, tokenizer = load_model(small, dtype="float32", device="cpu"), load_tokenizer(small)
    rows = [
        encode(tokenizer, row, "completion", 64, completion_only)
        for row in load_data("sums", "completion")[:4]
    ]
    assert len({len(row["input_ids"]) for row in rows}) > 1, (
        "rows of one length would not show padding"
    )
    ours = copy.deepcopy(model)
    trainer = sft_trainer(model, tokenizer, rows, tmp_path, padding_free=padding_free)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(
        model, dict(batch), num_items_in_batch=(batch["labels"] != -100).sum()
    )
    theirs.backward()

    packed = collate(rows, tokenizer.pad_token_id, pack=4 * 64 if padding_free else 0)
    if not padding_free:
        assert torch.equal(packed["input_ids"], batch["input_ids"])
        assert torch.equal(
            packed["completion_mask"].bool() & (packed["input_ids"] >= 0), batch["labels"] != -100
        )
    stats = Policy(ours)(
        packed["input_ids"],
        packed["attention_mask"],
        packed["completion_mask"],
        packed.get("position_ids"),
    )
    mean = sft_loss(stats.logp) / sum(sum(row["completion_mask"][1:]) for row in rows)
    mean.backward()
    assert abs(mean.item() - theirs.item()) <= 1e-5 * theirs.item()
    assert theirs.item() > 1
    assert error(gradient(ours), gradient(model)) <= 1e-5


def test_dpo_batch_of_trl_holds_our_tokens(small, tmp_path):
    tokenizer, model = (
        load_tokenizer(small, "transcript"),
        load_model(small, dtype="float32", device="cpu"),
    )
    pairs = [
        encode(tokenizer, row, "preference", 200) for row in load_data("chat", "preference")[:4]
    ]
    settings = Settings(**{**COMMON, "model": str(small), "data": "chat"})
    arguments = {
        **trl_arguments(settings, Run.create("dpo", dict(steps=6), out=tmp_path)),
        "remove_unused_columns": False,
        "max_length": None,
    }
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=trl.DPOConfig(**arguments),
        train_dataset=Dataset.from_list(paired_rows(pairs)),
        processing_class=tokenizer,
        data_collator=paired_collator(tokenizer.pad_token_id),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    sides = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
    assert batch["input_ids"].shape[0] == 8
    for row, mask, real, side in zip(
        batch["input_ids"], batch["completion_mask"], batch["attention_mask"], sides
    ):
        assert row[real.bool()].tolist() == side["input_ids"]
        assert mask[real.bool()].tolist() == [0, *side["completion_mask"][1:]]
    assert (
        abs(trainer.compute_loss(model, dict(batch)).item() - math.log(2)) < 1e-6
    )  # policy = reference


def test_a_whole_run_leaves_a_complete_record(small, runs):
    run = lab.run("sft", engine="trl", model=str(small), **COMMON, eval_every=3)
    rows = run.lines()
    assert run.status == "finished"
    assert [row["step"] for row in rows] == list(range(1, 7))
    names = {name for row in rows for name in row} - {"step", "seconds"}
    assert {
        "loss",
        "grad_norm",
        "learning_rate",
        "entropy",
        "tokens_per_second",
        "memory_mib",
        "eval/perplexity",
    } <= names
    assert all(metric(name).meaning for name in names)
    assert [row["step"] for row in rows if "eval/perplexity" in row] == [3]
    assert run.summary["after"]["perplexity"] < run.summary["before"]["perplexity"]
    trained = load_model(run.path / "model", dtype="float32", device="cpu")
    held_out = load_held_out("sums", "", "completion", COMMON["eval_rows"])
    examples = [
        encode(load_tokenizer(small), row, "completion", COMMON["max_length"]) for row in held_out
    ]
    found = perplexity(Policy(trained), examples, load_tokenizer(small).pad_token_id)
    assert found == pytest.approx(
        run.summary["after"]["perplexity"], rel=1e-5
    )  # what was saved is what was trained
    assert (run.path / "model" / "tokenizer.json").exists()
    assert not list((run.path / "checkpoints").glob("step-*"))


RATES = {  # of the peak, at each of six steps; the first three warm up
    "constant": [1 / 3, 2 / 3, 1, 1, 1, 1],
    "linear": [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3],
    "cosine": [1 / 3, 2 / 3, 1, 1, 0.75, 0.25],
    "wsd": [1 / 3, 2 / 3, 1, 1, 1, 1],
}


@pytest.mark.parametrize("schedule", RATES)
def test_both_engines_learn_the_same_from_the_first_step_on(small, runs, schedule):
    same = dict(
        COMMON, model=str(small), warmup=0.5, accumulate=2, weight_decay=0.1, schedule=schedule
    )
    ours, theirs = lab.run("sft", **same), lab.run("sft", engine="trl", **same)
    for run in (ours, theirs):
        assert [row["learning_rate"] / 1e-2 for row in run.lines()] == pytest.approx(
            RATES[schedule], rel=1e-12
        )
    for a, b in zip(ours.lines(), theirs.lines(), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4 * a["loss"]
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-3 * a["grad_norm"]
    assert ours.lines()[0]["loss"] - ours.lines()[-1]["loss"] > 0.1, (
        "nothing was learned, so nothing was compared"
    )
    assert math.isclose(
        ours.summary["after"]["perplexity"], theirs.summary["after"]["perplexity"], rel_tol=1e-3
    )


@pytest.mark.parametrize(
    "schedule, steps, warmup",
    [("wsd", 20, 0.1), ("linear", 7, 0.0), ("cosine", 10, 1.0), ("constant", 1, 0.1)],
)
def test_the_rates_given_to_trl_are_ours(schedule, steps, warmup):
    settings = Settings(steps=steps, schedule=schedule, warmup=warmup, learning_rate=3e-4)
    optimizer, scheduler = trl_optimizers(torch.nn.Linear(2, 2), settings)
    for step in range(steps):
        assert scheduler.get_last_lr() == pytest.approx(
            [learning_rate_at(step, settings)] * 2, rel=1e-12
        )
        optimizer.step(), scheduler.step()


def test_stopped_and_resumed_equals_uninterrupted(small, runs, monkeypatch):
    same = dict(COMMON, model=str(small), engine="trl", save_every=0)
    whole = lab.run("sft", **same)
    log = Run.log

    def stop_after_four(self, step, **metrics):
        log(self, step, **metrics)
        if step == 3 and not (self.path / "model").exists():
            self.request_stop()

    monkeypatch.setattr(Run, "log", stop_after_four)
    with pytest.raises(Stopped, match="after step 4"):
        lab.run("sft", **same)
    monkeypatch.setattr(Run, "log", log)
    run = next(r for r in all_runs(runs) if r.id != whole.id)
    assert run.status == "stopped"
    assert last_checkpoint(run)[1] == 4
    torn = run.path / "checkpoints" / "checkpoint-5"  # a kill while a newer checkpoint was written
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    run.log(5, loss=99.0)  # and after a step that no checkpoint has
    resumed = lab.resume(run)
    assert resumed.status == "finished"
    assert [row["step"] for row in resumed.lines()] == list(range(1, 7))
    assert [row["loss"] for row in resumed.lines()] == [row["loss"] for row in whole.lines()]
    a, b = (
        load_model(r.path / "model", dtype="float32", device="cpu").state_dict()
        for r in (whole, resumed)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_loss_that_is_not_finite_ends_the_run_unrecorded(small, examples, tmp_path):
    from polm_lab.training.loop import load_policy

    settings = Settings(
        **{**COMMON, "model": str(small), "warmup": 0.0, "learning_rate": 10.0, "clip": 0.0}
    )
    policy, tokenizer = load_policy(settings)
    run = Run.create("sft", dict(steps=6), out=tmp_path)
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="step 1"), run.active():
        train_with_trl(
            run,
            settings,
            "SFT",
            policy,
            tokenizer,
            labelled_rows(examples),
            config=dict(dataset_kwargs={"skip_prepare_dataset": True}),
        )
    assert run.status == "failed"
    assert "not finite" in run.read()["reason"]
    assert run.lines() == []
    assert last_checkpoint(run) == (None, 0)
    assert (run.path / "nonfinite-step-1.safetensors").exists()
    assert "forward" not in vars(policy.model)


def test_lora_trains_the_adapter_alone(small, runs):
    run = lab.run(
        "sft", **dict(COMMON, model=str(small), engine="trl", adapter="lora:r=2", steps=2)
    )
    assert (run.path / "model" / "adapter_config.json").exists()
    assert json.loads((run.path / "run.json").read_text())["status"] == "finished"


def test_wrong_input_is_one_line(small, examples, tmp_path, monkeypatch):
    settings = Settings(**{**COMMON, "model": str(small)})
    run = Run.create("sft", dict(steps=6), out=tmp_path)
    model, tokenizer = load_model(small, dtype="float32", device="cpu"), load_tokenizer(small)
    with pytest.raises(WrongInput, match="SFTTrainer refuses: Invalid `loss_type`"):
        train_with_trl(
            run,
            settings,
            "SFT",
            Policy(model),
            tokenizer,
            labelled_rows(examples),
            config=dict(loss_type="nothing"),
        )
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(WrongInput, match="pip install trl"):
        train_with_trl(run, settings, "SFT", Policy(model), tokenizer, labelled_rows(examples))


def test_metrics_that_are_not_ours_are_left_out():
    assert our_metrics(
        {
            "loss": 1.0,
            "train_runtime": 3,
            "rewards/right/mean": 0.5,
            "rewards/right/std": 0.1,
            "kl": None,
        }
    ) == {"loss": 1.0, "reward/right": 0.5}


def test_the_device_of_a_run_before_is_forgotten():
    from accelerate.state import PartialState

    asked = Settings(device="cpu")
    assert make_accelerator(asked).device.type == "cpu"
    PartialState._shared_state["device"] = torch.device("meta")  # as a run on another one leaves it
    assert make_accelerator(asked).device.type == "cpu"


@pytest.mark.parametrize("scale, ends", [(65536.0, False), (1.0, True), (None, True)])
def test_a_gradient_that_overflows_in_float16_is_left_to_the_scaler(tmp_path, scale, ends):
    model = torch.nn.Linear(2, 1)
    scaler = None if scale is None else types.SimpleNamespace(get_scale=lambda: scale)
    accelerator = types.SimpleNamespace(
        scaler=scaler,
        num_processes=1,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        backward=lambda loss: (loss * torch.inf).backward(),
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
    )
    run = Run.create("sft", {}, out=tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    loss = lambda model, batch, meter: model(batch["x"]).sum()
    update = Updater(run, accelerator, model, optimizer, loss, [], 1.0)
    with pytest.raises(FloatingPointError) if ends else contextlib.nullcontext():
        update(0, [dict(x=torch.ones(3, 2), weight=3.0)], Meter())
