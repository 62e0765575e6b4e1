"""A reader adds a method by following CONTRIBUTING.md.

The reader copies the template, changes names, exports, and touches no other file.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_a_method_is_added_with_one_notebook(tmp_path):
    copy = tmp_path / "project"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".venv", ".git", "runs", "__pycache__", "benchmarks", "build", "dist"
        ),
    )
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    steps = re.findall(
        r"^    (.+)$",
        (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a method")[1].split("\n## ")[0],
        re.M,
    )
    assert len(steps) >= 4, "CONTRIBUTING.md lists the commands of adding a method, indented"
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(copy),
        "POLM_RUNS": str(tmp_path / "runs"),
    }
    for line in steps:
        done = subprocess.run(
            ["bash", "-c", line], cwd=copy, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
    assert json.loads(done.stdout.strip().split("\n")[-1])["status"] == "finished", (
        "the last command is a run with --json"
    )
    changed = {
        p for p, old in before.items() if p.read_bytes() != old and "__pycache__" not in p.parts
    }
    added = {p for p in copy.rglob("*") if p.is_file() and "__pycache__" not in p.parts} - set(
        before
    )
    assert {p.name for p in changed} <= {"_modidx.py"}, "no file but the generated index changes"
    assert {str(p.relative_to(copy)) for p in added} == {
        "nbs/finetuning/mine.ipynb",
        "polm_lab/finetuning/mine.py",
    }
