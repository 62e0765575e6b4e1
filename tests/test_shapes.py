"""Each template of `nbs/_template` becomes a method of its own in a clean copy of the tree.

It takes the steps of CONTRIBUTING.md and touches nothing else. What trains passes the conformance
suite; every one runs with its small settings and has a summary before and after. Their exported
lines are counted, since a method is a short page.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, proof

TEMPLATES = {  # file -> name of its method, family
    "supervised": ("focal", "finetuning"),
    "pairwise": ("ipo", "alignment"),
    "onpolicy": ("reinforce", "reasoning"),
    "layerwise": ("nearest", "efficiency"),
    "making": ("sieve", "finetuning"),
    "editing": ("constrained", "integration"),
    "search": ("beam", "reasoning"),
}
SKIPPED = (".venv", ".git", "runs", "benchmarks", "build", "dist", "_docs")


def exported_lines(path) -> list[str]:
    "Lines of code that a notebook exports, without its imports, directives and empty lines."
    lines = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^#\| *export\b", source, re.M):
            lines += [
                line
                for line in source.split("\n")
                if line.strip() and not re.match(r"#\||import |from ", line)
            ]
    return lines


def test_every_template_is_here():
    assert {p.stem for p in (ROOT / "nbs/_template").glob("*.ipynb")} == set(TEMPLATES)


@pytest.mark.parametrize("shape", TEMPLATES)
def test_a_template_is_a_short_page(shape):
    lines = exported_lines(ROOT / f"nbs/_template/{shape}.ipynb")
    assert len(lines) <= 60, f"{len(lines)} exported lines"
    assert not [line for line in lines if len(line) > 100]


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    "What holds for a method of each template, in one copy of the tree."
    place = tmp_path_factory.mktemp("copy") / "project"
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(*SKIPPED))
    for shape, (name, family) in TEMPLATES.items():
        mine = f"mine{shape}"
        text = (place / f"nbs/_template/{shape}.ipynb").read_text(encoding="utf-8")
        for change in (str.lower, str.upper, str.capitalize):
            text = text.replace(change(name), change(mine))
        (place / f"nbs/{family}/{mine}.ipynb").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [Path(sys.executable).parent / "nbdev_export"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return proof(place, [f"mine{shape}" for shape in TEMPLATES])


@pytest.mark.parametrize("shape", TEMPLATES)
def test_a_method_of_each_template_works(proven, shape):
    found = proven[f"mine{shape}"]
    assert len(found) in (3, 7), found
    assert all(found.values()), found
