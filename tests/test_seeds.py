"Tables over seeds: every plan can be run, and every kept result is of its plan."

import csv
import math
import tomllib

import pytest
from conftest import ROOT

from polm_lab.core.knobs import WrongInput
from polm_lab.core.method import methods
from polm_lab.runner import launch
from polm_lab.runner.seeds import (
    COLUMNS,
    SEEDS,
    read_plan,
    read_results,
    seed_table,
    span,
    with_runs,
)

RESULTS = ROOT / "data" / "results"
PLANS = tomllib.loads((RESULTS / "plans.toml").read_text(encoding="utf-8"))
KEPT = sorted(path.stem for path in RESULTS.glob("*.csv"))


def test_plans_and_results_are_of_methods():
    assert set(PLANS) <= set(KEPT) <= set(methods())


@pytest.mark.parametrize("method", KEPT)
def test_every_setting_of_a_plan_can_be_run(method):
    earlier = []
    for name, knobs in read_plan(method).items():
        knobs = dict(knobs)
        which = knobs.pop("method", method)
        for knob, value in list(knobs.items()):
            if str(value).startswith("run:"):
                assert value.removeprefix("run:") in earlier, (method, name, knob)
                knobs[knob] = "tiny"
        launch.check_settings(which, knobs)
        earlier.append(name)


@pytest.mark.parametrize("method", KEPT)
def test_results_are_of_the_plan_with_every_seed(method):
    rows = read_results(method)
    assert tuple(rows[0]) == COLUMNS
    found = {}
    for row in rows:
        assert math.isfinite(float(row["after"])), row
        assert row["before"] == "" or math.isfinite(float(row["before"])), row
        found.setdefault(row["setting"], set()).add(int(row["seed"]))
    plan = read_plan(method)
    for setting, seeds in found.items():
        of_plan = [name for name in plan if setting == name or setting.startswith(f"{name}: ")]
        assert of_plan, f"{setting}: not in the plan; run polm_site seeds {method}"
        assert seeds == set(SEEDS), setting
    for name in plan:
        assert any(s == name or s.startswith(f"{name}: ") for s in found), name


def test_an_unknown_method_plan_or_metric_is_one_line(tmp_path):
    (tmp_path / "plans.toml").write_text("[sft.")
    rows = [dict(zip(COLUMNS, ("a", "0", "kl", "0", "1")))]
    with open(tmp_path / "sft.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    wrong = {
        "did you mean 'sft'": lambda: read_plan("sfft"),
        "expected a TOML file": lambda: read_plan("sft", tmp_path / "plans.toml"),
        "model = 'run:b'": lambda: with_runs(dict(model="run:b"), dict(a=None)),
        "polm_site seeds sft": lambda: seed_table("sft", path=tmp_path / "none.csv"),
        "metric 'lk'": lambda: seed_table("sft", ["lk"], tmp_path / "sft.csv"),
    }
    for part, call in wrong.items():
        with pytest.raises(WrongInput) as refused:
            call()
        assert part in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_method_without_a_plan_has_its_defaults(tmp_path):
    (tmp_path / "plans.toml").write_text('[dpo."long"]\nsteps = 9\n')
    assert read_plan("sft", tmp_path / "plans.toml") == {"defaults": {}}
    assert read_plan("dpo", tmp_path / "plans.toml") == {"long": {"steps": 9}}


def test_spans_and_tables(tmp_path):
    assert [span(v) for v in ([], [""], ["0.5", "0.5"], ["10", "9.5", "-1"])] == [
        "",
        "",
        "0.5",
        "-1 to 10",
    ]
    rows = [
        ("one", 0, "kl", "0", "0.25"),
        ("one", 1, "kl", "0", "0.125"),
        ("two", 0, "kl", "", "2"),
        ("two", 1, "kl", "", "2"),
        ("two", 0, "loss", "3", "1"),
        ("two", 1, "loss", "3", "1.5"),
    ]
    path = tmp_path / "sft.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    table = seed_table("sft", ["kl"], path)
    assert table.to_dict("index") == {
        "one": {"before": "0", "after": "0.125 to 0.25"},
        "two": {"before": "", "after": "2"},
    }
    both = seed_table("sft", path=path)
    assert both.loc["one"].to_dict()["loss", "after"] == ""
    assert both.loc["two"].to_dict()["loss", "after"] == "1 to 1.5"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows[:2]])
    alone = seed_table("sft", path=path)
    assert alone.to_dict("index") == {"kl": {"before": "0", "after": "0.125 to 0.25"}}
    assert alone.index.name == "2 seeds"
