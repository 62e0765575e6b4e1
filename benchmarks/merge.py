"""Compare merging with mergekit: wall time, peak memory, and equal results.

    python benchmarks/merge.py [--mergekit PATH] [--algorithms linear,slerp,ties,dare]
                               [--repeats 3] [--folder DIR] [--large] [--check]

Both merge the same three models of 220 M bf16 weights; the time is that of the whole command.
An environment of its own holds mergekit:
`python -m venv ENV && ENV/bin/pip install -c constraints.txt mergekit`.
PATH is then `ENV/bin/mergekit-yaml` (or $MERGEKIT).
`--algorithms ''` compares results only, on small models. Ours is `polm run merge --bare`.
The two take turns, each in a process of its own, with the inputs in the page cache.
*CPU* is user and system time, which hardly depends on what else runs.
*Peak* is the largest resident set, mapped files included.
*Limit* is the time to read all inputs once and write one output.
`--folder` keeps the models for another time.

TIES keeps the k largest changes of a tensor.
Changes of bf16 weights have few distinct values: several per cent equal the k-th largest.
Which of those are kept depends on the sort. Ours keeps the ones that come first.
mergekit keeps those that torch's sort, which is not stable, puts first.
So TIES is compared twice. With mergekit as it is, entries may differ only where their change
equals the threshold in one of the models. With a stable sort in mergekit, none may differ.

`--large` merges two models of 4.3 GB each by ours alone and watches its memory (13 GB of disk).
With `--check` the exit status is 1 unless ours is at least 2 x as fast and results are equal.
Its peak must also be at most mergekit's and at most 1 GiB + the largest tensor.
Equal means: linear and SLERP within one bf16 rounding, TIES with the same mask and signs.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
import torch

from polm_lab.core.machine import data_folder
from polm_lab.models.weights import Weights, blocks
from polm_lab.models.transform import Writer, walk

POLM = Path(sys.executable).parent / "polm"
SIZES = {
    "200M": dict(width=1024, inner=2816, layers=12, words=32_000),
    "small": dict(width=256, inner=640, layers=3, words=1024),
    "4GB": dict(width=2560, inner=6912, layers=26, words=32_000),
}
DENSITY = 0.4
# mergekit's usual way: all of it in the models' type
DTYPE = dict(linear="bfloat16", slerp="bfloat16", ties="bfloat16", dare="bfloat16")


def shapes(width, inner, layers, words):
    "Names and shapes of a Llama without tied head."
    found = {
        "model.embed_tokens.weight": (words, width),
        "lm_head.weight": (words, width),
        "model.norm.weight": (width,),
    }
    for i in range(layers):
        at = f"model.layers.{i}."
        found |= {at + f"self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        found |= {
            at + "mlp.gate_proj.weight": (inner, width),
            at + "mlp.up_proj.weight": (inner, width),
            at + "mlp.down_proj.weight": (width, inner),
        }
        found |= {at + f"{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    return found


def make(folder: Path, size: str, seed: int, base: Path | None = None, dtype=torch.bfloat16):
    "Save a model of random weights; with `base`, that model with noise, like a fine-tuned one."
    s = SIZES[size]
    plan = {name: (dtype, shape) for name, shape in shapes(**s).items()}
    old = Weights(base) if base else None
    config = json.loads((data_folder() / "tiny" / "config.json").read_text())
    config |= dict(
        hidden_size=s["width"],
        intermediate_size=s["inner"],
        num_hidden_layers=s["layers"],
        vocab_size=s["words"],
        num_attention_heads=s["width"] // 64,
        num_key_value_heads=s["width"] // 64,
        head_dim=64,
        tie_word_embeddings=False,
    )
    with Writer(folder, plan, data_folder() / "tiny", config) as writer:

        def one(item):
            number, name = item
            tile = (
                torch.randn(1 << 20, generator=torch.Generator().manual_seed(1000 * seed + number))
                if size != "4GB"
                else noise
            )
            for start, stop in blocks(plan[name][1]):
                shape = (stop - start, *plan[name][1][1:])
                at, entries = start * 7919 % (tile.numel() // 2), math.prod(shape)
                rows = tile[at : at + entries].view(shape)
                rows = (
                    rows * 0.02
                    if old is None
                    else old.read(name, start, stop).float() + rows * 0.002
                )
                writer.write(name, rows, start)
                if old:
                    old.release(name, start, stop)

        noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed))
        walk(enumerate(plan), one)


def timed(command: list, watch: list | None = None, **env) -> tuple[float, float, float]:
    """Return (wall seconds, CPU seconds, peak MiB) of a process.

    Ten times a second `watch` gets (seconds, resident MiB, resident MiB that are not mapped).
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [str(w) for w in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
        )
        over = threading.Event()

        def look():
            while not over.wait(0.1):
                lines = dict(
                    line.split(":", 1)
                    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
                    if ":" in line
                )
                if "VmRSS" in lines:
                    watch.append(
                        (
                            time.monotonic() - began,
                            int(lines["VmRSS"].split()[0]) / 1024,
                            int(lines["RssAnon"].split()[0]) / 1024,
                        )
                    )

        if watch is not None:
            threading.Thread(target=look, daemon=True).start()
        _, status, used = os.wait4(process.pid, 0)
        over.set()
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            output.seek(0)
            sys.exit(f"{' '.join(map(str, command))}\n{output.read().decode()[-3000:]}")
    return time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def ours(algorithm, folder, out: Path, extra=()):
    spec = dict(
        model=folder / "base",
        models=f"{folder / 'a'},{folder / 'b'}",
        algorithm=algorithm,
        tasks="",
        scaling=1.0,
        density=DENSITY,
        weights="0.6,0.4",
        **dict(extra),
    )
    return [
        POLM,
        "run",
        "merge",
        "--bare",
        "--out",
        out,
        *(w for k, v in spec.items() for w in ("-p", k, v)),
    ]


STABLE = """
import torch
sort = torch.argsort
torch.argsort = lambda *words, **more: sort(*words, **{**more, "stable": True})
from mergekit.scripts.run_yaml import main
main()
"""


def theirs(
    algorithm, folder, out: Path, mergekit, dtype: str, out_dtype: str, stable: bool = False
):
    name = dict(
        linear="linear",
        slerp="slerp",
        ties="ties",
        dare="dare_linear",
        task_arithmetic="task_arithmetic",
    )[algorithm]
    weights = (
        ""
        if algorithm == "slerp"
        else f"parameters: {{{{weight: {{w}}, density: {DENSITY}}}}}"
        if algorithm in ("ties", "dare")
        else "parameters: {{weight: {w}}}"
    )
    models = "".join(
        f"  - model: {folder / m}\n" + (f"    {weights.format(w=w)}\n" if weights else "")
        for m, w in (("a", 0.6), ("b", 0.4))
    )
    base = (
        ""
        if algorithm == "linear"
        else f"base_model: {folder / ('a' if algorithm == 'slerp' else 'base')}\n"
    )
    more = "parameters: {t: 0.4}\n" if algorithm == "slerp" else ""
    file = out.with_suffix(".yml")
    file.write_text(
        f"merge_method: {name}\nmodels:\n{models}{base}{more}dtype: {dtype}\nout_dtype: "
        f"{out_dtype}\n"
    )
    return [
        *([Path(mergekit).parent / "python", "-c", STABLE] if stable else [mergekit]),
        file,
        out,
        "--quiet",
    ]


def compare(algorithm, a: Path, b: Path, folder: Path, density: float) -> dict:
    """Return how two results differ: in roundings, and in mask or sign.

    A rounding is the spacing of their type at the size of the largest input. Another mask or sign
    is an entry of the base that was changed in another direction, or not by both.
    For TIES, `at_threshold` is the number of entries whose change equals the threshold of its
    model, and `elsewhere` are both figures without those.
    """
    first, second, inputs = (
        Weights(a),
        Weights(b),
        [Weights(folder / name) for name in ("base", "a", "b")],
    )
    assert first.entries.keys() == second.entries.keys()
    found = dict(
        algorithm=algorithm, entries=0, largest_difference_in_roundings=0.0, other_mask_or_sign=0
    )
    elsewhere = (
        dict(at_threshold=0, roundings_elsewhere=0.0, other_mask_or_sign_elsewhere=0)
        if algorithm.startswith("ties")
        else {}
    )
    for name, entry in first.entries.items():
        x, y, base, *tunes = (w.read(name).float() for w in (first, second, *inputs))
        scale = torch.stack([part.abs() for part in (x, base, *tunes)]).amax(0)
        spacing = torch.exp2(
            torch.frexp(scale).exponent.float() - (8 if entry.dtype == torch.bfloat16 else 24)
        )
        far, other = (
            (x - y).abs() / spacing.clamp_min(1e-38),
            (x - base).sign() != (y - base).sign(),
        )
        found["entries"] += x.numel()
        found["largest_difference_in_roundings"] = max(
            found["largest_difference_in_roundings"], round(far.max().item(), 3)
        )
        found["other_mask_or_sign"] += other.sum().item()
        if elsewhere:
            keep = max(1, int(density * x.numel()))
            thresholds = [(tune - base).abs().flatten().topk(keep).values[-1] for tune in tunes]
            clear = ~torch.stack(
                [(tune - base).abs() == value for tune, value in zip(tunes, thresholds)]
            ).any(0)
            elsewhere["at_threshold"] += (~clear).sum().item()
            elsewhere["roundings_elsewhere"] = max(
                elsewhere["roundings_elsewhere"], round((far * clear).max().item(), 3)
            )
            elsewhere["other_mask_or_sign_elsewhere"] += (other & clear).sum().item()
    return found | elsewhere


def limit(folder: Path, out: Path, models: int) -> float:
    "Seconds to read the inputs once and write one output."
    began, buffer = time.monotonic(), bytearray(1 << 23)
    with open(out, "wb", buffering=0) as target:
        for number, name in enumerate(("base", "a", "b")[-models:]):
            with open(folder / name / "model.safetensors", "rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    if not number:
                        target.write(memoryview(buffer)[:count])
    seconds = time.monotonic() - began
    out.unlink()
    return seconds


def large(folder: Path) -> dict:
    make(folder / "base", "4GB", 1)
    make(folder / "a", "4GB", 2, folder / "base")
    watch, out = [], folder / "runs"
    command = [
        POLM,
        "run",
        "merge",
        "--bare",
        "--out",
        out,
        *"-p algorithm linear -p tasks  -p weights 1,2".split(" "),
        "-p",
        "model",
        folder / "base",
        "-p",
        "models",
        f"{folder / 'base'},{folder / 'a'}",
    ]
    seconds, cpu, peak = timed(command, watch)
    size = Weights(folder / "base")
    quarter = []
    for i in range(4):
        part = watch[len(watch) * i // 4 : len(watch) * (i + 1) // 4]
        quarter.append(max(m[1] for m in part))
    return {
        "bytes of each, GB": round(size.size / 1e9, 2),
        "seconds": round(seconds),
        "CPU s": round(cpu),
        "peak MiB": round(peak),
        "largest tensor MiB": round(max(e.size for e in size.entries.values()) / 2**20),
        "peak by quarter of the time, MiB": [round(q) for q in quarter],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", default=os.environ.get("MERGEKIT", ""))
    parser.add_argument("--algorithms", default="linear,slerp,ties,dare")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the models are, or are made and left")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    missed, models, names = [], {}, [name for name in args.algorithms.split(",") if name]
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        if args.large:
            print(json.dumps(large(place)))
            return
        for part, size, dtype in (
            ("float32", "small", torch.float32),
            ("bfloat16", "small", torch.bfloat16),
            ("200M", "200M", torch.bfloat16),
        )[: 3 if names else 2]:
            models[part] = folder = (args.folder or place) / part
            for seed, name in ((1, "base"), (2, "a"), (3, "b")):
                if not (folder / name).exists():
                    make(
                        folder / name,
                        size,
                        seed,
                        folder / "base" if name != "base" else None,
                        dtype,
                    )
        weights = Weights(folder / "base")
        largest = max(e.size for e in weights.entries.values()) / 2**20
        if names:
            print(
                f"{sum(e.size for e in weights.entries.values()) / 2e6:.0f} M weights, bf16; "
                f"largest tensor {largest:.0f} MiB; mergekit "
                f"{'not given: ours alone' if not args.mergekit else ''}"
            )
            print(
                "| algorithm | ours, s | mergekit, s | mergekit / ours (min–max) | CPU s | peak "
                "MiB | limit, s |\n|---|---|---|---|---|---|---|",
                flush=True,
            )
        for algorithm in names:
            measured, limits = [], []
            for repeat in range(args.repeats):
                mine = timed(ours(algorithm, folder, place / "runs"))
                other = (
                    timed(
                        theirs(
                            algorithm,
                            folder,
                            place / "theirs",
                            args.mergekit,
                            DTYPE[algorithm],
                            "bfloat16",
                        )
                    )
                    if args.mergekit
                    else (0, 0, 0)
                )
                limits.append(
                    limit(folder, place / "copy", 2 if algorithm in ("linear", "slerp") else 3)
                )
                measured.append((mine, other))
            # for ours and theirs: medians of wall time, CPU time and peak
            column = []
            for each in zip(*measured):
                column.append([statistics.median(figures) for figures in zip(*each)])
            ratios = sorted(other[0] / mine[0] for mine, other in measured)
            print(
                f"| {algorithm} | {column[0][0]:.1f} | {column[1][0]:.1f} | "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) | "
                f"{column[0][1]:.1f} : {column[1][1]:.1f} | {column[0][2]:.0f} : "
                f"{column[1][2]:.0f} | {statistics.median(limits):.2f} |",
                flush=True,
            )
            if (
                args.mergekit
                and (statistics.median(ratios) < 2 or column[0][2] > column[1][2])
                or column[0][2] > 1024 + largest
            ):
                missed.append(algorithm)
        if args.mergekit:
            print("\nEqual results")
            # 2.8 M weights; mergekit computes in fp32 as we do
            for dtype in ("float32", "bfloat16"):
                for algorithm in (
                    "linear",
                    "slerp",
                    "task_arithmetic",
                    "ties",
                    "ties, stable sort",
                ):
                    name, stable = algorithm.split(",")[0], "stable" in algorithm
                    timed(ours(name, models[dtype], place / "equal"))
                    timed(
                        theirs(
                            name,
                            models[dtype],
                            place / "theirs",
                            args.mergekit,
                            "float32",
                            dtype,
                            stable,
                        )
                    )
                    newest = max((place / "equal").iterdir(), key=lambda p: p.stat().st_mtime_ns)
                    found = compare(
                        algorithm, newest / "model", place / "theirs", models[dtype], DENSITY
                    )
                    print(json.dumps(dict(dtype=dtype, **found)), flush=True)
                    ending = "_elsewhere" if algorithm == "ties" else ""
                    roundings = "roundings" if ending else "largest_difference_in_roundings"
                    far, other = found[roundings + ending], found["other_mask_or_sign" + ending]
                    # in fp32 sums are in another order, and mergekit takes the angle in fp32
                    bad = far > (1 if dtype == "bfloat16" else 64)
                    missed += [f"{algorithm} differs"] * (bad or name == "ties" and other > 0)
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    sys.exit(int(args.check and bool(missed)))


if __name__ == "__main__":
    main()
