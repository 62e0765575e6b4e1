"""Run every benchmark of this folder, each in a process of its own, and print the tables.

    python benchmarks/run.py [NAME ...] [--quick] [--check]

NAME is the name of a file of this folder; the default is all of them.
With `--quick` a benchmark that repeats has one repeat.
With `--check` the exit status is 1 if a bar is missed.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    known = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "run")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(known))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(known)}")
    failed = []
    for name in args.names or known:
        path = HERE / f"{name}.py"
        takes = path.read_text()
        words = [
            flag
            for flag, wanted in (("--check", args.check), ("--repeats=1", args.quick))
            if wanted and flag.split("=")[0] in takes
        ]
        print(f"\n## {name}\n", flush=True)
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-P", str(path), *words]).returncode
        print(f"\n{name}: {time.monotonic() - began:.0f} s, exit {code}", flush=True)
        failed += [name] * bool(code)
    if failed:
        print(f"\nfailed, or missed a bar: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
