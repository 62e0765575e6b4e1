"""Run a command as on a machine where some programs are missing.

    python tests/without.py bwrap chromium quarto -- make test

The command's PATH is one folder of links to all programs of today's PATH but those.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def path_without(names: list[str], folder: Path) -> str:
    "A PATH of one `folder`, filled with links to every program but `names`."
    for place in os.environ["PATH"].split(os.pathsep):
        for program in sorted(Path(place).glob("*")):
            link = folder / program.name
            if program.name not in names and not link.is_symlink() and os.access(program, os.X_OK):
                link.symlink_to(program)
    return str(folder)


def main() -> int:
    names, command = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    hidden = [
        n
        for n in ("POLM_BWRAP", "POLM_CHROMIUM", "POLM_SANDBOX", "POLM_BROWSER", "BROWSER_PATH")
        if n in os.environ
    ]
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    with tempfile.TemporaryDirectory() as folder:
        env["PATH"] = path_without(names, Path(folder))
        found = [name for name in names if shutil.which(name, path=env["PATH"])]
        if found:
            raise SystemExit(f"still found: {', '.join(found)}")
        return subprocess.run(command, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
