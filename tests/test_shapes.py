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

import pytest
from conftest import ROOT

TEMPLATES = {  # file -> name of its method, family
    "supervised": ("focal", "finetuning"),
    "pairwise": ("ipo", "alignment"),
    "onpolicy": ("reinforce", "reasoning"),
    "layerwise": ("nearest", "efficiency"),
    "making": ("sieve", "finetuning"),
    "editing": ("constrained", "integration"),
    "search": ("beam", "reasoning"),
}
SKIPPED = (".venv", ".git", "runs", "__pycache__", "benchmarks", "build", "dist", "_docs")
CHECK = """
import json, sys, tempfile
from pathlib import Path
from polm_lab.core.method import find
from polm_lab.training.conformance import conformance, short_run

method, out = find(sys.argv[1]), tempfile.mkdtemp()
if method.trains:
    table = conformance(method.name, out)
    print(json.dumps({name: bool(holds) for name, holds in table.holds.items()}))
else:
    run = short_run(method, Path(out))
    found = {when: bool(run.summary.get(when)) for when in ("before", "after")}
    print(json.dumps(found | {"finished": run.status == "finished"}))
"""


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


@pytest.mark.parametrize("shape", TEMPLATES)
def test_a_method_of_each_template_works(shape, tmp_path):
    name, family = TEMPLATES[shape]
    copy = shutil.copytree(ROOT, tmp_path / "project", ignore=shutil.ignore_patterns(*SKIPPED))
    text = (copy / f"nbs/_template/{shape}.ipynb").read_text(encoding="utf-8")
    for old, new in ((name, "mine"), (name.upper(), "MINE"), (name.capitalize(), "Mine")):
        text = text.replace(old, new)
    (copy / f"nbs/{family}/mine.ipynb").write_text(text, encoding="utf-8")
    env = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "PYTHONPATH": str(copy),
    }
    env |= {"POLM_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    for command in (["nbdev_export"], [sys.executable, "-c", CHECK, "mine"]):
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    found = json.loads(done.stdout.strip().split("\n")[-1])
    assert all(found.values()), found
