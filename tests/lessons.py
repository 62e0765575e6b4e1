"""Run the pages under other seeds, threads and rounding, and print the cells that fail.

    python tests/lessons.py                       # all pages
    python tests/lessons.py alignment/ppo         # one page
    python tests/lessons.py _template/            # the templates of methods
    python tests/lessons.py --tries moved bf16    # some of the tries

A lesson's claim must hold over seeds 0 to 4, one and two threads, and weights moved by 1e-6.
All pages take about an hour and a half.

A page without knobs has no seed to set.
A try with a seed then changes what the package draws on that page: order of rows, samples, random
models.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

ROOT = Path(__file__).parent.parent
# name -> changes of knobs, threads, share by which each weight is moved
# (the suite has seed 0 and one thread)
TRIES = {
    "seed 1, two threads": ({"seed": 1}, 2, 0.0),
    "seed 2, moved": ({"seed": 2}, 1, 1e-6),
    "seed 3": ({"seed": 3}, 1, 0.0),
    "seed 4, moved": ({"seed": 4}, 1, 1e-6),
    "two threads": ({}, 2, 0.0),
    "moved": ({}, 1, 1e-6),
    "bf16": ({"dtype": "bfloat16"}, 1, 0.0),
}
SEEDS = [name for name in TRIES if name.startswith("seed")]  # for pages with knobs
OTHERS = ["two threads", "moved"]  # for pages without
MOVE = """
import polm_lab.models.load as _models
import torch as _torch

_read = _models._read_model


def _moved(*args, **kwargs):
    model, random = _read(*args, **kwargs), _torch.Generator().manual_seed(0)
    with _torch.no_grad():
        for weight in model.parameters():
            noise = _torch.randn(weight.shape, generator=random, dtype=_torch.float32)
            weight.mul_((1 + {by} * noise).to(weight.dtype))
    return model


_models._read_model = _moved
"""
DRAW = """
import polm_lab.core.machine as _machine
import torch as _torch

_seed_of, _manual_seed = _machine.seed_of, _torch.manual_seed
_machine.seed_of = lambda *parts: _seed_of({by}, *parts)
_torch.manual_seed = lambda seed: _manual_seed(seed + {by})

import polm_lab.data.batches as _batches

_order = _batches.Order.__init__


def _drawn(self, *args, **kwargs):
    _order(self, *args, **kwargs)
    self.seed += {by}


_batches.Order.__init__ = _drawn
"""


def pages(wanted: list[str]) -> list[Path]:
    """Return the notebooks that are tested and the templates.

    With `wanted`, only those whose path has one of these words.
    """
    found = {p.relative_to(ROOT / "nbs"): p for p in sorted((ROOT / "nbs").rglob("*.ipynb"))}
    tried = {
        name: p
        for name, p in found.items()
        if not re.search(r"(^|/)[_.](?!template/)", name.as_posix())
    }
    if not wanted:
        return list(tried.values())
    found = []
    for name, path in tried.items():
        if any(word in name.as_posix() for word in wanted):
            found.append(path)
    return found


def has_parameters(notebook) -> bool:
    "Whether a notebook has a parameters cell."
    return any("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)


def prepared(path: Path, changes: dict, moved: float):
    """Return the notebook at `path` without its cells for people.

    Knobs are changed, or other random numbers drawn, and weights are moved by the share `moved`.
    """
    notebook = nbformat.read(path, as_version=4)
    cells = [nbformat.v4.new_code_cell(MOVE.replace("{by}", repr(moved)))] if moved else []
    if "seed" in changes and not has_parameters(notebook):
        cells.insert(0, nbformat.v4.new_code_cell(DRAW.replace("{by}", repr(changes["seed"]))))
    for cell in notebook.cells:
        if cell.cell_type != "code" or re.search(r"^#\|\s*eval:\s*false", cell.source, re.M):
            continue
        cells.append(cell)
        if "parameters" in cell.metadata.get("tags", []):
            known = {k: v for k, v in changes.items() if re.search(rf"^{k} = ", cell.source, re.M)}
            lines = [f"{name} = {value!r}" for name, value in known.items()]
            cells.append(nbformat.v4.new_code_cell("\n".join(lines)))
    notebook.cells = cells
    return notebook


def attempt(path: Path, name: str) -> dict:
    "Run a page once; what did not hold is in `error`."
    changes, threads, moved = TRIES[name]
    page = str(path.relative_to(ROOT / "nbs").with_suffix(""))
    began, error = time.monotonic(), ""
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "POLM_CLAIMS": "required",
            "POLM_RUNS": f"{folder}/runs",
            "TMPDIR": folder,
        }
        client = NotebookClient(
            prepared(path, changes, moved),
            timeout=1800,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
        )
        try:
            client.execute(env=env)
        except CellExecutionError as failed:
            error = f"{failed.ename}: {failed.evalue}"[:600]
        except (DeadKernelError, TimeoutError) as failed:
            error = f"{type(failed).__name__}: {failed}"[:600]
    return dict(
        page=page,
        attempt=name,
        holds=not error,
        seconds=round(time.monotonic() - began, 1),
        error=error,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pages", nargs="*", help="words that the paths of the pages have; none means all pages"
    )
    parser.add_argument(
        "--tries",
        nargs="+",
        choices=TRIES,
        help="instead of the seeds, or of threads and moved weights for a page without knobs",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--to", type=Path, help="a .jsonl file that gets one line a page and try")
    asked = parser.parse_args()
    jobs = []
    for path in pages(asked.pages):
        knobs = has_parameters(nbformat.read(path, as_version=4))
        jobs += [(path, name) for name in asked.tries or (SEEDS if knobs else OTHERS)]
    failed = 0
    with ThreadPoolExecutor(asked.workers) as pool:
        for row in pool.map(lambda job: attempt(*job), jobs):
            failed += not row["holds"]
            print(
                f"{row['page']:28} {row['attempt']:20} {row['seconds']:6.1f} s  "
                f"{'holds' if row['holds'] else row['error']}",
                flush=True,
            )
            if asked.to:
                with open(asked.to, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print(f"{len(jobs) - failed} of {len(jobs)} hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
