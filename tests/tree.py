"""Check that the notebooks are clean and that the package is what they export.

Exit status 1 and the names of those that are not.
Works on a copy, so the check changes nothing.
"""

import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = ("settings.ini", "pyproject.toml", "setup.py", "README.md", "nbs", "polm_lab")


def differing(left: Path, right: Path, pattern: str) -> list[str]:
    "Names of files that are in one tree only, or differ."
    names = {
        str(p.relative_to(tree))
        for tree in (left, right)
        for p in tree.rglob(pattern)
        if ".ipynb_checkpoints" not in p.parts
    }
    return sorted(
        n
        for n in names
        if not (
            (left / n).exists()
            and (right / n).exists()
            and filecmp.cmp(left / n, right / n, shallow=False)
        )
    )


def main() -> int:
    tools = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in PARTS:
            source = ROOT / part
            skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            (
                shutil.copytree(source, copy / part, ignore=skip)
                if source.is_dir()
                else shutil.copy(source, copy / part)
            )
        env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        subprocess.run([tools / "nbdev_clean"], cwd=copy, check=True, env=env)
        unclean = differing(ROOT / "nbs", copy / "nbs", "*.ipynb")
        for module in (copy / "polm_lab").rglob("*.py"):
            module.unlink()
        subprocess.run([tools / "nbdev_export"], cwd=copy, check=True, env=env)
        stale = differing(ROOT / "polm_lab", copy / "polm_lab", "*.py")
    for name in unclean:
        print(f"nbs/{name}: not clean; run nbdev_clean")
    for name in stale:
        print(
            f"polm_lab/{name}: not what the notebooks export; edit the notebook and run "
            "nbdev_export"
        )
    print(
        f"notebooks clean: {'no' if unclean else 'yes'}, export in sync: {'no' if stale else 'yes'}"
    )
    return int(bool(unclean or stale))


if __name__ == "__main__":
    sys.exit(main())
