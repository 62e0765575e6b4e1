"""Check the comparison of adapters.

Adapters that fit are trained, others are reported, and a killed comparison continues.
"""

import pytest

import polm_lab as lab
from polm_lab.training.chain import create, execute
from polm_lab.core.knobs import WrongInput
from polm_lab.models.attach import adapter_names
from polm_lab.efficiency.peft import NEEDS, RATES, adapter_list, pareto

SHORT = dict(steps=2, batch_size=4, eval_rows=4)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("POLM_RUNS", str(tmp_path / "runs"))


def test_two_adapters_are_compared_and_their_runs_stay_out_of_the_table():
    run = lab.run("peft", adapters="lora:r=2@0.002; ia3", **SHORT)
    rows = {row["adapter"]: row for row in run.record["table"]}
    assert list(rows) == ["lora:r=2", "ia3"]
    assert rows["lora:r=2"]["learning_rate"] == 0.002
    assert rows["ia3"]["learning_rate"] == RATES["ia3"]
    assert 0 < rows["ia3"]["trained_share"] < rows["lora:r=2"]["trained_share"] < 0.05
    assert all(
        row["perplexity"] > 1
        and row["activations_mib"] > 0
        and row["step_ms"] > 0
        and row["adapter_kib"] > 0
        for row in rows.values()
    )
    parts = [lab.open_run(run.path.parent / name) for name in run.record["stages"].values()]
    assert [p.settings["adapter"] for p in parts] == list(rows)
    assert not any((p.path / "checkpoints").exists() for p in parts)
    assert list(lab.runs().index) == [run.id] or len(lab.runs()) == 1
    assert run.summary["after"]["perplexity"] == min(row["perplexity"] for row in rows.values())


def test_a_comparison_that_broke_off_takes_finished_parts_as_they_are(monkeypatch):
    import polm_lab.efficiency.peft as page

    run, real, calls = create("peft", dict(adapters="lora:r=2; ia3", **SHORT)), page.subrun, []

    def breaks(whole, label, *args, **values):
        calls.append(label)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(whole, label, *args, **values)

    monkeypatch.setattr(page, "subrun", breaks)
    with pytest.raises(BaseException):
        execute(run)
    first = dict(lab.open_run(run.id).record["stages"])
    done = lab.open_run(run.path.parent / first["lora:r=2@0.005"]).record["ended"]
    monkeypatch.setattr(page, "subrun", real)
    run = execute(lab.open_run(run.id))
    assert run.status == "finished"
    assert len(run.record["table"]) == 2
    assert (
        lab.open_run(run.path.parent / run.record["stages"]["lora:r=2@0.005"]).record["ended"]
        == done
    )


def test_what_breaks_the_model_at_its_defaults_has_settings_that_do_not():
    run = lab.run(
        "peft", adapters="; ".join(NEEDS[name] for name in ("delora", "fourierft")), **SHORT
    )
    assert all(
        row["perplexity"] < 2 * run.summary["before"]["perplexity"] for row in run.record["table"]
    )  # 1.0 and 1.5 times; at their defaults 36 and 92


def test_a_named_adapter_that_does_not_fit_is_an_error_before_training():
    run = create("peft", dict(adapters="lora:r=2; vblora", **SHORT))
    with pytest.raises(WrongInput, match="vblora.*does not fit"):
        execute(run)
    assert "stages" not in lab.open_run(run.id).record


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected all"),
        ("lora:r=8@fast", "'fast' is no number"),
        ("lora; lora", "each once"),
        ("lorra", "did you mean 'lora'"),
        ("lora:rank=8", "no setting 'rank'"),
    ],
)
def test_wrong_lists(text, message):
    with pytest.raises(WrongInput, match=message):
        adapter_list(text)


def test_all_names_every_adapter_of_the_library():
    assert {spec.partition(":")[0] for spec, _ in adapter_list("all")} == {"none", *adapter_names()}
    assert set(RATES) | set(NEEDS) <= {"none", *adapter_names()}


def test_the_front_is_what_nothing_beats():
    assert pareto([1, 1, 2], [1, 2, 2]) == [1]
    assert pareto([], []) == []


def test_each_adapter_has_a_row_of_results_and_what_is_left_out_its_reason(tmp_path, capsys):
    "The record keeps what was compared, and the command line says why an adapter is not there."
    from polm_lab.cli import _report
    from polm_lab.runner.seeds import result_rows

    run = lab.run("peft", adapters="ia3; lora", steps=1, batch_size=2, eval_rows=2, out=tmp_path)
    rows = [row for row in result_rows("chat", run) if row["metric"] == "perplexity"]
    assert [row["setting"] for row in rows] == ["chat: as it is", "chat: ia3", "chat: lora"]
    table = {row["adapter"]: row["perplexity"] for row in run.record["table"]}
    assert [float(row["after"]) for row in rows[1:]] == pytest.approx(
        list(table.values()), rel=1e-4
    )
    assert float(rows[0]["after"]) == pytest.approx(run.summary["before"]["perplexity"], rel=1e-4)
    run.update(left_out={"adamss": "it needs a library that is not here"})
    _report(run, as_json=False)
    assert "left out:  adamss: it needs a library that is not here" in capsys.readouterr().out
