"The survey as tables, and the state of each of its rows: computed, never believed."

import csv
import json
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

import polm_lab as lab
from polm_lab.data.catalog import CATALOG
from polm_lab.core.knobs import WrongInput
from polm_lab.core.settings import knobs
from polm_lab.core.method import methods
from polm_lab.models.attach import parse_adapter
from polm_lab.site import atlas as page

ROWS = page.systems()
BY_NAME = {r["name"]: r for r in ROWS}
KNOWN = methods()


def test_the_files_are_whole():
    assert len(ROWS) == len(BY_NAME) == 772
    families = page.survey("families")
    assert len(families) == len({f["family"] for f in families}) == 125
    assert {r["family"] for r in ROWS} == {f["family"] for f in families}
    assert {r["chapter"] for r in ROWS} == set(page.CHAPTERS)
    for row in page.survey("systems"):
        assert row["runnable"] in page.WHY, row
        assert not row["year"] or 1900 < int(row["year"]) < 2027, row
        assert all(
            not value.startswith(" ") and not value.endswith(" ") and "\n" not in value
            for value in row.values()
        ), row["name"]
    for path in (ROOT / "data/survey").glob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        assert len({len(r) for r in rows}) == 1, path


def test_every_row_of_the_nine_tables_has_its_system():
    counts = {}
    for path in sorted((ROOT / "data/survey").glob("table*.csv")):
        rows = page.survey(path.stem)
        counts[path.stem[5]] = len(rows)
        for row in rows:
            assert row["system"] in BY_NAME, (path.stem, row["system"])
            assert f"T{path.stem[5]}" in BY_NAME[row["system"]]["section"].split(";"), (
                path.stem,
                row["system"],
            )
    assert counts == dict(zip("123456789", (34, 22, 11, 30, 30, 31, 38, 17, 37)))


def test_the_equations():
    rows = page.survey("equations")
    assert len(rows) == 48
    assert len({r["eq"] for r in rows}) == 48
    assert all(r["latex"] and r["check"] for r in rows)


def test_each_place_that_a_row_names_is_there():
    "A row whose place is gone would silently count as not there: here it is named."
    lost = [
        (r["name"], r["here"])
        for r in page.survey("systems")
        if r["here"] and not page.look(r["here"], KNOWN)
    ]
    assert not lost


@pytest.mark.parametrize(
    "here",
    [
        "dop",
        "merge?algorithm=tides",
        "merge?algorithms=ties",
        "merge?algorithm",
        "merge?",
        "prune?swaps=20",
        "prune?swaps=20 > sparse.swop",
        "prune?swaps=-1 > sparse.swap",
        "merge?algorithm=ties > sparse.swap",
        "selfrefine?threshold=0.5",
        "grpo?adapter=lora",
        "reft.minority",
        "adapter:lorra",
        "adapter:lora:use_doora=True",
        "model:llamma",
        "data:dolly-16k",
        "adapters:masked_step",
        ".x",
        "",
    ],
)
def test_what_is_not_there_is_nowhere(here):
    assert page.look(here, KNOWN) is None


def test_states_come_from_the_tree():
    assert set(Counter(r["state"] for r in ROWS)) == set(page.STATES)
    for row in ROWS:
        if row["state"] in ("runs", "partial", "shown", "loads"):
            assert (ROOT / "nbs" / row["notebook"]).is_file()
            assert row["by"]
            assert not row["why"]
        if row["state"] in ("runs", "partial", "loads"):
            assert row["tests"], f"{row['name']}: {row['notebook']} has no test"
        for test in filter(None, row["tests"].split(", ")):
            assert (ROOT / test).is_file()
        assert bool(row["why"]) == (row["state"] == "catalogued")
        assert row["by"] or row["state"] == "catalogued"
    left_out = [r for r in ROWS if r["why"].startswith("left out: ")]
    assert {"Agile-Quant", "HotaQ", "Q-DiT"} <= {r["name"] for r in left_out}


def test_a_method_that_goes_takes_its_rows_with_it(monkeypatch):
    "Without the record of merge its rows are a library's again, or catalogued."
    mine = [r["name"] for r in ROWS if r["notebook"] == "integration/merge.ipynb"]
    fewer = {k: v for k, v in KNOWN.items() if k != "merge"}
    monkeypatch.setattr(page, "methods", lambda: fewer)
    without = {r["name"]: r for r in page.systems()}
    assert len(mine) > 4
    assert {without[name]["state"] for name in mine} <= {"shown", "library", "catalogued"}
    assert {without[n]["state"] for n in mine} & {"library", "catalogued"}


def test_a_notebook_that_is_gone_runs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "notebooks_folder", lambda: tmp_path)
    page._modules.cache_clear()
    try:
        assert not [
            r for r in page.systems() if r["state"] in ("runs", "partial", "shown", "loads")
        ]
    finally:
        page._modules.cache_clear()


# What a run calls --------------------------------------------------------------------------------

HERE = {f["name"]: f for f in page.survey("systems")}


def test_every_row_that_runs_points_to_a_method_with_a_choice_or_to_what_it_reaches():
    "Read anew here, by a plain parser of its own."
    checked = 0
    for row in ROWS:
        if row["state"] not in ("runs", "partial"):
            continue
        here, checked = HERE[row["name"]]["here"], checked + 1
        if here.startswith("adapter:"):
            assert parse_adapter(here.removeprefix("adapter:"))[0] == here.split(":")[1], row[
                "name"
            ]
            continue
        pointer, _, called = here.partition(" > ")
        if "." in pointer.partition("?")[0]:
            assert any(pointer in page.reached(name) for name in KNOWN), row["name"]
            continue
        name, _, values = pointer.partition("?")
        own = {knob.name: knob for knob in knobs(KNOWN[name].settings)}
        for pair in filter(None, values.split("&")):
            word, _, value = pair.partition("=")
            choices = (
                ("true", "false") if own[word].type is bool else tuple(map(str, own[word].choices))
            )
            assert value in choices or called, (
                f"{row['name']}: {pair} is no choice, and no function is named that the run "
                "has to reach"
            )
        assert not called or called in page.reached(name), row["name"]
    assert checked > 80


def test_a_gap_makes_a_row_partial_and_no_row_that_runs_has_one():
    for row in ROWS:
        if row["state"] == "partial":
            assert len(row["gap"].split()) >= 4, f"{row['name']}: say in words what is missing"
        assert not row["gap"] or row["state"] in ("partial", "shown"), row["name"]
        assert (row["state"] == "partial") == bool(
            HERE[row["name"]]["gap"] and row["state"] not in ("shown", "catalogued")
        )
    loads = [
        row["name"]
        for row in page.survey("systems")
        if row["gap"] and row["here"].startswith(("model:", "data:"))
    ]
    assert not loads


def test_a_function_that_no_method_reaches_is_shown(monkeypatch):
    "`fuse.ensemble` and `dpo.optimal_policy` are on pages of methods; no run calls them."
    for here in ("fuse.ensemble", "dpo.optimal_policy", "formulas.fish_masks", "distance.starc"):
        assert page.look(here, KNOWN).state == "shown", here
    assert BY_NAME["output averaging"]["state"] == "shown"
    assert BY_NAME["KL-regularised reward maximisation"]["state"] == "shown"
    for here in ("ppo.gae", "reft.majority", "reward.reward_loss"):
        assert page.look(here, KNOWN).state == "runs"
        assert page.look(here, {"merge": KNOWN["merge"]}).state == "shown", (
            "without its methods it is shown"
        )
    monkeypatch.setattr(page, "reached", lambda method: frozenset())
    states = {r["name"]: r["state"] for r in page.systems()}
    assert (
        states["majority voting"] == "shown"
        and states["RLHF"] == "catalogued"
        or states["RLHF"] == "library"
    )
    assert states["TIES-merging"] == "runs", "a choice of a knob needs no function"


TOY = {
    "core/base.py": (
        "from . import late\n\ndef used():\n    return late.far()\n\ndef unused():\n"
        "    return used()\n\ndef shadowed():\n    pass\n"
    ),
    "core/late.py": (
        "TABLE = {'a': lambda x: inside(x)}\n\ndef inside(x):\n    return x\n\ndef far():\n"
        "    from .deep import Box\n    return TABLE['a'](Box())\n\ndef near():\n    pass\n"
    ),
    "core/deep.py": (
        "class Box:\n    def open(self):\n        return helper()\n\ndef helper():\n    pass\n"
        "\ndef other():\n    pass\n"
    ),
    "reasoning/toy.py": (
        "from ..core.base import used as made, shadowed\n\ndef toy(settings, run):\n"
        "    shadowed = made()\n    near = 1\n    return shadowed + near\n"
    ),
}


def test_what_a_method_reaches_is_read_off_the_syntax(monkeypatch, tmp_path):
    """Aliases, attributes of pages, tables, inner imports and methods of classes count.

    A local name that looks alike does not.
    """
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    caches = (page._modules, page._calls, page.reached)
    monkeypatch.setattr(page, "_package", lambda: tmp_path)
    [cache.cache_clear() for cache in caches]
    try:
        found = page.reached("toy")
    finally:
        [cache.cache_clear() for cache in caches]
    assert found == {
        "toy.toy",
        "base.used",
        "late.far",
        "late.TABLE",
        "late.inside",
        "deep.Box",
        "deep.helper",
    }


def test_a_method_that_says_it_is_of_the_survey_has_a_row():
    "What runs here and is in the survey is not forgotten; other methods need no row."
    pages = {r["notebook"] for r in ROWS}
    without = [m.name for m in KNOWN.values() if "survey" in m.paper and m.notebook not in pages]
    assert not without, "write where they are into the column `here` of data/survey/systems.csv"


def test_the_frame():
    frame = lab.atlas()
    assert len(frame) == 772
    assert {
        "section",
        "family",
        "year",
        "reference",
        "needs",
        "property",
        "state",
        "gap",
        "by",
        "notebook",
        "tests",
        "why",
    } <= set(frame.columns)
    assert (frame["reference"] != "").mean() > 0.8
    assert (frame["property"] != "").all()
    assert frame.loc["DPO", "needs"] == "reference, preference pairs"
    assert frame.loc["GRPO", "tests"] == "tests/test_grpo.py, tests/test_conformance.py"
    assert set(lab.atlas(state="runs")["state"]) == {"runs"}
    assert set(lab.atlas(chapter="alignment")["chapter"]) == {"alignment"}
    assert set(lab.atlas(family="quantization")["family"]) == {
        r["family"] for r in ROWS if r["family"].startswith("quantization")
    }
    for wrong, says in (
        (dict(state="running"), "state 'running'"),
        (dict(chapter="alinement"), "did you mean 'alignment'"),
        (dict(family="quantisation"), "did you mean"),
    ):
        with pytest.raises(WrongInput, match=says):
            lab.atlas(**wrong)


def test_data_sets_load():
    rows = [r for r in ROWS if r["by"].startswith("load_data, ")]
    assert len(rows) == len(CATALOG) == 37
    assert {r["by"].removeprefix("load_data, ") for r in rows} == set(CATALOG)


def test_coverage_adds_up():
    by_chapter, by_family = page.coverage(ROWS), page.coverage(ROWS, "family")
    assert by_chapter.loc["all"].equals(by_family.loc["all"])
    assert by_chapter.loc["all", "total"] == 772
    assert by_chapter.drop("all")["total"].sum() == 772


def test_the_figures_hold_every_system():
    sun, years, tree = page.sunburst(ROWS), page.timeline(ROWS), page.tree(ROWS)
    data = sun.data[0]
    children = Counter(data.parents)
    leaves = [label for i, label in zip(data.ids, data.labels) if not children[i]]
    assert len(leaves) == 772
    assert sorted(leaves) == sorted(page.html.escape(name) for name in BY_NAME)
    assert sum(len(t.x) for t in years.data) == sum(
        1 for r in ROWS if r["year"] and 2018 <= r["year"] <= 2025
    )
    assert [t.name for t in years.data] == list(page.STATES)
    inner = dict(zip(tree.data[0].ids, tree.data[0].values))
    parents = dict(zip(tree.data[0].ids, tree.data[0].parents))
    assert inner["all"] == 772 == sum(v for i, v in inner.items() if parents[i] == "all")


def test_text_is_escaped():
    rows = [dict(r) for r in ROWS[:3]]
    rows[0]["name"] = "<img src=x onerror=alert(1)>"
    assert "<img" not in page.html_table(rows, "<b>")
    assert "<b>" not in page.html_table(rows, "<b>").replace("<tbody>", "")
    assert "<img" not in page._text(rows[0])
    assert "<img" not in json.dumps(page.sunburst(rows).to_dict()["data"][0]["labels"])


def test_the_widget():
    board = page.Atlas(ROWS)
    assert len(board.grid.rows) == 772
    for name in board.view.options:
        board.view.value = name
    board.view.value = "Table 2: Alignment methods"
    assert len(board.grid.rows) == 22
    assert "state" in [c["name"] for c in board.grid.columns]
    board.grid.selected = [4]
    assert "DPO" in board.detail.value
    board.view.value = "Systems"
    assert board.detail.value == ""
    assert board.grid.selected == []
    board.grid.selected = [next(i for i, r in enumerate(ROWS) if r["name"] == "TIES-merging")]
    assert "related:" in board.detail.value
    assert "DARE (runs)" in board.detail.value
    assert "https://arxiv.org" in board.detail.value


def test_neighbours():
    own, related = page.neighbours("integration/merge.ipynb", ROWS)
    names = {r["name"] for r in own}
    assert {"TIES-merging", "DARE", "SLERP"} <= names
    assert not names & {r["name"] for r in related}
    assert page.neighbours("core/knobs.ipynb", ROWS) == ([], [])


def test_unknown_tables_are_refused():
    with pytest.raises(WrongInput, match="from 1 to 9"):
        page.table(0)
    with pytest.raises(WrongInput, match="did you mean 'families'"):
        page.survey("familys")


def test_it_is_light_until_it_is_asked():
    code = "import sys, polm_lab as lab; lab.atlas; print('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", "import polm_lab, sys; print('torch' in sys.modules)"],
            capture_output=True,
            text=True,
        ).stdout
        == "False\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 0
    )
