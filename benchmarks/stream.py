"""Measure the memory in which a large model is quantized.

    python benchmarks/stream.py [--algorithm gptq] [--blocks 20] [--check]

A random Llama of 4 GB (1.03 billion weights in 32 bits) is written to a temporary folder and
quantized to 4 bits, as a run does it. Counted is memory that the system cannot take back: pages of
files are not. Bar: half of the model's size. The folder takes three times that of the model.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from polm_lab.core.machine import free_memory
from polm_lab.efficiency.quantize import Codes, Quantize, quantize_model
from polm_lab.models.load import load_model
from polm_lab.models.save import save_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.training.layerwise import SHELF, shelves


def make_model(folder: Path, blocks: int):
    "Save a random Llama with the embedded model's tokenizer."
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    save_model(LlamaForCausalLM(config), load_tokenizer("tiny"), folder)


def own_memory() -> float:
    "Return the anonymous memory of this process in MiB."
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024


def quantize(folder: Path, algorithm: str) -> None:
    "Quantize the model in `folder` and save it, in the way of a run without its evaluations."
    run = SimpleNamespace(path=folder / "run", writes=True)
    run.path.mkdir()
    model = load_model(folder / "model", dtype="float32", device="cpu").eval()
    windows = torch.randint(1024, (4, 64), generator=torch.Generator().manual_seed(0))
    settings = Quantize(algorithm=algorithm, bits=4, group_size=128, calibration_batch_size=2)
    codes, found = Codes(run.path / SHELF), {}
    with shelves(run, model) as shelve:
        for number, _ in enumerate(quantize_model(model, windows, settings, found, measure=True)):
            codes.take(found)
            shelve(number)
        codes.write(run)
        save_model(model, load_tokenizer("tiny"), run.path / "model")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--algorithm", default="gptq")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--check", action="store_true", help="exit 1 if the bar is missed")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model", a.blocks)
        size = (folder / "model/model.safetensors").stat().st_size / 2**20
        return measure(folder, a.algorithm, size, a.check)


def measure(folder: Path, algorithm: str, size: float, check: bool) -> int:
    "Quantize in this process, print the table, and return the exit status."
    free_memory()  # the random model was made here
    begin, peak, done = own_memory(), 0.0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, own_memory())

    watcher, began = threading.Thread(target=watch), time.monotonic()
    watcher.start()
    quantize(folder, algorithm)
    done.set()
    watcher.join()
    print("| algorithm | model, MiB | before, MiB | peak, MiB | seconds |\n|---|---|---|---|---|")
    seconds = time.monotonic() - began
    print(f"| {algorithm} | {size:.0f} | {begin:.0f} | {peak:.0f} | {seconds:.0f} |")
    return int(check and peak > size / 2)


if __name__ == "__main__":
    sys.exit(main())
