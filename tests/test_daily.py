"""The daily commands: `make` prints its targets, `make quick` has its tests.

`make page` finds a page and the tests that check it.
"""

import re
import subprocess

import page
import pytest
from conftest import ROOT

from polm_lab.core.knobs import WrongInput


def test_make_alone_prints_every_target():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True)
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)", text, re.M)[1].split()
    printed = re.findall(r"^  make (\w+) +\S", done.stdout, re.M)
    assert done.returncode == 0
    assert printed == targets
    assert {"quick", "page", "test"} < set(printed)


def test_the_fast_tests_are_there():
    lines = (ROOT / "tests" / "fast.txt").read_text(encoding="utf-8").split()
    files = [line for line in lines if not line.startswith("--deselect=")]
    assert "tests/test_layout.py" in files
    assert all((ROOT / f).is_file() for f in files)
    for line in set(lines) - set(files):
        file, name = line.removeprefix("--deselect=").split("::")
        assert file in files
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "word", ["alignment/dpo", "nbs/alignment/dpo.ipynb", "./nbs/alignment/dpo"]
)
def test_a_page_is_found(word):
    assert page.find_page(word) == "alignment/dpo"


@pytest.mark.parametrize(
    ("word", "hint"), [("dpo", "alignment/dpo"), ("alignment/dop", "alignment/dpo")]
)
def test_a_wrong_page_is_refused_with_the_nearest(word, hint):
    with pytest.raises(WrongInput, match=f"did you mean '{hint}'"):
        page.find_page(word)


def test_the_tests_of_a_page():
    assert page.tests_for("alignment/dpo") == [
        ["tests/test_dpo.py"],
        ["tests/test_conformance.py", "-k", "dpo"],
    ]
    ((*files,),) = page.tests_for("workbench/cockpit")
    assert files == ["tests/test_cockpit.py"]
    (by_import,) = page.tests_for("models/rollout")
    assert "tests/test_rollout.py" in by_import
    assert "tests/test_conformance.py" not in by_import


def test_touched_pages_differ_from_main_or_are_new(tmp_path):
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    def write(name: str, text: str = "{}"):
        path = tmp_path / "nbs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    git("init", "-b", "main")
    for name in ("core/same.ipynb", "core/edited.ipynb", "core/gone.ipynb", "core/on_branch.ipynb"):
        write(name)
    git("add", "-A")
    git("commit", "-m", "base")
    assert page.touched(tmp_path) == []
    git("checkout", "-b", "work")
    write("core/on_branch.ipynb", "[]")
    git("commit", "-am", "work")
    write("core/edited.ipynb", "[]")
    write("core/new.ipynb")
    write("_template/draft.ipynb")
    write("core/notes.txt")
    (tmp_path / "nbs/core/gone.ipynb").unlink()
    assert page.touched(tmp_path) == ["core/edited", "core/new", "core/on_branch"]


def test_touched_notebooks_end_in_time_and_a_failure_is_the_exit_status(capsys):
    pages, seen = ["alignment/dpo", "core/run", "core/knobs"], []

    def run(name: str) -> bool:
        seen.append(name)
        return name != "core/run"

    assert page.run_touched(60, run=run, pages=pages[:1]) == 0
    assert page.run_touched(60, run=run, pages=list(pages)) == 1
    assert sorted(seen[1:]) == sorted(pages)
    capsys.readouterr()
    assert page.run_touched(-1, run=run, pages=list(pages)) == 0
    assert len(seen) == 4
    printed = capsys.readouterr().out
    assert "0 of 3 touched notebooks run" in printed
    assert all(name in printed for name in pages)


def test_durations_are_written_where_they_are_asked_for(tmp_path):
    place = tmp_path / "durations.txt"
    command = [
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--durations=3",
        "tests/test_fused_ranks.py",
    ]
    done = page.subprocess.run(
        [page.BIN / command[0], *command[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=page.os.environ | {"POLM_DURATIONS": str(place)},
    )
    assert done.returncode == 0, done.stdout
    slowest, files = place.read_text().split("\n\n")
    assert len(slowest.split("\n")) == 3
    assert slowest.count("tests/test_fused_ranks.py::") == 3
    assert re.fullmatch(r" +[\d.]+ s in all  tests/test_fused_ranks.py\n", files)
