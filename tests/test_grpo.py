"""GRPO: closed forms, equality with TRL under accumulation, runs that repeat to the bit.

Also resampling, and settings that are refused.
"""

import copy
import json
import math

import datasets
import pytest
import torch
from conftest import ROOT
from trl import GRPOConfig, GRPOTrainer

import polm_lab as lab
from polm_lab.training import onpolicy
from polm_lab.data.batches import collate
from polm_lab.training.evaluate import as_example, eval_no_grad
from polm_lab.core.knobs import WrongInput
from polm_lab.models.policy import Policy
from polm_lab.core.metrics import metric
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.training.loop import Meter
from polm_lab.reasoning import grpo
from polm_lab.reasoning.grpo import (
    GRPO,
    KLS,
    LOSSES,
    batch_loss,
    loss_weight,
    summed_loss,
    token_loss,
    trl_config,
)
from polm_lab.rewards.functions import parse_rewards
from polm_lab.training.chain import create, execute

SHORT = dict(
    steps=3,
    batch_size=8,
    num_generations=4,
    eval_rows=2,
    max_new_tokens=8,
    device="cpu",
    dtype="float32",
    save_every=0,
)


# Closed forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", KLS)
def test_the_kl_term_of_a_token(kl):
    logp, old, ref = (torch.tensor([[v]], requires_grad=v == -1.0) for v in (-1.0, -1.3, -1.5))
    without = token_loss(logp, old, torch.tensor([0.7]))
    term = (token_loss(logp, old, torch.tensor([0.7]), ref, beta=0.5, kl=kl) - without).item()
    k, ratio = {"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 1 + 0.5}, math.exp(0.3)
    expected = {"k3_weighted": 0.5 * k["k3"] * ratio}.get(
        kl, 0.0 if kl.endswith("_reward") else 0.5 * k[kl[:2]]
    )
    assert term == pytest.approx(expected, abs=1e-6)


def test_what_a_token_weighs():
    mask = (torch.arange(6) < torch.tensor([[1], [3], [6], [0]])).long()
    weights = {}
    for kind in LOSSES:
        losses = torch.zeros(4, 6, requires_grad=True)
        (summed_loss(losses, mask, kind) / loss_weight(mask, kind, 8)).backward()
        assert not losses.grad[mask == 0].any()
        weights[kind] = [losses.grad[i, 0].item() for i in range(3)]
    assert weights["grpo"] == pytest.approx([1 / 4, 1 / 12, 1 / 24])
    assert weights["dr_grpo"] == pytest.approx([1 / 32] * 3)
    assert weights["dapo"] == weights["bnpo"] == pytest.approx([1 / 10] * 3)


# TRL --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    "Tokenizer, the model that sampled, the policy and the reference: three that differ."
    made = [load_model("tiny", dtype="float32", device="cpu") for _ in range(3)]
    torch.manual_seed(1)
    for model in made[1:]:
        for p in model.parameters():
            p.data += 0.01 * torch.randn_like(p)
    return load_tokenizer("tiny"), *map(Policy, made)


def microbatch(models, texts, masked):
    "Completions of 12+34 as one microbatch; those in `masked` were cut."
    tokenizer, sampler, _, reference = models
    prompt = tokenizer("12+34=").input_ids
    batch = collate(
        [as_example(prompt, [*tokenizer(t).input_ids, tokenizer.eos_token_id]) for t in texts],
        tokenizer.pad_token_id,
    )
    for name, model in (("old_logp", sampler), ("ref_logp", reference)):
        with eval_no_grad(model):
            batch[name] = model(
                batch["input_ids"],
                batch["attention_mask"],
                batch["completion_mask"],
                temperature=0.8,
            ).logp
    batch["loss_mask"] = batch["completion_mask"] * torch.tensor(
        [[i not in masked] for i in range(len(texts))]
    )
    return dict(
        batch,
        prompt=len(prompt),
        prefix=torch.tensor([[0, len(prompt)]] * len(texts)),
        advantages=torch.linspace(-1.2, 1.7, len(texts)),
    )


def as_trl(batch, items):
    "The same rows as TRL's `compute_loss` takes them; all prompts are equally long."
    cut = batch["prompt"]
    return dict(
        prompt_ids=batch["input_ids"][:, :cut],
        prompt_mask=batch["attention_mask"][:, :cut],
        completion_ids=batch["input_ids"][:, cut:],
        completion_mask=batch["loss_mask"][:, cut:],
        old_per_token_logps=batch["old_logp"][:, cut:],
        ref_per_token_logps=batch["ref_logp"][:, cut:],
        advantages=batch["advantages"],
        num_items_in_batch=items,
    )


@pytest.mark.parametrize("beta, kl", [(0.0, "k3"), (0.3, "k3"), (0.3, "k3_weighted")])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_step_of_two_microbatches_is_trls(models, loss_type, beta, kl, tmp_path):
    tokenizer, _, policy, _ = models
    settings = GRPO(
        loss=loss_type,
        beta=beta,
        kl=kl,
        updates=2,
        batch_size=4,
        accumulate=2,
        num_generations=4,
        max_new_tokens=16,
        temperature=0.8,
        clip_low=0.01,
        clip_high=0.02,
        mask_truncated=True,
    )
    batches = [
        microbatch(models, ["46", "4", "2+4=6\n10+30=40\n40+6=46", "47 or so"], {1}),
        microbatch(models, ["45", "about 46", "6", "46\n46"], set()),
    ]
    config = GRPOConfig(
        str(tmp_path),
        **trl_config(settings),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = GRPOTrainer(
        copy.deepcopy(policy.model),
        [len],
        config,
        train_dataset=datasets.Dataset.from_list([{"prompt": "1+1="}] * 4),
        processing_class=tokenizer,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    items = sum(b["loss_mask"].sum() for b in batches)
    theirs = sum(trainer.compute_loss(trainer.model, as_trl(b, items)) for b in batches)
    theirs.backward()
    policy.zero_grad()
    meter = Meter()
    ours = sum(batch_loss(policy, b, settings, meter) for b in batches) / sum(
        loss_weight(b["loss_mask"], loss_type, 16) for b in batches
    )
    ours.backward()
    gradient_of = lambda model: torch.cat([p.grad.flatten() for p in model.parameters()])
    g_ours, g_theirs = gradient_of(policy), gradient_of(trainer.model)
    assert abs(ours.item() - theirs.item()) < 1e-5
    assert (g_ours - g_theirs).norm() < 1e-5 * g_theirs.norm()
    assert meter.means()["clip_fraction"] > 0.1
    assert (
        meter.means()["ratio_max"] > 1.02
    )  # away from the first update, where much would be equal by itself


# Runs -------------------------------------------------------------------------------------------


def learned(run):
    "The samples that were learned from: those of a group."
    return [row for row in run.lines("samples") if "group" in row]


def weights(run):
    return (run.path / "model" / "model.safetensors").read_bytes()


def test_two_runs_are_equal_to_the_bit_and_the_record_is_whole():
    first, second = (
        lab.run("grpo", **SHORT, updates=2, rewards="correct:1,format:0.5") for _ in range(2)
    )
    assert weights(first) == weights(second)
    assert (
        weights(first) != (lab.models.sources.model_path("tiny") / "model.safetensors").read_bytes()
    )
    drop = ("seconds", "tokens_per_second", "memory_mib")
    untimed = lambda row: {k: v for k, v in row.items() if k not in drop}
    assert list(map(untimed, first.lines())) == list(map(untimed, second.lines()))
    names = {name for row in [*first.lines(), *first.summary.values()] for name in row} - {
        "step",
        "seconds",
    }
    assert all(map(metric, names))
    assert {
        "reward",
        "reward/correct",
        "reward/format",
        "reward_std",
        "kl",
        "entropy",
        "clip_fraction",
        "ratio_max",
        "advantage_std",
        "length",
        "truncated",
        "zero_std_groups",
        "loss",
    } <= names
    assert {"accuracy", "pass_at_k", "reward", "kl", "forgetting"} <= set(first.summary["after"])
    lines = first.lines()
    assert lines[0]["ratio_max"] > 1
    assert (
        abs(lines[0]["reward"] - lines[0]["reward/correct"] - 0.5 * lines[0]["reward/format"])
        < 1e-6
    )
    rows = learned(first)
    assert {row["step"] for row in rows} == {1, 2, 3}
    assert len(rows) == 24
    assert len(first.lines("samples")) == 24 + 3 * 2
    for row in rows:
        assert len(row["tokens"]) == len(row["logp"]) == len(row["ref_logp"])
        assert {
            "group",
            "prompt",
            "completion",
            "reward",
            "rewards",
            "advantage",
            "ended",
            "ids",
        } <= set(row)
    assert rows[0]["logp"] == pytest.approx(
        rows[0]["ref_logp"], abs=1e-3
    )  # at the first step the policy is the reference


def test_without_beta_there_is_no_reference_but_the_kl_is_still_evaluated():
    run = lab.run("grpo", **SHORT, beta=0.0)
    assert "kl" not in run.lines()[0]
    assert run.summary["after"]["kl"] > 0
    assert run.summary["before"]["kl"] == 0
    assert run.lines()[0]["ratio_max"] == 1.0
    assert run.lines()[0]["clip_fraction"] == 0.0


def test_the_kl_may_be_taken_off_the_reward():
    plain, taken = (lab.run("grpo", **SHORT, beta=beta, kl="k1_reward") for beta in (0.0, 5.0))
    assert (
        plain.lines()[0]["reward"] == taken.lines()[0]["reward"]
    )  # what is logged is the task's reward
    assert weights(plain) != weights(taken)


def test_groups_without_spread_are_counted_and_exchanged(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def even(prompts, completions, **columns):\n"
        "    return [1.0 if int(p[0]) % 2 else float(i % 2) for i, p in enumerate(prompts)]\n"
    )
    spec = f"{tmp_path}/mine.py:even"  # prompts that begin with an odd digit give equal rewards
    plain, again = (
        lab.run("grpo", **SHORT | dict(batch_size=32), rewards=spec, resample=resample)
        for resample in (0, 12)
    )
    for run in (plain, again):
        assert all(0 < row["zero_std_groups"] < 1 for row in run.lines())
    prompts_of = lambda run: {row["prompt"] for row in learned(run)}
    kept = prompts_of(plain), prompts_of(again)
    assert any(int(p[0]) % 2 for p in kept[0])
    assert not any(int(p[0]) % 2 for p in kept[1])
    assert weights(again) == weights(
        lab.run("grpo", **SHORT | dict(batch_size=32), rewards=spec, resample=12)
    )


def test_rewards_that_are_all_equal_change_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def same(completions):\n    return [3.0] * len(completions)\n"
    )
    run = lab.run("grpo", **SHORT, rewards=f"{tmp_path}/mine.py:same", beta=0.0)
    assert [row["zero_std_groups"] for row in run.lines()] == [1.0] * 3
    assert [row["grad_norm"] for row in run.lines()] == [0.0] * 3


def test_completions_that_are_all_cut_and_masked_change_nothing():
    run = lab.run(
        "grpo", **SHORT | dict(max_new_tokens=1), mask_truncated=True, beta=0.0, loss="dapo"
    )
    assert [row["truncated"] for row in run.lines()] == [1.0] * 3
    assert [row["grad_norm"] for row in run.lines()] == [0.0] * 3


def test_an_adapter_is_its_own_reference():
    run = lab.run("grpo", **SHORT, adapter="lora:r=2")
    assert run.summary["before"]["kl"] == 0
    assert run.lines()[0]["kl"] < 1e-5
    assert (run.path / "model" / "adapter_model.safetensors").exists()


REFUSED = {
    "groups are not whole": (dict(batch_size=6), "multiple of num_generations = 4"),
    "unknown reward": (dict(rewards="corect"), "did you mean 'correct'"),
    "no truth": (dict(data="JSONL"), "`answer` column"),
    "no room": (dict(max_length=9), "max_length - max_new_tokens = 1"),
    "one sample": (dict(num_generations=1), "num_generations = 1"),
    "no temperature": (dict(temperature=0.0), "temperature = 0.0"),
    "unknown loss": (dict(loss="gspo"), "one of grpo, dr_grpo, dapo, bnpo"),
    "TRL has no k1": (dict(engine="trl", kl="k1"), "expected k3 or k3_weighted"),
    "TRL does not resample": (dict(engine="trl", resample=2), "use engine lab"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_settings_are_refused_before_compute(name, tmp_path, monkeypatch):
    changes, says = REFUSED[name]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n' * 20)
    if changes.get("data") == "JSONL":
        changes = dict(data=str(tmp_path / "rows.jsonl"))
    monkeypatch.setattr(onpolicy, "rollout", lambda *a, **k: pytest.fail("something was computed"))
    with pytest.raises(WrongInput) as wrong:
        lab.run("grpo", **SHORT | changes)
    assert says in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_a_reward_that_breaks_in_the_middle_fails_the_run_and_keeps_what_was_done(tmp_path):
    (tmp_path / "mine.py").write_text(
        "calls = []\n\ndef late(completions):\n    calls.append(1)\n"
        "    return [float('nan') if len(calls) > 6 else 1.0 * len(c) for c in completions]\n"
    )
    with pytest.raises(WrongInput, match="reward late: completion 0 got nan"):
        lab.run("grpo", **SHORT | dict(steps=9), rewards=f"{tmp_path}/mine.py:late", out=tmp_path)
    [run] = [lab.open_run(p.parent) for p in tmp_path.glob("*/run.json")]
    assert run.status == "failed"
    assert "got nan" in run.read()["reason"]
    assert [row["step"] for row in run.lines()] == [1, 2, 3]


def test_trl_leaves_the_same_samples(runs):
    run = lab.run(
        "grpo",
        engine="trl",
        data="sums",
        eval_rows=4,
        steps=2,
        batch_size=8,
        num_generations=4,
        max_new_tokens=8,
        max_length=64,
        device="cpu",
        dtype="float32",
    )
    rows = run.lines("samples")
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8
    assert [row["group"] for row in rows] == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    weights = dict(parse_rewards(run.settings["rewards"]))
    for row in rows:
        assert row["reward"] == pytest.approx(
            sum(weights[name] * value for name, value in row["rewards"].items())
        )
        assert row["prompt"]
        assert "".join(row["tokens"]).strip().startswith(row["completion"].strip()[:5])
        assert "logp" not in row
    for step, metrics in enumerate(run.lines(), 1):
        rewards = [row["reward"] for row in rows if row["step"] == step]
        assert metrics["reward"] == pytest.approx(sum(rewards) / 8, abs=1e-5)


def test_a_relative_reward_file_is_found_from_another_folder(runs, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.py").write_text(
        "def short(completions, **columns):\n    return [-float(len(c)) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    run = create(
        "grpo",
        dict(
            rewards="correct:0.5,mine.py:short:0.1",
            data="sums",
            eval_rows=4,
            steps=1,
            batch_size=4,
            num_generations=4,
            max_new_tokens=8,
        ),
        via="bare",
    )
    monkeypatch.chdir(tmp_path)
    execute(run)
    assert {"correct", "short"} == set(learned(run)[0]["rewards"])


def test_the_what_if_cell_reacts():
    cells = json.loads((ROOT / "nbs" / "reasoning" / "grpo.ipynb").read_text())["cells"]
    [source] = [
        "".join(cell["source"])
        for cell in cells
        if "skip-execution" in cell["metadata"].get("tags", [])
    ]
    names = dict(vars(grpo))
    exec(source, names)
    bars = names["figure"].data
    for value in (0.5, 1.0, 0.0):
        names["sliders"][7].value = value
        rewards = [slider.value for slider in names["sliders"]]
        assert [list(bar.y) for bar in bars] == list(grpo.what_if_advantages(rewards).values())
        assert rewards[7] == value
    names["drift"](2.0, 64)
    assert names["chart"].data[1].y[0] == pytest.approx(grpo.what_if_kl(2.0)[1])
