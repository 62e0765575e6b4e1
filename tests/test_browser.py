"""The workbench as a person uses it: a real JupyterLab and a real Voilà, driven in headless Chromium.

The browser is $POLM_CHROMIUM, a chromium or chrome on the PATH, or Playwright's own (`playwright install chromium`). Without one the tests are skipped
and say so; with POLM_BROWSER=required (as in CI) they fail instead. POLM_SCREENSHOTS=FOLDER keeps pictures.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import POLM

from polm_lab.core.run import Run, all_runs

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright: pip install playwright")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
NOTEBOOK = {
    "cells": [{"cell_type": "code", "id": "a", "metadata": {}, "source": "import polm_lab as lab\nbench = lab.workbench()\nbench", "outputs": [], "execution_count": None}],
    "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5,
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("POLM_CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
    with playwright.sync_playwright() as p:
        try:
            made = p.chromium.launch(executable_path=found, args=FLAGS)
        except playwright.Error as error:
            words = f"no browser for the browser tests: install chromium, or `playwright install chromium` ({str(error).splitlines()[0]})"
            pytest.fail(words) if os.environ.get("POLM_BROWSER") == "required" else pytest.skip(words)
        yield made
        made.close()


@contextlib.contextmanager
def server(words, url, folder, log):
    "A server process, ready to answer at `url`."
    environment = {**os.environ, "POLM_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1", "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data"),
                   "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "IPYTHONDIR": str(folder / "ipython")}  # fmt: skip
    with open(log, "w") as out:
        process = subprocess.Popen(list(map(str, words)), cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        until = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(url, timeout=2)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, Path(log).read_text()[-3000:]
                time.sleep(0.3)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def lab_server(tmp_path_factory):
    "(url of the notebook, folder) of a JupyterLab."
    folder, port = tmp_path_factory.mktemp("lab"), free_port()
    (folder / "bench.ipynb").write_text(json.dumps(NOTEBOOK))
    words = [POLM.parent / "jupyter-lab", "--no-browser", f"--port={port}", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=secret", f"--ServerApp.root_dir={folder}", "--allow-root",
             "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    with server(words, f"http://127.0.0.1:{port}/api", folder, folder / "lab.log"):
        yield f"http://127.0.0.1:{port}", folder


class Page:
    "A page with the few things that a person does on it."

    def __init__(self, browser, width=1280):
        self.context = browser.new_context(viewport=dict(width=width, height=1000))
        self.page = self.context.new_page()
        self.asked, self.errors = [], []
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))

    def picture(self, name):
        folder = os.environ.get("POLM_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{folder}/{name}.png")

    def tab(self, name):
        self.page.get_by_role("tab", name=name, exact=True).click()

    def choose(self, label, value):
        self.page.get_by_label(label, exact=True).locator("visible=true").first.select_option(value)

    def type(self, label, text):
        field = self.page.get_by_label(label, exact=True).locator("visible=true").first
        field.fill(text)
        field.press("Tab")

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").first.click()

    def text(self, words, timeout=20):
        self.page.get_by_text(words).locator("visible=true").first.wait_for(timeout=timeout * 1000)

    def wait_for(self, holds, timeout=60, what="it"):
        "Poll `holds()` until it is true; returns the seconds that took."
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < timeout, f"{what} did not happen in {timeout} s"
            self.page.wait_for_timeout(50)
        return time.monotonic() - began

    def points(self) -> int:
        "Points that are drawn in the visible figures."
        return self.page.evaluate("""() => [...document.querySelectorAll('.js-plotly-plot')].filter(p => p.offsetParent)
            .reduce((n, p) => n + (p.data || []).reduce((m, t) => m + ((t.y && (t.y.length ?? t.y.shape?.[0])) || 0), 0), 0)""")


def latest(folder) -> Run:
    return all_runs(folder / "runs")[-1]


def open_lab(browser, url, width=1280, theme=None) -> Page:
    "The notebook in JupyterLab, its cell run, the workbench on the screen."
    at = Page(browser, width)
    at.page.goto(f"{url}/lab/tree/bench.ipynb?token=secret")
    show_workbench(at)
    return at


def show_workbench(at: Page):
    "Run the cell."
    at.page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
    at.page.get_by_text("| Idle").wait_for(timeout=60_000)
    at.page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
    at.page.keyboard.press("Shift+Enter")
    at.page.get_by_role("tab", name="Configure", exact=True).wait_for(timeout=30_000)
    at.page.keyboard.press("Control+b")  # the file browser goes, the workbench has the width


def test_a_grpo_run_from_the_form_to_the_reward_of_one_completion(browser, lab_server):
    url, folder = lab_server
    at = open_lab(browser, url)
    methods = at.page.get_by_label("Method", exact=True).locator("visible=true").first
    names = methods.locator("option").all_inner_texts()
    methods.select_option(index=next(i for i, name in enumerate(names) if "grpo" in name))
    commands = at.page.locator("pre").locator("visible=true")
    at.wait_for(lambda: "run grpo" in "".join(commands.all_inner_texts()), 20, "the form of grpo")
    at.text("Raise the probability")
    at.page.get_by_text("Optimization", exact=True).click()
    at.type("steps", "40")
    at.wait_for(lambda: "steps 40" in "".join(commands.all_inner_texts()), 20, "the command that follows the form")
    at.picture("configure")
    at.press("Run")
    took = at.wait_for(lambda: at.points() > 0, 90, "the first point")
    print(f"first points {took:.1f} s after Run")

    at.page.reload()  # in mid-run: the run goes on, and the cell, run again, shows it
    show_workbench(at)
    run = latest(folder)
    at.wait_for(lambda: run.status == "finished", 120, "the end of the run")
    assert run.settings["steps"] == 40 and run.summary["after"]["accuracy"] > run.summary["before"]["accuracy"]
    at.tab("Watch")
    at.text("finished: step 40 of 40")
    at.wait_for(lambda: at.points() >= 40, 30, "a point a step")
    at.picture("watch")

    at.tab("Understand")
    at.page.locator(".polm input[type=search]").locator("visible=true").first.fill("reward>0.5")
    at.page.locator(".polm tbody tr").locator("visible=true").first.click()
    at.text("Its reward is 1 × correct (1) = 1")
    at.picture("understand")
    away = [u for u in at.asked if "127.0.0.1" not in u and not u.startswith(("data:", "blob:"))]
    assert not away, f"asked of strangers: {away[:3]}"
    assert not at.errors, at.errors[:3]
    at.context.close()


def test_the_app_in_voila(browser, tmp_path):
    port = free_port()
    with server([POLM, "app", f"--port={port}", "--no-browser"], f"http://127.0.0.1:{port}/voila/static/voila.js", tmp_path, tmp_path / "voila.log"):
        at = Page(browser, 1920)
        at.page.goto(f"http://127.0.0.1:{port}/")
        at.page.get_by_role("tab", name="Configure", exact=True).wait_for(timeout=90_000)
        at.press("Look at model and data")
        at.text("LlamaForCausalLM")
        at.picture("app")
        assert not at.errors, at.errors[:3]
        at.context.close()
