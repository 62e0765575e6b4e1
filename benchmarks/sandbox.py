"""Measure executions a second in the sandbox, against bare Python and the bare isolator.

    python benchmarks/sandbox.py [--number 200] [--workers 2] [--check]

With `--check` the exit status is 1 if the pool gives fewer than 50 executions a second.
"""

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from polm_lab.rewards.sandbox import Pool, isolator, run_code

BAR = 50
TESTS = "assert rev([1, 2, 3]) == [3, 2, 1]\nassert rev([]) == []\nassert rev('ab') == 'ba'"
RIGHT = "import re, math\nfrom collections import Counter\ndef rev(x):\n    return x[::-1]"
WRONG = "import re, math\nfrom collections import Counter\ndef rev(x):\n    return x"


def rate(number: int, call) -> float:
    began = time.perf_counter()
    call(number)
    return number / (time.perf_counter() - began)


def side_by_side(workers: int, words: list[str]):
    def call(number):
        with ThreadPoolExecutor(workers) as threads:
            list(
                threads.map(
                    lambda _: subprocess.run(words, capture_output=True, env={}), range(number)
                )
            )

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=200, help="executions in each measurement")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit 1 if the bar is missed")
    args = parser.parse_args()
    print(f"{isolator()}, {args.workers} workers, {args.number} executions each\n")
    python, jail = (
        [sys._base_executable, "-I", "-S", "-c"],
        ["bwrap", "--unshare-all", "--ro-bind", "/", "/"],
    )
    with Pool(args.workers, seconds=10) as pool:
        rows = {
            "a program that only exists, without a sandbox": side_by_side(
                args.workers, [*python, "pass"]
            ),
            "the isolator around `true`": side_by_side(args.workers, [*jail, "true"]),
            "the isolator around that program": side_by_side(
                args.workers, [*jail, *python, "pass"]
            ),
            "pool, the same program": lambda n: pool.map(["pass"] * n),
            "pool, a right function and its tests": lambda n: pool.map(
                [RIGHT] * n, tests=[TESTS] * n
            ),
            "pool, a wrong function, with its traceback": lambda n: pool.map(
                [WRONG] * n, tests=[TESTS] * n
            ),
            "one after another, the same program": lambda n: [run_code("pass") for _ in range(n)],
        }
        print("| what | executions/s |\n|---|---|")
        found = {}
        for name, call in rows.items():
            found[name] = rate(args.number, call)
            print(f"| {name} | {found[name]:.0f} |", flush=True)
    slowest = min(value for name, value in found.items() if name.startswith("pool"))
    print(
        f"\nbar: {BAR} executions/s in the pool: {'holds' if slowest >= BAR else 'missed'} "
        f"({slowest:.0f})"
    )
    return int(args.check and slowest < BAR)


if __name__ == "__main__":
    sys.exit(main())
