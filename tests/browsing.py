"""A real JupyterLab or Voilà and a headless Chromium, for workbench tests and benchmark.

The browser is $POLM_CHROMIUM, a chromium or chrome on the PATH, or Playwright's own
(`playwright install chromium`); POLM_CHROMIUM=none takes none.
It finds no host but this one, and each request to another is noted.
POLM_SCREENSHOTS=FOLDER keeps pictures.
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
from urllib.parse import urlparse

import psutil
import pytest
from conftest import POLM

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
HERE = ("127.0.0.1", "localhost")
CELL = "import polm_lab as lab\nbench = lab.workbench()\nbench"


def notebook(*cells) -> str:
    made = [
        {
            "cell_type": "code",
            "id": f"c{i}",
            "metadata": {},
            "source": cell,
            "outputs": [],
            "execution_count": None,
        }
        for i, cell in enumerate(cells)
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})


def patience(seconds: float) -> float:
    """Return how long to wait for what takes well under `seconds` on a machine that is free.

    It is longer where others want the machine's processors too.
    """
    return seconds * max(1.0, os.getloadavg()[0] / os.cpu_count() / 2)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def open_browser(playwright):
    "Chromium; raises playwright's error where there is none."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("POLM_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    return playwright.chromium.launch(executable_path=found, args=FLAGS)


def browser_or_skip(playwright):
    """Return Chromium; where there is none the test is skipped and says so.

    With POLM_BROWSER=required (as in CI) it fails instead.
    """
    from playwright.sync_api import Error

    try:
        if os.environ.get("POLM_CHROMIUM") == "none":
            raise Error("POLM_CHROMIUM=none")
        return open_browser(playwright)
    except Error as error:
        words = (
            "no browser: install chromium, or `playwright install chromium` "
            f"({str(error).splitlines()[0]})"
        )
        pytest.fail(words) if os.environ.get("POLM_BROWSER") == "required" else pytest.skip(words)


@contextlib.contextmanager
def server(words, url, folder, **environment):
    "Yield a server process, ready to answer at `url`, whose runs are in `folder`/runs."
    places = {
        f"JUPYTER_{name.upper()}_DIR": str(folder / name) for name in ("config", "data", "runtime")
    }
    environment = {
        **os.environ,
        "POLM_RUNS": str(folder / "runs"),
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        **places,
        **environment,
    }
    log = folder / "server.log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            list(map(str, words)),
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + patience(90)
        while True:
            try:
                urllib.request.urlopen(url, timeout=2)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(0.3)
        yield process
    finally:
        family = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@contextlib.contextmanager
def jupyter(folder, **notebooks):
    """Yield (address, process) of a JupyterLab as `polm lab` starts it.

    `notebooks` (name=cells) are in `folder`.
    """
    port = free_port()
    for name, cells in notebooks.items():
        (folder / f"{name}.ipynb").write_text(notebook(*cells))
    words = [
        POLM,
        "lab",
        "--no-browser",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=secret",
        f"--ServerApp.root_dir={folder}",
        "--allow-root",
    ]
    with server(words, f"http://127.0.0.1:{port}/api", folder) as process:
        yield f"http://127.0.0.1:{port}", process


@contextlib.contextmanager
def voila(folder, *words, **environment):
    "The app as `polm app` starts it; yields its address."
    port = free_port()
    with server(
        [POLM, "app", f"--port={port}", "--no-browser", *words],
        f"http://127.0.0.1:{port}/voila/static/voila.js",
        folder,
        **environment,
    ):
        yield f"http://127.0.0.1:{port}"


class Page:
    "A page with the few things that a person does on it."

    def __init__(self, browser, width=1280, height=1000):
        self.context = browser.new_context(viewport=dict(width=width, height=height))
        self.context.set_default_timeout(patience(30) * 1000)
        self.page = self.context.new_page()
        self.asked, self.errors = [], []
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.on("websocket", lambda s: self.asked.append(s.url))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("dialog", lambda d: d.accept())

    def elsewhere(self) -> list[str]:
        "What was asked of other hosts."
        return [
            u
            for u in self.asked
            if not u.startswith(("data:", "blob:", "about:")) and urlparse(u).hostname not in HERE
        ]

    def picture(self, name):
        folder = os.environ.get("POLM_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{folder}/{name}.png")

    def seen(self, selector):
        "What is visible of `selector`."
        return self.page.locator(selector).locator("visible=true")

    def tab(self, name):
        self.page.get_by_role("tab", name=name, exact=True).locator("visible=true").first.click()

    def field(self, label):
        return self.page.get_by_label(label, exact=True).locator("visible=true").first

    def choose(self, label, text):
        "The option of a list whose words contain `text`."
        field = self.field(label)
        words = [word.replace("\xa0", " ") for word in field.locator("option").all_inner_texts()]
        field.select_option(index=next(i for i, word in enumerate(words) if text in word))

    def type(self, label, text):
        field = self.field(label)
        field.fill(text)
        field.press("Tab")

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").first.click()

    def text(self, words, timeout=30):
        self.page.get_by_text(words).locator("visible=true").first.wait_for(
            timeout=patience(timeout) * 1000
        )

    def wait_for(self, holds, timeout=60, what="it"):
        "Poll `holds()` until it is true; returns the seconds that took."
        began, timeout = time.monotonic(), patience(timeout)
        while not holds():
            assert time.monotonic() - began < timeout, f"{what} did not happen in {timeout:.0f} s"
            self.page.wait_for_timeout(50)
        return time.monotonic() - began

    def points(self) -> int:
        "Points that are drawn in the visible figures."
        return self.page.evaluate(
            """() => [...document.querySelectorAll('.js-plotly-plot')]
            .filter(p => p.offsetParent)
            .flatMap(p => p.data || [])
            .reduce((n, t) => n + ((t.y && (t.y.length ?? t.y.shape?.[0])) || 0), 0)"""
        )

    def drawn(self) -> list[str]:
        "Names of the runs that have points in the visible figures."
        return self.page.evaluate(
            """() => [...new Set([...document.querySelectorAll('.js-plotly-plot')]
            .filter(p => p.offsetParent)
            .flatMap(p => p.data || [])
            .filter(t => t.y && (t.y.length ?? t.y.shape?.[0]))
            .map(t => t.name))]"""
        )

    # JupyterLab ----------------------------------------------------------------------------------

    def open_notebook(self, address, name="bench", theme=None):
        "A notebook in JupyterLab with a kernel that is ready, the file browser out of the way."
        self.page.goto(f"{address}/lab/tree/{name}.ipynb?token=secret")
        self.wait_for_kernel()
        light = {"light": "true", "dark": "false"}.get(theme)
        if light and self.page.evaluate("document.body.dataset.jpThemeLight") != light:
            self.page.get_by_role("menuitem", name="Settings", exact=True).click()
            self.page.get_by_text("Theme", exact=True).locator("visible=true").first.hover()
            self.page.get_by_text(f"JupyterLab {theme.capitalize()}", exact=True).locator(
                "visible=true"
            ).first.click()
            self.wait_for(
                lambda: self.page.evaluate("document.body.dataset.jpThemeLight") == light,
                20,
                f"the {theme} theme",
            )
        if self.seen("#jp-left-stack").count():
            self.page.keyboard.press("Control+b")

    def wait_for_kernel(self):
        self.seen(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=patience(60) * 1000)
        self.page.get_by_text("| Idle").wait_for(timeout=patience(60) * 1000)

    def run_cell(self):
        "Run the first cell; the workbench is on the screen."
        self.seen(".jp-Notebook .jp-CodeCell .cm-content").first.click()
        self.page.keyboard.press("Shift+Enter")
        self.page.get_by_role("tab", name="Configure", exact=True).wait_for(
            timeout=patience(60) * 1000
        )

    def save(self):
        self.page.keyboard.press("Control+s")
        self.wait_for(
            lambda: not self.page.locator(".jp-mod-dirty").count(), 20, "the notebook saved"
        )
