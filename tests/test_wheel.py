"""A wheel built from the repository runs a method in a clean environment.

It contains the notebooks and the model.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from conftest import ROOT


def test_a_wheel_in_a_clean_environment_runs_dpo(tmp_path):
    subprocess.run(["git", "-C", ROOT, "rev-parse"], check=True, capture_output=True)
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "-z"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, files):  # without what a build in the working tree would leave behind
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            tmp_path / "dist",
            source,
        ],
        check=True,
        capture_output=True,
    )
    wheel = next((tmp_path / "dist").glob("*.whl"))
    assert wheel.stat().st_size < 20_000_000

    clean = tmp_path / "clean"
    venv.create(clean, with_pip=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(clean)}))
    # the installed requirements, without this project's source tree
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [clean / "bin/pip", "install", "--quiet", "--no-deps", wheel],
        check=True,
        capture_output=True,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "POLM_RUNS")}
    done = subprocess.run(
        [clean / "bin/polm", "run", "dpo", "-p", "steps", "2", "-p", "eval_rows", "4", "--json"],
        cwd=elsewhere,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().split("\n")[-1])
    assert said["status"] == "finished"
    assert said["path"].startswith(str(elsewhere / "runs"))
    where = subprocess.run(
        [clean / "bin/python", "-c", "import polm_lab; print(polm_lab.__file__)"],
        cwd=elsewhere,
        env=env,
        capture_output=True,
        text=True,
    ).stdout
    assert where.startswith(str(clean))
    code = (
        "import polm_lab as lab; states = lab.atlas()['state']; print(len(states), (states == "
        "'runs').sum() > 50, lab.datasets().shape[0] > 40)"
    )
    atlas = subprocess.run(
        [clean / "bin/python", "-c", code], cwd=elsewhere, env=env, capture_output=True, text=True
    )
    assert atlas.stdout == "772 True True\n", atlas.stderr
    refused = subprocess.run(
        [clean / "bin/polm_site", "check"], cwd=elsewhere, env=env, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "the source tree, where the site is made" in refused.stderr
