"GGUF files as models: the numbers of the file, in any architecture that is known; refusals; kills."

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.models.gguf import built, gguf_folder, need_space, read_facts
from polm_lab.models.small import save_small_gguf
from polm_lab.models.sources import model_path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def silent(line):
    pass


@pytest.mark.parametrize("kind, bar", [("F32", 0.02), ("Q8_0", 0.1), ("Q4_1", 0.9)])
def test_the_model_answers_as_the_one_that_was_written(kind, bar, tmp_path):
    "bfloat16 costs 0.4 % of a weight, 4 bits up to half of a level."
    model = save_small_gguf(tmp_path / "m.gguf", kind).eval()
    found = AutoModelForCausalLM.from_pretrained(
        gguf_folder(tmp_path / "m.gguf", silent), dtype=torch.float32
    )
    ids = torch.randint(2, 258, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = found(ids).logits, model(ids).logits
    assert (ours - theirs).abs().max() < bar * theirs.std()
    assert (ours - theirs).abs().max() > 0


def test_a_gguf_file_is_a_model_like_any_other(tmp_path):
    save_small_gguf(tmp_path / "m.gguf", "Q8_0")
    run = lab.run(
        "sft",
        model=str(tmp_path / "m.gguf"),
        out=tmp_path / "runs",
        data="sums",
        steps=2,
        batch_size=2,
        eval_rows=2,
        max_length=64,
        dtype="float32",
        device="cpu",
    )
    assert run.status == "finished"
    assert (run.path / "model" / "model.safetensors").is_file()
    assert model_path(str(tmp_path / "m.gguf")).parent.name == "gguf"


def test_a_file_is_converted_once_and_again_when_it_changed(tmp_path):
    file = tmp_path / "m.gguf"
    save_small_gguf(file, "Q8_0")
    lines = []
    first = gguf_folder(file, lines.append)
    assert gguf_folder(file, lines.append) == first
    assert len(lines) == 1
    save_small_gguf(file, "Q8_0", seed=1)
    os.utime(file, ns=(0, 0))
    second = gguf_folder(file, lines.append)
    assert second != first
    assert len(lines) == 2
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize("cut", [0, 3, 100, 2000, -1])
def test_a_cut_file_is_one_line_and_leaves_nothing(cut, tmp_path, cache):
    save_small_gguf(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:cut])
    with pytest.raises(WrongInput) as wrong:
        gguf_folder(tmp_path / "cut.gguf", silent)
    assert "\n" not in str(wrong.value)
    assert "cut short" in str(wrong.value)
    assert not cache.exists() or not any(cache.rglob("*.safetensors"))


def test_an_unknown_architecture_is_one_line_and_leaves_nothing(tmp_path, cache):
    save_small_gguf(tmp_path / "m.gguf", architecture="mamba9")
    assert read_facts(tmp_path / "m.gguf")["architecture"] == "mamba9"
    with pytest.raises(WrongInput, match="architecture 'mamba9'.*expected one of .*llama"):
        gguf_folder(tmp_path / "m.gguf", silent)
    assert not any((cache / "gguf").iterdir())


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch, cache):
    import shutil

    save_small_gguf(tmp_path / "m.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(WrongInput, match="0 MiB free.*POLM_CACHE"):
        gguf_folder(tmp_path / "m.gguf", silent)
    assert not any((cache / "gguf").iterdir())
    monkeypatch.undo()
    need_space(tmp_path, 1)


def test_a_folder_that_fails_or_comes_second_is_gone(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with built(tmp_path / "a") as fresh:
            (fresh / "x").write_text("1")
            1 / 0
    assert not any(tmp_path.iterdir())
    with built(tmp_path / "a") as fresh:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "first").write_text("1")
        (fresh / "second").write_text("2")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "first"]


SLOW = """
import sys, time
from pathlib import Path
from polm_lab.models.gguf import built
with built(Path(sys.argv[1])) as fresh:
    (fresh / "half").write_text("1")
    print("begun", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_a_living_ones_stays(tmp_path):
    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "begun\n"
        return process

    killed, living = start(), start()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f".a.{killed.pid}", f".a.{living.pid}"]
    )
    with built(tmp_path / "a") as fresh:
        (fresh / "whole").write_text("1")
    left = sorted(p.name for p in tmp_path.iterdir())
    living.kill()
    living.wait()
    assert left == [f".a.{living.pid}", "a"]
    assert (tmp_path / "a" / "whole").is_file()


def test_two_at_once_write_one_folder(tmp_path):
    save_small_gguf(tmp_path / "m.gguf")
    code = (
        "import sys; from pathlib import Path; from polm_lab.models.gguf import gguf_folder; "
        "print(gguf_folder(Path(sys.argv[1]), lambda line: None))"
    )
    began = time.monotonic()
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "m.gguf")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    found = {process.communicate(timeout=120)[0] for process in both}
    assert time.monotonic() - began < 120
    assert all(process.returncode == 0 for process in both)
    assert len(found) == 1
    assert [p.name[0] for p in (tmp_path / "cache" / "gguf").iterdir()] == ["m"]
