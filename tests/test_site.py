"""The teaching site, as far as it can be proven without Quarto; with Quarto, all of it.

Each check is seen to fail: on a broken link, a missing picture, a wrong key,
an unresolved reference.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from polm_lab.core.knobs import WrongInput
from polm_lab.core.method import methods
from polm_lab.site import build as site_build
from polm_lab.site import filter as site_filter
from polm_lab.site import lint as site_lint
from polm_lab.site import pages as site_pages

SITE = Path(sys.executable).parent / "polm_site"
# of the schema of Quarto, see "quarto" for its version
KEYS = json.loads((ROOT / "tests/quarto_keys.json").read_text())
FOUND = site_pages.facts(ROOT)
BIB = site_filter.read_bib(ROOT / "references.bib")
PAGES = [p for paths in site_pages.pages(ROOT, FOUND["methods"]).values() for p in paths]


def made(page):
    return site_filter.filtered(
        json.loads((ROOT / page).read_text(encoding="utf-8")),
        page.removeprefix("nbs/"),
        FOUND,
        BIB,
        "foot",
    )


MADE = {ROOT / page: made(page) for page in PAGES}
ANCHORS = {path: site_lint.anchors(notebook) for path, notebook in MADE.items()}


def problems(path, notebook):
    return site_lint.check_notebook(path, ROOT, notebook, BIB, ANCHORS)


# ---- the configuration


def test_the_configuration_is_what_the_records_give():
    assert (ROOT / "_quarto.yml").read_text(encoding="utf-8") == site_pages.as_yaml(
        site_pages.configuration(ROOT, FOUND["methods"])
    ), "run polm_site write"


def unknown_keys(configured: dict) -> list[str]:
    "Keys that Quarto's schema does not have where they stand."
    wrong = [k for k in configured if k not in KEYS["document"] and k not in ("project", "website")]
    for place in ("project", "website", "crossref"):
        wrong += [f"{place}.{k}" for k in configured.get(place, {}) if k not in KEYS[place]]
    wrong += [f"sidebar.{k}" for k in configured["website"]["sidebar"] if k not in KEYS["sidebar"]]
    for form, given in configured["format"].items():
        wrong += [f"{form}.{k}" for k in given if k not in KEYS["document"]] + [
            f"grid.{k}" for k in given.get("grid", {}) if k not in KEYS["grid"]
        ]

    def items(contents):
        for item in contents:
            yield from (f"item.{k}" for k in item if k not in KEYS["item"])
            yield from items(item.get("contents", []))

    return wrong + list(items(configured["website"]["sidebar"]["contents"]))


def test_every_key_is_one_that_quarto_knows():
    configured = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert not unknown_keys(configured)
    for path, key in (
        ((), "biblography"),
        (("website",), "side-bar"),
        (("website", "sidebar"), "colapse-level"),
        (("format", "html"), "code-folding"),
        (("project",), "output_dir"),
    ):
        bad = copy.deepcopy(configured)
        place = bad
        for step in path:
            place = place[step]
        place[key] = True
        assert len(unknown_keys(bad)) == 1, key


def test_what_the_configuration_names_is_there():
    configured = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    html = configured["format"]["html"]
    for name in (
        configured["bibliography"],
        configured["csl"],
        html["css"],
        html["include-after-body"],
        *configured["project"]["render"],
    ):
        assert (ROOT / name).is_file(), name
    assert set(html["theme"]) == {"light", "dark"}
    assert configured["website"]["search"] is True
    assert html["code-fold"]
    assert configured["ipynb-filters"] == ["polm_site filter"]
    assert configured["project"]["post-render"] == ["polm_site finish"]
    assert SITE.is_file(), "pip install -e . makes it"


def test_the_style_asks_no_other_host():
    """Quarto's themes fetch fonts, and MathJax comes from another host: both are off.

    The bootswatch themes take this variable.
    """
    html = yaml.safe_load((ROOT / "_quarto.yml").read_text())["format"]["html"]
    assert html["html-math-method"] == "mathml"
    for base, own in html["theme"].values():
        assert base in ("cosmo", "darkly")
        assert re.search(r"^\$web-font-path: false;", (ROOT / own).read_text(), re.M)
    texts = [path for path in (ROOT / "nbs/_site").iterdir() if path.suffix != ".png"]
    assert len(texts) >= 4
    for path in texts:
        assert not site_lint.fetched(path.read_text()), path


def test_every_notebook_is_in_the_sidebar_once():
    configured = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    hrefs = re.findall(r"href: (nbs/\S+)", (ROOT / "_quarto.yml").read_text())
    there = set()
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        path = path.relative_to(ROOT)
        if not any(part.startswith(("_", ".")) for part in path.parts):
            there.add(path.as_posix())
    assert (
        sorted(hrefs)
        == sorted(there - set(site_pages.LEFT_OUT))
        == sorted(configured["project"]["render"])
    )
    for method in methods().values():
        assert f"nbs/{method.notebook}" in hrefs
    with pytest.raises(WrongInput, match="no section of the sidebar takes it"):
        records = dict(FOUND["methods"])
        old, site_pages.SECTIONS = (
            site_pages.SECTIONS,
            {k: v for k, v in site_pages.SECTIONS.items() if k != "alignment"},
        )
        try:
            site_pages.pages(ROOT, records)
        finally:
            site_pages.SECTIONS = old


# ---- the filter


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_sound(page):
    path = ROOT / page
    notebook = MADE[path]
    assert problems(path, notebook) == []
    first = "".join(notebook["cells"][0]["source"])
    assert notebook["cells"][0]["cell_type"] == "raw"
    assert first.startswith("---\n")
    assert first.endswith("---\n")
    head = yaml.safe_load(first.strip("-\n"))
    assert head["title"]
    assert head["description"]
    text = json.dumps(notebook["cells"])
    assert len(text) < 500_000
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        assert source.strip()
        if cell["cell_type"] == "code":
            assert not re.search(r"^#\| *(export|default_exp|hide)", source, re.M)
            for output in cell["outputs"]:
                assert output.get("name") != "stderr"
                assert "\\u001b[" not in json.dumps(output)
    assert json.loads(path.read_text(encoding="utf-8")) != notebook


# a process each; all others went through the same function above
CALLED = [p for i, p in enumerate(PAGES) if i % 9 == 0]


@pytest.mark.parametrize("page", CALLED)
def test_the_filter_called_as_quarto_calls_it(page, tmp_path):
    """It gets its name alone, in the notebook's folder, and the notebook on standard input.

    Standard output is the notebook.
    """
    path = ROOT / page
    command = yaml.safe_load((ROOT / "_quarto.yml").read_text())["ipynb-filters"][0].split()
    env = {
        **os.environ,
        "PATH": f"{SITE.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
    }
    text = path.read_text(encoding="utf-8")
    done = subprocess.run(
        command, cwd=path.parent, input=text, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    want = site_filter.filtered(json.loads(text), page.removeprefix("nbs/"), FOUND, BIB, "foot")[
        "cells"
    ]
    assert got["nbformat"] == 4
    assert got["cells"][:-1] == want[:-1]
    assert re.search(rf"`{re.escape(page)}`, polm_lab \d", "".join(got["cells"][-1]["source"]))


def test_the_filter_refuses_what_is_no_notebook_of_the_folder():
    text = json.dumps(
        {
            "cells": [{"cell_type": "markdown", "metadata": {}, "source": ["# Other"]}],
            "metadata": {},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
    )
    done = subprocess.run(
        [SITE, "filter"], cwd=ROOT / "nbs/core", input=text, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no notebook here is the one on standard input" in done.stderr


def test_a_method_page_has_its_row_its_knobs_and_its_reference():
    text = "\n".join(
        "".join(c["source"])
        for c in MADE[ROOT / "nbs/alignment/dpo.ipynb"]["cells"]
        if c["cell_type"] == "markdown"
    )
    assert "## In the survey {#survey}" in text
    assert "| DPO |" in text
    assert "Related:" in text
    assert "| `beta` | 0.1 |" in text
    assert "{#reference-dpo_loss}" in text
    assert "[-@rafailov2023]" in text


def shown(page) -> list[str]:
    "The outputs of a page that are HTML, as they come into it."
    data = [
        output.get("data", {}).get("text/markdown", "")
        for cell in MADE[ROOT / page]["cells"]
        for output in cell.get("outputs", [])
    ]
    return [
        text.removeprefix(f"{site_filter.FENCE}{{=html}}\n").removesuffix(f"\n{site_filter.FENCE}")
        for text in map("".join, data)
        if text
    ]


def test_figures_are_alive_with_what_the_site_has(tmp_path):
    "The outputs of a page in an offline browser: plotly.js comes from the site, and draws them."
    playwright = pytest.importorskip("playwright.sync_api", reason="this test needs playwright")
    from browsing import Page, browser_or_skip

    outputs = shown("nbs/alignment/dpo.ipynb")
    drawn = [text for text in outputs if "Plotly.newPlot" in text]
    assert drawn
    assert all(f'src="../../{site_filter.PLOTLY}"' in text for text in drawn)
    assert not any(site_lint.fetched(text) for text in outputs)
    (tmp_path / "nbs/alignment").mkdir(parents=True)
    (tmp_path / "nbs/alignment/dpo.html").write_text("<meta charset='utf-8'>" + "\n".join(outputs))
    site_build.finish(tmp_path)
    assert (tmp_path / site_filter.FONT).is_file()
    assert f'url("../../{site_filter.FONT}")' in (ROOT / "nbs/_site/style.css").read_text()
    with playwright.sync_playwright() as p:
        browser = browser_or_skip(p)
        page = Page(browser)
        page.page.goto(f"file://{tmp_path}/nbs/alignment/dpo.html")
        page.wait_for(
            lambda: page.page.locator(".js-plotly-plot svg.main-svg").count() >= len(drawn),
            what="the figures",
        )
        asked, errors = (
            [u for u in page.asked if not u.startswith(("file:", "data:", "blob:"))],
            page.errors,
        )
        browser.close()
    assert not asked
    assert not errors


def folded(page: str) -> list[str]:
    "The sources of the folded cells of a page."
    sources = ["".join(c["source"]) for c in MADE[ROOT / page]["cells"]]
    return [text for text in sources if text.startswith("#| code-fold: true")]


def test_code_of_the_workbench_imports_and_proofs_are_folded_and_methods_are_open():
    assert len(folded("nbs/site/atlas.ipynb")) > 5
    hidden = "\n".join(folded("nbs/alignment/dpo.ipynb"))
    assert "import torch" in hidden
    assert "def trl_loss" in hidden
    assert "def dpo_loss" not in hidden
    assert "def dpo(" not in hidden
    assert "lab.run" not in hidden


@pytest.mark.parametrize("page", sorted(FOUND["methods"]))
def test_a_methods_result_comes_first(page):
    cells = MADE[ROOT / "nbs" / page]["cells"]
    sources = ["".join(c["source"]) for c in cells]
    result = next(i for i, text in enumerate(sources) if text.startswith("## The result"))
    heads = [text for text in sources[:result] if text.startswith("## ")]
    code = [c for c in cells[:result] if c["cell_type"] == "code"]
    assert not heads
    assert len(code) <= 3  # nothing but imports and settings before it
    shown = sources[result]
    assert "<th>rows/" not in shown
    assert "plotly-figure" in shown
    assert "<table" in shown or "| metric |" in shown
    assert "(#run)" in shown
    assert any("{#run}" in text for text in sources[result + 1 :])


# ---- every check can fail


def broken(cell=None, text=None, page="nbs/alignment/dpo.ipynb"):
    "The problems of a page with a cell or a piece of text more."
    notebook = copy.deepcopy(MADE[ROOT / page])
    notebook["cells"].append(cell or site_filter.markdown(text))
    return problems(ROOT / page, notebook)


def output(kind, **more):
    return {
        "cell_type": "code",
        "metadata": {},
        "execution_count": None,
        "source": ["x"],
        "outputs": [{"output_type": kind, "metadata": {}, **more}],
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "[x](../alignment/nothing.ipynb)",
            "link to ../alignment/nothing.ipynb, which is not there",
        ),
        ("[x](../training/loop.ipynb#no-such-part)", "whose page has no such anchor"),
        ("[x](#no-such-part)", "whose page has no such anchor"),
        ("![x](nothing.png)", "picture to nothing.png"),
        ("[x](../_template/supervised.ipynb)", "which is no page of the site"),
        ("[x](../../CONTRIBUTING.md)", "which is no page of the site"),
        ("see @eq-nowhere", "cross-reference @eq-nowhere leads nowhere"),
        ("see [@nobody2020]", "citation @nobody2020 is not in references.bib"),
        ("Nobody et al. 2020 say so", "Nobody et al. 2020 is not in references.bib"),
        ("$$x", "begins with $$ and does not end"),
        ("$$x \\tag{1}$$", "has a \\tag, which MathML does not know"),
    ],
)
def test_a_fault_in_the_text_is_caught(text, says):
    wrong = broken(text=text)
    assert len(wrong) == 1, wrong
    assert says in wrong[0], wrong
    assert wrong[0].startswith("nbs/alignment/dpo.ipynb: "), wrong


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ({**output("stream"), "outputs": []}, "ends in a value and shows none; run the notebook"),
        (
            output("error", ename="ValueError", evalue="", traceback=[]),
            "shows an error, ValueError",
        ),
        (
            output("display_data", data={"application/vnd.plotly.v1+json": {}}),
            "Unable to display output of type application/vnd.plotly.v1+json",
        ),
        (
            output("display_data", data={site_filter.WIDGET: {}, "text/plain": "0%"}),
            "Unable to display output of type application/vnd.jupyter.widget-view+json",
        ),
        (
            output("display_data", data={"application/javascript": ["1"], "text/plain": ["1"]}),
            "Unable to display output of type application/javascript",
        ),
        (
            output("display_data", data={"text/html": ["<b>x</b>"], "text/plain": ["1"]}),
            "Unable to display output of type text/html",
        ),
        (
            output(
                "display_data",
                data={"text/markdown": ["<script src='https://cdn.example.org/x.js'></script>"]},
            ),
            "a page has to work offline",
        ),
        (
            output(
                "display_data",
                data={
                    "text/markdown": [
                        "<script type='module'>import \"https://cdn.example.org/x.js\"</script>"
                    ]
                },
            ),
            "a page has to work offline",
        ),
    ],
)
def test_a_fault_in_an_output_is_caught(cell, says):
    wrong = broken(cell)
    assert len(wrong) == 1, wrong
    assert says in wrong[0], wrong


@pytest.mark.parametrize(
    "text",
    [
        "[x](../training/loop.ipynb)",
        "[x](#reference)",
        "[x](https://example.org/gone)",
        "`[x](nothing.md)`",
        "Rafailov et al. [-@rafailov2023]",
        "an address: me@example.org",
    ],
)
def test_what_is_sound_is_not_refused(text):
    assert broken(text=text) == []


def a_site(folder, **pages):
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(f"<html><body>{text}</body></html>")
    return site_lint.check_site(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<a href='gone.html'>x</a>", "gone.html is not there"),
        ("<a href='b.html#gone'>x</a>", "the page has no such anchor"),
        ("<img src='gone.png'>", "gone.png is not there"),
        ("<link rel='stylesheet' href='gone.css'>", "gone.css is not there"),
        ("<p>Unable to display output for mime type(s): x</p>", "Unable to display output"),
        ("<p><strong>?@eq-lost</strong></p>", "unresolved reference"),
        ("<p>(<strong>nobody2020?</strong>)</p>", "unresolved reference"),
        (
            "<script src='https://cdn.plot.ly/plotly-4.1.1.min.js'></script>",
            "fetches https://cdn.plot.ly/plotly-4.1.1.min.js",
        ),
        (
            '<script>script.src  = "https://cdn.example.org/mathjax.js";</script>',
            "fetches https://cdn.example.org/mathjax.js",
        ),
        (
            "<link rel='stylesheet' href='//fonts.example.org/x.css'>",
            "fetches //fonts.example.org/x.css",
        ),
        (
            "<style>@import url('https://fonts.example.org/x');</style>",
            "fetches https://fonts.example.org/x",
        ),
        ("<img src='https://example.org/x.png'>", "fetches https://example.org/x.png"),
    ],
)
def test_a_fault_in_the_rendered_site_is_caught(text, says, tmp_path):
    wrong, _ = a_site(tmp_path, a=text, b="<p id='here'>b</p>")
    assert len(wrong) == 1, wrong
    assert says in wrong[0], wrong
    assert wrong[0].startswith("a.html: "), wrong


def test_code_that_speaks_of_faults_is_no_fault(tmp_path):
    code = "x = 'Unable to display output for mime type(s): y'  # ?@eq-lost quarto-unresolved-ref"
    wrong, _ = a_site(
        tmp_path,
        a=(
            '<pre class="sourceCode python"><code '
            f'class="sourceCode">{code}</code></pre><code>?@eq-lost</code>'
        ),
    )
    assert not wrong


def test_a_style_that_fetches_is_caught(tmp_path):
    (tmp_path / "site_libs").mkdir()
    (tmp_path / "site_libs/theme.css").write_text(
        '@import"https://fonts.example.org/css2?family=Lato";'
        '.a{background:url("data:image/png;base64,x")}'
    )
    wrong, _ = a_site(tmp_path, a="a")
    assert wrong == [
        (
            "site_libs/theme.css: fetches https://fonts.example.org/css2?family=Lato; "
            "a page has to work offline"
        )
    ]


def test_a_sound_site_passes(tmp_path):
    wrong, counts = a_site(
        tmp_path,
        a=(
            "<link rel='canonical' href='https://example.org/a'><a href='b.html#here'>x</a><a "
            "href='https://example.org'>y</a><a href='./'>z</a>"
        ),
        b="<p id='here'>b</p>",
        index="i",
    )
    assert not wrong
    assert counts["pages"] == 3


def test_warnings_of_quarto_are_seen():
    output = (
        "[ 1/60] nbs/index.ipynb\n\x1b[33mWARN: Unable to resolve crossref @eq-x\x1b[39m\n"
        "Output created: _docs/index.html\n[WARNING] Could not convert TeX math\n"
    )
    assert len(site_build.warnings_of(output)) == 2
    assert not site_build.warnings_of("Output created: _docs/nbs/warn.html\n")


def test_tables_sort_and_filter_in_a_browser(tmp_path):
    """A click on a heading sorts by it (months as dates), and the field filters.

    The site puts this script at the end of each page.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="this test needs playwright")
    from browsing import browser_or_skip

    from polm_lab.site.atlas import html_table

    rows = [
        dict(name=n, size=s, when=w)
        for n, s, w in (("b", "10", "Mar-2023"), ("a", "9", "Dec-2022"), ("c", "", "Jan-2024"))
    ]
    script = (ROOT / "nbs/_site/tables.html").read_text()
    (tmp_path / "page.html").write_text(f"<meta charset='utf-8'>{html_table(rows)}{script}")
    with playwright.sync_playwright() as p:
        browser = browser_or_skip(p)
        page = browser.new_page()
        page.goto(f"file://{tmp_path}/page.html")

        def names():
            return page.locator("tbody tr:visible td:first-child").all_inner_texts()

        found = {}
        for column in ("name", "size", "when", "when"):
            page.locator("th", has_text=column).click()
            found[column, page.locator("th", has_text=column).get_attribute("aria-sort")] = names()
        page.locator("input.sortable-filter").fill("2023 b")
        found["filter"] = names()
        browser.close()
    up, down = "ascending", "descending"
    assert found == {
        ("name", up): ["a", "b", "c"],
        ("size", up): ["a", "b", "c"],
        ("when", up): ["a", "b", "c"],
        ("when", down): ["c", "b", "a"],
        "filter": ["b"],
    }


# ---- bibliography, commands, workflows


def test_the_bibliography(tmp_path):
    assert len(BIB) > 100
    assert all(re.fullmatch(r"[a-z]+\d{4}[a-z]?", key) for key in BIB)
    for key, fields in BIB.items():
        assert fields["year"] in key
    bad = tmp_path / "x.bib"
    bad.write_text("@misc{a2020,\n  author = {A},\n  year = {2020}\n}\n")
    with pytest.raises(WrongInput, match="a2020 has no title"):
        site_filter.read_bib(bad)


def test_mentions_become_the_right_citation():
    assert site_filter.cited("Wang", "2024", "alignment/reward", BIB) == "wang2024a"
    assert site_filter.cited("Wang", "2024", "efficiency/adaptation/formulas", BIB) == "wang2024b"
    assert site_filter.cited("Wang", "2024", "data/load", BIB) == ""
    assert site_filter.cited("Rafailov", "2023", "any/page", BIB) == "rafailov2023"
    both = ("Frantar", "2022", "efficiency/compression/rounding", BIB)
    assert site_filter.cited(*both, " et al.") == "frantar2022"
    assert site_filter.cited(*both, " and Alistarh") == "frantar2022a"


def test_only_the_year_of_a_mention_changes():
    bib = {"gao2022": {}, "tie2025": {}}
    text = (
        "## Gao 2022\n\nGao, Schulman and Hilton (2022), Tie et al.\n"
        "2025, (Tie et al. 2025), Nobody et al. 2025."
    )
    year = "[-@tie2025]"
    assert site_filter.with_citations(text, "any/page", bib) == (
        "## Gao 2022\n\nGao, Schulman and Hilton ([-@gao2022]), Tie et al.\n"
        f"{year}, (Tie et al. {year}), Nobody et al. 2025."
    )


def test_papers_of_all_methods_are_in_the_bibliography():
    for page, record in FOUND["methods"].items():
        for mention in site_filter.MENTION.finditer(record["paper"]):
            assert site_filter.cited(
                mention[1], mention[3], page.removesuffix(".ipynb"), BIB, mention[2]
            ), f"{page}: {mention[0]}"


def test_make_docs_says_how_to_get_quarto(capsys, monkeypatch):
    "Without Quarto the notebooks are checked, and the last line says where Quarto is."
    monkeypatch.setattr(shutil, "which", lambda name, *a: None)
    before = (ROOT / "_quarto.yml").read_bytes()
    assert site_build.build(ROOT) == 2
    printed = capsys.readouterr().out
    assert "quarto is not installed" in printed
    assert "https://quarto.org" in printed
    assert (ROOT / "_quarto.yml").read_bytes() == before
    assert re.search(r"^docs: .*\n\t.*polm_site build$", (ROOT / "Makefile").read_text(), re.M)


def test_wrong_words_are_refused(capsys):
    assert site_build.main(["rite"]) == 2
    assert "expected write, filter, finish, check" in capsys.readouterr().err


def test_the_workflows_run_the_tests_and_publish():
    flows = {
        p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / ".github/workflows").glob("*.yml")
    }
    runs = {}
    for name, flow in flows.items():
        steps = [step for job in flow["jobs"].values() for step in job["steps"]]
        runs[name] = [step.get("run", "") for step in steps]
    assert "bash .ci/run" in runs["test"]
    assert "make docs" in runs["site"]
    assert (ROOT / ".ci/run").is_file()
    uses = [step.get("uses", "") for job in flows["site"]["jobs"].values() for step in job["steps"]]
    assert any(u.startswith("quarto-dev/quarto-actions/setup@") for u in uses)
    assert any(u.startswith("actions/deploy-pages@") for u in uses)
    configured = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    upload = next(
        s
        for job in flows["site"]["jobs"].values()
        for s in job["steps"]
        if "upload-pages" in s.get("uses", "")
    )
    assert upload["with"]["path"] == configured["project"]["output-dir"]


def test_the_front_door():
    "Citation, templates and hooks are well formed, and name what is there."
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    from polm_lab import __version__

    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"):
        head = yaml.safe_load(path.read_text().split("---")[1])
        assert {"name", "about"} <= set(head)
    for hook in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]:
        program, *words = hook["entry"].split()
        assert (ROOT / program).is_file() or (SITE.parent / Path(program).name).is_file(), program
        assert all((ROOT / w).exists() for w in words if w.startswith("tests/"))


@pytest.mark.skipif(not shutil.which("quarto"), reason="quarto is not installed")
def test_the_site_renders():
    """No warning, no dead link; an offline browser draws the figures from the disk.

    Equations are set in the font of the site.
    """
    assert site_build.build(ROOT) == 0
    playwright = pytest.importorskip("playwright.sync_api", reason="this test needs playwright")
    from browsing import Page, browser_or_skip

    with playwright.sync_playwright() as p:
        browser = browser_or_skip(p)
        for name, figures, equations in (
            ("index", 0, 0),
            ("alignment/dpo", 2, 50),
            ("site/atlas", 3, 0),
            ("site/errata", 0, 50),
        ):
            page = Page(browser)
            page.page.goto((ROOT / "_docs" / "nbs" / f"{name}.html").as_uri())
            page.wait_for(
                lambda: page.page.locator(".js-plotly-plot svg.main-svg").count() >= figures,
                what="the figures",
            )  # noqa: B023
            assert page.page.locator("math").count() >= equations
            assert page.page.evaluate(
                "document.fonts.ready.then(() => [...document.fonts].filter(f => "
                "f.family.includes('site math')).map(f => f.status))"
            ) == ["loaded" if equations else "unloaded"]
            assert not [u for u in page.asked if not u.startswith(("file:", "data:", "blob:"))]
        browser.close()


def test_the_readme_names_every_method_as_its_page_does():
    from polm_lab.site.readme import methods_table, with_table

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = methods_table(ROOT, list(FOUND["methods"]))
    assert table.count("\n") == len(FOUND["methods"]) + 1
    assert with_table(text, table) == text, "run polm_site write"
    picture = ROOT / "nbs" / "_site" / "cockpit.png"
    assert picture.stat().st_size <= 200_000
    assert "nbs/_site/cockpit.png" in text


def test_jupyterlab_folds_what_the_site_folds():
    "Imports, settings, TRL and proofs are closed; functions, runs and parameters are open."
    from polm_lab.site.folds import with_folds

    closed = 0
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        page = path.relative_to(ROOT / "nbs").as_posix()
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert with_folds(notebook, page) == notebook, f"nbs/{page}: run polm_site write"
        for cell in notebook["cells"]:
            source, hidden = "".join(cell["source"]), bool(cell["metadata"].get("jupyter"))
            closed += hidden
            assert not (hidden and cell["cell_type"] == "markdown"), page
            if "lab.from_cell(" in source or "parameters" in cell["metadata"].get("tags", ()):
                assert not hidden, (page, source[:60])
    assert closed > 400
