"Panels and comparisons from records: whole, growing, rewound, damaged, killed, deleted."

import asyncio
import json
import shutil
import subprocess
import sys

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.callbacks import Points

from polm_lab.core.knobs import WrongInput
from polm_lab.core.method import methods
from polm_lab.core.metrics import METRICS
from polm_lab.core.run import Run
from polm_lab.workbench.compare import (
    Compare,
    export_figure,
    family_tree,
    leaderboard,
    lineage,
    report,
    run_rows,
    same_prompt,
    settings_difference,
)
from polm_lab.workbench.panels import (
    advantage_histogram,
    explain,
    frontier,
    grouped,
    panels,
    plain,
    sample_texts,
    write_page,
)
from polm_lab.workbench.figures import library
from polm_lab.workbench.record import Record, smooth, thin
from polm_lab.workbench.watch import Watch

NASTY = "<img src=x onerror=alert(1)>\x1b[31m\u202etxt"


@pytest.fixture
def make(runs):
    "A finished policy-gradient run: `make(method, steps, parents=..., **settings)`."

    def made(method="grpo", steps=20, parents=(), reached=0.9, **settings):
        run = Run.create(
            method, dict(model="tiny", data="sums", steps=steps) | settings, parents=parents
        )
        with run.active():
            for step in range(1, steps + 1):
                at = step / steps
                run.log(
                    step,
                    loss=1 - at,
                    reward=reached * at,
                    kl=0.2 * at,
                    grad_norm=1.0,
                    **{"reward/correct": reached * at},
                )
                if step % 5 == 0:
                    run.log(
                        step,
                        **{"eval/reward": reached * at, "eval/kl": 0.2 * at, "eval/accuracy": at},
                    )
                run.sample(
                    step,
                    [
                        dict(
                            group=0,
                            prompt="2+3=",
                            completion=NASTY,
                            reward=float(i),
                            advantage=2.0 * i - 1,
                        )
                        for i in (0, 1)
                    ],
                )
            run.frame("before", dict(accuracy=0.4, reward=0.4, kl=0.0))
            run.frame(
                "after", dict(accuracy=reached, reward=reached, kl=0.2, perplexity=2 - reached)
            )
        return run

    return made


def figures(view):
    "The figures of a `Watch` by group."
    return {group: figure for group, (_, figure, _) in view.panels.figures.items()}


def lines(text, folder):
    "A run whose metrics.jsonl is `text`."
    run = Run.create("sft", dict(steps=9), out=folder)
    (run.path / "metrics.jsonl").write_text(text)
    return run


# Reading -----------------------------------------------------------------------------------------


def slowly(run):
    "The columns of a record, by the standard library alone."
    columns = {}
    for row in run.lines():
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and "step" in row:
                columns.setdefault(name, []).append((row["step"], value))
    return columns


def same(record, run):
    return {
        name: list(zip(*map(np.ndarray.tolist, pair))) for name, pair in record.columns.items()
    } == slowly(run)


def test_a_record_is_what_the_standard_library_reads(make, runs):
    run = make()
    assert same(Record(run), run)


@pytest.mark.parametrize(
    "bad",
    [
        '{"step": 2, "lo',
        "[1, 2]",
        "7",
        "",
        "null",
        '{"step": 2, "loss": "high"}',
        '{"loss": 2}',
        '{"step": 2, "loss": {"a": 1}}',
        "\x00\x00",
        '{"step": 2, "loss": 1e999}',
        "[" * 5000,
        '{"step": 2, "loss": ' + "9" * 400 + "}",
    ],
)
def test_a_damaged_line_costs_only_itself(bad, runs):
    run = lines('{"step": 1, "loss": 3}\n' + bad + '\n{"step": 3, "loss": 2.5, "kl": null}\n', runs)
    record = Record(run)
    assert record["loss"][0].tolist() == [1, 3]
    assert record["loss"][1].tolist() == [3, 2.5]
    assert record["kl"][0].tolist() == []


def test_a_record_grows_waits_for_a_torn_line_and_is_rewound(make, runs):
    run = lines('{"step": 1, "loss": 1}\n{"step": 2, "lo', runs)
    record = Record(run)
    assert record["loss"][0].tolist() == [1]
    assert record.damaged == 0
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('ss": 5}\n{"step": 3, "kl": 0.5}\n')
    assert record.refresh() == {"loss", "kl"}
    assert record.refresh() == set()
    assert same(record, run)
    run.rewind(1)
    run.log(2, loss=7.0)  # the text there now is longer and different
    assert "loss" in record.refresh()
    assert record["loss"][1].tolist() == [1, 7]
    assert same(record, run)


def test_thin_keeps_extremes_ends_and_order():
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 999, 1000, 1001, 1999, 2001, 123_457):
        y = rng.normal(size=n)
        x, few = thin(np.arange(n), y)
        assert len(x) <= 1000
        assert (np.diff(x) > 0).all()
        assert (few == y[x.astype(int)]).all()
        if n:
            assert (few.min(), few.max(), x[0], x[-1]) == (y.min(), y.max(), 0, n - 1)
        if n <= 1000:
            assert len(x) == n
    x, _ = thin(np.arange(10**5), rng.normal(size=10**5), within=(500, 900))
    assert set(range(500, 901)) <= set(x)
    assert len(x) < 2000


def test_smoothing_begins_at_the_first_value_and_follows_the_line():
    assert smooth([4.0], 0.9).tolist() == [4.0]
    assert smooth([1.0, 2.0], 0.0).tolist() == [1.0, 2.0]
    assert np.allclose(smooth([1.0, 0.0, 0.0], 0.5), [1, 1 / 3, 1 / 7])
    assert abs(smooth(np.r_[np.zeros(50), np.ones(500)], 0.9)[-1] - 1) < 1e-9


@pytest.mark.parametrize("steps, metrics", [(1_000_000, 1), (62_500, 16)])
def test_a_million_points_are_drawn_as_a_thousand(steps, metrics, runs):
    run = Run.create("sft", dict(steps=steps))
    names = list(METRICS)[:metrics]
    with open(run.path / "metrics.jsonl", "w") as file:
        for s in range(1, steps + 1):
            values = ", ".join(f'"{n}": {(s * 7919 % 1000) / 1000}' for n in names)
            file.write(f'{{"step": {s}, "seconds": {s / 7:.3f}, {values}}}\n')
    view = Watch(run)
    with run.active():
        run.log(steps + 1, **{names[0]: 5.0})
    view.refresh()
    drawn = [t for figure in figures(view).values() for t in figure.data]
    assert sum(len(t.x) > 0 for t in drawn) == metrics
    assert all(len(t.x) <= 1000 for t in drawn)
    assert max(max(t.y, default=0) for t in drawn) == 5.0


# Figures -----------------------------------------------------------------------------------------


def test_panels_draw_runs_evaluations_and_meanings(make):
    first, second = make(), make(reached=0.5)
    figure = panels(first, second)
    assert {t.name for t in figure.data} == {first.id, second.id}
    assert [note.text for note in figure.layout.annotations] == [
        "loss (nats)",
        "reward",
        "reward/correct",
        "kl (nats/token)",
        "accuracy (share)",
        "grad_norm",
    ]
    held_out = [t for t in figure.data if t.mode == "markers"]
    assert len(held_out) == 6
    assert list(held_out[0].x) == [5, 10, 15, 20]
    kl = next(t for t in figure.data if "π<sub>ref</sub>" in t.hovertemplate)
    assert "%{x}" in kl.hovertemplate
    assert "%{y" in kl.hovertemplate
    assert "healthy run" in kl.hovertemplate
    assert "usual: 0 to 1" in kl.hovertemplate
    assert sum(bool(t.showlegend) for t in figure.data) == 2


def test_every_formula_and_reading_can_be_shown():
    methods()  # each declares metrics of its own
    assert "usual: from 0<br>" in explain("divergence").replace("unit: nats/token, ", "")
    for m in METRICS.values():
        assert explain(m.name)
        assert not set("\\{}") & set(plain(m.formula)), m.formula
        assert m.meaning.split()[0] in explain(m.name)
    assert explain("nothing") == ""
    assert "correct" in explain("reward/correct")


def test_each_metric_has_one_group():
    names = [*METRICS, "reward/correct", "eval/kl", "perplexity/sums", "temperature"]
    names.remove("rows")  # a count, which is not drawn
    found = grouped([*names, "step", "seconds", "rows", "eval/rows"])
    assert sorted(n for group in found.values() for n in group) == sorted(
        {n.removeprefix("eval/") for n in names}
    )
    assert found["Other"] == ["temperature"]


def test_frontier_and_advantages(make):
    run = make()
    path, points = frontier(run, smoothing=0).data
    assert (path.x[-1], path.y[-1], path.customdata[-1]) == (0.2, 0.9, 20)
    assert len(points.x) == 6
    assert [t.name for t in advantage_histogram(run).data] == [
        "step 1: 0% at 0",
        "step 20: 0% at 0",
    ]
    bare = Run.create("sft", dict(steps=1))
    for view in (frontier, advantage_histogram, panels):
        with pytest.raises(WrongInput, match=bare.id):
            view(bare)


def test_pages_show_what_models_wrote_as_text(make, tmp_path):
    run = make()
    for text in (
        sample_texts(run),
        write_page([run], tmp_path / "p.html", "<b>title</b>").read_text(),
    ):
        assert "<img" not in text.split("newest samples")[-1]
        assert "\x1b" not in text.split("newest samples")[-1]
        assert "&lt;img" in text
    run.sample(
        21,
        [
            dict(prompt=[dict(role="user", content="x" * 10**6)], completion=None),
            dict(),
            dict(prompt=[3]),
        ],
    )
    assert len(sample_texts(run)) < 10_000


# Watching ----------------------------------------------------------------------------------------


def test_watch_follows_a_run(runs):
    run = Run.create("grpo", dict(steps=4))
    view = Watch(run)
    assert "created" in view.status.value
    assert "no metrics" in view.status.value
    assert view.refresh()
    with run.active():
        run.log(1, loss=2.0, reward=0.1)
        assert view.refresh()
        assert list(figures(view)) == ["Reward", "Learning"]
        learning = figures(view)["Learning"]
        # one point can be seen
        assert list(learning.data[0].y) == [2.0]
        assert "markers" in learning.data[0].mode
        sent = []
        learning._send_restyle_msg = lambda *_, **__: sent.append("restyle")
        learning._send_update_msg = lambda restyle_data=None, *rest, trace_indexes=None, **more: (
            sent.append(trace_indexes)
        )
        run.log(2, reward=0.2)
        view.refresh()
        # loss did not grow: nothing is sent
        assert not sent
        assert list(figures(view)["Reward"].data[0].y) == [0.1, 0.2]
        run.log(3, loss=1.0, kl=0.1)
        view.refresh()
        assert list(figures(view)) == ["Reward", "Learning", "Policy"]
        assert figures(view)["Learning"] is learning
        assert "step 3 of 4" in view.status.value
        assert " left" in view.status.value
    assert not view.refresh()
    assert "finished" in view.status.value


def test_a_finished_run_shows_what_it_showed_live(make):
    run = make()
    live = Watch(run)
    later = Watch(str(run.path))
    for group, figure in figures(live).items():
        for old, new in zip(figure.data, figures(later)[group].data):
            assert np.array_equal(old.x, new.x)
            assert np.array_equal(old.y, new.y)
    assert later.status.value == live.status.value


def test_traits_restyle_the_figures(make):
    view = Watch([make(), make(reached=0.5)])
    reward = figures(view)["Reward"]
    assert reward.layout.template.layout.paper_bgcolor != "rgb(17,17,17)"
    assert reward.layout.uirevision
    view.dark = True
    assert reward.layout.template.layout.paper_bgcolor == "rgb(17,17,17)"
    assert reward.layout.paper_bgcolor == "rgba(0,0,0,0)"
    assert len(reward.data[1].x) == 0
    assert reward.data[0].opacity == 1
    view.smoothing = 0.9
    assert np.allclose(reward.data[1].y, smooth(reward.data[0].y, 0.9))
    assert reward.data[0].opacity < 1
    view.log_x = view.log_y = True
    assert (
        reward.layout.xaxis.type == reward.layout.xaxis2.type == reward.layout.yaxis.type == "log"
    )
    assert view.children[1].children[0].value == 0.9
    assert view.children[1].children[2].value is True
    view.runs = view.runs[:1]
    assert len(figures(view)["Reward"].data) == 6  # 2 metrics of 1 run
    with pytest.raises(Exception, match="smoothing"):
        view.smoothing = 1.0


def test_a_live_figure_starts_before_plotly_is_loaded(make):
    """The module of a live figure is not plotly.js itself, and plotly.js is sent once.

    anywidget drops all messages to a model whose module needs more than two seconds.
    """
    first, second = Watch(make()), Watch(make())
    for figure in (*figures(first).values(), *figures(second).values()):
        state = figure.get_state()
        assert isinstance(figure, go.FigureWidget)
        assert len(state["_esm"]) < 3000
        assert "shelf.library" in state["_esm"]
    held = library()
    assert len(held.code) > 10**6
    assert held is library()
    assert "addTraces" not in held._esm
    held.close()
    assert library() is not held
    assert len(library().code) > 10**6


def test_a_page_that_is_loaded_again_gets_the_figures_as_they_are(runs):
    run = Run.create("sft", dict(steps=3))
    with run.active():
        run.log(1, loss=3.0)
        view = Watch(run)
        run.log(2, loss=2.0)
        view.refresh()
    view.dark = True
    state = figures(view)["Learning"].get_state()
    y = state["_widget_data"][0]["y"]
    assert np.frombuffer(y["buffer"], y["dtype"]).tolist() == [3.0, 2.0]
    assert state["_widget_layout"]["template"]["layout"]["paper_bgcolor"] == "rgb(17,17,17)"


def test_a_logarithm_only_where_nothing_is_negative(runs):
    view = Watch(
        lines(
            '{"step": 1, "loss": -0.5, "grad_norm": 0}\n{"step": 2, "loss": 1, "grad_norm": 2}\n',
            runs,
        ),
        log_y=True,
    )
    learning = figures(view)["Learning"]
    assert learning.layout.yaxis.type == "linear"
    assert learning.layout.yaxis2.type == "log"


def test_a_zoom_shows_every_point_and_stays(runs):
    run = lines("".join(f'{{"step": {s}, "loss": {s % 7}}}\n' for s in range(1, 20_001)), runs)
    view = Watch(run)
    learning = figures(view)["Learning"]
    assert len(learning.data[0].x) <= 1000
    learning.layout.xaxis.range = (5000, 5400)  # what the browser sends for a zoom
    assert set(range(5000, 5401)) <= set(learning.data[0].x)
    run.log(20_001, loss=3.0)
    view.refresh()
    assert tuple(learning.layout.xaxis.range) == (5000, 5400)
    assert set(range(5000, 5401)) <= set(learning.data[0].x)
    assert learning.data[0].x[-1] == 20_001


def test_live_ends_with_the_run(runs):
    async def scene():
        run = Run.create("sft", dict(steps=2))
        view = Watch(run).live(every=0.01)
        with run.active():
            run.log(1, loss=1.0)
            await asyncio.sleep(0.1)
            seen = "running" in view.status.value
        await asyncio.wait_for(view._task, 5)
        return seen and "finished" in view.status.value

    assert asyncio.run(scene())


def test_what_is_wrong_with_a_run_is_said_in_its_line(make, runs):
    whole, wrong = make(), Watch("no-such-run")
    assert "no such run" in wrong.status.value
    assert not wrong.refresh()

    failed = Run.create("sft", dict(steps=2))
    with pytest.raises(ValueError), failed.active():
        failed.log(1, loss=1.0)
        raise ValueError("<b>it</b> broke \x1b[0m")
    view = Watch([whole, failed, "nothing"])
    assert "failed" in view.status.value
    assert "&lt;b&gt;it&lt;/b&gt; broke ␛" in view.status.value
    assert "nothing" in view.status.value

    damaged = lines('{"step": 1, "loss": 1}\nnonsense\n', runs)
    assert "1 damaged line left out" in Watch(damaged).status.value

    drawn = [list(t.y) for figure in figures(view).values() for t in figure.data]
    shutil.rmtree(failed.path)
    (whole.path / "run.json").write_text("{")
    assert not view.refresh()
    assert view.status.value.count("gone") == 4
    assert [list(t.y) for figure in figures(view).values() for t in figure.data] == drawn


def test_a_killed_run_is_seen_as_dead(runs):
    run = Run.create("sft", dict(steps=9))
    code = (
        "import sys, os, signal; from polm_lab.core.run import Run\n"
        "with Run(sys.argv[1]).active() as run:\n    run.log(1, loss=1.0)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.path)])
    view = Watch(run)
    assert "dead" in view.status.value
    assert "its process is gone" in view.status.value
    assert not view.refresh()


# Comparing ---------------------------------------------------------------------------------------


def test_rows_of_comparisons(make, runs):
    base, better, other = (
        make("sft", beta=1),
        make("sft", beta=2, reached=0.95, eval_data="facts"),
        make("grpo", num_generations=8),
    )
    (runs / "broken").mkdir()
    (runs / "broken" / "run.json").write_text("{")
    rows = run_rows()
    assert rows[0]["run"] == "broken"
    assert rows[0]["status"] == "damaged"
    assert len(rows) == 4
    assert next(r for r in rows if r["run"] == better.id)["accuracy"] == 0.95
    assert settings_difference(base, better) == [
        {"knob": "beta", base.id: 1, better.id: 2},
        {"knob": "eval_data", base.id: "–", better.id: "facts"},
    ]
    assert {r["knob"] for r in settings_difference(base, other)} == {
        "method",
        "beta",
        "num_generations",
    }
    assert [r["run"] for r in leaderboard(metric_name="accuracy")][0] == better.id
    assert leaderboard()[0]["data"] == "facts"
    assert [r["after"] for r in leaderboard(metric_name="perplexity")] == sorted(
        r["after"] for r in leaderboard(metric_name="perplexity")
    )
    with pytest.raises(WrongInput, match="did you mean 'accuracy'"):
        leaderboard(metric_name="acuracy")


def test_same_prompt_takes_the_newest_sample_of_each(make):
    first, second, silent = make(), make(steps=7), Run.create("sft", dict(steps=1))
    second.sample(
        7,
        [dict(prompt="other", completion="x"), dict(prompt="2+3=", side="chosen", completion="5")],
    )
    assert [(r["run"], r["step"], r["completion"]) for r in same_prompt(first, second)] == [
        (first.id, 20, NASTY),
        (second.id, 7, NASTY),
    ]
    for which in ((first, silent), ()):
        with pytest.raises(WrongInput, match="no prompt"):
            same_prompt(*which)


def test_lineage_is_a_graph_of_runs(make, runs):
    sft = make("sft")
    dpo = make("dpo", parents=[sft.id], model=str(sft.path / "model"))
    merged = make("merge", parents=[sft.id, dpo.id, "20200101-gone"])
    nodes, edges = family_tree()
    assert {n: v["depth"] for n, v in nodes.items()} == {
        "tiny": 0,
        "20200101-gone": 0,
        sft.id: 1,
        dpo.id: 2,
        merged.id: 3,
    }
    assert len(edges) == 5
    assert nodes["tiny"]["status"] == "base"
    assert nodes["20200101-gone"]["status"] == "gone"
    figure = lineage()
    assert {t.name for t in figure.data[1:]} == {"sft", "dpo", "merge", "base", "gone"}
    assert len(figure.data[0].x) == 15
    sft.update(parents=[merged.id])  # a damaged record: a circle
    assert family_tree()[0][sft.id]["depth"] <= 5
    assert lineage().data
    with pytest.raises(WrongInput, match="no runs are there"):
        lineage(runs / "empty")


def test_figures_and_reports_can_be_taken_away(make, tmp_path, monkeypatch):
    first, second = make(), make(beta=0.1)
    inside = export_figure(panels(first), tmp_path / "inside.html").read_text()
    assert len(inside) > 10**6
    assert (
        len(export_figure(panels(first), tmp_path / "net.html", connected=True).read_text()) < 10**5
    )
    with pytest.raises(WrongInput, match=".html or .png"):
        export_figure(panels(first), tmp_path / "figure.jpg")
    cells = [
        c
        for c in json.loads(report(first, second, path=tmp_path / "r.ipynb").read_text())["cells"]
        if c["cell_type"] == "code"
    ]
    assert cells[0]["metadata"]["tags"] == ["parameters"]
    assert len(cells) == 9
    shown, seen = [], {}
    monkeypatch.setattr("polm_lab.workbench.figures.show", shown.append)
    for cell in cells:
        exec("".join(cell["source"]), seen)
    assert [type(figure).__name__ for figure in shown] == ["Figure"] * 4
    bare = Run.create("sft", dict(steps=1))
    assert len(json.loads(report(bare, path=tmp_path / "bare.ipynb").read_text())["cells"]) == 7


def test_a_picture_is_drawn_or_one_line_says_why_not(make, tmp_path, monkeypatch):
    figure = panels(make(), metrics=["loss"])
    try:
        assert export_figure(figure, tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    except WrongInput as wrong:
        assert "needs Chrome" in str(wrong)
        assert "\n" not in str(wrong)

    def none(*_, **__):
        raise WrongInput("no browser found")

    monkeypatch.setattr("polm_lab.workbench.compare.draw_png", none)
    with pytest.raises(WrongInput, match=r"needs Chrome or Chromium \(no browser found\)"):
        export_figure(figure, tmp_path / "figure.png")


def test_compare_shows_the_chosen_runs(make, runs):
    first, second = make(beta=0.1), make(beta=0.2, reached=0.5)
    view = Compare()

    def shown(tab):
        view.tabs.selected_index = list(view.views).index(tab)
        return view.tabs.children[view.tabs.selected_index].children[0]

    assert "choose one run" in shown("Panels").value
    listed = [row["run"] for row in view.table.rows]
    view.table.selected = [listed.index(run.id) for run in (second, first)]
    assert view.chosen == [second.id, first.id]
    assert len(shown("Panels").panels.records) == 2
    assert len(shown("Reward against KL").data) == 4
    assert [r["knob"] for r in shown("Settings").rows] == ["beta"]
    assert [r["completion"] for r in shown("Same prompts").rows] == [
        "<img src=x onerror=alert(1)>␛[31m⟨U+202E⟩txt"
    ] * 2
    graph = shown("Lineage")
    assert [t.name for t in graph.data[1:]] == ["grpo", "base"]
    for _ in range(2):  # a click takes a run away, another chooses it again
        view._click(
            graph.data[1],
            Points(point_inds=[list(graph.data[1].customdata).index(second.id)]),
            None,
        )
        assert (second.id in view.chosen) == (len(view.chosen) == 2)
    board = shown("Leaderboard")
    assert [r["run"] for r in board.children[1].rows] == [first.id, second.id]
    board.children[0].value = "perplexity"
    assert shown("Leaderboard").children[1].rows[0]["after"] == 1.1
    view.dark = True
    assert shown("Lineage").layout.template.layout.paper_bgcolor == "rgb(17,17,17)"

    make(beta=0.3)  # a new run comes in between; those chosen stay chosen
    assert not view.refresh()
    assert len(view.table.rows) == 3
    assert sorted(view.chosen) == sorted([second.id, first.id])
    assert {view.table.rows[i]["run"] for i in view.table.selected} == set(view.chosen)
    for button in (view.exports[0], view.exports[2]):
        button.click()
        assert "written" in view.message.value
    assert {p.suffix for p in (runs / "exports").iterdir()} == {".html", ".ipynb"}

    shutil.rmtree(second.path)
    assert "no run is there" in shown("Settings").value
    view.exports[0].click()
    assert "no run is there" in view.message.value
    assert not view.refresh()
    assert len(view.table.rows) == 2


def test_compare_follows_a_chosen_run(make, runs):
    run = Run.create("sft", dict(steps=9))
    with run.active():
        run.log(1, loss=3.0)
        view = Compare()
        view.table.selected = [0]
        panel = view.tabs.children[0].children[0]
        run.log(2, loss=2.0)
        run.update(step=2)
        assert view.refresh()
        assert view.table.rows[0]["step"] == 2
        assert view.table.selected == [0]
        assert view.chosen == [run.id]
        assert view.tabs.children[0].children[0] is panel
        assert list(figures(panel)["Learning"].data[0].y) == [3, 2]
    assert not view.refresh()
    assert view.table.rows[0]["status"] == "finished"
    assert view.chosen == [run.id]


def test_compare_of_nothing(runs):
    view = Compare()
    for number in range(len(view.views)):
        view.tabs.selected_index = number
        assert "role='status'" in view.tabs.children[number].children[0].value
