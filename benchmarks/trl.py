"""Compare SFT, DPO, reward models, GRPO and RLOO with TRL's trainers.

    python benchmarks/trl.py [--methods sft,dpo,reward,grpo,rloo] [--models tiny,18M]
                             [--repeats 5] [--threads 2] [--check]

It measures steps per second and peak memory on the same model, data and settings.
Each measurement is a process of its own; the two engines take turns.
`ours` is `engine="lab"`. `TRL` is `engine="trl"`.
The latter gives the same settings, rows and order to TRL's public trainer.
Both use fp32 and fused AdamW, without evaluation or checkpoint within the timed steps.
Both write metrics at each step.
Threads wait as torch has them wait, as they do for users; CPU time includes that waiting.
Steps are timed from one written metrics line to the next, without the first ones.
Linux only. With `--check` the exit status is 1 unless the bars hold.
SFT, DPO and reward models need at least 1.0 x TRL's steps per second, GRPO and RLOO 1.5 x.
Peak memory may be at most TRL's.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

# this file must not hide the package trl
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
BARS = {"sft": 1.0, "dpo": 1.0, "reward": 1.0, "grpo": 1.5, "rloo": 1.5}
WARM = 3  # first steps, which are not timed
COMMON = dict(
    device="cpu",
    dtype="float32",
    seed=0,
    schedule="constant",
    warmup=0.0,
    eval_rows=1,
    save_every=0,
)
CASES = {  # (method, model): settings
    ("sft", "tiny"): dict(data="chat", steps=23, batch_size=16, max_length=256, learning_rate=1e-3),
    ("dpo", "tiny"): dict(
        data="chat", steps=23, batch_size=8, max_length=256, learning_rate=1e-4, reference="copy"
    ),
    ("reward", "tiny"): dict(
        data="chat", steps=23, batch_size=8, max_length=256, learning_rate=1e-3
    ),
    ("grpo", "tiny"): dict(
        data="sums",
        steps=23,
        batch_size=64,
        num_generations=8,
        max_new_tokens=32,
        learning_rate=3e-4,
        beta=0.04,
    ),
    ("rloo", "tiny"): dict(
        data="sums",
        steps=23,
        batch_size=64,
        num_generations=8,
        max_new_tokens=32,
        learning_rate=3e-4,
        beta=0.05,
    ),
    ("sft", "18M"): dict(steps=13, batch_size=8, max_length=256, learning_rate=1e-4),
    ("dpo", "18M"): dict(
        steps=9, batch_size=4, max_length=256, learning_rate=1e-5, reference="copy"
    ),
    ("reward", "18M"): dict(steps=9, batch_size=4, max_length=256, learning_rate=1e-5),
    ("grpo", "18M"): dict(
        steps=7,
        batch_size=32,
        num_generations=8,
        max_new_tokens=64,
        max_length=256,
        learning_rate=1e-5,
        beta=0.04,
        rewards="{folder}/reward.py:even",
    ),
    ("rloo", "18M"): dict(
        steps=7,
        batch_size=32,
        num_generations=8,
        max_new_tokens=64,
        max_length=256,
        learning_rate=1e-5,
        beta=0.05,
        rewards="{folder}/reward.py:even",
    ),
}
WORDS = 32_000  # vocabulary of the larger model


def make_model(folder: Path):
    """Save a random Llama of 18 M weights (tied head), and data for it.

    Its vocabulary has 32,000 whole words.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<s>", "</s>", "<pad>", "<unk>", *(f"w{i}" for i in range(WORDS - 4))]
    vocabulary = {token: i for i, token in enumerate(names)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    rng = random.Random(0)

    def words(low, high):
        return " ".join(
            f"w{int(rng.paretovariate(0.5)) % (WORDS - 4)}" for _ in range(rng.randint(low, high))
        )

    rows = [dict(prompt=words(20, 80), a=words(20, 150), b=words(20, 150)) for _ in range(256)]
    kinds = {
        "sft": [dict(prompt=r["prompt"], completion=" " + r["a"]) for r in rows],
        "dpo": [dict(prompt=r["prompt"], chosen=" " + r["a"], rejected=" " + r["b"]) for r in rows],
        "grpo": [dict(prompt=r["prompt"]) for r in rows],
        "rloo": [dict(prompt=r["prompt"]) for r in rows],
    }
    kinds["reward"] = kinds["dpo"]
    for method, data in kinds.items():
        (folder / f"{method}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (folder / "reward.py").write_text(
        "def even(prompts, completions, **columns):\n"
        "    return [sum(int(w[1:]) % 2 == 0 for w in c.split() if w[1:].isdigit()) / max(1, "
        "len(c.split())) for c in completions]\n"
    )


def settings_of(method: str, model: str, folder: str) -> dict:
    case = {
        k: v.format(folder=folder) if isinstance(v, str) else v
        for k, v in CASES[method, model].items()
    }
    return {
        **COMMON,
        **case,
        **({} if model == "tiny" else dict(model=folder, data=f"{folder}/{method}.jsonl")),
    }


def gemm_speed(rows: int, width: int, inner: int) -> float:
    "Measured GFLOP/s of an fp32 product [rows, width] x [width, inner]."
    import torch

    a, b = torch.randn(rows, width), torch.randn(width, inner)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2e-9 * rows * width * inner / min(times)


def one(args):
    "In a child process: run one method with one engine, print what was measured as JSON."
    import torch

    import polm_lab as lab
    from polm_lab.training import engine
    from polm_lab.training import loop as train
    from polm_lab.core.method import find
    from polm_lab.models.attach import count_parameters
    from polm_lab.models.load import load_model
    from polm_lab.core.run import Run, all_runs

    torch.set_num_threads(args.threads)
    found = find(args.method)
    module = sys.modules[found.function.__module__]

    class Over(Exception):
        "Training is over, and nothing else is measured."

    def fit(run, settings, policy, updates, loss, evaluate=None):
        train.fit(run, settings, policy, updates, loss)
        raise Over

    def train_with_trl(run, settings, trainer, policy, tokenizer, rows, evaluate=None, **more):
        engine.train_with_trl(run, settings, trainer, policy, tokenizer, rows, **more)
        raise Over

    module.fit, module.train_with_trl = fit, train_with_trl  # neither engine evaluates
    marks, log = [], Run.log

    def timed(self, step, **metrics):
        log(self, step, **metrics)
        marks.append(
            (
                time.perf_counter(),
                time.process_time(),
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            )
        )

    Run.log = timed
    with tempfile.TemporaryDirectory() as out:
        settings = settings_of(args.method, args.model, args.folder)
        with contextlib.suppress(Over):
            lab.run(args.method, out=out, engine=args.engine, **settings)
        rows = all_runs(out)[0].lines()
        steps = len(marks) - WARM
        measured = dict(
            wall=[(b[0] - a[0]) for a, b in zip(marks[WARM - 1 :], marks[WARM:])],
            cpu=(marks[-1][1] - marks[WARM - 1][1]) / steps,
            peak=marks[-1][2],
            loss=[rows[0]["loss"], rows[-1]["loss"]],
            length=statistics.mean(r.get("length", 0) for r in rows[WARM:]),
        )
        if args.engine == "lab" and args.method == "sft":
            model = load_model(settings.get("model", "tiny"), device="cpu", dtype="float32")
            tokens = statistics.mean(
                r["tokens_per_second"] * w for r, w in zip(rows[WARM:], measured["wall"])
            )
            width = model.config.hidden_size
            measured |= dict(
                tokens=tokens,
                weights=count_parameters(model),
                gemm=gemm_speed(int(tokens), width, 4 * width),
            )
    print("MEASURED " + json.dumps(measured))


def measure(method: str, model: str, engine: str, args, folder: str) -> dict:
    "Start `one` in a process and add what the operating system says of it."
    words = [
        sys.executable,
        __file__,
        "--one",
        "--methods",
        method,
        "--models",
        model,
        "--engine",
        engine,
        "--folder",
        folder,
        "--threads",
        str(args.threads),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
    }
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(words, stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        whole = time.perf_counter() - began
        out.seek(0), err.seek(0)
        line = next((line for line in out if line.startswith("MEASURED ")), None)
        if child.returncode or line is None:
            raise RuntimeError(f"{' '.join(words)} failed:\n{err.read()[-3000:]}")
    found = json.loads(line.removeprefix("MEASURED "))
    return dict(
        found,
        step=statistics.mean(found["wall"]),
        whole=whole,
        whole_cpu=usage.ru_utime + usage.ru_stime,
        rss=usage.ru_maxrss / 1024,
    )


def middle(values) -> float:
    return statistics.median(values)


def compare(method: str, model: str, args, folder: str) -> dict:
    "Both engines in turn, `repeats` times; medians of each and of the ratio pair by pair."
    found = {"lab": [], "trl": []}
    for repeat in range(args.repeats):
        for engine in ("lab", "trl") if repeat % 2 == 0 else ("trl", "lab"):
            found[engine].append(measure(method, model, engine, args, folder))
            print(
                f"  {method} {model} {engine}: {1 / found[engine][-1]['step']:.2f} steps/s",
                file=sys.stderr,
            )
    ours, theirs = found["lab"], found["trl"]
    ratios = [t["step"] / o["step"] for o, t in zip(ours, theirs)]
    row = dict(
        method=method,
        model=model,
        ours=1 / middle([m["step"] for m in ours]),
        trl=1 / middle([m["step"] for m in theirs]),
        ratio=middle(ratios),
        low=min(ratios),
        high=max(ratios),
        cpu_ratio=middle([t["cpu"] / o["cpu"] for o, t in zip(ours, theirs)]),
        whole=(middle([m["whole"] for m in ours]), middle([m["whole"] for m in theirs])),
        rss=(max(m["peak"] for m in ours), max(m["peak"] for m in theirs)),
        length=(ours[0]["length"], theirs[0]["length"]),
        loss=(ours[0]["loss"], theirs[0]["loss"]),
    )
    row["holds"] = row["ratio"] >= BARS[method] and row["rss"][0] <= row["rss"][1]
    if "gemm" in ours[0]:
        best = min(m["step"] for m in ours)
        row["limit"] = dict(
            weights=ours[0]["weights"],
            tokens=ours[0]["tokens"],
            gemm=max(m["gemm"] for m in ours),
            achieved=6e-9 * ours[0]["weights"] * ours[0]["tokens"] / best,
        )
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default="sft,dpo,reward,grpo,rloo")
    parser.add_argument("--models", default="tiny,18M")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.method, args.model = args.methods, args.models
        one(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        rows = [
            compare(method, model, args, folder)
            for method in args.methods.split(",")
            for model in args.models.split(",")
        ]
    print(
        "| method | model | ours, steps/s | TRL, steps/s | ours / TRL (min–max) | CPU time TRL / "
        "ours | whole process, s | peak memory, MiB | bar |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['method']} | {r['model']} | {r['ours']:.2f} | {r['trl']:.2f} | "
            f"{r['ratio']:.2f} ({r['low']:.2f}–{r['high']:.2f}) | {r['cpu_ratio']:.2f} "
            f"| {r['whole'][0]:.1f} : {r['whole'][1]:.1f} | {r['rss'][0]:.0f} : {r['rss'][1]:.0f} "
            f"| {BARS[r['method']]:.1f} {'holds' if r['holds'] else 'MISSED'} |"
        )
    print()
    for r in rows:
        if "limit" in r:
            print(
                (
                    "{method} {model}: {weights:,} weights, {tokens:.0f} tokens a step, product at "
                    "{gemm:.0f} GFLOP/s, achieved 6NT/t = {achieved:.0f} GFLOP/s"
                ).format(**r, **r["limit"])
            )
        print(
            f"{r['method']} {r['model']}: loss first to last ours {r['loss'][0][0]:.4f} → "
            f"{r['loss'][0][1]:.4f}, TRL {r['loss'][1][0]:.4f} → {r['loss'][1][1]:.4f}"
            + (
                f"; tokens of a completion {r['length'][0]:.1f} : {r['length'][1]:.1f}"
                if r["length"][0]
                else ""
            )
        )
    print(
        f"{args.threads} threads, {args.repeats} repeats, Python {platform.python_version()}, "
        + ", ".join(
            f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "accelerate")
        )
    )
    if args.check and not all(r["holds"] for r in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
