"""Measure a training step next to a second run, with the wait of torch's threads as it is and as we set it.

    python benchmarks/busy.py [--steps 10] [--repeats 3] [--check]

A thread that waits for the others runs in a loop first: 300,000 times in libgomp, 1,000 times here.
Each measurement is a process of its own. The two waits take turns, alone and next to a second run
of the same kind. Bar: next to it, at most two thirds of the library's time.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

WAITS = {"library": "300000", "ours": "1000"}


def measure(steps: int):
    "Train the embedded model for a few steps in this process and print the seconds of one."
    import torch

    from polm_lab.models.load import load_model

    torch.set_num_threads(2)
    model = load_model("tiny", dtype="float32", device="cpu").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(1024, (16, 64), generator=torch.Generator().manual_seed(0))
    for step in range(steps + 1):  # the first warms up
        if step == 1:
            began = time.perf_counter()
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    print((time.perf_counter() - began) / steps)


def started(wait: str, steps: int) -> subprocess.Popen:
    "Start a process whose threads wait so, and which trains for some steps."
    words = [sys.executable, "-P", __file__, "--child", f"--steps={steps}"]
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    env["GOMP_SPINCOUNT"] = wait
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def timed(wait: str, steps: int, beside: bool) -> float:
    "Return the seconds of a step, alone or next to a second run."
    second = started(wait, 10**6) if beside else None
    try:
        return float(started(wait, steps).communicate()[0])
    finally:
        if second:
            second.kill()
            second.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit 1 if the bar is missed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        measure(a.steps)
        return 0
    found = {}
    for beside in (False, True):
        for _ in range(a.repeats):
            for name, wait in WAITS.items():
                found.setdefault((beside, name), []).append(timed(wait, a.steps, beside))
    print("| | library, s | ours, s | library / ours |\n|---|---|---|---|")
    ratios = {}
    for beside in (False, True):
        theirs, ours = (statistics.median(found[beside, name]) for name in WAITS)
        ratios[beside] = theirs / ours
        place = "next to a second run" if beside else "alone"
        print(f"| {place} | {theirs:.3f} | {ours:.3f} | {ratios[beside]:.2f} |")
    return int(a.check and ratios[True] < 1.5)


if __name__ == "__main__":
    sys.exit(main())
