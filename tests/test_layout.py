"""Rules of the tree.

Who imports whom, how long modules and cells are, one notebook a module, parameters that equal the
defaults.
"""

import ast
import json
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

from polm_lab.core.settings import knobs
from polm_lab.core.method import FAMILIES, methods

ROOMS = [  # imports run one way: a module imports from its own room and from rooms above it in this list
    ("core",),
    ("data",),
    ("models",),
    ("training",),
    ("rewards",),
    ("finetuning", "alignment", "reasoning", "efficiency", "integration"),
    ("runner",),
    ("workbench",),
    ("site",),
    ("recipes",),
    ("cli",),
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
METHOD_ROOMS = next(rooms for rooms in ROOMS if "finetuning" in rooms)
MODULE_LINES, CELL_LINES = 700, 120
SAME_NAMES = ["data.load, models.load"]  # the one pair of modules with the same last part
LONG: set[str] = (
    set()
)  # exported cells that may be above CELL_LINES, as notebook:name; the list may only shrink


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def modules(package: Path) -> dict[str, Path]:
    "The modules of a package by their dotted names below it, without what nbdev generates."
    found = {}
    for path in sorted(package.rglob("[a-z]*.py")):
        found[".".join(path.relative_to(package).with_suffix("").parts)] = path
    return found


def imports(package: Path) -> dict[tuple[str, str], list[str]]:
    "What modules import of each other, also inside functions: {(importing, imported): names}."
    known, found = modules(package), {}
    for module, path in known.items():
        inside = [package.name, *module.split(".")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                pairs = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = inside[: -node.level] if node.level else []
                source = ".".join([*base, *filter(None, [node.module])])
                pairs = [(source, alias.name) for alias in node.names]
            else:
                continue
            for source, name in pairs:
                head, _, source = source.partition(".")
                if head != package.name:
                    continue
                if (
                    source not in known
                ):  # a folder: the name is a module in it, or the package's own
                    source, name = f"{source}.{name}".strip("."), ""
                if source in known:
                    found.setdefault((module, source), []).append(name)
    return found


def is_method(module: str) -> bool:
    room, _, rest = module.partition(".")
    return room in METHOD_ROOMS and "." not in rest


def wrong_directions(package: Path) -> list[str]:
    "Imports from a room above, between families other than method to method, and of private names."
    wrong = [f"{m}: in no room of ROOMS" for m in modules(package) if m.split(".")[0] not in LEVEL]
    for (module, source), names in sorted(imports(package).items()):
        here, there = module.split(".")[0], source.split(".")[0]
        edge = f"{module} imports {source}"
        if here not in LEVEL or there not in LEVEL:
            continue
        if LEVEL[there] > LEVEL[here]:
            wrong.append(f"{edge}, whose room is above it")
        elif {here, there} <= set(METHOD_ROOMS):
            if here != there and not (is_method(module) and is_method(source)):
                wrong.append(f"{edge}: between families only a method imports a method")
            elif not is_method(module) and is_method(source):
                wrong.append(f"{edge}: what a family shares imports no method")
        private = [n for n in names if n.startswith("_")]
        if private and module != source:
            wrong.append(f"{edge}: {', '.join(private)} is private")
    return wrong


def circles(package: Path) -> list[str]:
    "A circle of modules that import each other, if there is one."
    graph = {}
    for module, source in imports(package):
        if module != source:
            graph.setdefault(module, set()).add(source)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" is imported by ".join(error.args[1])]
    return []


def long_modules(package: Path, most: int = MODULE_LINES) -> list[str]:
    "Modules above `most` lines."
    counts = {
        m: len(p.read_text(encoding="utf-8").splitlines()) for m, p in modules(package).items()
    }
    return [
        f"{module}: {n} lines; expected at most {most}" for module, n in counts.items() if n > most
    ]


def same_last_parts(package: Path) -> list[str]:
    "Modules whose last parts are the same: a method, a page and a test are found by that name."
    homes = {}
    for module in modules(package):
        homes.setdefault(module.split(".")[-1], []).append(module)
    return [", ".join(names) for names in homes.values() if len(names) > 1]


def notebooks(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def long_cells(folder: Path, most: int = CELL_LINES) -> dict[str, int]:
    "Exported cells above `most` lines: {notebook:first name that it defines: lines}."
    found = {}
    for path in notebooks(folder):
        page = path.relative_to(folder).with_suffix("").as_posix()
        for text in map(source, cells(path)):
            lines = len(text.rstrip().splitlines())
            if lines > most and re.search(r"^#\| *export\b", text, re.M):
                name = re.search(r"^(?:async def|def|class) +(\w+)", text, re.M)
                found[f"{page}:{name[1] if name else 'a cell without a name'}"] = lines
    return found


def not_as_listed(folder: Path, listed: set[str]) -> list[str]:
    "Long cells that are not listed, and listed cells that are short or gone."
    found = long_cells(folder)
    wrong = []
    for cell in sorted(found.keys() - listed):
        wrong.append(f"{cell}: {found[cell]} lines; expected at most {CELL_LINES}; split it")
    for cell in sorted(listed - found.keys()):
        wrong.append(f"{cell}: no longer above {CELL_LINES} lines; take it off LONG")
    return wrong


def no_methods(folder: Path, registered) -> list[str]:
    "Notebooks directly in the folder of a family whose name is no registered method of that family."
    wrong = []
    for room in METHOD_ROOMS:
        for path in sorted((folder / room).glob("[!_.]*.ipynb")):
            if path.stem not in registered or registered[path.stem].family != room:
                wrong.append(
                    f"{room}/{path.stem}: no method; what a family shares is in a sub-folder"
                )
    return wrong


PACKAGE = ROOT / "polm_lab"
NOTEBOOKS = notebooks(ROOT / "nbs")


def test_imports_run_one_way():
    assert len(imports(PACKAGE)) > 300
    assert not wrong_directions(PACKAGE)


def test_no_modules_import_each_other():
    assert not circles(PACKAGE)


def test_no_module_is_long():
    assert not long_modules(PACKAGE)


def test_last_parts_of_module_names_are_unique():
    assert same_last_parts(PACKAGE) == SAME_NAMES


def test_no_exported_cell_is_long():
    assert not not_as_listed(ROOT / "nbs", LONG)


def test_a_notebook_in_the_folder_of_a_family_is_a_method():
    assert not no_methods(ROOT / "nbs", methods())


def a_package(folder: Path, **texts: str) -> Path:
    'A made-up package: `core__run="import x"` is the module `core.run`.'
    package = folder / "polm_lab"
    for name, text in texts.items():
        path = package.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return package


SOUND = dict(
    core__knobs="",
    training__loop="from ..core.knobs import Knob",
    alignment__dpo="from ..training.loop import fit",
    alignment__shared__pairs="from ...core import knobs",
    reasoning__grpo="from ..alignment.dpo import dpo_loss",
    workbench__app="import polm_lab.alignment.dpo\nfrom .. import __version__",
    cli="def main():\n    from .workbench.app import Workbench",
)


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        ("core__run", "from ..workbench.app import Workbench", "above it"),
        ("core__run", "def f():\n    from ..workbench import app", "above it"),
        ("core__run", "import polm_lab.workbench.app as app", "above it"),
        ("core__run", "from polm_lab import cli", "above it"),
        ("reasoning__ppo", "from ..alignment.shared.pairs import pair", "only a method"),
        ("reasoning__shared__asking", "from ...alignment.dpo import dpo_loss", "only a method"),
        ("alignment__shared__losses", "from ..dpo import dpo_loss", "imports no method"),
        ("workbench__watch", "from .app import Workbench, _style", "_style is private"),
        ("attic__old", "", "in no room"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path, module, text, expected):
    assert not wrong_directions(a_package(tmp_path, **SOUND))
    (wrong,) = wrong_directions(a_package(tmp_path, **{module: text}))
    assert expected in wrong
    assert module.replace("__", ".") in wrong


def test_a_circle_is_seen(tmp_path):
    package = a_package(tmp_path, **SOUND)
    assert not circles(package)
    a_package(
        tmp_path, core__run="from .knobs import Knob", core__knobs="def f():\n    from . import run"
    )
    (circle,) = circles(package)
    assert "core.run" in circle
    assert "core.knobs" in circle
    assert "alignment" not in circle


def test_long_modules_and_equal_names_are_seen(tmp_path):
    package = a_package(
        tmp_path,
        **SOUND,
        core__fits="x = 1\n" * (MODULE_LINES - 1),
        core__long="x = 1\n" * MODULE_LINES,
    )
    found = f"core.long: {MODULE_LINES + 1} lines; expected at most {MODULE_LINES}"
    assert long_modules(package) == [found]
    assert not same_last_parts(package)
    a_package(tmp_path, models__loop="")
    assert same_last_parts(package) == ["models.loop, training.loop"]


def a_notebook(path: Path, *texts: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [dict(cell_type="code", source=text.splitlines(keepends=True)) for text in texts]
    path.write_text(json.dumps(dict(cells=made)))


def test_long_cells_are_seen_and_the_list_of_them_shrinks(tmp_path):
    fits = "#| export\nclass Fits:\n" + "    x = 1\n" * (CELL_LINES - 2)
    a_notebook(tmp_path / "core" / "run.ipynb", fits, fits.replace("#| export\n", "\n\n"))
    assert not not_as_listed(tmp_path, set())
    a_notebook(tmp_path / "core" / "run.ipynb", fits.replace("Fits", "Long") + "    y = 2\n")
    (wrong,) = not_as_listed(tmp_path, set())
    assert wrong.startswith(f"core/run:Long: {CELL_LINES + 1} lines")
    assert not not_as_listed(tmp_path, {"core/run:Long"})
    a_notebook(tmp_path / "core" / "run.ipynb", fits.replace("Fits", "Long"))
    (wrong,) = not_as_listed(tmp_path, {"core/run:Long"})
    assert "take it off LONG" in wrong


def test_a_page_of_a_family_that_is_no_method_is_seen(tmp_path):
    a_notebook(tmp_path / "alignment" / "dpo.ipynb")
    a_notebook(tmp_path / "alignment" / "shared" / "pairs.ipynb")
    a_notebook(tmp_path / "core" / "run.ipynb")
    assert not no_methods(tmp_path, methods())
    a_notebook(tmp_path / "alignment" / "losses.ipynb")
    a_notebook(tmp_path / "reasoning" / "dpo.ipynb")
    assert [w.split(":")[0] for w in no_methods(tmp_path, methods())] == [
        "alignment/losses",
        "reasoning/dpo",
    ]


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
    assert not any("#| export" in source(c) for c in order[order.index(tagged[0]) :]), (
        "nothing is exported after the parameters"
    )
    assert found.family in FAMILIES
    assert found.summary
    assert found.title


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_notebooks_are_small_and_have_a_title(path):
    assert path.stat().st_size < 400_000
    first = json.loads(path.read_text())["cells"][0]
    assert first["cell_type"] == "markdown"
    assert source(first).startswith("# ")
    assert "\n> " in source(first)
    for cell in cells(path):
        if "skip-execution" in cell["metadata"].get("tags", []):
            assert "#| eval: false" in source(cell), (
                "papermill and nbdev skip a cell for people by different marks: it needs both"
            )


def unsolved(text: str) -> str:
    """Return what the exercises in the text of a cell lack; empty if nothing is missing.

    Each has a folded answer, with empty lines around the list: else it is not rendered as a list.
    """
    head = re.search(r"^(#+ .*|\*\*)?[Ee]xercises.*", text, re.M)
    asked, _, folded = text[head.end() if head else len(text) :].partition(
        "\n\n<details><summary>Solutions</summary>\n\n"
    )
    exercises, answers = (re.findall(r"^(\d+)\. ", part, re.M) for part in (asked, folded))
    if not head or (
        exercises == [str(n + 1) for n in range(len(exercises))] == answers != []
        and folded.endswith("\n\n</details>")
    ):
        return ""
    closed = "closed" if folded.endswith("</details>") else "not closed"
    return f"exercises numbered {exercises}, folded solutions {answers}, {closed}"


def test_exercises_have_folded_solutions():
    fold = "\n\n<details><summary>Solutions</summary>\n\n%s\n\n</details>"
    assert not unsolved("# Why\n\n1. Text.")
    assert not unsolved("## Pitfalls and exercises\n\n1. Why?\n2. How?" + fold % "1. So.\n2. Thus.")
    for wrong in (
        "Exercises: why?",
        "## Exercises\n\n1. Why?\n2. How?" + fold % "1. So.",
        "## Exercises\n\n1. Why?" + (fold % "1. So.").replace("\n\n", "\n"),
    ):
        assert unsolved(wrong)
    lacking = {
        str(path.relative_to(ROOT / "nbs").with_suffix("")): why
        for path in NOTEBOOKS
        for cell in cells(path, "markdown")
        if (why := unsolved(source(cell)))
    }
    assert not lacking


def test_the_import_is_light():
    code = "import sys, polm_lab; print(sorted({'torch', 'transformers', 'pandas', 'plotly'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "[]\n"
    )
    code = "import sys, polm_lab.cli; print(sorted({'torch', 'transformers', 'pandas', 'plotly'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "[]\n"
    )


def test_no_large_files():
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    sizes = {n: (ROOT / n).stat().st_size for n in names if n and (ROOT / n).exists()}
    assert all(size < 10_000_000 for size in sizes.values())
    assert sum(size for n, size in sizes.items() if Path(n).parts[0] == "data") < 25_000_000


def test_no_file_tells_where_it_was_made():
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    place = re.compile(
        rf"{re.escape(str(ROOT))}\b|(?<![.\w])(?:/\w[\w.-]*)+/(?:site-packages|\.venv|nbs|polm_lab)/"
    )
    told = {}
    for path in (
        ROOT / n
        for n in names
        if Path(n).suffix
        in {".ipynb", ".py", ".md", ".json", ".csv", ".txt", ".ini", ".yml", ".toml"}
    ):
        text = path.read_text() if path.exists() else ""
        found = [
            m[0]
            for m in place.finditer(text)
            if not re.search(r"https?:[^\s\"']*$", text[max(0, m.start() - 200) : m.start()])
        ]
        if found:
            told[str(path.relative_to(ROOT))] = found[:3]
    assert not told, f"absolute paths of one machine: {told}"
