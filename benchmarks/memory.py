"""Measure peak memory and time of SFT with each of the memory options.

    python benchmarks/memory.py [--steps 6]

All use one model and the same rows; each runs in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPTIONS = {
    "batch_size 32": dict(batch_size=32),
    "batch_size 8, accumulate 4": dict(batch_size=8, accumulate=4),
    "gradient_checkpointing": dict(batch_size=32, gradient_checkpointing=True),
    "adapter lora": dict(batch_size=32, adapter="lora:r=8"),
    "packing": dict(batch_size=32, packing=True),
    "batch_size 8, accumulate 4, checkpointing, lora": dict(
        batch_size=8, accumulate=4, gradient_checkpointing=True, adapter="lora:r=8"
    ),
}


def make_model(folder: Path):
    """Save a random Llama of about 25 M parameters with the embedded model's tokenizer.

    Its vocabulary has 32,000 entries.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from polm_lab.models.tokenizers import load_tokenizer
    from polm_lab.models.save import save_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    save_model(LlamaForCausalLM(config), load_tokenizer("tiny"), folder)


def measure(model: str, out: str, steps: int, options: dict):
    "Run SFT in this process and print what it took beyond what the imports take."
    import torch

    import polm_lab as lab
    from polm_lab.models.load import load_model  # noqa: F401  so that imports do not count
    from polm_lab.finetuning import sft  # noqa: F401

    torch.set_num_threads(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    run = lab.run(
        "sft",
        out=out,
        model=model,
        data="chat",
        steps=steps,
        eval_rows=1,
        save_every=0,
        dtype="float32",
        device="cpu",
        max_length=512,
        **options,
    )
    times = run.metrics()["seconds"].diff().dropna()
    print(
        json.dumps(
            dict(
                mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
                seconds=times.median(),
            )
        )
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure(args.one[0], args.one[1], args.steps, json.loads(args.one[2]))
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        print(
            "| option | peak memory beyond imports, MiB | seconds a step | memory, share of the "
            "first | time, share of the first |\n|---|---|---|---|---|"
        )
        first = None
        for name, options in OPTIONS.items():
            words = [
                sys.executable,
                __file__,
                "--steps",
                str(args.steps),
                "--one",
                f"{folder}/model",
                f"{folder}/runs",
                json.dumps(options),
            ]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            found = json.loads(done.stdout.strip().split("\n")[-1])
            first = first or found
            print(
                f"| {name} | {found['mib']:.0f} | {found['seconds']:.2f} | "
                f"{found['mib'] / first['mib']:.2f} | {found['seconds'] / first['seconds']:.2f} |",
                flush=True,
            )
    print(f"\n{time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main()
