"Rules of the tree: who imports whom, one notebook a module, parameters that equal the defaults."

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from polm_lab.core.knobs import knobs
from polm_lab.core.method import FAMILIES, methods

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LAYERS = {"core": 0, "finetuning": 1, "alignment": 1, "reasoning": 1, "efficiency": 1, "integration": 1, "workbench": 2, "recipes": 3, "cli": 4}


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def layer(module: str) -> int:
    return LAYERS[module.split(".")[1]]


@pytest.mark.parametrize("path", sorted((ROOT / "polm_lab").rglob("[a-z]*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            source, names = ".".join([*above, node.module or ""]), [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            source, names = node.names[0].name, []
        else:
            continue
        if source.startswith("polm_lab.") and source != module:
            assert layer(source) <= layer(module), f"{module} imports {source}, which stands above it"
            private = [n for n in names if n.startswith("_")]
            assert not private, f"{module} imports {', '.join(private)} of {source}: only public names are for others"


def test_one_notebook_exports_one_module():
    homes = {}
    for path in NOTEBOOKS:
        for cell in cells(path):
            found = re.search(r"#\| *default_exp (\S+)", source(cell))
            if found and "_template" not in path.parts:
                assert found[1] not in homes, f"{path} and {homes[found[1]]} both export {found[1]}"
                homes[found[1]] = path
    assert len(homes) > 10


@pytest.mark.parametrize("name", methods())
def test_a_method_notebook_has_the_agreed_form(name):
    found = methods()[name]
    path = ROOT / "nbs" / found.notebook
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    values = {}
    for node in ast.parse(source(tagged[0])).body:
        assert isinstance(node, ast.Assign), "the parameters cell holds literals only"
        values[node.targets[0].id] = ast.literal_eval(node.value)
    assert values == {k.name: k.default for k in knobs(found.settings)}
    assert len(found.own_knobs) <= 15
    order = cells(path)
    assert not any("#| export" in source(c) for c in order[order.index(tagged[0]) :]), "nothing is exported after the parameters"
    assert found.family in FAMILIES and found.summary and found.title


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_notebooks_are_small_and_have_a_title(path):
    assert path.stat().st_size < 400_000
    first = json.loads(path.read_text())["cells"][0]
    assert first["cell_type"] == "markdown" and source(first).startswith("# ") and "\n> " in source(first)
    for cell in cells(path):
        if "skip-execution" in cell["metadata"].get("tags", []):
            assert "#| eval: false" in source(cell), "papermill and nbdev skip a cell for people by different marks: it needs both"


def unsolved(text: str) -> str:
    "What the exercises in the text of a cell lack: a folded answer to each, with empty lines around the list, without which it is not rendered as one; empty if nothing."
    head = re.search(r"^(#+ .*|\*\*)?[Ee]xercises.*", text, re.M)
    asked, _, folded = text[head.end() if head else len(text) :].partition("\n\n<details><summary>Solutions</summary>\n\n")
    exercises, answers = (re.findall(r"^(\d+)\. ", part, re.M) for part in (asked, folded))
    if not head or (exercises == [str(n + 1) for n in range(len(exercises))] == answers != [] and folded.endswith("\n\n</details>")):
        return ""
    return f"exercises numbered {exercises}, folded solutions {answers}, {'closed' if folded.endswith('</details>') else 'not closed'}"


def test_exercises_have_folded_solutions():
    fold = "\n\n<details><summary>Solutions</summary>\n\n%s\n\n</details>"
    assert not unsolved("# Why\n\n1. Text.") and not unsolved("## Pitfalls and exercises\n\n1. Why?\n2. How?" + fold % "1. So.\n2. Thus.")
    for wrong in ("Exercises: why?", "## Exercises\n\n1. Why?\n2. How?" + fold % "1. So.", "## Exercises\n\n1. Why?" + (fold % "1. So.").replace("\n\n", "\n")):
        assert unsolved(wrong)
    lacking = {str(path.relative_to(ROOT / "nbs").with_suffix("")): why for path in NOTEBOOKS for cell in cells(path, "markdown") if (why := unsolved(source(cell)))}
    assert not lacking


def test_the_import_is_light():
    code = "import sys, polm_lab; print(sorted({'torch', 'transformers', 'pandas', 'plotly'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    code = "import sys, polm_lab.cli; print(sorted({'torch', 'transformers', 'pandas', 'plotly'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_no_large_files():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    sizes = {n: (ROOT / n).stat().st_size for n in names if n and (ROOT / n).exists()}
    assert all(size < 10_000_000 for size in sizes.values())
    assert sum(size for n, size in sizes.items() if Path(n).parts[0] == "data") < 25_000_000


def test_no_file_tells_where_it_was_made():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    place = re.compile(rf"{re.escape(str(ROOT))}\b|(?<![.\w])(?:/\w[\w.-]*)+/(?:site-packages|\.venv|nbs|polm_lab)/")
    told = {}
    for path in (ROOT / n for n in names if Path(n).suffix in {".ipynb", ".py", ".md", ".json", ".csv", ".txt", ".ini", ".yml", ".toml"}):
        text = path.read_text() if path.exists() else ""
        found = [m[0] for m in place.finditer(text) if not re.search(r"https?:[^\s\"']*$", text[max(0, m.start() - 200) : m.start()])]
        if found:
            told[str(path.relative_to(ROOT))] = found[:3]
    assert not told, f"absolute paths of one machine: {told}"
