"The loop: an adapter that gives ranks back."

import subprocess
import sys

import pytest
import torch

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.core.settings import Settings
from polm_lab.models.load import load_model
from polm_lab.core.run import Run, Stopped
from polm_lab.training import loop
from polm_lab.training.budget import RankBudget
from polm_lab.training.chain import create, execute

SHORT = dict(
    data="sums",
    steps=6,
    batch_size=4,
    eval_rows=4,
    save_every=1,
    max_length=64,
    device="cpu",
    dtype="float32",
    warmup=0.0,
    learning_rate=1e-2,
    adapter="adalora:init_r=6,target_r=2",
)


def ranks(run):
    "Ranks that are left in each layer of the saved adapter."
    weights = lab.models.load.load_model(run.path / "model", "float32", "cpu").state_dict()
    return [int((value != 0).sum()) for name, value in weights.items() if "lora_E" in name]


def weights(run):
    return (run.path / "model" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_adalora_gives_ranks_back_and_a_resumed_run_is_the_uninterrupted_one(
    method, tmp_path, monkeypatch
):
    settings = SHORT | (
        dict(num_generations=4, max_new_tokens=6, batch_size=8, updates=2)
        if method == "grpo"
        else {}
    )
    whole = lab.run(method, **settings, out=tmp_path / "whole")
    left = ranks(whole)
    assert sum(left) == 2 * len(left), "6 ranks a layer to begin with, 2 on average in the end"
    assert len(left) > 4, "6 ranks a layer to begin with, 2 on average in the end"
    assert len(set(left)) > 1, "layers keep what they need, which differs"
    for stop in (2, 5) if method == "sft" else (3,):
        parts = create(method, settings, out=tmp_path / "parts", via="bare")
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Run, "stop_requested", lambda self: self.record["step"] == stop)
            execute(parts)
        parts = Run(parts.path)
        execute(parts)
        assert weights(parts) == weights(whole)
        drop = ("seconds", "tokens_per_second", "memory_mib")
        for row, other in zip(parts.lines(), whole.lines(), strict=True):
            for name in drop:
                row.pop(name, None)
                other.pop(name, None)
            assert row == other


def test_ranks_are_kept_through_the_last_steps(tmp_path):
    run = lab.run(
        "sft",
        **SHORT | dict(adapter="adalora:init_r=6,target_r=2,tinit=1,tfinal=2,deltaT=2"),
        out=tmp_path,
    )
    assert sum(ranks(run)) == 2 * len(ranks(run))


def test_the_penalty_is_pefts():
    model = load_model(
        "tiny",
        "float32",
        "cpu",
        adapter="adalora:init_r=6,target_r=2,total_step=10,orth_reg_weight=0.7",
    )
    ids = torch.arange(5, 15)[None]
    with_labels = model(input_ids=ids, labels=ids).loss
    plain = model.base_model.model(input_ids=ids, labels=ids).loss
    assert RankBudget.of(model).penalty().item() == pytest.approx(
        (with_labels - plain).item(), abs=1e-5
    )
    assert RankBudget.of(load_model("tiny", "float32", "cpu")) is None


class Pull:
    "A hook: the penalty pulls a weight to 5, and what it was called with is kept."

    def __init__(self, line):
        self.line, self.seen = line, []

    def penalty(self):
        return (self.line.weight - 5).square().sum()

    def after_step(self, done):
        self.seen.append((done, self.line.weight.grad is not None))

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_the_loop_calls_any_hook_and_keeps_its_state(tmp_path, monkeypatch):
    settings, hooks = (
        Settings(
            steps=40, learning_rate=0.5, warmup=0.0, save_every=20, device="cpu", dtype="float32"
        ),
        [],
    )
    monkeypatch.setattr(loop, "step_hooks", lambda model: hooks)

    def updates(step, meter):
        yield [dict(x=torch.ones(2, 1), weight=2.0), dict(x=torch.ones(1, 1), weight=1.0)]

    def train(run, stop=None):
        line = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(line.weight)
        hooks[:] = [Pull(line)]
        with monkeypatch.context() as patch, run.active():
            if stop:
                patch.setattr(Run, "stop_requested", lambda self: self.record["step"] == stop)
            loop.fit(
                run,
                settings,
                line,
                updates,
                lambda model, batch, meter: model(batch["x"]).sum() * 0.0,
            )
        return line.weight.item(), hooks[0].seen

    weight, seen = train(Run.create("line", {"steps": 40}, out=tmp_path / "whole"))
    assert seen == [(done, True) for done in range(1, 41)]
    assert weight == pytest.approx(5.0, abs=1.0)
    parts = Run.create("line", {"steps": 40}, out=tmp_path / "parts")
    with pytest.raises(Stopped):
        train(parts, stop=7)
    assert train(parts) == (weight, seen)


def test_what_adalora_cannot_do_is_refused(tmp_path):
    with pytest.raises(WrongInput, match="init_r = 4 ranks .* more than target_r = 4"):
        lab.run("sft", **SHORT | dict(adapter="adalora:init_r=4,target_r=4"), out=tmp_path)
    with pytest.raises(WrongInput, match="engine = 'trl', adapter = 'adalora"):
        lab.run("sft", **SHORT | dict(engine="trl"), out=tmp_path)


def test_the_memory_of_a_run_is_its_own_and_not_that_of_who_started_it():
    held = bytearray(b"x" * 2**30)
    code = (
        "import torch; from polm_lab.core.machine import peak_memory; "
        "print(peak_memory(torch.device('cpu')))"
    )
    found = float(
        subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
    assert 50 < found < len(held) / 2**20
