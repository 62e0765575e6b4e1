"""The cells for people, which no headless run executes, do what they show.

Each is executed after what it needs and nothing more.
It needs the imports of its notebook, the module that the notebook exports,
and the earlier cells whose names it uses.
The parameters cell has the method's `small` values.
Such earlier cells may cost a run: a cell that needs any is tried where POLM_PEOPLE=all.
Otherwise it is skipped with a word.
A cell has to end with a widget or a figure.
Its sliders and choices are moved, and what a page draws must follow within a second.

Limits: nothing is drawn in a browser (tests/test_browser.py does that for the app).
Buttons are not pressed.
A cell that relies on an earlier cell's side effect, not on its names, would fail here.
"""

import ast
import asyncio
import builtins
import importlib
import json
import os
import re
import symtable

import ipywidgets as widgets
import pytest
from conftest import ROOT
from IPython.display import display

import polm_lab as lab
from polm_lab.core.method import REGISTRY

NOTEBOOKS = sorted(
    p
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if not {".ipynb_checkpoints", "_template"} & set(p.parts)
)


def code(path):
    "[(source, tags)] of the code cells of a notebook."
    return [
        ("".join(c["source"]), c["metadata"].get("tags", []))
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == "code"
    ]


PEOPLE = [
    (path, number)
    for path in NOTEBOOKS
    for number, (_, tags) in enumerate(code(path))
    if "skip-execution" in tags
]


def names(source) -> tuple[set, set]:
    "Names that a cell takes from the notebook, and those that it gives to it."

    def tables(table):
        yield table
        for child in table.get_children():
            yield from tables(child)

    top = symtable.symtable(source, "cell", "exec")
    made = {
        s.get_name()
        for s in top.get_symbols()
        if s.is_assigned() or s.is_imported() or s.is_namespace()
    }
    used = {
        s.get_name()
        for t in tables(top)
        for s in t.get_symbols()
        if s.is_referenced() and (t is top or s.is_global())
    }
    return used - made - set(dir(builtins)), made


def is_imports(source) -> bool:
    return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body)


def needed(cells, number, have) -> list[int]:
    """Return the earlier cells that cell `number` builds on, first one first.

    They make a name which it, or one of them, uses.
    """
    chosen, open_names = set(), names(cells[number][0])[0] - set(have)
    for i in range(number - 1, -1, -1):
        source, tags = cells[i]
        used, made = (
            names(source)
            if "skip-execution" not in tags and not re.match(r"#\| *export", source)
            else (set(), set())
        )
        if made & open_names:
            chosen.add(i)
            open_names = (open_names - made) | used - set(have)
    if any("globals()" in cells[i][0] for i in chosen):  # the run takes its settings from there
        chosen |= {i for i, (_, tags) in enumerate(cells) if "parameters" in tags}
    return sorted(chosen)


async def execute(source, space):
    "Run a cell like a notebook: top-level `await`, a running loop, the value of its last line."
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    for part, mode in ((tree, "exec"), (last, "eval")):
        value = None
        if part:
            value = eval(compile(part, "cell", mode, flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), space)
            value = await value if asyncio.iscoroutine(value) else value
    return value


def tree_of(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from tree_of(child)


def places(control):
    "Values to move a control to, and back."
    if isinstance(control, widgets.FloatLogSlider):
        return [control.base**control.min, control.base**control.max, control.value]
    if isinstance(control, (widgets.FloatSlider, widgets.IntSlider)):
        return [control.min, control.max, control.value]
    if isinstance(control, (widgets.Dropdown, widgets.ToggleButtons, widgets.RadioButtons)):
        return [value for _, value in control._options_full][:6] + [control.value]
    if isinstance(control, widgets.Checkbox):
        return [not control.value, control.value]
    return []


def drawn(view) -> list:
    "What a widget shows: the data of its figures and its texts."
    parts = [w for w in tree_of(view)]
    shown = [w.to_json() for w in parts if hasattr(w, "to_plotly_json")] + [
        w.value for w in parts if isinstance(w, (widgets.HTML, widgets.HTMLMath, widgets.Label))
    ]
    return shown + [repr(w.outputs) for w in parts if isinstance(w, widgets.Output)]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    "A folder with one short run that has samples, for the cells that show the newest run."
    out = tmp_path_factory.mktemp("people")
    lab.run(
        "grpo",
        out=out,
        steps=2,
        batch_size=8,
        num_generations=4,
        eval_rows=4,
        max_new_tokens=8,
        data="sums",
    )
    return out


@pytest.fixture
def interactive(monkeypatch):
    "Errors in a function under `interactive` are raised: without a kernel they are only logged."

    def update(self, *_):
        self.result = self.f(**{w._kwarg: w.get_interact_value() for w in self.kwargs_widgets})

    monkeypatch.setattr(widgets.interactive, "update", update)


def test_there_are_cells_for_people():
    assert len(PEOPLE) >= 5


@pytest.mark.parametrize(
    "path, number", PEOPLE, ids=[f"{p.parent.name}/{p.stem}-{n}" for p, n in PEOPLE]
)
def test_a_cell_for_people_works(path, number, request, interactive, monkeypatch):
    cells = code(path)
    module = next(
        (m[1] for source, _ in cells if (m := re.search(r"#\| *default_exp (\S+)", source))), None
    )
    # a notebook has it without import
    space = {"__name__": "people", "lab": lab, "display": display}
    if module:
        space |= vars(
            importlib.import_module("polm_lab" if module == "__init__" else f"polm_lab.{module}")
        )
    method = REGISTRY.get(path.stem)
    if "runs" in cells[number][0]:
        monkeypatch.setenv("POLM_RUNS", str(request.getfixturevalue("record")))

    async def run():
        for source, tags in cells[:number]:
            if is_imports(source) and "skip-execution" not in tags:
                exec(source, space)
        before = needed(cells, number, space)
        if before and os.environ.get("POLM_PEOPLE") != "all":
            pytest.skip(f"it builds on the results of cells {before}; POLM_PEOPLE=all makes them")
        for i in before:
            await execute(cells[i][0], space)
            if "parameters" in cells[i][1] and method:
                space.update(steps=2, eval_rows=4, **method.small)
        view = await execute(cells[number][0], space)
        assert isinstance(view, widgets.Widget) or hasattr(view, "to_plotly_json"), (
            f"it ends with {type(view).__name__}, expected a widget or a figure"
        )
        # a view of the workbench has choices that take effect with a button
        what_if = path.parent.name not in ("workbench", "site")
        for control in tree_of(view):
            seen = [drawn(view)]
            for place in places(control):
                control.value = place
                seen.append(drawn(view))
            if what_if and len(seen) > 1:
                assert any(later != seen[0] for later in seen), (
                    f"{control.description}: nothing that is drawn changes with it"
                )
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    asyncio.run(run())
