"""Check one page, or the pages that differ from main.

`make page P=alignment/dpo` runs `python tests/page.py alignment/dpo`.
It exports, runs the notebook, runs the tests that check it, and renders it with Quarto.
Where Quarto is not installed, the filter that the site puts before Quarto is used instead.

The last step of `make quick` runs `python tests/page.py --touched`.
It runs the notebooks that differ from main or are new.
None is started after `--within` seconds (default 60); those that were not run are printed.
Exit status 1 if anything fails, 2 if there is no such page.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pages import left_out

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
BIN = Path(sys.executable).parent


def find_page(word: str, folder: Path = NOTEBOOKS) -> str:
    "The page that `word` means, as `alignment/dpo`; the path of its notebook is accepted too."
    from polm_lab.core.knobs import WrongInput, nearest

    page = word.removeprefix("./").removeprefix("nbs/").removesuffix(".ipynb")
    paths = [p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.ipynb")]
    known = [p for p in paths if not re.search(r"(^|/)[._]", p)]
    if page not in known:
        by_name = [p for p in known if p.rpartition("/")[2] == page]
        hint = f"did you mean {by_name[0]!r}?" if by_name else nearest(page, known)
        raise WrongInput(f"page {word!r}: no notebook of that name; {hint}")
    return page


def touched(root: Path = ROOT, base: str = "main") -> list[str]:
    "The pages that differ from `base` and those that git does not know yet."

    def git(*words) -> list[str]:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.split("\n")

    names = git("diff", "--name-only", "--relative", "--diff-filter=d", base, "--", "nbs")
    names += git("ls-files", "--others", "--exclude-standard", "--", "nbs")
    names = [n.removeprefix("nbs/") for n in names if n.endswith(".ipynb")]
    return sorted({n.removesuffix(".ipynb") for n in names if not re.search(r"(^|/)[._]", n)})


def run_notebook(page: str) -> bool:
    "Run a notebook as `make test` does; whether it passed."
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        given = dict(TMPDIR=place, POLM_RUNS=f"{place}/runs", POLM_CLAIMS="required")
        given |= dict(POLM_CHROMIUM="none", OMP_NUM_THREADS="1")
        command = [BIN / "nbdev_test", "--path", f"nbs/{page}.ipynb", "--do_print"]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | given,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        print(done.stdout)
    end = "failed" if done.returncode else "passed"
    print(f"{page}: {end} in {time.monotonic() - began:.0f} s", flush=True)
    return done.returncode == 0


def runnable(pages: list[str]) -> list[str]:
    "The pages that can be run here; prints which cannot, and why."
    pattern, why = left_out()
    skipped = [p for p in pages if re.search(pattern, f"{p.rpartition('/')[2]}.ipynb")]
    if skipped:
        print(f"not run: {', '.join(skipped)}. {why}")
    return [p for p in pages if p not in skipped]


def run_touched(within: float, workers: int = 2, run=run_notebook, pages=None) -> int:
    "Run the touched notebooks, two at once, smallest first; start none after `within` seconds."
    pages = runnable(touched() if pages is None else pages)
    pages.sort(key=lambda page: (NOTEBOOKS / f"{page}.ipynb").stat().st_size)
    began, late = time.monotonic(), []

    def one(page: str) -> bool:
        if time.monotonic() - began > within:
            late.append(page)
            return True
        return run(page)

    with ThreadPoolExecutor(workers) as pool:
        passed = list(pool.map(one, pages))
    print(
        f"{len(pages) - len(late)} of {len(pages)} touched notebooks run, {passed.count(False)} "
        "failed"
    )
    if late:
        print(
            f"not run, as {within:.0f} s were over: {', '.join(late)}; `make page P=...` runs one"
        )
    return int(not all(passed))


def tests_for(page: str) -> list[list[str]]:
    "Arguments for pytest: the test files of a page, and its part of the conformance suite."
    from polm_lab.core.method import methods
    from polm_lab.site.atlas import Place, tests_of

    name = page.rpartition("/")[2]
    method = name if name in methods() and methods()[name].notebook == f"{page}.ipynb" else ""
    files = tests_of(Place("runs", "", f"{page}.ipynb", method))
    whole = [f for f in files if f != "tests/test_conformance.py"]
    calls = [whole] if whole else []
    if len(whole) < len(files):
        calls.append(["tests/test_conformance.py", "-k", name])
    return calls


def render(page: str) -> bool:
    "Render a page with Quarto, or put it through the site's filter; whether that worked."
    path = NOTEBOOKS / f"{page}.ipynb"
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    if shutil.which("quarto"):
        return subprocess.run(["quarto", "render", path], cwd=ROOT, env=env).returncode == 0
    done = subprocess.run(
        [BIN / "polm_site", "filter"],
        cwd=path.parent,
        env=env,
        input=path.read_text(encoding="utf-8"),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stderr)
        return False
    made = ROOT / "_docs" / f"{page}.ipynb"
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text(done.stdout, encoding="utf-8")
    print(f"quarto is not installed: {made.relative_to(ROOT)} is what the site's filter gives it")
    return True


def check(page: str) -> int:
    "Export, run, test and render one page; every part is run, also after one that failed."
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([BIN / command], cwd=ROOT, check=True)
    passed = {"notebook": all(map(run_notebook, runnable([page])))}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for words in tests_for(page):
        print(f"pytest {' '.join(words)}", flush=True)
        done = subprocess.run([BIN / "pytest", "-q", *words], cwd=ROOT, env=env)
        passed[" ".join(words)] = done.returncode in (0, 5)  # 5: no test has that name
    passed["render"] = render(page)
    for part, well in passed.items():
        print(f"{page}: {part}: {'passed' if well else 'FAILED'}")
    return int(not all(passed.values()))


def main(words: list[str]) -> int:
    from polm_lab.core.knobs import WrongInput

    if words[:1] == ["--touched"]:
        return run_touched(float(words[words.index("--within") + 1]) if "--within" in words else 60)
    if len(words) != 1 or not words[0]:
        print("expected a page: make page P=alignment/dpo", file=sys.stderr)
        return 2
    try:
        return check(find_page(words[0]))
    except WrongInput as wrong:
        print(wrong, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
