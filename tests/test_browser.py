"""The workbench as a person uses it: a real JupyterLab and Voilà in headless Chromium.

The tests in JupyterLab are one story, in order, on one page.
Without a browser all are skipped and say so; with POLM_BROWSER=required (as in CI) they fail.
See browsing.py for which browser is taken.
"""

import os
import shutil
import signal
import time

import psutil
import pytest

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need playwright: pip install playwright"
)

from browsing import CELL, Page, browser_or_skip, jupyter, patience, voila  # noqa: E402

from polm_lab.core.run import Run, all_runs  # noqa: E402


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        made = browser_or_skip(p)
        yield made
        made.close()


class Desk(Page):
    "The workbench in JupyterLab, and the folder that its runs go to."

    def __init__(self, browser, folder, process):
        super().__init__(browser)
        self.folder, self.process = folder / "runs", process

    def newest(self) -> Run:
        return all_runs(self.folder)[-1]

    def commands(self) -> str:
        return "".join(self.seen(".polm-code pre").all_inner_texts())

    def start(self, **knobs) -> Run:
        "Set knobs in the form that is open, press Run, and wait for the first point."
        for name, value in knobs.items():
            self.type(name, str(value))
        self.wait_for(
            lambda: all(f"{name} {value}" in self.commands() for name, value in knobs.items()),
            20,
            "the command that follows the form",
        )
        before = len(all_runs(self.folder))
        self.press("Run")
        self.wait_for(lambda: len(all_runs(self.folder)) > before, 20, "the run's folder")
        run = self.newest()
        self.wait_for(lambda: self.drawn() == [run.id] and self.points() > 0, 60, "the first point")
        return run


@pytest.fixture(scope="module")
def desk(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    with jupyter(folder, bench=[CELL]) as (address, process):
        at = Desk(browser, folder, process)
        at.open_notebook(address)
        at.run_cell()
        yield at
        at.context.close()


@pytest.fixture(autouse=True)
def nothing_is_asked_of_others(request):
    "No page asked another host for anything, and no script failed."
    yield
    at = request.node.funcargs.get("desk")
    if at:
        assert not at.elsewhere(), f"asked of strangers: {at.elsewhere()[:3]}"
        assert not at.errors, at.errors[:3]


def test_choose_change_a_knob_run_reload_stop_and_resume(desk):
    desk.choose("Method", "grpo")
    desk.text("Raise the probability")
    desk.wait_for(lambda: "run grpo" in desk.commands(), 20, "the form of grpo")
    desk.page.get_by_text("More on data and model").click()
    desk.picture("configure")
    run = desk.start(steps=300, eval_rows=8)
    assert run.settings["steps"] == 300
    assert run.settings["eval_rows"] == 8

    desk.save()
    # in mid-run: the notebook was saved and the kernel lives, so the view is back without a cell
    # run again
    desk.page.reload()
    desk.wait_for_kernel()
    desk.page.get_by_role("tab", name="Watch", exact=True).wait_for(timeout=patience(60) * 1000)
    before = (
        desk.wait_for(lambda: desk.points() > 0, 30, "the points after the reload")
        and desk.points()
    )
    desk.wait_for(lambda: desk.points() > before, 30, "more points")
    assert run.status == "running"

    desk.press("Stop")
    desk.text("stopped; it can be resumed", 60)
    stopped = run.last_line()["step"]
    assert run.status == "stopped"
    assert 0 < stopped < 300
    desk.press("Resume")
    desk.wait_for(
        lambda: run.status == "running" and run.last_line()["step"] > stopped,
        60,
        "a step after the resume",
    )
    steps = [row["step"] for row in run.lines()]
    assert steps == list(range(1, len(steps) + 1)), "each step once"
    desk.press("Stop")
    desk.wait_for(lambda: run.status == "stopped", 60, "the second stop")


def test_clone_with_changes_to_the_end(desk):
    first = desk.newest()
    desk.press("Clone with changes")
    desk.text(f"the settings of {first.id}")
    assert "eval_rows 8" in desk.commands()
    run = desk.start(steps=15)
    desk.text("finished", 90)
    desk.wait_for(lambda: run.status == "finished", 60, "the end of the run")
    assert run.settings == {**first.settings, "steps": 15}
    assert set(run.summary) == {"before", "after"}
    desk.wait_for(lambda: desk.points() >= 15 * 10, 30, "fifteen points in each of ten metrics")
    desk.picture("watch")


def test_why_one_completion_got_its_reward(desk):
    desk.tab("Understand")
    desk.seen(".polm input[type=search]").first.fill("advantage>0 reward>0.5")
    desk.seen(".polm tbody tr").first.click()
    desk.text("Its reward is 1 × correct (1) = 1")
    desk.seen(".polm input[type=search]").first.fill("reward>9")
    desk.text("; the filter hides the chosen row")
    desk.seen(".polm input[type=search]").first.fill("")
    desk.wait_for(
        lambda: not desk.seen(".polm-bar").get_by_text("the filter hides").count(),
        10,
        "the words of the filter gone",
    )
    desk.text("so each of its tokens is made more likely")
    token = desk.seen(".polm-tokens span").first
    assert "log π when sampled" in token.get_attribute("aria-label")
    desk.press("Ask the models")
    desk.wait_for(
        lambda: (
            "most probable"
            in (desk.seen(".polm-tokens span").first.get_attribute("aria-label") or "")
        ),
        60,
        "what the models say",
    )
    desk.field("Color by").select_option(label="entropy")
    desk.text("uncertainty before the token")
    desk.picture("understand")


def test_compare_two_runs(desk):
    desk.tab("Compare")
    ids = [run.id for run in all_runs(desk.folder)]
    for name in ids:
        row = desk.seen(".polm tbody tr").filter(has_text=name).first
        row.wait_for()
        if row.get_attribute("aria-selected") != "true":
            row.click()
    desk.wait_for(lambda: set(desk.drawn()) == set(ids), 30, "both runs in the panels")
    desk.tab("Settings")
    desk.text("steps")
    cells = desk.seen("table[aria-label='Settings that differ'] td").all_inner_texts()
    assert cells[0] == "steps"
    assert set(cells[1:3]) == {"300", "15"}
    desk.tab("Lineage")
    desk.wait_for(lambda: desk.seen(".js-plotly-plot").count() == 1, 30, "the family tree")
    desk.picture("compare")


def test_start_a_sweep(desk):
    desk.tab("Configure")
    desk.choose("Method", "sft")
    desk.wait_for(lambda: "run sft" in desk.commands(), 20, "the form of sft")
    desk.type("steps", "3")
    desk.wait_for(lambda: "steps 3" in desk.commands(), 20, "the command")
    desk.tab("Sweep")
    desk.wait_for(lambda: desk.field("fixed").input_value() == "steps 3", 30, "what Configure says")
    desk.type("vary", "learning_rate 0.0003, 0.001")
    desk.type("metric", "perplexity")
    desk.field("notebook").select_option(label="no")
    desk.text("2 trials, 1 at a time")
    desk.press("Start sweep")
    desk.text("2 of 2 trials are over; best perplexity", 120)
    trials = desk.seen("table[aria-label=trials] tbody tr")
    chosen = trials.nth(1).locator("td").last.inner_text()
    trials.nth(1).click()
    desk.wait_for(
        lambda: desk.field("Run").input_value() == chosen,
        20,
        "the trial as the run that is looked at",
    )
    desk.picture("sweep")


def test_a_killed_run_a_damaged_line_and_a_deleted_folder_are_shown(desk):
    desk.tab("Configure")
    run = desk.start(steps=400)
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo\n')
    desk.text("1 damaged line left out")
    os.kill(run.read()["pid"], signal.SIGKILL)
    desk.text("its process is gone (killed, or the machine went down); it can be resumed")
    desk.picture("killed")
    shutil.rmtree(run.path)
    desk.text("no run is there")
    desk.text("what was read before is shown")
    assert desk.points() > 0
    desk.picture("deleted")
    other = desk.newest()
    desk.field("Run").select_option(other.id)
    desk.wait_for(lambda: desk.drawn() == [other.id], 30, "another run")


def test_a_killed_kernel_stops_no_run(desk):
    desk.tab("Configure")
    run = desk.start(steps=400)
    family = {p.pid for p in psutil.Process(desk.process.pid).children(recursive=True)}
    # of one that just ended it is None
    kernels = [
        p
        for p in psutil.process_iter(["cmdline"])
        if p.pid in family and "ipykernel_launcher" in (p.info["cmdline"] or [])
    ]
    assert len(kernels) == 1
    kernels[0].kill()
    desk.text("Kernel Restarting", 60)
    desk.page.keyboard.press("Enter")
    step = run.last_line()["step"]
    desk.wait_for_kernel()
    desk.run_cell()
    desk.wait_for(
        lambda: desk.drawn() == [run.id] and desk.points() > 0,
        60,
        "the run that went on, shown at once",
    )
    assert run.status == "running"
    assert run.last_line()["step"] > step
    desk.press("Stop")
    desk.wait_for(lambda: run.status == "stopped", 60, "the stop")


REPLAY = """async ([figure_code, library_code]) => {
  const load = async text => {
    const url = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
    return (await import(url)).default;
  };
  class Model {
    constructor(state) { this.state = state; this.listeners = {}; }
    get(name) { return this.state[name]; }
    set(name, value) {
      this.state[name] = value;
      (this.listeners["change:" + name] ?? []).forEach(call => call());
    }
    on(name, call) { (this.listeners[name] ??= []).push(call); }
    off(name, call) {
      this.listeners[name] = this.listeners[name].filter(other => other !== call);
    }
  }
  globalThis.received = [];
  const names = ["_py2js_restyle", "_py2js_addTraces"], model = new Model({});
  const figure = (await load(figure_code))();
  figure.initialize({ model });
  for (const [name, message] of [[names[0], 1], [names[1], 2], [names[0], 3]]) {
    model.set(name, message);
    model.set(name, null);
  }
  const code = `globalThis.loaded = (globalThis.loaded ?? 0) + 1;
    export default () => ({
      initialize({ model }) {
        const keep = name => () => model.get(name) && received.push([name, model.get(name)]);
        for (const name of ${JSON.stringify(names)}) model.on("change:" + name, keep(name));
      },
      render({ el }) { el.textContent = "drawn"; },
    });`;
  for (const kernel of [1, 2]) {
    const library = await load(library_code);
    library.initialize({ model: new Model({ code }) });
  }
  const el = document.body.appendChild(document.createElement("div"));
  await figure.render({ model, el });
  model.set(names[0], 4);
  return [received, el.textContent, loaded];
}"""


def test_what_was_said_to_a_figure_before_plotly_came_is_repeated_to_it(browser):
    import plotly.graph_objects as go

    from polm_lab.workbench.figures import library, live_figure

    page = browser.new_page()
    page.route(
        "http://127.0.0.1/",
        lambda route: route.fulfill(body="<!doctype html>", content_type="text/html"),
    )
    page.goto("http://127.0.0.1/")
    received, drawn, loaded = page.evaluate(
        REPLAY, [live_figure(go.Figure()).get_state()["_esm"], library().get_state()["_esm"]]
    )
    restyle, add = "_py2js_restyle", "_py2js_addTraces"
    assert received == [[restyle, 1], [add, 2], [restyle, 3], [restyle, 4]]
    assert drawn == "drawn"
    assert loaded == 1
    page.close()


def test_the_app_in_voila(browser, tmp_path):
    with voila(tmp_path) as address:
        at = Page(browser, 1920)
        at.page.goto(f"{address}/?theme=dark")
        at.page.get_by_role("tab", name="Configure", exact=True).wait_for(
            timeout=patience(60) * 1000
        )
        at.press("Look at model and data")
        at.text("LlamaForCausalLM")
        at.picture("app")
        at.type("steps", "5")
        at.press("Run")
        at.wait_for(lambda: at.points() > 0, 90, "the first point")
        at.text("finished", 90)
        time.sleep(1)
        at.picture("app_watch")
        assert all_runs(tmp_path / "runs")[0].status == "finished"
        assert not at.elsewhere(), f"asked of strangers: {at.elsewhere()[:3]}"
        assert not at.errors, at.errors[:3]
        at.context.close()
