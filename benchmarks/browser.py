"""Measure in the browser how long a person waits.

    python benchmarks/browser.py [--repeats 3] [--check]

Measured are the first metric, an answer while a run trains, a large run, and a slider.
It uses a real JupyterLab and headless Chromium (see tests/browsing.py).
Times are taken inside the page, from the click to the frame in which the result is drawn.

The case `cold` is a new kernel with Run pressed as soon as the form is there.
The case `warm` is a workbench that has been open for a while.
The machine load (mean number of processes that want a processor) is printed next to each time.
Times double when it exceeds the number of processors.
With `--check` the exit status is 1 unless every bar holds.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from browsing import CELL, Page, jupyter, open_browser  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from workbench import NAMES, large_run  # noqa: E402

from polm_lab.core.run import Run, all_runs  # noqa: E402

CLOCK = """([act, holds, timeout]) => new Promise((done, fail) => {
  const check = new Function("return " + holds), began = performance.now();
  new Function(act)();
  const look = () => {
    const spent = performance.now() - began;
    if (check()) done(spent);
    else if (spent > timeout) fail(new Error("not within the time: " + holds));
    else requestAnimationFrame(look);
  };
  look();
})"""

# the first points of the first curve, as text
FIGURE = "JSON.stringify([...document.querySelector('.js-plotly-plot').data[0].y].slice(0, 40))"


def clocked(page, act: str, holds: str, timeout: float = 120) -> float:
    "Seconds in the page from doing `act` until `holds`, looked at in every frame."
    return page.evaluate(CLOCK, [act, holds, 1000 * timeout]) / 1000


def press(words: str) -> str:
    return (
        f"[...document.querySelectorAll('button')].find(b => b.textContent.trim() === {words!r} "
        "&& b.offsetParent && !b.disabled).click()"
    )


def drawn(condition: str) -> str:
    "That some visible figure has points of a run whose id `name` fulfils `condition`."
    return (
        "[...document.querySelectorAll('.js-plotly-plot')].some(p => p.offsetParent && (p.data || "
        "[]).some(t => { const name = t.name || ''; "
        f"return {condition} && t.y && (t.y.length ?? t.y.shape?.[0]) > 0; }}))"
    )


def load() -> float:
    return os.getloadavg()[0]


def first_metric(at, folder) -> tuple[float, Run]:
    "Seconds from Run to the first point on the screen."
    known = [run.id for run in all_runs(folder / "runs")]
    seconds = clocked(at.page, press("Run"), drawn(f"name && !{json.dumps(known)}.includes(name)"))
    return seconds, all_runs(folder / "runs")[-1]


def prepare(at, **knobs):
    at.tab("Configure")
    at.choose("Method", "grpo")
    for name, value in knobs.items():
        at.type(name, str(value))
    at.wait_for(
        lambda: all(
            f"{n} {v}" in "".join(at.seen(".polm-code pre").all_inner_texts())
            for n, v in knobs.items()
        ),
        30,
    )


def stop(at, run):
    at.press("Stop")
    at.wait_for(lambda: run.status in ("stopped", "finished"), 90)


def what_if() -> str:
    "Return the what-if cell of the page on DPO."
    cells = json.loads((ROOT / "nbs" / "alignment" / "dpo.ipynb").read_text())["cells"]
    return next(
        "".join(c["source"])
        for c in cells
        if "interactive" in "".join(c["source"])
        and "skip-execution" in c["metadata"].get("tags", [])
    )


class Rows(list):
    "Rows that are printed as they come."

    def append(self, row):
        super().append(row)
        what, seconds, bar, busy, remark = row
        print(
            f"{what:44} {seconds * 1000:6.0f} ms {bar * 1000:5.0f} ms  {busy:4.1f} "
            f"{'ok  ' if seconds <= bar else 'OVER'} {remark}",
            flush=True,
        )


def measure(repeats: int) -> list[tuple]:
    "(what, seconds, bar in seconds, load, remark) for each wait."
    rows = Rows()
    with tempfile.TemporaryDirectory() as name, sync_playwright() as p:
        folder = Path(name)
        (folder / "runs").mkdir()
        browser = open_browser(p)
        slider = ["import torch\nfrom polm_lab.alignment.dpo import *\n" + what_if()]
        with jupyter(folder, bench=[CELL]) as (address, _):
            at = Page(browser)
            at.open_notebook(address)
            at.run_cell()
            prepare(at)
            seconds, run = first_metric(at, folder)
            rows.append(
                (
                    "first metric on screen, cold",
                    seconds,
                    12,
                    load(),
                    f"{run.lines()[0]['seconds']:.1f} s of them in the run itself",
                )
            )
            stop(at, run)
            found, inside = [], []
            for _ in range(repeats):
                at.tab("Configure")
                at.page.wait_for_timeout(15_000)  # the next process gets ready
                seconds, run = first_metric(at, folder)
                found.append(seconds), inside.append(run.lines()[0]["seconds"])
                stop(at, run)
            rows.append(
                (
                    "first metric on screen, warm",
                    statistics.median(found),
                    3,
                    load(),
                    f"{statistics.median(inside):.1f} s of them in the run itself",
                )
            )

            prepare(at, steps=2000)
            seconds, run = first_metric(at, folder)
            at.tab("Configure")
            found = []
            for number in range(20):
                at.page.wait_for_timeout(230)
                field = (
                    "[...document.querySelectorAll('input')].find(i => i.offsetParent && "
                    "i.closest('.widget-inline-hbox')?.querySelector('label')?.textContent === "
                    "'steps')"
                )
                act = (
                    f"const i = {field}; i.value = '{3000 + number}'; i.dispatchEvent(new "
                    f"Event('input', {{bubbles: true}})); i.dispatchEvent(new Event('change', "
                    f"{{bubbles: true}}))"
                )
                found.append(
                    clocked(
                        at.page,
                        act,
                        "[...document.querySelectorAll('.polm-code pre')].some(c => "
                        f"c.textContent.includes('steps {3000 + number}'))",
                    )
                )
            assert run.status == "running"
            rows.append(
                (
                    "an answer while training",
                    statistics.median(found),
                    0.1,
                    load(),
                    f"slowest of 20: {max(found) * 1000:.0f} ms",
                )
            )
            stop(at, run)

            for steps, metrics in ((1_000_000, NAMES[:1]), (62_500, NAMES)):
                run = large_run(folder / "runs", steps, metrics)
                at.tab("Watch")
                choice = (
                    "[...document.querySelectorAll('select')].find(s => s.offsetParent && "
                    "[...s.options].some(o => o.textContent.replaceAll('\\u00a0', ' ') === "
                    f"'{run.id}'))"
                )
                at.wait_for(lambda: at.page.evaluate(f"Boolean({choice})"), 30)
                act = (
                    f"const s = {choice}; s.selectedIndex = [...s.options].findIndex(o => "
                    f"o.textContent === '{run.id}'); s.dispatchEvent(new Event('change', "
                    f"{{bubbles: true}}))"
                )
                rows.append(
                    (
                        f"a run of {steps:,} x {len(metrics)} points opens",
                        clocked(at.page, act, drawn(f"name === '{run.id}'")),
                        2,
                        load(),
                        "",
                    )
                )
            at.context.close()

        # a server of its own: JupyterLab opens again what was open in the last one
        other = folder / "slider"
        (other / "runs").mkdir(parents=True)
        with jupyter(other, slider=slider) as (address, _):
            at = Page(browser)
            at.open_notebook(address, "slider")
            at.seen(".jp-Notebook .jp-CodeCell .cm-content").first.click()
            at.page.keyboard.press("Shift+Enter")
            at.wait_for(lambda: at.points() > 0, 120)
            at.page.wait_for_timeout(3000)
            found = []
            for _ in range(10):
                at.page.evaluate(f"globalThis.before = {FIGURE}")
                act = (
                    "const h = document.querySelector('.noUi-handle'); h.focus(); "
                    "h.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', bubbles: "
                    "true}))"
                )
                found.append(clocked(at.page, act, f"{FIGURE} !== globalThis.before", 20))
                at.page.wait_for_timeout(300)
            rows.append(
                (
                    "a what-if slider",
                    statistics.median(found),
                    0.1,
                    load(),
                    f"slowest of 10: {max(found) * 1000:.0f} ms",
                )
            )
            at.context.close()
        browser.close()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    print(f"{'what':44} {'took':>9} {'bar':>8}  load")
    began, rows = time.time(), measure(asked.repeats)
    print(f"{time.time() - began:.0f} s in all, {os.cpu_count()} processors")
    if asked.check and any(seconds > bar for _, seconds, bar, *_ in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
