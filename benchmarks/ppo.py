"""Compare PPO's step with GRPO's: CPU time and wall-clock time.

    python benchmarks/ppo.py [--repeats 5] [--steps 6] [--threads 1] [--check]

Both have the same prompts, the same completions and one update each.
The methods take turns in one process. With a learning rate of 0 the policy does not change.
So each step of each method samples the same tokens (asserted).
Both have a reference model. PPO also has a critic, as a head on the policy (`shared`) or as a
model of its own (`own`). All run in fp32, without evaluation or checkpoint.
Steps are timed from one written metrics line to the next, without the first one.
With `--check` the exit status is 1 if PPO's step costs more than 1.6 x GRPO's CPU time.
"""

import argparse
import contextlib
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version

import torch

import polm_lab as lab
from polm_lab.alignment import ppo
from polm_lab.training import loop as train
from polm_lab.core.run import Run, all_runs
from polm_lab.reasoning import grpo

BAR = 1.6
SAME = dict(
    data="chat",
    rewards="correct",
    num_generations=4,
    batch_size=32,
    max_new_tokens=64,
    beta=0.05,
    learning_rate=0.0,
    eval_rows=1,
    save_every=0,
    device="cpu",
    dtype="float32",
    seed=0,
)
PPO = dict(epochs=1, minibatches=1)
CASES = {
    "grpo": ("grpo", {}),
    "ppo, shared": ("ppo", PPO | dict(value="shared")),
    "ppo, own": ("ppo", PPO | dict(value="own")),
}


class Over(Exception):
    "Training is over, and nothing else is measured."


def steps_of(name: str, steps: int) -> tuple[list, list]:
    """Return (CPU seconds, wall seconds) of each step but the first, and what was sampled.

    What was sampled is the number of tokens in a completion.
    """
    method, settings = CASES[name]
    marks, log = [], Run.log

    def timed(self, step, **metrics):
        log(self, step, **metrics)
        marks.append((time.process_time(), time.perf_counter()))

    Run.log = timed
    try:
        with tempfile.TemporaryDirectory() as out, contextlib.suppress(Over):
            try:
                lab.run(method, out=out, steps=steps, **SAME, **settings)
            finally:
                lengths = [row["length"] for row in all_runs(out)[0].lines()]
    finally:
        Run.log = log
    return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(marks, marks[1:])], lengths


def columns(repeats: list[list[tuple]]) -> tuple[list, list]:
    "CPU seconds and wall seconds of the steps, each as a list for each repeat."
    cpu, wall = [], []
    for times in repeats:
        cpu.append([step[0] for step in times])
        wall.append([step[1] for step in times])
    return cpu, wall


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def fit(run, settings, policy, updates, loss, evaluate=None):
        train.fit(run, settings, policy, updates, loss)  # without evaluation
        raise Over

    ppo.fit = grpo.fit = fit
    found, lengths = {name: [] for name in CASES}, {}
    for repeat in range(args.repeats):
        for name in CASES:
            times, lengths[name] = steps_of(name, args.steps)
            found[name].append(times)
            print(
                f"  {repeat + 1}/{args.repeats} {name}: "
                f"{statistics.median(cpu for cpu, _ in times):.2f} s of CPU a step",
                file=sys.stderr,
            )
    assert len({tuple(each) for each in lengths.values()}) == 1, (
        f"the methods sampled other tokens: {lengths}"
    )
    print(
        "| method | CPU s a step | wall s a step | CPU, × GRPO (min–max) | wall, × GRPO | bar "
        "|\n|---|---|---|---|---|---|"
    )
    held = True
    for name in CASES:
        cpu, wall = columns(found[name])
        base_cpu, base_wall = columns(found["grpo"])
        ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(cpu, base_cpu)]
        slow = statistics.median(
            statistics.median(a) / statistics.median(b) for a, b in zip(wall, base_wall)
        )
        middle = statistics.median(ratios)
        held &= middle <= BAR
        verdict = "" if name == "grpo" else f"{BAR} {'holds' if middle <= BAR else 'MISSED'}"
        print(
            f"| {name} | {statistics.median(sum(cpu, [])):.3f} | "
            f"{statistics.median(sum(wall, [])):.3f} | {middle:.2f} "
            f"({min(ratios):.2f}–{max(ratios):.2f}) | {slow:.2f} | {verdict} |"
        )
    print(
        f"\n{SAME['batch_size']} completions a step of {statistics.mean(lengths['grpo']):.1f} "
        f"tokens, {args.threads} threads, {args.repeats} repeats of {args.steps} steps, "
        f"Python {platform.python_version()}, torch {version('torch')}, transformers "
        f"{version('transformers')}"
    )
    if args.check and not held:
        sys.exit(1)


if __name__ == "__main__":
    main()
