"What readable.py measures: each measure is seen on a made-up tree, and the project is within its bars."

import json

import pytest
from readable import BARS, measure, plain, sentences

CLEAN = 'def f(x: int) -> int:\n    "Return `x`."\n    return x\n'
LONG_SENTENCE = "This " + "long " * 26 + "sentence goes on."


def a_tree(folder, code=CLEAN, prose="# Page\n\nA short sentence.", test=CLEAN):
    "A tree with one notebook and one test."
    for name in ("nbs", "tests", "benchmarks"):
        (folder / name).mkdir()
    cells = [
        dict(cell_type="markdown", source=prose.splitlines(keepends=True)),
        dict(cell_type="code", source=code.splitlines(keepends=True), outputs=[]),
    ]
    (folder / "nbs" / "a.ipynb").write_text(json.dumps(dict(cells=cells)))
    (folder / "tests" / "test_a.py").write_text(test)
    for name in ("README.md", "CONTRIBUTING.md"):
        (folder / name).write_text("# It\n\nOne sentence is here.\n")
    return folder


def test_a_clean_tree_has_nothing(tmp_path):
    found = measure(a_tree(tmp_path))
    assert found.lines == 6
    assert not any(found.places.values())


@pytest.mark.parametrize(
    "measured, parts",
    [
        ("long", dict(code=f"x = '{'a' * 100}'")),
        ("long", dict(test=f"x = '{'a' * 100}'\n")),
        ("too long", dict(code=f"x = '{'a' * 120}'")),
        ("nested", dict(code="x = [[a for a in b] for b in c]")),
        ("nested", dict(test="x = sum(max(a for a in b) for b in c)\n")),
        ("joined", dict(code="assert 1 < 2 and 2 < 3, 'no'")),
        (
            "joined",
            dict(test="def test_it():\n    assert (\n        1 < 2\n        and 2 < 3\n    )\n"),
        ),
        ("words", dict(prose="# Page\n\nThe table stands below.")),
        ("words", dict(code='def f():\n    "What it said."\n')),
        ("words", dict(code="x = 1  # in place of two")),
        ("words", dict(code='raise ValueError("it bears no number at all")')),
        ("sentences", dict(prose=f"# Page\n\n{LONG_SENTENCE}")),
        ("sentences", dict(test=f'def f():\n    """Return it.\n\n    {LONG_SENTENCE}\n    """\n')),
    ],
)
def test_each_measure_is_seen(measured, parts, tmp_path):
    found = measure(a_tree(tmp_path, **parts))
    assert len(found.places[measured]) == 1
    assert found.values()[measured] > BARS[measured]


def test_code_formulas_and_tables_are_no_prose():
    text = plain(
        "Say `that stands`.\n\n```\nit said\n```\n\n| stands | bears |\n|---|---|\n\n$$mend$$"
    )
    assert not {"stands", "said", "bears", "mend"} & set(text.split())
    found = sentences("First one here. Second one here.\n\n- An item of it\n- Another item here")
    assert found == ["First one here.", "Second one here.", "An item of it", "Another item here"]


def test_the_project_is_within_its_bars():
    values = measure().values()
    for name, bar in BARS.items():
        assert values[name] <= bar, name
