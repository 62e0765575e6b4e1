"""Measure the waits of the workbench and the command line.

    python benchmarks/workbench.py [--repeats 5] [--check]

Measured are opening large runs, the cockpit, a sweep that continues, and the command line.
Records are written as runs write them, into a temporary folder.
The bars are for wall-clock medians.
The CPU time is printed next to them, since other work on the machine hardly changes it.
Each view is opened once before, so that imports are not counted, and none is sent to a browser.
The case `new point` is one line more in the record, then `refresh`.
A view does that twice a second while a run trains.
The last line is a process of its own, imports included.
With `--check` the exit status is 1 unless every bar holds.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from polm_lab.core.run import Run
from polm_lab.workbench.cockpit import Cockpit
from polm_lab.runner.sweep import create_sweep, plan
from polm_lab.workbench.trials import Sweeps
from polm_lab.workbench.watch import Watch

NAMES = [
    "loss",
    "reward",
    "kl",
    "entropy",
    "length",
    "truncated",
    "accuracy",
    "grad_norm",
    "learning_rate",
    "advantage_std",
    "reward_std",
    "zero_std_groups",
    "clip_fraction",
    "ratio_max",
    "tokens_per_second",
    "memory_mib",
]


def timed(call) -> tuple[float, float]:
    "Wall-clock and CPU seconds of a call, processes that it waits for included."

    def spent() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    wall, cpu = time.perf_counter(), spent()
    call()
    return time.perf_counter() - wall, spent() - cpu


def large_run(out, steps: int, names) -> Run:
    "Return a run with `steps` lines of metrics."
    run = Run.create("example", dict(steps=steps), out=out)
    with open(run.path / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            file.write(
                f'{{"step": {step}, "seconds": {step / 100}, '
                + ", ".join(
                    f'"{name}": {(step * 7919 + k) % 1000 / 1000}' for k, name in enumerate(names)
                )
                + "}\n"
            )
    run.update(status="finished", step=steps)
    return run


def sampled_run(out, rows: int) -> Run:
    "Return a run with `rows` completions of 48 tokens in groups of eight, as GRPO has them."
    run = Run.create(
        "grpo", dict(steps=rows // 64, rewards="correct:1,format:0.2", max_new_tokens=48), out=out
    )
    for step in range(rows // 64):
        run.log(step + 1, reward=0.5)
        run.sample(
            step + 1,
            [
                dict(
                    group=i // 8,
                    prompt=f"{i // 8}{step}+{step}=",
                    completion="because 2+2=4 " * 6,
                    reward=i % 8 / 8,
                    rewards={"correct": i % 8 / 8, "format": 0.0},
                    advantage=i % 8 / 4 - 0.9,
                    tokens=["4 "] * 48,
                    logp=[-0.5] * 48,
                    ref_logp=[-0.7] * 48,
                    old_logp=[-0.5] * 48,
                    ended=True,
                )
                for i in range(64)
            ],
        )
    run.update(status="finished")
    return run


def opening(view, run, repeats: int) -> list[tuple]:
    return [timed(lambda: view(run)) for _ in range(repeats + 1)][1:]


def growing(run, repeats: int) -> list[tuple]:
    "Time `refresh` after each new line of the record; the view stays open."
    view, times, names = (
        Watch(run),
        [],
        [n for n in run.last_line() if n not in ("step", "seconds")],
    )
    for k in range(repeats + 1):
        run.log(run.last_line()["step"] + 1, **{n: 0.1 * k for n in names})
        times.append(timed(view.refresh))
    return times[1:]


def sweeping(out, trials: int, repeats: int) -> tuple[list, list, list]:
    """Measure a sweep: opening it, a refresh after one trial more, and one with nothing new.

    Half of its trials are over when it is opened.
    """
    sweep = create_sweep(
        plan(
            "sft",
            {"learning_rate": [1e-6 * (n + 1) for n in range(trials // 2)], "batch_size": [8, 16]},
            {"steps": 20},
        ),
        out,
    )
    for trial in sweep.trials:
        trial["run"] = f"20260101-000000-sft-{trial['number']:04x}"
    over = lambda n: sweep.trials[n].update(
        status="finished", value=0.5 + n / 1000, step=20, seconds=3.0
    )
    for n in range(trials // 2):
        over(n)
    sweep.save()
    opened = opening(Sweeps, out, repeats)
    view, more, nothing = Sweeps(out), [], []
    for n in range(trials // 2, trials // 2 + repeats + 1):
        over(n)
        sweep.save()
        more.append(timed(view.refresh))
        nothing.append(timed(view.refresh))
    return opened, more[1:], nothing[1:]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    polm, lines = Path(sys.executable).parent / "polm", []
    with tempfile.TemporaryDirectory() as out:
        for words, steps, names in (
            ("1,000,000 steps × 1 metric", 10**6, NAMES[:1]),
            ("62,500 steps × 16 metrics", 62_500, NAMES),
        ):
            run = large_run(out, steps, names)
            lines.append((f"open a run, {words}", opening(Watch, run, a.repeats), 2.0))
            lines.append((f"new point, {words}", growing(run, a.repeats), 0.1))
        lines.append(
            (
                "open the cockpit, 640 samples",
                opening(Cockpit, sampled_run(out, 640), a.repeats),
                1.0,
            )
        )
        opened, more, nothing = sweeping(out, 200, a.repeats)
        lines += [
            ("open a sweep of 200 trials", opened, 1.0),
            ("one of 200 trials more is over", more, 0.1),
            ("nothing new in 200 trials", nothing, 0.1),
        ]
    lines.append(
        (
            "polm --help",
            [
                timed(lambda: subprocess.run([polm, "--help"], check=True, capture_output=True))
                for _ in range(a.repeats + 1)
            ][1:],
            0.5,
        )
    )
    print(f"{'':44}{'median, ms':>12}{'slowest, ms':>13}{'CPU, ms':>9}{'bar, ms':>9}")
    missed = []
    for name, times, bar in lines:
        walls, cpu = zip(*times)
        holds = statistics.median(walls) <= bar
        print(
            f"{name:44}{1000 * statistics.median(walls):12.0f}{1000 * max(walls):13.0f}"
            f"{1000 * statistics.median(cpu):9.0f}{1000 * bar:9.0f} "
            f" {'holds' if holds else 'MISSED'}"
        )
        missed += [] if holds else [name]
    if missed:
        print(f"\nmissed: {', '.join(missed)}", file=sys.stderr)
    return int(a.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
