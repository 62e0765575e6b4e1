"""The declarations of a method's page, and their readers.

A page declares needs, the explanation of a reward, metrics, and kinds of rows.
"""

import importlib
import json
import types

import pytest

from polm_lab.core import method as registry
from polm_lab.alignment.rlaif import explained
from polm_lab.core.knobs import WrongInput
from polm_lab.core.settings import RunSettings
from polm_lab.core.method import EXPLANATIONS, NEEDS, REGISTRY, find, method, methods
from polm_lab.core.metrics import METRICS, Metric, metric, register_metrics
from polm_lab.core.run import Run
from polm_lab.data import rows
from polm_lab.data.encode import encode
from polm_lab.data.load import load_data
from polm_lab.data.rows import KINDS, refuse_row, register_kind
from polm_lab.runner import sweep
from polm_lab.workbench.cockpit import Cockpit
from polm_lab.workbench.compare import leaderboard
from polm_lab.workbench.panels import explain
from polm_lab.workbench.record import Record
from polm_lab.workbench.why import EXPLAINERS, by_baseline, why

GAP = Metric("surprise_gap", "surprise at new facts minus that at old ones", better="down")


def declare(**facts):
    "A method `mine` that declares `facts`."

    def mine(settings: RunSettings, run) -> None:
        "Do what only this method does."

    return method(family="finetuning", title="Mine", **facts)(mine)


@pytest.fixture(autouse=True)
def forget():
    "Nothing that a test declares is there for the next."
    methods()  # a page registers its method once, when it is imported
    kept = [(table, dict(table)) for table in (METRICS, KINDS, REGISTRY, rows.CHECKS)]
    yield
    for table, was in kept:
        table.clear()
        table.update(was)


@pytest.fixture
def page(monkeypatch):
    "A page `mine` that is not imported yet: whoever asks for it imports it."
    files = registry._files()
    monkeypatch.setattr(registry, "_files", lambda: {**files, "mine": "polm_lab.finetuning.mine"})
    asked = []

    def load(name):
        if name != "polm_lab.finetuning.mine":
            return importlib.import_module(name)
        asked.append(name)
        declare(metrics=(GAP,), explain=lambda row, group, settings: [f"{len(group)} rows"])

    monkeypatch.setattr(registry, "importlib", types.SimpleNamespace(import_module=load))
    return asked


# Words


def test_every_method_uses_known_words():
    for m in methods().values():
        assert set(m.needs) <= set(NEEDS)
        assert callable(m.explain) or m.explain in ("", *EXPLANATIONS)
    declared = dict(
        grpo="group",
        ppo="tokens",
        rloo="baseline",
        dpo="implicit",
        reward="model",
        critic="score",
        selfrefine="score",
        rag="score",
        rlaif=explained,
    )
    # The others record no samples of their own: their stages do, or nothing has a reward.
    assert {name: m.explain for name, m in methods().items() if m.explain} == declared
    assert set(EXPLAINERS) == set(EXPLANATIONS)


@pytest.mark.parametrize(
    "facts, found",
    [
        (
            dict(needs=("refrence",)),
            "needs: unknown word 'refrence': did you mean 'reference'? known: ",
        ),
        (dict(needs="reward"), "needs = 'reward': expected a tuple of words"),
        (dict(explain="grup"), "explain: unknown word 'grup': did you mean 'group'? known: "),
    ],
)
def test_an_unknown_word_is_refused_in_one_line(facts, found):
    with pytest.raises(WrongInput) as wrong:
        declare(**facts)
    assert str(wrong.value).startswith(found)
    assert "\n" not in str(wrong.value)
    assert "mine" not in REGISTRY


# Explanations


def test_a_method_names_its_explanation():
    row = dict(prompt="2+2=", completion="4", reward=1.0, advantage=0.5)
    group = [row, dict(reward=0.0)]
    declare(explain="baseline")
    assert "greedy answer" in why(row, group, {}, "mine")[2]  # of the record alone it is a group
    declare(
        explain=lambda row, group, settings: [f"{row['reward']} of {len(group)}, {settings['way']}"]
    )
    assert why(row, group, dict(way="so"), "mine") == ["1.0 of 2, so"]
    declare(explain=lambda row, group, settings: settings["way"])  # a word that depends on the row
    assert why(row, group, dict(way="baseline"), "mine") == by_baseline(row, group, {})
    declare()
    assert why(row, group, {}, "mine") == why(row, group, {}) == why(row, group, {}, "gone")
    assert "no reward" in why(dict(completion="4"), [], {}, "mine")[-1]


PAIR = [
    dict(side=side, reward=r, completion=side) for side, r in (("chosen", 2.0), ("rejected", 0.5))
]
GROUP = [dict(reward=r, advantage=r - 0.25, advantages=[0.1, 0.4]) for r in (1.0, 0.0, 0.0, 0.0)]


@pytest.mark.parametrize(
    "method, rows, settings, found",
    [
        ("reward", PAIR, dict(beta=0.1), "The reward model gives this answer 2;"),
        ("dpo", PAIR, {}, "Its implicit reward is 2."),
        ("grpo", GROUP, dict(scale="none"), "its advantage is 1 − 0.25 = 0.75"),
        ("ppo", GROUP, {}, "Each of its tokens has an advantage of its own, from 0.1 to 0.4"),
        ("rloo", [GROUP[0] | dict(advantages=[])], {}, "compared with the greedy answer"),
        ("rlaif", PAIR, dict(algorithm="dpo", beta=0.1), "Its implicit reward is 2."),
        ("rlaif", GROUP, dict(algorithm="ppo"), "Each of its tokens has an advantage of its own"),
        ("rlaif", GROUP, dict(algorithm="direct"), "its advantage is (1 − 0.25) / 0.5 = 1.5"),
        ("rlaif", GROUP, dict(algorithm="mark"), "its advantage is 1 − 0.25 = 0.75"),
        ("critic", GROUP, {}, "It is a score only"),
        ("selfrefine", GROUP, {}, "It is a score only"),
        ("rag", GROUP, {}, "It is a score only"),
    ],
)
def test_a_row_is_explained_as_its_method_declares(method, rows, settings, found):
    said = " ".join(why(rows[0], rows, settings, method))
    assert found in said
    assert said.count("It is a score only") == ("score only" in found)


def test_the_cockpit_asks_the_page_of_the_run(page):
    run = Run.create("mine", {})
    run.sample(1, [dict(prompt="a", completion="b", reward=1.0, group=0)] * 3)
    view = Cockpit(run)
    view.selected = 0
    assert view.why.value == "<div class='polm-view'><p>3 rows</p></div>"
    assert page == ["polm_lab.finetuning.mine"]


# Metrics


def test_a_metric_has_one_owner():
    declare(metrics=(GAP,))
    changed = Metric("surprise_gap", "another wording", better="down")
    declare(metrics=(changed,))  # the notebook was edited and run again
    assert metric("eval/surprise_gap/old").meaning == "another wording: old, on held-out data"
    assert find("mine").metrics == (changed,)
    for owner, name, holder in (
        ("yours", "surprise_gap", "mine"),
        ("mine", "kl", "the vocabulary"),
    ):
        with pytest.raises(WrongInput, match=f"metric '{name}' of {owner}: {holder} has it"):
            register_metrics(
                owner, [Metric("fine", "x", better="up"), Metric(name, "x", better="up")]
            )
    assert "fine" not in METRICS, "what is refused leaves nothing behind"
    assert METRICS["surprise_gap"] == changed
    assert METRICS["kl"].unit == "nats/token"


@pytest.mark.parametrize(
    "wrong, found",
    [
        (Metric("Gap", "x", better="up"), "one lower-case word"),
        (Metric("eval/gap", "x", better="up"), "one lower-case word"),
        (Metric("step", "x", better="up"), "other than step"),
        (Metric("gap", "", better="up"), "expected a meaning"),
        (Metric("gap", "x"), "expected a meaning, and a reading"),
        (Metric("gap", "x", better="higher"), "better = 'higher'"),
    ],
)
def test_a_metric_that_nobody_could_read_is_refused(wrong, found):
    with pytest.raises(WrongInput, match=found) as error:
        declare(metrics=(wrong,))
    assert "\n" not in str(error.value)
    assert "mine" not in REGISTRY


def test_whoever_reads_a_run_knows_the_metrics_of_its_page(page):
    run = Run.create("mine", {})
    run.log(1, loss=1.0, **{"eval/accuracy": 0.5, "reward/format": 0.2})
    record = Record(run)
    assert not page, "a record of known names imports no page"
    run.log(2, **{"eval/surprise_gap": 1.0})
    record.refresh()
    assert page
    assert "surprise at new facts" in explain("eval/surprise_gap")


def test_a_table_and_a_sweep_know_which_way_is_better(page, runs):
    for gap in (2.0, 1.0):
        with Run.create("mine", {}).active() as run:
            run.frame("after", {"surprise_gap": gap})
    assert [row["after"] for row in leaderboard(metric_name="surprise_gap")] == [1.0, 2.0]
    METRICS.pop("surprise_gap"), REGISTRY.pop("mine")
    how = sweep.plan("mine", dict(seed="0,1"), metric="surprise_gap")[1]
    assert how["better"] == "down"


# Kinds of rows


def check_year(row):
    if not isinstance(row["year"], int):
        refuse_row(row, "year", "is no whole number", "a year")


def test_a_kind_of_rows_of_a_page_is_loaded_and_checked(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(dict(fact="Oslo", year=1048, more=1)) + "\n")
    with pytest.raises(WrongInput, match="kind 'dated': unknown"):
        load_data(str(path), "dated")
    register_kind("mine", "dated", ("fact", "year"), "a fact and its year", check_year)
    assert load_data(str(path), "dated", "all") == [dict(fact="Oslo", year=1048, more=1)]
    path.write_text(json.dumps(dict(fact="Oslo", year="old")) + "\n")
    with pytest.raises(WrongInput, match="facts.jsonl:1: year is no whole number; expected a year"):
        load_data(str(path), "dated", "all")
    path.write_text(json.dumps(dict(fact="Oslo")) + "\n")
    with pytest.raises(WrongInput, match=r"expected fact \+ year \(a fact and its year\)"):
        load_data(str(path), "dated", "all")


def test_a_kind_of_rows_has_one_owner():
    register_kind("mine", "dated", ("fact",), "a fact")
    register_kind("mine", "dated", ("fact", "year"), "a fact and its year")
    assert KINDS["dated"][0] == ("fact", "year")
    for owner, kind, holder in (
        ("yours", "dated", "mine"),
        ("mine", "ranked", "the table of kinds"),
    ):
        with pytest.raises(WrongInput, match=f"kind '{kind}' of {owner}: {holder} has it"):
            register_kind(owner, kind, ("fact",), "a fact")
    for columns, meaning in (((), "a fact"), ("fact", "a fact"), (("fact",), "")):
        with pytest.raises(WrongInput, match="expected a tuple of columns, and a meaning"):
            register_kind("mine", "other", columns, meaning)


def test_a_declared_kind_is_not_encoded_for_its_page(tokenizer):
    "Only the page knows what is learned of its rows; a kind of the table is encoded as before."
    register_kind("mine", "swap", ("before", "after"), "a text and what it becomes")
    for row in (
        {"before": "one", "after": "two"},
        {"prompt": "one", "before": "one", "after": "two"},
    ):
        with pytest.raises(WrongInput) as wrong:
            encode(tokenizer, row, "swap", 64)
        assert str(wrong.value).startswith(
            "kind 'swap': declared by the page of a method; expected"
        )
        assert "\n" not in str(wrong.value)
        assert "swap," not in str(wrong.value)
    assert encode(tokenizer, {"prompt": "1+1="}, "prompt", 64)["input_ids"]
