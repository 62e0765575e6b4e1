"""Prints the pattern of the notebooks that are not run here: drafts, and, where no sandbox works, the pages that run code of a model.

`POLM_SANDBOX=required` (as in CI) leaves nothing out: there those pages fail without a sandbox.
"""

import os
import sys

from polm_lab.core.sandbox import missing

RUN_CODE = ("tools", "selfrefine", "corrections", "critic", "cheating")

if __name__ == "__main__":
    why = missing() if os.environ.get("POLM_SANDBOX") != "required" else ""
    if why:
        print(f"not run: {', '.join(RUN_CODE)}. {why}", file=sys.stderr)
    print(rf"^([_.]|({'|'.join(RUN_CODE)})\.ipynb$)" if why else "^[_.]")
