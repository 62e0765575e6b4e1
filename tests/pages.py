"""Print the pattern of the notebooks that are not run here.

These are drafts, and, where no sandbox works, the pages that run code of a model.
With `POLM_SANDBOX=required` (as in CI) none is left out: those pages fail without a sandbox.
With `--hidden` it prints the tests that look at the sandbox, at a browser or at Quarto.
"""

import os
import re
import sys
from pathlib import Path

from polm_lab.rewards.sandbox import missing

KILLED = "test_kill.py::test_killed_and_resumed_equals_uninterrupted"
RUN_CODE = ("tools", "selfrefine", "corrections", "critic", "cheating")
LOOKS = r"sandbox|chromium|browsing|quarto|run_code|algorithm=.(editor|coderl)"


def looking() -> list[str]:
    """The files of tests that look at what may be missing.

    Of the many methods that are killed, only one needs it.
    """
    place = Path(__file__).parent
    files = []
    for path in sorted(place.glob("test_*.py")):
        if re.search(LOOKS, path.read_text(encoding="utf-8")) and path.name != "test_kill.py":
            files.append(str(path))
    return [*files, f"{place / KILLED}[critic-coderl]"]


def left_out() -> tuple[str, str]:
    "The pattern of the file names that are not run here, and why; drafts are always left out."
    why = missing() if os.environ.get("POLM_SANDBOX") != "required" else ""
    return (rf"^([_.]|({'|'.join(RUN_CODE)})\.ipynb$)" if why else "^[_.]"), why


if __name__ == "__main__":
    if "--hidden" in sys.argv:
        print(" ".join(looking()))
        sys.exit()
    pattern, why = left_out()
    if why:
        print(f"not run: {', '.join(RUN_CODE)}. {why}", file=sys.stderr)
    print(pattern)
