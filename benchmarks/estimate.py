"""Compare what `lab.estimate` says with what a run then takes, in time and peak memory.

    python benchmarks/estimate.py [--models tiny,18M,smol] [--methods sft,dpo,grpo] [--check]

Each run is a process of its own, as the command line starts it. smol is left out where it is not
here. With `--check` the exit status is 1 if an estimate is more than 25 % off.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

import pandas as pd

import polm_lab as lab
from polm_lab.models.packaged import packaged_models

BAR = 0.25
SHARED = {
    "tiny": dict(steps=150),
    "18M": dict(steps=30, batch_size=8, max_length=256, learning_rate=1e-5),
    "smol": dict(
        steps=8,
        batch_size=4,
        eval_rows=40,
        max_length=96,
        adapter="lora:r=8",
        learning_rate=1e-4,
        dtype="float32",
    ),
}
OWN = {
    ("sft", "tiny"): dict(data="sums"),
    ("dpo", "tiny"): dict(data="chat", steps=40),
    ("grpo", "tiny"): dict(data="sums", steps=30, max_new_tokens=16),
    ("sft", "18M"): dict(data="{folder}/sft.jsonl"),
    ("dpo", "18M"): dict(data="{folder}/dpo.jsonl", batch_size=4, steps=20),
    ("grpo", "18M"): dict(
        data="{folder}/grpo.jsonl",
        rewards="{folder}/reward.py:even",
        batch_size=32,
        max_new_tokens=32,
        steps=12,
    ),
    ("sft", "smol"): dict(data="chat"),
    ("dpo", "smol"): dict(data="chat", batch_size=2),
    ("grpo", "smol"): dict(
        data="sums", rewards="correct", batch_size=16, num_generations=4, max_new_tokens=8
    ),
}


def make_large(folder: Path):
    "Save the model of 18 M weights of `benchmarks/trl.py`, and its data."
    path = Path(__file__).with_name("trl.py")
    found = importlib.util.spec_from_file_location("peers", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.make_model(folder)


def measured(method: str, knobs: dict) -> dict:
    "Estimate a run and make it; return both, as a row."
    guess = lab.estimate(method, **knobs)
    with tempfile.TemporaryDirectory() as out:
        run = lab.wait(lab.launch(method, out=out, notebook=False, **knobs))
        if run.status != "finished":
            sys.exit(f"{method}: {run.status} ({run.record['reason']})")
        record = run.record
    row = {}
    for name in ("seconds", "memory_mib"):
        row[f"{name}, estimated"], row[name] = guess[name], record[name]
        row[f"{name}, ratio"] = guess[name] / record[name]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="tiny,18M,smol")
    parser.add_argument("--methods", default="sft,dpo,grpo")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        make_large(Path(folder))
        for model in args.models.split(","):
            if model == "smol" and "smol" not in packaged_models():
                print("smol is not here: `polm get smol`", file=sys.stderr)
                continue
            for method in args.methods.split(","):
                knobs = SHARED[model] | OWN[method, model]
                knobs = {
                    name: value.format(folder=folder) if isinstance(value, str) else value
                    for name, value in knobs.items()
                }
                spec = folder if model == "18M" else model
                rows[method, model] = row = measured(method, dict(knobs, model=spec))
                ratios = {name: round(value, 2) for name, value in row.items() if "ratio" in name}
                print(f"{method} {model}: {ratios}", flush=True)
    table = pd.DataFrame(rows).T
    print(table.round(2).to_string())
    ratios = table[[name for name in table if name.endswith("ratio")]]
    missed = int(((ratios - 1).abs() > BAR).sum().sum())
    print(f"{missed} of {ratios.size} estimates are more than {BAR:.0%} off")
    return int(bool(missed and args.check))


if __name__ == "__main__":
    sys.exit(main())
