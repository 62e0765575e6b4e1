"""Figures as notebooks store them: visible offline, untrusted and without scripts, and small.

The browser test opens each notebook with figures in a real JupyterLab, and compares pixels.
It is used as by a person who has just cloned the project.
The test takes what is stored, so it fails for a notebook whose outputs are older than its code:
`polm_site execute PAGE` stores them anew.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import psutil
import pytest
from conftest import ROOT

from polm_lab.core.knobs import WrongInput
from polm_lab.core.run import Run
from polm_lab.workbench import figures as panels_figures
from polm_lab.workbench import panels as panels_panels
from polm_lab.site import build as site_build
from polm_lab.site import filter as site_filter
from polm_lab.site import lint as site_lint
from polm_lab.site import outputs as site_outputs

NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
ALL = [p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in NOTEBOOKS]
PNG = b"\x89PNG\r\n"
needs_pillow = pytest.mark.skipif(
    find_spec("PIL") is None, reason="pictures are read with pillow: pip install pillow"
)


def cells(name) -> list[dict]:
    "The code cells of a notebook, each with its `number`."
    found = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [
        dict(cell, number=number)
        for number, cell in enumerate(found)
        if cell["cell_type"] == "code"
    ]


def figures(name) -> list[tuple[int, int, dict]]:
    "Return (cell, output, data) of every figure that a notebook stores, in whatever way."
    found = []
    for cell in cells(name):
        for place, output in enumerate(cell["outputs"]):
            data = output.get("data", {})
            if site_filter.FIGURE in data or "Plotly.newPlot" in "".join(data.get("text/html", "")):
                found.append((cell["number"], place, data))
    return found


WITH_FIGURES = [name for name in ALL if figures(name)]


def numbers(array) -> list:
    "The numbers of an array as it is stored."
    if isinstance(array, list):
        return array
    return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"]).tolist()


def pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def drawn(png: bytes) -> float:
    "The share of pixels of a picture that are not white."
    return float((pixels(png) < 250).any(axis=-1).mean())


def without_browser():
    "Leave a test out where no browser is; with POLM_BROWSER=required (as in CI) it fails."
    if os.environ.get("POLM_BROWSER") == "required":
        pytest.fail("no browser that draws pictures, and POLM_BROWSER=required")
    pytest.skip("no browser")


@pytest.fixture
def painter():
    "A process that has not tried to draw a picture."
    panels_figures._painter.cache_clear()
    yield
    made = panels_figures._painter()
    if made.loop:
        made.close()
    panels_figures._painter.cache_clear()


@pytest.fixture
def run(runs):
    "A run of 40 steps with six metrics."
    run = Run.create("example", dict(steps=40))
    chance = np.random.default_rng(0)
    names = ("reward", "kl", "entropy", "loss", "grad_norm", "length")
    with run.active():
        for step in range(1, 41):
            run.log(step, **dict(zip(names, chance.normal(size=6).round(4).tolist())))
    return run


# ---- what is stored


def test_numbers_keep_seven_digits_and_integers_all():
    rough = np.array([1 / 3, np.nan, 1e-30, -2.0])
    figure = go.Figure(
        [
            go.Scatter(x=np.arange(1000, 1004), y=rough),
            go.Scatter(x=list(range(9)), y=[1.23456789012] * 9),
        ]
    )
    figure.add_scatter(x=["a", "b"], y=np.array([1e300, 1.0]), marker_size=[7.123456789, 2.0])
    first, second, third = panels_figures.figure_json(figure)["data"]
    assert first["x"]["dtype"] == "i2"
    assert numbers(first["x"]) == [1000, 1001, 1002, 1003]
    assert first["y"]["dtype"] == "f4"
    assert np.allclose(numbers(first["y"]), rough, rtol=1e-7, atol=0, equal_nan=True)
    assert second["x"]["dtype"] == "i1"
    assert second["y"]["dtype"] == "f4"
    assert abs(numbers(second["y"])[8] - 1.23456789012) < 1e-7
    assert third["x"] == ["a", "b"]
    assert third["y"]["dtype"] == "f8"
    assert numbers(third["y"]) == [1e300, 1.0]
    assert third["marker"]["size"] == [7.123457, 2.0]


def test_a_matrix_keeps_its_shape_and_a_gap_stays_a_gap():
    figure = go.Figure(
        [go.Heatmap(z=np.arange(6.0).reshape(2, 3) / 7), go.Scatter(y=[0.5, None, float("inf")])]
    )
    heat, line = panels_figures.figure_json(figure)["data"]
    assert heat["z"]["shape"] == "2, 3"
    assert np.allclose(numbers(heat["z"]), np.arange(6) / 7, rtol=1e-6)
    assert line["y"] == [0.5, None, None]


def test_of_the_template_only_what_is_used_is_stored():
    line = panels_figures.figure_json(panels_panels.framed(go.Figure(go.Scatter(y=[1, 2])), 200))
    heat = panels_figures.figure_json(panels_panels.framed(go.Figure(go.Heatmap(z=[[1, 2]])), 200))
    colored = panels_figures.figure_json(
        panels_panels.framed(go.Figure(go.Scatter(y=[1, 2], marker_color=[1, 2])), 200)
    )
    space = panels_figures.figure_json(
        panels_panels.framed(go.Figure(go.Scatter3d(x=[1], y=[1], z=[1])), 200)
    )
    parts = [set(stored["layout"]["template"]["layout"]) for stored in (line, heat, colored, space)]
    assert ["colorscale" in part for part in parts] == [False, True, True, True]
    assert ["scene" in part for part in parts] == [False, False, False, True]
    assert all({"colorway", "font", "xaxis", "paper_bgcolor"} <= part for part in parts)
    assert set(heat["layout"]["template"]["data"]) == {"heatmap"}
    assert len(json.dumps(line)) < 2000
    assert "rgba(0,0,0,0)" not in json.dumps(
        [line["layout"].get(name) for name in ("paper_bgcolor", "plot_bgcolor")]
    )


def test_no_figure_has_a_button_that_sends_data_away(run, tmp_path):
    "Plotly's default is a button that opens a host with the data of the figure."
    from polm_lab.workbench.compare import export_figure

    figure = panels_panels.panels(run)
    assert panels_figures.figure_json(figure)["config"]["showSendToCloud"] is False
    assert panels_figures.live_figure(figure)._config["showSendToCloud"] is False
    for page in (
        panels_panels.write_page([run], tmp_path / "a.html", "A page"),
        export_figure(figure, tmp_path / "b.html"),
    ):
        text = page.read_text(encoding="utf-8")
        assert '"showSendToCloud": false' in text
        assert not site_lint.fetched(
            re.sub(r"<script[^>]*>/\*\*.*?</script>", "", text, flags=re.S)
        )


@needs_pillow
def test_a_picture_is_small_and_shows_the_figure(run, painter):
    if panels_figures.browser_path() is None:
        without_browser()
    made = panels_figures.figure_output(panels_panels.panels(run))
    assert set(made) == {site_filter.FIGURE, "image/png", "text/plain"}
    assert panels_figures.FIGURE == site_filter.FIGURE
    png = base64.b64decode(made["image/png"])
    assert png.startswith(PNG)
    assert len(png) <= panels_figures.PICTURE_BYTES
    shown = pixels(png)
    assert shown.shape == (470, 800, 3)
    assert 0.01 < drawn(png) < 0.5
    assert (shown[0, 0] == 255).all()
    # the line of the run, #0072b2
    blue = np.abs(shown.astype(int) - [0, 114, 178]).sum(axis=-1) < 30
    assert blue.sum() > 300
    tree = panels_figures.figure_json(
        go.Figure(
            go.Scatter(y=np.random.default_rng(0).normal(size=9000)),
            layout=dict(width=1600, height=900),
        )
    )
    large = panels_figures.figure_picture(tree)
    assert len(large) <= panels_figures.PICTURE_BYTES
    assert pixels(large).shape[1] <= 800


@needs_pillow
def test_a_picture_of_noise_gets_smaller_until_it_fits():
    from PIL import Image

    noise, out = (
        np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8),
        io.BytesIO(),
    )
    Image.fromarray(noise).save(out, "png")
    small = panels_figures.shrink(out.getvalue(), 20_000)
    assert len(small) <= 20_000
    assert 100 <= pixels(small).shape[1] < 400
    with pytest.raises(WrongInput, match="expected at most 100"):
        panels_figures.shrink(out.getvalue(), 100)


def test_without_a_browser_the_numbers_are_stored_and_a_line(run, painter, monkeypatch):
    monkeypatch.setenv("POLM_CHROMIUM", "none")
    made = panels_figures.figure_output(panels_panels.panels(run))
    assert set(made) == {site_filter.FIGURE, "text/plain"}
    assert "\n" not in made["text/plain"]
    if find_spec("PIL") and find_spec("kaleido"):
        assert made["text/plain"] == (
            "A figure without a picture: no browser found; install chromium, "
            "or name one in POLM_CHROMIUM, then run the cell again"
        )


@needs_pillow
def test_a_browser_that_fails_fails_once_and_no_run(run, painter, monkeypatch, tmp_path):
    pytest.importorskip("kaleido")
    broken = tmp_path / "browser"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("POLM_CHROMIUM", str(broken))
    made = [panels_figures.figure_output(panels_panels.panels(run)) for _ in range(2)]
    assert all(set(part) == {site_filter.FIGURE, "text/plain"} for part in made)
    assert "the browser that draws pictures failed (" in made[0]["text/plain"]
    assert made[0]["text/plain"] == made[1]["text/plain"]


@needs_pillow
def test_a_browser_that_hangs_is_given_up(run, painter, monkeypatch):
    pytest.importorskip("kaleido")

    async def hang(*_):
        import asyncio

        await asyncio.sleep(60)

    monkeypatch.setattr(panels_figures, "_PATIENCE", 0.2)
    monkeypatch.setattr(panels_figures, "browser_path", lambda: "/bin/sh")
    monkeypatch.setattr(panels_figures._Painter, "_draw", hang)
    assert (
        "failed (TimeoutError: no answer within 0.2 s)"
        in panels_figures.figure_output(panels_panels.panels(run))["text/plain"]
    )


def test_the_browser_is_closed_when_no_figure_comes(run, painter, monkeypatch):
    if panels_figures.browser_path() is None or not find_spec("kaleido"):
        without_browser()
    monkeypatch.setattr(panels_figures, "_IDLE", 0.05)
    stored = panels_figures.figure_json(panels_panels.panels(run))
    assert panels_figures.draw_png(stored).startswith(PNG)
    for _ in range(200):
        if panels_figures._painter().browser is None:
            break
        time.sleep(0.05)
    assert panels_figures._painter().browser is None
    assert panels_figures.draw_png(stored).startswith(PNG)  # the next figure starts another


def test_a_process_that_ends_leaves_no_browser_and_no_folder(request):
    tmp_path = Path(tempfile.mkdtemp())  # a browser's socket wants a short path
    request.addfinalizer(lambda: shutil.rmtree(tmp_path))
    if panels_figures.browser_path() is None or not find_spec("kaleido"):
        without_browser()
    code = (
        "from polm_lab.workbench import figures; import plotly.graph_objects as go; "
        "print(len(figures.draw_png(figures.figure_json(go.Figure(go.Scatter(y=[1, 2]))))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000, done.stderr
    assert done.stderr == "", done.stderr
    assert not [p for p in tmp_path.iterdir() if p.name != "runs"]
    assert not [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(p.info["cmdline"] or [])
    ]


# ---- what the notebooks hold


@pytest.mark.parametrize("name", ALL)
def test_no_stored_output_needs_a_host_a_script_or_a_kernel(name):
    for cell in cells(name):
        for output in cell["outputs"]:
            shown = {
                kind: value
                for kind, value in output.get("data", {}).items()
                if kind not in ("text/plain", "image/png")
            }
            assert not re.search(r"\bcdn\b|cdnjs|jsdelivr|unpkg", json.dumps(shown)), (
                f"cell {cell['number']} names a host of scripts"
            )
            assert site_filter.WIDGET not in output.get("data", {}), (
                f"cell {cell['number']} stores a widget, which shows nothing without its kernel"
            )
            page = "".join(output.get("data", {}).get("text/html", ""))
            assert not site_lint.fetched(page), (
                f"cell {cell['number']} fetches {site_lint.fetched(page)[0]}"
            )
            assert not re.search(r"<(script|iframe|object|embed)\b|<\w[^<>]*\son\w+=", page), (
                f"cell {cell['number']} stores a script, which JupyterLab removes"
            )


@pytest.mark.parametrize("name", ALL)
def test_each_figure_is_stored_as_numbers_and_a_small_picture(name):
    for number, _, data in figures(name):
        assert site_filter.FIGURE in data, (
            f"cell {number} stores a figure as a script; run polm_site execute {name}"
        )
        png = base64.b64decode(data.get("image/png", ""))
        assert png.startswith(PNG), f"cell {number}: {data['text/plain']}"
        assert len(png) <= panels_figures.PICTURE_BYTES, (
            f"cell {number}: a picture of {len(png)} bytes; run polm_site execute {name}"
        )
    asked = [
        cell
        for cell in cells(name)
        if re.search(r"^show\(", "".join(cell["source"]), re.M)
        and "skip-execution" not in cell["metadata"].get("tags", [])
    ]
    if not name.startswith("_"):
        lacking = [cell["number"] for cell in asked if not cell["outputs"]]
        assert not lacking, (
            f"cells {lacking} show a figure and store none; run polm_site execute {name}"
        )


@pytest.mark.parametrize("name", ALL)
def test_stored_outputs_are_small(name):
    assert (
        sum(len(json.dumps(cell["outputs"], ensure_ascii=False)) for cell in cells(name)) <= 300_000
    )


# ---- outputs are stored by one command


def write(path, *sources, **tags):
    made = [
        {
            "cell_type": "code",
            "id": f"c{i:07d}",
            "metadata": {"tags": tags.get(f"c{i}", [])} if f"c{i}" in tags else {},
            "source": text,
            "outputs": [],
            "execution_count": None,
        }
        for i, text in enumerate(sources)
    ]
    text = json.dumps(
        {
            "cells": made,
            "metadata": {
                "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
            },
            "nbformat": 4,
            "nbformat_minor": 5,
        }
    )
    path.write_text(text)
    return text


def stored(path) -> list[list[dict]]:
    return [cell["outputs"] for cell in json.loads(path.read_text())["cells"]]


def test_a_notebook_is_executed_and_its_outputs_are_stored(tmp_path):
    page = tmp_path / "page.ipynb"
    people = "#| eval: false\n1 / 0"
    first = (
        "import os, sys\nprint('a warning', file=sys.stderr)\n"
        "print(os.environ['POLM_RUNS'], os.environ['TMPDIR'])"
    )
    show = (
        "import plotly.graph_objects as go\nfrom polm_lab.workbench.figures import show\n"
        "show(go.Figure(go.Scatter(y=[1, 2])))\nobject()"
    )
    made = json.loads(write(page, first, people, show, c1=["skip-execution"]))
    made["cells"][1]["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": ["of a person"]}
    ]
    page.write_text(json.dumps(made))
    got = site_outputs.execute_page(page, ROOT)
    printed, nothing, shown = stored(page)
    assert [(o["name"], o["text"]) for o in printed] == [("stdout", ["runs /tmp\n"])]
    assert nothing == []
    assert set(shown[0]["data"]) - {"image/png"} == {site_filter.FIGURE, "text/plain"}
    assert shown[1]["data"]["text/plain"] == ["<object>"]
    assert got["figures"] == 1
    assert len(got["pictures"]) == ("image/png" in shown[0]["data"])
    assert got["bytes"] == page.stat().st_size
    assert '"execution_count": null' in page.read_text()
    assert "language_info" not in page.read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\nraise ValueError('no\\nmore')", "ValueError: no"),
        (
            "print('/opt/other' + '/site-packages/torch')",
            "cell 0 shows a path of this machine, /opt/other.site-packages/",
        ),
        (
            "from pathlib import Path\nprint(Path.home() / 'notes.txt')",
            "cell 0 shows a path of this machine, ",
        ),
        (
            (
                "from IPython.display import HTML\n"
                "HTML('<script src=\"https://cdn.example.org/x.js\"></script>')"
            ),
            "fetches https://cdn.example.org/x.js",
        ),
        ("import os\nos._exit(3)", "DeadKernelError"),
    ],
)
def test_a_notebook_that_cannot_be_stored_stays_as_it_was(tmp_path, text, says):
    page = tmp_path / "page.ipynb"
    before = write(page, text)
    with pytest.raises(WrongInput, match=says):
        site_outputs.execute_page(page, ROOT)
    assert page.read_text() == before


def test_which_notebooks_are_executed(monkeypatch, capsys):
    every = [p.relative_to(ROOT / "nbs").as_posix() for p in site_outputs.notebooks(ROOT, [])]
    assert "alignment/dpo.ipynb" in every
    assert "workbench.ipynb" not in every
    assert not [p for p in every if p.startswith("_")]
    assert [
        p.stem
        for p in site_outputs.notebooks(ROOT, ["dpo", "nbs/reasoning/grpo.ipynb", "alignment/dpo"])
    ] == ["dpo", "grpo"]
    assert {p.parent.name for p in site_outputs.notebooks(ROOT, ["recipes"])} == {"recipes"}
    with pytest.raises(WrongInput, match="polm_site execute nothing: no such notebook"):
        site_outputs.notebooks(ROOT, ["nothing"])

    def page(path, root):
        if path.stem == "dpo":
            raise WrongInput("ValueError: no")
        return dict(seconds=1.0, bytes=2000, figures=2, pictures=[1000])

    monkeypatch.setattr(site_outputs, "execute_page", page)
    assert site_build.main(["execute", "dpo", "grpo"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [*sorted(printed[:2]), *printed[2:]] == [  # the first two as they end
        "nbs/alignment/dpo.ipynb: failed, left as it was: ValueError: no",
        "nbs/reasoning/grpo.ipynb: 1 s, 2 kB, 2 figures (1 kB of pictures)",
        "1 figures have no picture; their outputs say why",
        "1 failed: nbs/alignment/dpo.ipynb",
    ]
    assert site_build.main(["execute", "nothing"]) == 2


# ---- in a browser without a network


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="this test needs playwright")
    from browsing import browser_or_skip

    with sync_api.sync_playwright() as p:
        made = browser_or_skip(p)
        yield made
        made.close()


@needs_pillow
def test_a_page_of_the_site_draws_a_stored_figure(browser, tmp_path, run):
    from browsing import Page

    figure = panels_panels.panels(run, metrics=["loss", "reward"]).update_layout(
        title="</script><b>x"
    )
    # twice the same: each has its place
    texts = [
        site_filter.figure_html(panels_figures.figure_json(part), "") for part in (figure, figure)
    ]
    (tmp_path / "page.html").write_text(
        "<meta charset='utf-8'><body style='background:#fff'>" + "\n".join(texts)
    )
    site_build.finish(tmp_path)
    page = Page(browser)
    page.page.goto((tmp_path / "page.html").as_uri())
    page.wait_for(
        lambda: page.page.locator(".js-plotly-plot svg.main-svg .scatterlayer .trace").count() >= 4,
        what="the figures",
    )
    shots = [part.screenshot() for part in page.page.locator(".plotly-figure").all()]
    asked = [u for u in page.asked if not u.startswith(("file:", "data:", "blob:"))]
    page.context.close()
    assert not asked
    assert not page.errors
    assert [0.01 < drawn(shot) < 0.5 for shot in shots] == [True, True]


@needs_pillow
def test_the_one_page_of_a_run_draws_its_figures(browser, tmp_path, run):
    "What `make run` writes, opened from the disk."
    from browsing import Page

    page = Page(browser)
    page.page.goto(
        panels_panels.write_page([run, run], tmp_path / "panels_panels.html", "Two runs").as_uri()
    )
    page.wait_for(
        lambda: (
            page.page.locator(".js-plotly-plot svg.main-svg .scatterlayer .trace").count() >= 12
        ),
        what="the figures",
    )
    shots = [part.screenshot() for part in page.page.locator(".js-plotly-plot").all()]
    asked = [u for u in page.asked if not u.startswith(("file:", "data:", "blob:"))]
    page.context.close()
    assert not asked
    assert not page.errors
    assert [0.01 < drawn(shot) < 0.5 for shot in shots] == [True, True]


OPEN = """async path => {
    const none = { shouldStart: false, canStart: false, autoStartDefault: false };
    const options = { path, factory: 'Notebook', kernelPreference: none };
    window.page = await window.jupyterapp.commands.execute('docmanager:open', options);
    await window.page.context.ready;
    await window.page.revealed;
    return window.page.content.widgets.map(cell => cell.model.trusted !== false);
}"""
FIND = """async ([cell, output, id]) => {
    await window.page.content.scrollToItem(cell, 'center');
    const found = window.page.content.widgets[cell].outputArea?.widgets[output]?.node;
    if (found) { found.id = id; found.scrollIntoView({ block: 'center' }); }
    return Boolean(found);
}"""
CLOSE = "() => { window.page.context.model.dirty = false; window.page.close(); }"


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    "JupyterLab without kernels on an untrusted copy of the notebooks, in an offline browser."
    from browsing import POLM, Page, free_port, patience, server

    folder, port = tmp_path_factory.mktemp("figures"), free_port()
    shutil.copytree(
        ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_*")
    )
    words = [
        POLM,
        "lab",
        "--no-browser",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=secret",
        f"--ServerApp.root_dir={folder}",
    ]
    with server(
        [*words, "--allow-root", "--LabApp.expose_app_in_browser=True"],
        f"http://127.0.0.1:{port}/api",
        folder,
    ):
        at = Page(browser)
        at.page.goto(f"http://127.0.0.1:{port}/lab?token=secret")
        at.page.wait_for_function("window.jupyterapp", timeout=patience(60) * 1000)
        at.page.evaluate("window.jupyterapp.restored.then(() => true)")
        at.folder = folder
        yield at
        at.context.close()


@needs_pillow
@pytest.mark.parametrize("name", WITH_FIGURES)
def test_every_figure_of_a_notebook_shows_offline_and_untrusted(lab, name):
    trusted = lab.page.evaluate(OPEN, f"nbs/{name}.ipynb")
    found = figures(name)
    assert not any(trusted[number] for number, _, _ in found), "a fresh copy is not trusted"
    shown = []
    try:
        for number, place, _ in found:
            ident = f"figure-{number}-{place}"
            lab.wait_for(
                lambda: lab.page.evaluate(FIND, [number, place, ident]),
                20,
                f"the output of cell {number}",
            )  # noqa: B023
            part = lab.page.locator(f"#{ident}")
            until = time.monotonic() + (10 if site_filter.FIGURE in found[0][2] else 1)
            while drawn(png := part.screenshot()) < 0.005 and time.monotonic() < until:
                lab.page.wait_for_timeout(100)
            shown.append(round(drawn(png), 4))
        lab.picture(f"figures-{name.replace('/', '-')}")
    finally:
        lab.page.evaluate(CLOSE)
    # a notebook without a kernel surprises JupyterLab's status bar, not its outputs
    errors = [e for e in lab.errors if "(reading 'kernel')" not in e]
    assert not lab.elsewhere()
    assert not errors
    assert len(shown) == len(found), f"shares of pixels that are not white: {shown}"
    assert all(share > 0.005 for share in shown), f"shares of pixels that are not white: {shown}"


@needs_pillow
def test_a_figure_is_alive_under_the_pointer_and_where_it_has_no_picture(lab, run, painter):
    """A picture becomes the figure under the pointer; without a picture it is drawn at once.

    All of it is untrusted and without a kernel.
    """
    made = [
        panels_figures.figure_output(panels_panels.panels(run, metrics=["loss", "kl", "reward"]))
        for _ in range(2)
    ]
    made[1].pop("image/png", None)
    page = json.loads(write(lab.folder / "made.ipynb", "1", "2"))
    for cell, data in zip(page["cells"], made):
        cell["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": data}]
    (lab.folder / "made.ipynb").write_text(json.dumps(page))
    lab.page.evaluate(OPEN, "made.ipynb")
    try:
        for number in (0, 1):
            lab.wait_for(
                lambda: lab.page.evaluate(FIND, [number, 0, f"made-{number}"]), 20, "the output"
            )  # noqa: B023
        assert lab.page.locator("#made-0 img").evaluate("image => image.naturalWidth") == 800
        assert not lab.page.locator("#made-0 .scatterlayer").count()
        lines = lab.page.locator("#made-1 .scatterlayer .trace path.js-line")
        lab.wait_for(lambda: lines.count() == 3, 20, "the figure without a picture")
        lab.page.locator("#made-0").hover()
        lines = lab.page.locator("#made-0 .scatterlayer .trace path.js-line")
        lab.wait_for(lambda: lines.count() == 3, 20, "the figure under the pointer")
        lab.picture("figures-made")
        titles = lab.page.locator("#made-0 .modebar-btn").evaluate_all(
            "buttons => buttons.map(button => button.dataset.title)"
        )
        assert titles
        assert not [
            title for title in titles if title and re.search("share|cloud|edit", title, re.I)
        ]
        assert [
            0.005 < drawn(lab.page.locator(f"#made-{number}").screenshot()) for number in (0, 1)
        ] == [True, True]
    finally:
        lab.page.evaluate(CLOSE)
    assert not lab.elsewhere()
