"""Each rule on a run that has the illness, and on one that has not.

Short real runs where the illness can be caught, records otherwise.
"""

import json
import shutil

import pytest

from polm_lab.core.run import Run
from polm_lab.runner import launch
from polm_lab.workbench.diagnose import diagnose
from polm_lab.workbench.evidence import Evidence, Lines
from polm_lab.workbench.rules import RULES
from polm_lab.workbench.diagnose import Diagnosis, findings_html

REWARDS = """
def flat(completions, **columns):
    return [0.0] * len(completions)

def long(completion_ids, **columns):
    return [len(ids) / 16 for ids in completion_ids]
"""
GRPO = dict(method="grpo", steps=8, batch_size=8, num_generations=4, eval_rows=4, max_new_tokens=8)
REAL = {
    "flat": GRPO | dict(rewards="FILE:flat"),
    "cut": GRPO | dict(max_new_tokens=2),
    "long": GRPO
    | dict(
        steps=20,
        batch_size=32,
        num_generations=8,
        max_new_tokens=16,
        rewards="FILE:long",
        learning_rate=1e-3,
        beta=0.0,
    ),
    "hot": GRPO | dict(steps=10, eval_rows=16, learning_rate=0.03),
    "cold": GRPO | dict(learning_rate=1e-7),
    "heart": dict(
        method="sft",
        steps=60,
        batch_size=4,
        eval_rows=8,
        learning_rate=3e-3,
        data="FOUR",
        eval_data="sums",
    ),
    "fell": dict(method="dpo", steps=12, batch_size=8, eval_rows=8, learning_rate=3e-3),
    "well": dict(method="grpo"),  # the teaching run
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "Real runs by name, made when first asked for."
    folder, made = tmp_path_factory.mktemp("real"), {}
    (folder / "rewards.py").write_text(REWARDS)
    # wrong, so only to be learned by heart
    rows = [dict(prompt=f"{a}+{a}=", completion=str(2 * a + 1)) for a in (11, 23, 34, 42)]
    (folder / "four.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def get(name):
        if name not in made:
            files = {
                "FILE:flat": f"{folder}/rewards.py:flat",
                "FILE:long": f"{folder}/rewards.py:long",
                "FOUR": str(folder / "four.jsonl"),
            }
            values = {k: files.get(v, v) for k, v in REAL[name].items()}
            made[name] = launch.run(values.pop("method"), out=folder / "runs", **values)
        return made[name]

    return get


def rules(run) -> dict:
    return {finding.rule: finding for finding in diagnose(run)}


CAUGHT = [
    ("no_contrast", "flat"),
    ("cut_short", "cut"),
    ("pays_for_length", "long"),
    ("reward_without_accuracy", "long"),
    ("kl_left_range", "hot"),
    ("unusual_learning_rate", "hot"),
    ("worse_than_start", "hot"),
    ("unusual_learning_rate", "cold"),
    ("worse_on_held_out", "heart"),
    ("both_rewards_fall", "fell"),
    ("loss_near_zero", "well"),
]


@pytest.mark.parametrize("rule, ill", CAUGHT)
def test_real_illness(real, rule, ill):
    found = rules(real(ill))
    assert rule in found, found
    assert found[rule].says
    assert found[rule].evidence
    assert found[rule].look
    assert not found[rule].says.startswith("The rule")


def test_real_health(real):
    assert set(rules(real("well"))) == {"loss_near_zero"}
    # where nothing is learned a loss of 0 is no comfort
    assert "loss_near_zero" not in rules(real("flat"))


# Illnesses that a run of seconds does not catch, as records: name -> (metrics, samples, facts,
# the healthy counterpart's metrics)
def line(a, b):
    return lambda t: a + (b - a) * t


def step(a, b, at=0.5):
    return lambda t: a if t < at else b


RECORDS = {
    "entropy_collapsed": (dict(entropy=step(1.5, 0.01)), {}, dict(entropy=line(1.5, 0.8))),
    "gradient_spikes": (
        dict(grad_norm=lambda t: 90.0 if abs(t - 0.5) < 0.015 else 1.0),
        {},
        dict(grad_norm=line(1.0, 3.0)),
    ),
    "kl_left_range": (dict(kl=line(0.0, 5.0)), {}, dict(kl=line(0.0, 0.5))),
    "no_contrast": (dict(zero_std_groups=0.92), {}, dict(zero_std_groups=0.5)),
    "cut_short": (dict(truncated=line(0.0, 1.0)), {}, dict(truncated=0.1)),
    "both_rewards_fall": (
        dict(margin=line(0, 2), reward_chosen=line(0, -1), reward_rejected=line(0, -3)),
        {},
        dict(margin=line(0, 2), reward_chosen=line(0, 1), reward_rejected=line(0, -1)),
    ),
    "loss_near_zero": (dict(loss=0.001, advantage_std=1.0), {}, dict(loss=0.7, advantage_std=1.0)),
    "worse_on_held_out": (
        dict(accuracy=line(0.5, 1.0), **{"eval/accuracy": 0.5}),
        {},
        dict(accuracy=line(0.5, 0.9), **{"eval/accuracy": line(0.5, 0.88)}),
    ),
    "worse_than_start": (
        dict(loss=1.0),
        dict(summary=dict(before=dict(accuracy=0.8), after=dict(accuracy=0.5))),
        dict(loss=1.0),
    ),
    "critic_misleads": (
        dict(explained_variance=line(0, -0.5)),
        {},
        dict(explained_variance=line(0, 0.5)),
    ),
    "kl_not_held": (
        dict(kl=line(0, 0.9), kl_coefficient=line(0.01, 0.2)),
        {},
        dict(kl=line(0, 0.9), kl_coefficient=line(0.02, 0.01)),
    ),
    "ranks_by_chance": (
        dict(margin=line(0, 1)),
        dict(summary=dict(after=dict(pair_accuracy=0.55))),
        dict(margin=line(0, 1)),
    ),
    "prefers_length": (
        dict(loss=1.0),
        dict(summary=dict(after=dict(length_bias=0.3))),
        dict(loss=1.0),
    ),
    "equal_pairs": (
        dict(loss=1.0),
        dict(left_out=dict(train=dict(equal=3, pairs=4))),
        dict(loss=1.0),
    ),
    "did_not_finish": (dict(loss=1.0), dict(status="running"), dict(loss=1.0)),
}


def written(metrics, steps=50, samples=(), **facts) -> Run:
    run = Run.create("grpo", dict(steps=steps))
    for i in range(steps):
        run.log(
            i + 1,
            **{
                name: value(i / (steps - 1)) if callable(value) else value
                for name, value in metrics.items()
            },
        )
    run.sample(steps, samples)
    run.update(**dict(status="finished", step=steps) | facts)
    return run


@pytest.mark.parametrize("rule", RECORDS)
def test_written_illness(rule):
    ill, facts, well = RECORDS[rule]
    assert rule in rules(written(ill, **facts))
    assert rule not in rules(written(well))


QUALITIES = ("accuracy", "pair_accuracy", "gold_score")


@pytest.mark.parametrize("name", QUALITIES)
def test_each_measure_of_answers_is_looked_at(name):
    overfitted = written({name: line(0.5, 1.0), f"eval/{name}": 0.5})
    assert name in rules(overfitted)["worse_on_held_out"].evidence
    ends = {when: {name: value} for when, value in (("before", 0.8), ("after", 0.5))}
    assert name in rules(written(dict(loss=1.0), summary=ends))["worse_than_start"].evidence
    if name != "pair_accuracy":
        gamed = written(dict(reward=line(0, 1)), summary=ends)
        assert "reward_without_accuracy" in rules(gamed)


CHANCE = {
    "accuracy that fell by chance": (
        dict(loss=1.0),
        dict(accuracy=0.5),
        dict(accuracy=0.4),
        "worse_than_start",
    ),
    "a loss that is no perplexity": (
        dict(loss=line(0.3, 0.05)),
        dict(perplexity=3.0),
        dict(perplexity=3.0),
        "worse_on_held_out",
    ),
    "a gradient that comes and goes below the clip": (
        dict(grad_norm=lambda t: 0.9 if abs(t - 0.5) < 0.015 else 0.01),
        {},
        {},
        "gradient_spikes",
    ),
}


@pytest.mark.parametrize("case", CHANCE)
def test_no_false_alarm(case):
    metrics, before, after, rule = CHANCE[case]
    run = written(metrics, summary=dict(before=before, after=after))
    run.update(settings=run.settings | dict(clip=1.0, eval_rows=64))
    assert rule not in rules(run)


def test_what_is_solved_may_be_certain():
    collapse = dict(entropy=step(1.5, 0.01))
    assert [
        rules(written(collapse, summary=dict(after=dict(accuracy=share))))[
            "entropy_collapsed"
        ].severity
        for share in (0.6, 0.99)
    ] == ["warning", "note"]


def test_collapse_names_its_step():
    assert "step 26" in rules(written(RECORDS["entropy_collapsed"][0]))["entropy_collapsed"].says


def test_every_rule_is_tested():
    assert set(RULES) == {rule for rule, _ in CAUGHT} | set(RECORDS) | {"damaged_lines"}


def test_damage_is_counted_and_the_rest_is_read():
    run = written(dict(kl=line(0.0, 5.0)))
    assert "damaged_lines" not in rules(run)
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 51, "kl"\n\xff\xfe\n[1]\n{"step": 52, "k')
    found = rules(run)
    assert found["damaged_lines"].evidence.startswith("3 lines of metrics.jsonl")
    assert "is incomplete" in found["damaged_lines"].evidence
    assert "kl_left_range" in found


@pytest.mark.parametrize(
    "row",
    [
        dict(reward="x"),
        dict(reward=[1]),
        dict(group=[1], reward=1.0),
        dict(tokens=3, reward=1.0),
        dict(rewards=7),
        {"step": {}},
    ],
)
def test_odd_rows_do_not_break_it(row):
    run = written(
        dict(zero_std_groups=1.0, reward=line(0, 1), length=line(0, 9), truncated=1.0),
        samples=[dict(row)] if "step" not in row else [],
    )
    run._append("samples", [row])
    assert isinstance(Diagnosis(run).findings, list)


def test_lines_follow_a_file_that_is_replaced(tmp_path):
    run = written(dict(loss=1.0), samples=[dict(reward=1.0)] * 4)
    lines = Lines(run.path / "samples.jsonl")
    assert lines.read()
    assert len(lines.rows) == 4
    run.rewind(3)
    lines.read()
    assert lines.rows == []
    (run.path / "samples.jsonl").unlink()
    assert not lines.read()


def test_the_view_outlives_its_run():
    run = written(dict(kl=line(0.0, 5.0)))
    view = Diagnosis(run, dark=True)
    before = view.children[0].value
    assert "KL is above its usual range" in before
    shutil.rmtree(run.path)
    view.refresh()
    view.refresh()
    assert "gone" in view.children[0].value
    assert "KL is above its usual range" in view.children[0].value
    assert "no such run" in Diagnosis("nothing").children[0].value


def test_a_reason_is_text():
    run = written(
        dict(loss=1.0), status="failed", reason="<img src=x onerror=alert(1)>\x1b[31m\u202e"
    )
    page = findings_html(diagnose(run), 50)
    assert "<img" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "&lt;img" in page


def test_refresh_tells_whether_anything_changed():
    evidence = Evidence(written(dict(loss=1.0)))
    assert not evidence.refresh()
    evidence.run.log(51, loss=2.0)
    assert evidence.refresh()
    assert not evidence.refresh()
