"""Put faults into a copy of the package, one by one, and report those that no test sees.

    make mutate
    python tests/mutate.py                    # all of them
    python tests/mutate.py ppo 'kl_estimate'  # those with one of the words in file, text or tests

`mutations.csv` lists them. Its columns are:

- `file`: below the root
- `before`: a text that occurs there once, up to white space
- `after`: the text that replaces it
- `tests`: pytest's words, as in a shell

Exit status 1 if a fault lives, if a text is not found once, or if a test fails without any fault.
"""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
SEEN, LIVES = 1, 0  # exit statuses of pytest: a test failed, all passed


def mutations(words: list[str]) -> list[dict]:
    "The rows of mutations.csv, or those that have one of `words`."
    with open(ROOT / "tests" / "mutations.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not words:
        return rows
    found = []
    for row in rows:
        text = " ".join(row.values())
        if any(word in text for word in words):
            found.append(row)
    return found


def copy_of_package(folder: Path) -> Path:
    "Copy the package to `folder`, with the data and notebooks that it needs next to it."
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "polm_lab", folder / "polm_lab", ignore=ignored)
    for name in ("data", "nbs", "settings.ini"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def status_of(tests: str, package: Path) -> int:
    "Exit status of pytest over `tests` with the package in the folder `package`."
    env = {
        **os.environ,
        "PYTHONPATH": str(package),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    # -P: the package of this folder would come before the one of PYTHONPATH
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *shlex.split(tests),
    ]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True).returncode


def places_of(before: str, text: str) -> list[re.Match]:
    "Where `before` occurs in `text`; line breaks and other white space may differ."
    indent = before[: len(before) - len(before.lstrip())]
    tokens = re.findall(r"\w+|[^\w\s]", before)
    pattern = re.escape(indent) + r"\s*".join(map(re.escape, tokens))
    return list(re.finditer(pattern, text))


def verdict(row: dict) -> str:
    "`seen`, `lives`, or what is wrong with the row."
    with tempfile.TemporaryDirectory() as folder:
        package = copy_of_package(Path(folder))
        path = package / row["file"]
        text = path.read_text(encoding="utf-8")
        places = places_of(row["before"], text)
        if len(places) != 1 or row["before"] == row["after"]:
            return f"not a fault: its text occurs {len(places)} times in {row['file']}"
        begin, end = places[0].span()
        path.write_text(text[:begin] + row["after"] + text[end:], encoding="utf-8")
        status = status_of(row["tests"], package)
    return {SEEN: "seen", LIVES: "lives"}.get(status, f"pytest ended with {status}")


def main(words: list[str]) -> int:
    rows = mutations(words)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        package, tests = copy_of_package(Path(folder)), sorted({row["tests"] for row in rows})
        failing = [
            test
            for test, status in zip(tests, pool.map(lambda test: status_of(test, package), tests))
            if status != LIVES
        ]
    if failing:
        print("without any fault these fail: " + "; ".join(f"pytest {test}" for test in failing))
        return 1
    bad = 0
    with ThreadPoolExecutor(2) as pool:
        for row, found in zip(rows, pool.map(verdict, rows)):
            bad += found != "seen"
            print(
                f"{found:6} {row['file'].removeprefix('polm_lab/')}: {row['before']!r:.60} -> "
                f"{row['after']!r:.60}",
                flush=True,
            )
    print(f"{len(rows)} faults, {bad} not seen")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
