"""The embedded model `tiny`: its files, its bars, and the training that makes it."""

import json
import math
import random
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polm_lab.data import base
from polm_lab.data.base import Recipe, draw_documents, encode_document, learning_rate, make_model
from polm_lab.data.base import (
    make_tokenizer,
    measure,
    microbatches,
    pretrain,
    save_base,
    summed_loss,
)
from polm_lab.data.messages import END, assistant, chat_text, user
from polm_lab.data.tasks import TASKS

TINY = Path(__file__).parents[1] / "data" / "tiny"
MINI = Recipe(
    width=32,
    layers=1,
    heads=2,
    inner=48,
    vocabulary=320,
    context=256,
    steps=30,
    tokens=256,
    warmup=4,
)


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForCausalLM.from_pretrained(TINY).eval(), AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def mini_tokenizer():
    return make_tokenizer(MINI)


def quiet(line):
    pass


def test_files_are_small_and_tell_their_recipe(tiny):
    model, _ = tiny
    names = {
        "README.md",
        "config.json",
        "figures.json",
        "generation_config.json",
        "recipe.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {p.name for p in TINY.iterdir()} == names | {"model.safetensors"}
    assert (TINY / "model.safetensors").stat().st_size <= 8_000_000
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    stored = json.loads((TINY / "recipe.json").read_text())
    del stored["torch"]
    assert stored == json.loads(
        json.dumps(asdict(Recipe()))
    )  # the command makes these weights again
    figures = json.loads((TINY / "figures.json").read_text())
    card = (TINY / "README.md").read_text()
    assert all(f"| {name} |" in card for name in figures)


def test_tokenizer(tiny):
    _, tokenizer = tiny
    assert tokenizer.convert_ids_to_tokens(tokenizer("23+45=").input_ids) == [
        "2",
        "3",
        "+",
        "4",
        "5",
        "=",
    ]
    for text in ("23+45=68", "naïve 漢字 \t x\n\n  y 🙂", " leading", "trailing "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (
        tokenizer("a b").input_ids == encode_document(tokenizer, "a b")[:-1]
    )  # prompts begin as documents begin
    assert tokenizer.eos_token == END
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    # A completion's tokens do not depend on a prompt before it.
    for task in TASKS.values():
        for form in task.forms:
            for row in task.rows("completion", 20, form=form):
                if isinstance(row["prompt"], str):
                    apart = (
                        tokenizer(row["prompt"]).input_ids + tokenizer(row["completion"]).input_ids
                    )
                    assert apart == tokenizer(row["prompt"] + row["completion"]).input_ids


def test_chat_template_writes_what_the_tasks_write(tiny):
    _, tokenizer = tiny
    messages = [
        {"role": "system", "content": "Be polite."},
        user("What is\n1+2? "),
        assistant(" 3"),
        user("x"),
        assistant(""),
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == chat_text(messages)
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert chat_text(messages).startswith(prompt)
    out = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [t for t, kept in zip(out["input_ids"], out["assistant_masks"]) if kept]
    assert tokenizer.decode(learned) == f" 3{END}{END}"


def test_tiny_is_a_base_model(tiny):
    "The bars: it knows much and answers badly."
    torch.manual_seed(0)
    figures = measure(*tiny, n=60, num_generations=16, tests=(("sums", "direct", 8),))[
        "sums/direct"
    ]
    assert 0.25 <= figures["one"] <= 0.60
    assert figures["any"] >= 0.85
    assert figures["greedy"] >= figures["one"] + 0.2  # the truth is its favourite answer


def test_tiny_serves_every_task(tiny):
    asked = [
        ("sums", "steps", 32),
        ("sums", "check", 40),
        ("facts", "recall", 8),
        ("facts", "reading", 8),
    ]
    asked += [
        ("stories", "tell", 64),
        ("stories", "label", 4),
        ("chat", "any", 80),
        ("code", "any", 24),
    ]
    figures = measure(*tiny, n=24, num_generations=2, tests=asked)
    assert figures["sums/steps"]["greedy"] >= 0.8
    assert figures["sums/check"]["greedy"] >= 0.8
    assert figures["facts/recall"]["greedy"] >= 0.5  # by chance: about 0.08
    assert figures["facts/reading"]["greedy"] >= 0.8
    assert figures["code/any"]["greedy"] >= 0.6
    assert figures["stories/tell"]["one"] >= 0.7
    assert figures["stories/label"]["greedy"] >= 0.8
    assert 0.3 <= figures["chat/any"]["one"] <= 0.8  # room to improve
    assert all(f["perplexity"] < 4 for f in figures.values() if "perplexity" in f)


def test_documents_depend_on_seed_and_step_only(mini_tokenizer):
    first = draw_documents(MINI, mini_tokenizer, 7)
    random.seed(1), torch.manual_seed(1)
    assert (
        first == draw_documents(MINI, mini_tokenizer, 7) != draw_documents(MINI, mini_tokenizer, 8)
    )
    assert all(ids[-1] == mini_tokenizer.eos_token_id for ids in first if len(ids) < MINI.context)
    assert not any(mini_tokenizer.pad_token_id in ids for ids in first)


def test_microbatches_lose_nothing(mini_tokenizer):
    documents = [d for step in range(3) for d in draw_documents(MINI, mini_tokenizer, step)]
    model = make_model(MINI, mini_tokenizer)
    batches = microbatches(documents, mini_tokenizer.pad_token_id, size=300)
    back = sorted(row[row != -100].tolist() for _, labels in batches for row in labels)
    assert back == sorted(documents)
    assert len(batches) > 2
    with torch.no_grad():
        alone = sum(
            summed_loss(model, torch.tensor([d]), torch.tensor([d])).item() for d in documents
        )
        together = sum(summed_loss(model, *b).item() for b in batches)
    assert math.isclose(alone, together, rel_tol=1e-5)


def test_learning_rate_rises_stays_and_falls():
    recipe = Recipe(steps=1000, warmup=10, decay=0.5, learning_rate=1.0)
    assert [learning_rate(recipe, s) for s in (0, 4, 9, 10, 500, 750, 999)] == pytest.approx(
        [0.1, 0.5, 1, 1, 1, 0.5, 0.002]
    )


def test_interrupted_training_ends_in_the_same_bits(tmp_path):
    whole, _ = pretrain(MINI, tmp_path / "whole", save_every=1000, say=quiet)
    pretrain(MINI, tmp_path / "parts", stop_at=11, say=quiet)
    resumed, _ = pretrain(MINI, tmp_path / "parts", save_every=1000, say=quiet)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_killed_training_ends_in_the_same_bits(tmp_path):
    "Killed at the worst instant: the fourth state is written and not yet in its place."
    code = f"""
import os, signal
from pathlib import Path
import torch
from polm_lab.data.base import Recipe, pretrain

torch.set_num_threads({torch.get_num_threads()})
replace, calls = os.replace, []

def replace_or_die(old, new):
    calls.append(new) if str(new).endswith("state.pt") else None
    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 4 else replace(old, new)

os.replace = replace_or_die
pretrain(Recipe(**{asdict(MINI)!r}), Path({str(tmp_path / "killed")!r}), save_every=5)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert process.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"] == 15
    resumed, _ = pretrain(MINI, tmp_path / "killed", say=quiet)
    whole, _ = pretrain(MINI, tmp_path / "whole", save_every=1000, say=quiet)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_saved_folder_loads_to_the_same_model(tmp_path, mini_tokenizer):
    model = make_model(MINI, mini_tokenizer)
    save_base(
        model,
        mini_tokenizer,
        MINI,
        {"sums/direct": {"one": 0.5, "any": 1.0, "greedy": 0.9}, "sums": {"perplexity": 2.0}},
        tmp_path,
    )
    again, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    ids = torch.tensor([tokenizer("23+45=").input_ids])
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, again(input_ids=ids).logits)
    assert tokenizer.chat_template == mini_tokenizer.chat_template


def test_command_makes_a_model_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        base, "measure", lambda model, tokenizer, num_generations: {"sums": {"perplexity": 9.0}}
    )
    out, threads = tmp_path / "tiny", torch.get_num_threads()
    base.main(
        ["--out", str(out), "--work", str(tmp_path / "work"), "--threads", str(threads)], MINI
    )
    assert (out / "model.safetensors").exists()
    assert "| sums | 9.00 |" in (out / "README.md").read_text()
    assert '"perplexity": 9.0' in capsys.readouterr().out
