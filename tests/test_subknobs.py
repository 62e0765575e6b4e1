"""Knobs whose value is a short string.

Their parts are knobs of their own, and the string is still the short form.
"""

import dataclasses
import json
import random

import pytest

from polm_lab.alignment.ppo import CRITIC, DETAILS, PPO
from polm_lab.core.knobs import OFF, Listed, Part, WrongInput
from polm_lab.core.settings import Settings, compose, knobs
from polm_lab.core.settings import make_settings, part_knobs, part_named, value_named
from polm_lab.alignment.rlaif import RLAIF
from polm_lab.core.method import find, methods
from polm_lab.core.run import Run
from polm_lab.efficiency.prune import Prune
from polm_lab.integration.merge import Merge
from polm_lab.integration.merging.weighting import weight_rules
from polm_lab.efficiency.compression.sparse import parse_pattern
from polm_lab.integration.rag import RAG
from polm_lab.integration.retriever import Retriever
from polm_lab.models.attach import parse_adapter
from polm_lab.reasoning.grpo import GRPO
from polm_lab.reasoning.selfrefine import SelfRefine
from polm_lab.rewards.functions import LIBRARY, parse_rewards
from polm_lab.rewards.judges import JUDGES, parse_judge
from polm_lab.runner import launch, sweep
from polm_lab.workbench.controls import Form

SHORT = dict(steps=1, batch_size=8, max_new_tokens=4, eval_rows=4, data="sums")


def parts_of(cls, name: str) -> dict:
    "The parts of one knob of a settings class, by their own name."
    return {k.part.name: k for k in part_knobs(cls).values() if k.name.startswith(f"{name}.")}


def written(cls, name: str, text: str, part: str, value) -> str:
    "`text` of the knob `name` with `value` for a part."
    return getattr(make_settings(cls, {name: text, f"{name}.{part}": value}), name)


def details_of(text: str) -> dict:
    "Return what PPO reads in the knob `details`."
    return DETAILS.values(text, "details")


# Declared -----------------------------------------------------------------------------------------


def test_the_parts_are_declared_with_type_range_and_meaning():
    details = parts_of(PPO, "details")
    assert list(details) == list(DETAILS.parts)
    assert {k.type for k in details.values()} == {bool, float}
    assert details["normalize"].type is bool
    assert details["clip_value"].default == 0.2
    assert details["entropy"].default == OFF
    assert details["normalize"].default is True
    assert details["whiten_rewards"].default is False
    for method in ("grpo", "ppo", "rloo"):
        rewards = parts_of(find(method).settings, "rewards")
        assert list(rewards) == list(LIBRARY)
        assert rewards["correct"].default == 1.0
    assert parts_of(Prune, "allocation")["rule"].choices == (
        "uniform",
        "outliers",
        "hessian",
        "trace",
        "own",
    )
    for name, m in methods().items():
        for k in part_knobs(m.settings).values():
            assert k.meaning, (name, k.name)
            assert k.choices or k.range, (name, k.name)
            assert k.check(k.default) == k.default, (name, k.name)


def test_strings_are_kept_and_parse_as_before():
    for text in ("", "clip_value", " normalize , clip_value:0.30", "explore:-2", "normalize:0"):
        assert make_settings(PPO, dict(details=text)).details == text
        details_of(text)
    for text in ("correct", "correct:1.0,format:0.2", "a.py:nan,model:runs/x:0.5"):
        assert make_settings(GRPO, dict(rewards=text)).rewards == text
    assert [f.name for f in dataclasses.fields(PPO) if "." in f.name] == []


# Reading and writing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, part, value, found",
    [
        ("normalize,clip_value:0.2", "clip_value", 0.3, "normalize,clip_value:0.3"),
        # unchanged: 0.2 is its default
        ("normalize,clip_value", "clip_value", 0.2, "normalize,clip_value"),
        ("normalize, clip_value:0.2", "clip_value", OFF, "normalize"),
        ("clip_value:0.2,clip_value:0.3,normalize", "clip_value", OFF, "normalize"),
        ("normalize,clip_value:0.2", "normalize", "off", "clip_value:0.2"),
        (
            "normalize,clip_value:0.2",
            "whiten_rewards",
            "on",
            "normalize,clip_value:0.2,whiten_rewards",
        ),
        ("", "entropy", "1e-5", "entropy:1e-05"),
        ("normalize", "entropy", "on", "normalize,entropy:0.01"),
        ("normalize", "entropy", OFF, "normalize"),
    ],
)
def test_details_are_written(text, part, value, found):
    assert written(PPO, "details", text, part, value) == found
    details_of(found)


@pytest.mark.parametrize(
    "text, part, value, found",
    [
        ("correct", "format", 0.2, "correct,format:0.2"),
        ("correct,format:0.2", "correct", 2, "correct:2,format:0.2"),
        ("correct,format:0.2", "format", 0, "correct,format:0"),  # still measured, weighs nothing
        ("correct,m:f:0.5", "m:f", 0.25, "correct,m:f:0.25"),
        ("correct,a/b.py:f", "a/b.py:f", 0.25, "correct,a/b.py:f:0.25"),
        ("correct", "model:runs/x.y", "off", "correct"),
        ("correct,model:runs/x.y", "model:runs/x.y", 3, "correct,model:runs/x.y:3"),
    ],
)
def test_weights_of_rewards_are_written(text, part, value, found):
    assert written(GRPO, "rewards", text, part, value) == found
    names = dict(parse_rewards(found))
    assert part not in names if value == "off" else names[part] == value


@pytest.mark.parametrize(
    "text, part, value, found",
    [
        ("lora", "r", 4, "lora:r=4"),
        ("lora:r=8,lora_alpha=16", "r", "4", "lora:r=4,lora_alpha=16"),
        (
            "lora:target_modules=q_proj,v_proj,r=8",
            "lora_alpha",
            32,
            "lora:target_modules=q_proj,v_proj,r=8,lora_alpha=32",
        ),
        ("lora:target_modules=q_proj,v_proj,r=8", "r", OFF, "lora:target_modules=q_proj,v_proj"),
        ("lora:r=8", "kind", "none", "none"),
        ("none", "kind", "lora", "lora"),
        ("", "kind", "lora", "lora"),
        ("none", "r", OFF, "none"),
    ],
)
def test_settings_of_an_adapter_are_written(text, part, value, found):
    assert written(Settings, "adapter", text, part, value) == found
    parse_adapter(found)


RULES = r"0.7,0.3; layers\.[01]\.=1,0"


@pytest.mark.parametrize(
    "text, part, value, found",
    [
        (RULES, "1", 0.5, r"0.5,0.3; layers\.[01]\.=1,0"),
        (RULES, "2", "0.30", RULES),  # as it was
        ("mlp=1,0", "1", 2, "2; mlp=1,0"),  # for all comes before the rule for a few
        ("1,1; mlp=1,0; 0.5,0.5; norm=0,1", "2", -1, "1,1; mlp=1,0; 0.5,-1; norm=0,1"),
        ("", "2", 0.25, "1,0.25"),
        ("", "1", OFF, ""),
        (" 1 , 2 ;", "2", OFF, "1"),
        ("2; mlp=1", "1", "off", "mlp=1"),
        ("=1,2", "1", "on", "=1,2"),
        ("3", "2", 1e-5, "3,1e-05"),
    ],
)
def test_weights_of_tunes_are_written(text, part, value, found):
    grammar = next(k for k in knobs(Merge) if k.name == "weights").parts
    assert compose(Merge, {"weights": text, f"weights.{part}": value})["weights"] == found
    for name, whole in grammar.parts.items():
        kept = grammar.read(text, whole)
        assert name <= part or grammar.read(found, whole) == kept  # those behind it stay


def test_weights_of_tunes_are_parts_with_a_place():
    found = parts_of(Merge, "weights")
    assert list(found) == ["1", "2", "3", "4"]
    assert {k.type for k in found.values()} == {float}
    assert all(k.default == OFF and k.low < 0 < k.high for k in found.values())
    made = make_settings(Merge, {"weights.2": 0.3, "weights.1": 0.7})
    assert made.weights == "0.7,0.3"
    assert weight_rules(made.weights, 2)("any") == [0.7, 0.3]
    draw = random.Random(0)
    for _ in range(100):
        pair = [draw.uniform(-1, 1) * 10 ** draw.randint(-6, 0) for _ in range(2)]
        values = {f"weights.{n}": value for n, value in enumerate(pair, 1)}
        text = make_settings(Merge, dict(weights=RULES) | values).weights
        rule = weight_rules(text, 2)
        assert rule("model.norm.weight") == pair
        assert rule("model.layers.1.mlp") == [1, 0]
        assert [value_named(Merge, dict(weights=text), name) for name in values] == pair


def test_the_kind_of_an_adapter_comes_before_its_settings():
    made = make_settings(Settings, {"adapter.r": 4, "adapter.kind": "lora"})
    assert parse_adapter(made.adapter) == ("lora", dict(r=4))


def test_the_rule_of_an_allocation_is_a_word():
    assert written(Prune, "allocation", "uniform", "rule", "hessian") == "hessian"
    assert written(Prune, "allocation", "0.4,0.5", "rule", "own") == "0.4,0.5"
    assert written(Prune, "allocation", "0.4,0.5", "rule", "outliers") == "outliers"


@pytest.mark.parametrize(
    "text, part, value, found",
    [
        ("shared:0.1", "weight", 0.5, "shared:0.5"),
        ("shared:0.1", "weight", 2, "shared:2"),
        ("shared:0.10", "weight", 0.1, "shared:0.10"),  # as it was
        ("own", "weight", 0.5, "own"),  # as it was: 0.5 is what it means
        ("own", "weight", "0", "own:0"),
        ("shared:0.1", "kind", "own", "own:0.1"),
        ("shared", "kind", "own", "own:0.5"),
        ("shared:0.1", "kind", "runs/a", "runs/a:0.1"),
        ("shared:0.1", "kind", "runs/a:b", "runs/a:b:0.1"),
        ("runs/a:b:0.1", "weight", 1e-5, "runs/a:b:1e-05"),
        ("C:/runs/a", "weight", 0.3, "C:/runs/a:0.3"),
        ("runs/a:b:0.1", "kind", "shared", "shared:0.1"),
    ],
)
def test_a_critic_and_its_weight_are_written(text, part, value, found):
    "The word and the number, each kept while the other changes; a path with a colon survives."
    made = written(PPO, "value", text, part, value)
    assert made == found
    read = CRITIC.values(made, "value")
    assert read[part] == (float(value) if part == "weight" else value)
    for name, part_of in CRITIC.parts.items():
        assert CRITIC.read(made, part_of) == read[name]
        if name != part:
            assert CRITIC.read(text, part_of) == read[name]


@pytest.mark.parametrize(
    "text, found",
    [
        (
            "",
            "value = '': expected own, shared or a run of reward, with the weight of its loss if "
            "wanted, such as own:0.5",
        ),
        (" :0.5", "value = ' :0.5': expected own, shared or a run of reward"),
        ("own:x", "value = 'own:x': weight: found 'x'; expected a number from 0 up, such as 0.5"),
        ("own:", "value = 'own:': weight: found ''; expected a number from 0 up, such as 0.5"),
        ("own:-1", "value = 'own:-1': weight: found '-1'; expected a number from 0 up"),
        ("own:inf", "value = 'own:inf': weight: found 'inf'; expected a number from 0 up"),
        ("C:/runs/a", "value = 'C:/runs/a': weight: found '/runs/a'; expected a number from 0 up"),
    ],
)
def test_a_wrong_critic_is_refused_as_a_whole(text, found):
    with pytest.raises(WrongInput) as wrong:
        CRITIC.values(text, "value")
    assert str(wrong.value).startswith(found)
    assert "\n" not in str(wrong.value)


LIST = Listed(
    Part("on", bool, True, "a switch"),
    Part("low", float, 2.0, "a number", low=1),
    Part("both", float, 0.5, "a number", low=0, high=1),
    Part("high", float, 0.5, "a number", high=1),
    Part("free", float, 0.5, "a number"),
)


@pytest.mark.parametrize(
    "text, found",
    [
        ("lov", "unknown 'lov'; did you mean 'low'? known: both, free, high, low, on"),
        ("on,low:0", "low: found '0'; expected a number from 1 up, such as 2"),
        ("both:1.5", "both: found '1.5'; expected a number from 0 to 1, such as 0.5"),
        ("high:2", "high: found '2'; expected a number to 1, such as 0.5"),
        ("free:nan", "free: found 'nan'; expected a number, such as 0.5"),
        ("on:off", "on: found 'off'; expected a number, such as 1"),
        ("low:1:2", "low: found '1:2'; expected a number from 1 up"),
    ],
)
def test_all_values_of_a_list_are_checked(text, found):
    assert LIST.values(" on, low:1,, both:1,high:-9 ,free", "list") == dict(
        on=True, low=1, both=1, high=-9, free=0.5
    )
    with pytest.raises(WrongInput) as wrong:
        LIST.values(text, "list")
    assert str(wrong.value).startswith(f"list = {text!r}: {found}")
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize(
    "text, part, value, found",
    [
        ("contrast:self", "kind", "contrast", "contrast:self"),
        (" contrast: self", "kind", "contrast", " contrast: self"),  # as it was
        ("contrast:runs/a", "kind", "model", "model:runs/a"),
        ("contrast:runs/a", "kind", "rule", "rule:correct"),
        ("rule:a.py:f,length", "kind", "contrast", "contrast:self"),
        ("contrast:self", "model", "runs/a.b", "contrast:runs/a.b"),
        ("model:runs/a", "model", "on", "model:self"),
        ("rule:correct", "correct", 0.5, "rule:correct:0.5"),
        ("rule:correct", "length", "on", "rule:correct,length:1"),
        ("rule:correct, a.py:f", "correct", OFF, "rule:a.py:f"),
        ("rule:a.py:f,correct", "a.py:f", 0.25, "rule:a.py:f:0.25,correct"),
        ("openai:http://h:1/v1#a", "model", "b/c", "openai:http://h:1/v1#b/c"),
        ("openai:http://h:1/v1#a", "address", "https://g/v1", "openai:https://g/v1#a"),
        ("openai:http://h:1/v1#a", "kind", "model", "model:self"),  # a name there is none here
        ("openai:http://h:1/v1#a", "length", OFF, "openai:http://h:1/v1#a"),
    ],
)
def test_the_parts_of_a_judge_are_written(text, part, value, found):
    assert written(RLAIF, "judge", text, part, value) == found
    assert parse_judge(found)[0] == parts_of(RLAIF, "judge")["kind"].check(
        found.split(":")[0].strip()
    )


def test_the_kind_of_a_judge_comes_before_what_it_has():
    asked = {"judge.model": "m", "judge.address": "http://h/v1", "judge.kind": "openai"}
    assert make_settings(RLAIF, asked).judge == "openai:http://h/v1#m"
    asked = {"judge.correct": "off", "judge.length": 0.2, "judge.kind": "rule"}
    assert make_settings(RLAIF, asked).judge == "rule:length:0.2"
    assert parts_of(RLAIF, "judge")["kind"].choices == tuple(JUDGES)
    assert list(parts_of(RLAIF, "judge")) == ["kind", *LIBRARY, "model", "address"]


@pytest.mark.parametrize(
    "text, part, value, found",
    [
        ("Be polite. | Be rude.", "opposite", "Be cold.", "Be polite. | Be cold."),
        ("Be polite.|Be rude.", "principle", "Be brief.", "Be brief. | Be rude."),
        ("Be polite. | Be rude.", "opposite", OFF, "Be polite."),
        ("rules.txt", "principle", "others.txt", "others.txt"),
        ("Be polite.", "opposite", "Be rude.", "Be polite. | Be rude."),
    ],
)
def test_a_principle_and_its_opposite_are_written(text, part, value, found):
    assert written(RLAIF, "constitution", text, part, value) == found


def test_an_endpoint_a_pattern_and_the_reward_of_a_retriever_are_written():
    asked = {"endpoint.kind": "openai", "endpoint.model": "m", "endpoint.address": "http://h/v1"}
    for cls in (RAG, SelfRefine):
        assert make_settings(cls, asked).endpoint == "openai:http://h/v1#m"
        assert (
            make_settings(cls, {"endpoint": "openai:x#m", "endpoint.kind": "none"}).endpoint == ""
        )
    assert written(Prune, "pattern", "2:4", "keep", 1) == "1:4"
    asked = make_settings(Prune, {"pattern.of": 8, "pattern.keep": "4"})
    assert parse_pattern(asked.pattern) == (4, 8)
    assert value_named(Prune, dict(pattern="2:4"), "pattern.of") == 4
    asked = make_settings(Retriever, {"reward.kind": "model", "reward.model": "runs/a"})
    assert asked.reward == "model:runs/a"
    assert (
        make_settings(Retriever, {"reward": "model:a", "reward.kind": "states"}).reward == "states"
    )


def test_what_is_written_is_read_again():
    "For any details: the numbers come back as they were written, and the others stay."
    draw = random.Random(0)
    details = parts_of(PPO, "details")
    for _ in range(200):
        text = PPO().details
        wanted = {}
        for name in draw.sample(list(details), 4):
            switch = details[name].type is bool
            wanted[name] = draw.choice(
                [True, False] if switch else [OFF, draw.random() * 10 ** draw.randint(-6, 2)]
            )
            text = written(PPO, "details", text, name, wanted[name])
        found = details_of(text)
        for name, value in details_of(PPO().details).items():
            assert name in wanted or found[name] == value
        for name, value in wanted.items():
            assert value_named(PPO, dict(details=text), f"details.{name}") == value
            assert (name in found) == (value not in (False, OFF))
            if value not in (True, False, OFF):
                assert found[name] == value


# Checks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls, values, found",
    [
        (Merge, {"weights.1": 0.5}, "weights: '0.5' has 1 weights; expected 2 finite numbers"),
        (Merge, {"weights.2": 20}, "weights.2 = 20: expected a number ≥ -10 and ≤ 10, or off"),
        (
            Merge,
            {"weights": "1,2", "weights.1": OFF},
            "weights = '1,2': 1 = 'off': weight 2 follows",
        ),
        (Merge, {"weights.5": 1}, "weights.5: weights has no part '5': known: 1, 2, 3, 4"),
        (Merge, {"weights": "(=1,1"}, "weights: '(=1,1': missing )"),
        (
            PPO,
            {"details.clip_value": -1},
            "details.clip_value = -1: expected a number ≥ 0, or off (in its loss,",
        ),
        (
            PPO,
            {"details.clip_value": "much"},
            "details.clip_value = 'much': expected a number ≥ 0, or off",
        ),
        (PPO, {"details.normalize": 0.5}, "details.normalize = 0.5: expected on or off"),
        (
            PPO,
            {"details.clip_valeu": 1},
            "details.clip_valeu: details has no part 'clip_valeu': did you mean 'clip_value'?",
        ),
        (PPO, {"detail.clip_value": 1}, "unknown knob 'detail' of PPO: did you mean 'details'?"),
        (
            PPO,
            {"details.clip_value": 1, "steps.x": 2},
            "steps.x: steps has no parts; expected steps itself, a whole number",
        ),
        (PPO, {"detials": "normalize"}, "unknown knob 'detials' of PPO: did you mean 'details'?"),
        (PPO, {"details": 3, "details.clip_value": 1}, "details = 3: expected text"),
        (
            GRPO,
            {"rewards.fromat": 0.2},
            "rewards.fromat: rewards has no part 'fromat': did you mean 'format'?",
        ),
        (GRPO, {"rewards.format": float("nan")}, "rewards.format = nan: expected a number"),
        (
            GRPO,
            {"adapter.r": 8},
            "adapter = 'none': r = 8: none has no settings; expected another kind",
        ),
        (
            GRPO,
            {"adapter": "lora", "adapter.r": 2.5},
            "adapter.r = 2.5: expected a whole number ≥ 1",
        ),
        (
            PPO,
            {"value.weight": -1},
            "value.weight = -1: expected a number ≥ 0 (weight of its loss)",
        ),
        (PPO, {"value.weight": "off"}, "value.weight = 'off': expected a number ≥ 0"),
        (
            PPO,
            {"value.wieght": 1},
            "value.wieght: value has no part 'wieght': did you mean 'weight'?",
        ),
        (PPO, {"value.kind": 1}, "value.kind = 1: expected text (own, shared or a run of reward)"),
        (
            RLAIF,
            {"judge.kind": "rul"},
            "judge.kind = 'rul': expected one of rule, model, contrast, openai",
        ),
        (
            RLAIF,
            {"judge.length": 1},
            "judge = 'contrast:self': length = 1.0: contrast has no length; expected kind rule; "
            "give the kind too",
        ),
        (
            RLAIF,
            {"judge.address": "http://k@h"},
            "judge = 'contrast:self': address = 'http://…': contrast has no address; expected "
            "kind openai",
        ),
        (
            RLAIF,
            {"judge": "openai:http://k@h#m", "judge.length": 1},
            "judge = 'openai:http://…': length = 1.0: openai has no length",
        ),
        (
            RLAIF,
            {"judge.lenght": 1},
            "judge.lenght: judge has no part 'lenght': did you mean 'length'?",
        ),
        (
            RLAIF,
            {"judge.kind": "rule", "judge.length": 11},
            "judge.length = 11: expected a number ≥ -10 and ≤ 10, or off",
        ),
        (RLAIF, {"judge.kind": "openai"}, "judge: found 'openai' and nothing after it"),
        (
            RLAIF,
            {"judge.kind": "rule", "judge.correct": "off"},
            "judge: found 'rule' and nothing after it",
        ),
        (Prune, {"pattern.keep": 0}, "pattern.keep = 0: expected a whole number ≥ 1"),
        (
            Retriever,
            {"reward.kind": "model", "reward.steps": 1},
            "reward.steps: reward has no part 'steps'",
        ),
        (
            Prune,
            {"allocation.rule": "even"},
            "allocation.rule = 'even': expected one of uniform, outliers",
        ),
        (
            Prune,
            {"allocation.rule": "own"},
            "allocation = 'uniform': rule = 'own': expected the text itself",
        ),
    ],
)
def test_a_wrong_part_is_refused_in_one_line(cls, values, found):
    with pytest.raises(WrongInput) as wrong:
        make_settings(cls, values)
    assert str(wrong.value).startswith(found)
    assert "\n" not in str(wrong.value)


def test_a_part_of_a_part_less_knob_and_unknown_ones_by_name():
    with pytest.raises(WrongInput, match="has no parts"):
        part_named(PPO, "beta.x")
    assert compose(PPO, dict(beta=1)) == dict(beta=1)


# The form -----------------------------------------------------------------------------------------


def test_the_form_shows_the_parts_and_they_write_the_string():
    form = Form("ppo")
    fields = form.parts["details"].fields
    clip, normalize = fields["details.clip_value"], fields["details.normalize"]
    clip.slider.value = 0.4
    assert form.values == dict(details=PPO().details.replace("clip_value:0.2", "clip_value:0.4"))
    clip.control.value = "off"
    normalize.control.value = False
    assert form.values == dict(details="whiten_advantages,clip_reward:5,missing_eos:1")
    assert form.settings().details == form.values["details"]
    clip.slider.value = 0.1  # from off: the slider names it
    assert form.values["details"].endswith(",clip_value:0.1")
    form.fields["details"].control.value = "entropy"
    assert (clip.value, normalize.value, fields["details.entropy"].value) == (OFF, False, 0.01)
    clip.control.value = "-3"
    assert form.problem.startswith("details.clip_value = '-3'")
    assert form.values == dict(details="entropy")
    clip.control.value = "0.3"
    assert not form.problem
    form.load({"details.clip_value": 0.7})
    assert clip.value == 0.7
    assert form.values["details"].count("0.7") == 1
    for field in form.fields.values():
        field.undo.click()
    assert form.values == {}
    assert clip.value == 0.2


def test_the_form_shows_the_critic_and_a_slider_of_its_weight():
    form = Form("ppo")
    fields = form.parts["value"].fields
    kind, weight = fields["value.kind"], fields["value.weight"]
    assert (kind.value, weight.value) == ("shared", 0.1)
    weight.slider.value = 0.4
    assert form.values == dict(value="shared:0.4")
    kind.control.value = "runs/a:b"
    assert form.values == dict(value="runs/a:b:0.4")
    assert form.settings().value == "runs/a:b:0.4"
    weight.control.value = "-1"
    assert form.problem.startswith("value.weight = '-1'")
    assert form.values == dict(value="runs/a:b:0.4")
    form.fields["value"].control.value = "own"
    assert (kind.value, weight.value) == ("own", 0.5)
    assert not form.problem
    form.fields["value"].undo.click()
    assert form.values == {}
    assert weight.value == 0.1


def test_a_part_that_needs_another_says_so_in_the_form():
    form = Form("grpo")
    rank = form.parts["adapter"].fields["adapter.r"]
    rank.control.value = "8"
    assert "give the kind too" in rank.problem
    assert form.values == {}
    assert rank.value == OFF
    form.parts["adapter"].fields["adapter.kind"].control.value = "lora"
    rank.control.value = "8"
    assert form.values == dict(adapter="lora:r=8")
    assert not form.problem
    form.parts["rewards"].fields["rewards.format"].slider.value = 0.2
    assert form.values["rewards"] == "correct,format:0.2"


def test_the_weights_of_tunes_have_sliders():
    form = Form("merge")
    first, second = (form.parts["weights"].fields[f"weights.{n}"] for n in (1, 2))
    second.slider.value = 0.4
    assert form.values == dict(weights="1,0.4")
    assert first.value == 1.0
    first.slider.value = 0.6
    assert form.settings().weights == "0.6,0.4"
    assert not form.problem
    form.fields["weights"].control.value = r"0.7,0.3; mlp=1,0"
    assert (first.value, second.value) == (0.7, 0.3)
    second.control.value = "off"
    first.control.value = "off"
    assert form.values == dict(weights="mlp=1,0")
    assert form.parts["weights"].fields["weights.3"].value == OFF


def test_the_form_shows_the_parts_that_the_kind_of_a_judge_has():
    form = Form("rlaif")
    fields = form.parts["judge"].fields

    def seen() -> list[str]:
        return [name for name, f in fields.items() if f.layout.display != "none"]

    assert seen() == ["judge.kind", "judge.model"]
    fields["judge.kind"].control.value = "rule"
    assert seen() == ["judge.kind", *(f"judge.{name}" for name in LIBRARY)]
    fields["judge.length"].slider.value = 0.5
    assert form.values == dict(judge="rule:correct,length:0.5")
    assert not form.problem
    fields["judge.kind"].control.value = "openai"
    assert seen() == ["judge.kind", "judge.model", "judge.address"]
    assert form.problem.startswith("judge: found 'openai' and nothing after it")
    fields["judge.address"].control.value = "http://localhost:8000/v1"
    fields["judge.model"].control.value = "small"
    assert not form.problem
    assert form.settings().judge == "openai:http://localhost:8000/v1#small"
    form.fields["judge"].undo.click()
    assert form.values == {}
    assert seen() == ["judge.kind", "judge.model"]


# Sweeps -------------------------------------------------------------------------------------------


def test_a_sweep_varies_parts():
    grid = {"details.clip_value": "0.1,off", "rewards.format": "0,0.2"}
    fixed = {"details": "clip_value:0.2,normalize", "details.normalize": "off"}
    name, asked, points = sweep.plan("ppo", grid, fixed, metric="reward")
    assert asked["space"] == {"details.clip_value": [0.1, OFF], "rewards.format": [0.0, 0.2]}
    assert asked["fixed"] == dict(details="clip_value:0.2")
    made = [launch.check_settings(name, asked["fixed"] | point)[1] for point in points]
    assert [(s.details, s.rewards) for s in made] == [
        ("clip_value:0.1", "correct,format:0"),
        ("clip_value:0.1", "correct,format:0.2"),
        ("", "correct,format:0"),
        ("", "correct,format:0.2"),
    ]
    json.dumps(asked)


def test_a_sweep_varies_the_critic_and_its_weight():
    grid = {"value.weight": "0.1,0.5", "value.kind": "own,shared"}
    name, asked, points = sweep.plan("ppo", grid, metric="reward")
    assert asked["space"] == {"value.weight": [0.1, 0.5], "value.kind": ["own", "shared"]}
    made = [launch.check_settings(name, asked["fixed"] | point)[1].value for point in points]
    assert sorted(made) == ["own:0.1", "own:0.5", "shared:0.1", "shared:0.5"]
    _, asked, points = sweep.plan(
        "ppo", {"value.weight": "0.05..1"}, metric="reward", search="random", trials=3
    )
    assert all(0.05 <= p["value.weight"] <= 1 for p in points)


def test_a_sweep_varies_the_judge():
    grid = {"judge.kind": "rule,contrast", "noise": "0,0.5"}
    name, asked, points = sweep.plan("rlaif", grid, {"judge": "model:tiny"}, metric="reward")
    made = [launch.check_settings(name, asked["fixed"] | point)[1].judge for point in points]
    assert made == ["rule:correct"] * 2 + ["contrast:tiny"] * 2
    _, asked, points = sweep.plan(
        "rlaif",
        {"judge.length": "0.1..1"},
        {"judge": "rule:correct"},
        metric="reward",
        search="random",
        trials=2,
    )
    assert all(0.1 <= point["judge.length"] <= 1 for point in points)


def test_a_sweep_searches_a_part_in_a_range():
    grid = {"details.clip_value": "0.1..0.4"}
    _, asked, points = sweep.plan("ppo", grid, metric="reward", search="random", trials=3)
    assert asked["space"] == {"details.clip_value": dict(low=0.1, high=0.4, log=False)}
    assert len({p["details.clip_value"] for p in points}) == 3
    assert all(0.1 <= p["details.clip_value"] <= 0.4 for p in points)


def test_a_sweep_varies_the_weights_of_tunes():
    grid, fixed = {"weights.1": "0.3,0.7", "weights.2": "0.5"}, dict(weights=RULES)
    name, asked, points = sweep.plan("merge", grid, fixed, metric="accuracy/sums")
    made = [launch.check_settings(name, asked["fixed"] | point)[1].weights for point in points]
    assert made == [RULES.replace("0.7,0.3", pair) for pair in ("0.3,0.5", "0.7,0.5")]
    with pytest.raises(WrongInput, match="expected 2 finite numbers"):
        sweep.plan("merge", {"weights.1": "0.3,0.7"}, metric="accuracy/sums")


@pytest.mark.parametrize(
    "grid, fixed, found",
    [
        ({"details.clip": "0.1,0.2"}, {}, "details has no part 'clip'"),
        ({"details.clip_value": "0.1,-1"}, {}, "details.clip_value = '-1': expected"),
        ({"details.clip_value": "off..0.4"}, {}, "expected the low end below the high one"),
        (
            {"details": "normalize,clip_value"},
            {"details.clip_value": 1},
            "details is swept and fixed",
        ),
        ({"rewards.fromat": "0,1"}, {}, "rewards has no part 'fromat'"),
        ({"adapter.r": "4,8"}, {}, "none has no settings"),
    ],
)
def test_what_a_sweep_refuses(grid, fixed, found):
    with pytest.raises(WrongInput) as wrong:
        sweep.plan("ppo", grid, fixed, metric="reward")
    assert found in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_a_sweep_of_parts_runs_is_shown_and_is_picked_up_again(runs):
    values = dict(
        SHORT, num_generations=4, adapter="lora", notebook=False, metric="loss", better="down"
    )
    made = sweep.sweep("grpo", {"adapter.r": [1, 2], "rewards.format": [0.2]}, **values)
    trials = made.trials
    assert [t["status"] for t in trials] == ["finished"] * 2
    found = [made.run(t).settings for t in trials]
    assert [(s["adapter"], s["rewards"]) for s in found] == [
        ("lora:r=1", "correct,format:0.2"),
        ("lora:r=2", "correct,format:0.2"),
    ]
    assert list(sweep.results(made)["adapter.r"]) == [1, 2]
    trials[1].update(status="running", values=None)  # as a worker that was killed leaves it
    made.update(trials=trials)
    again = sweep.open_sweep(made.id)
    sweep.reopen_trials(again)
    assert again.trials[1]["values"] == {"adapter.r": 2, "rewards.format": 0.2}


def test_a_slider_of_a_part_that_is_off_may_be_rounded_by_the_browser():
    "A browser sets a slider onto its grid when it draws it; that is no choice of anybody."
    form = Form("grpo")
    moved = 0
    for field in form.parts["adapter"].fields.values():
        if field.value == OFF and field._place:
            start, moved = field.slider.value, moved + 1
            field.slider.value = start + field.slider.step / 4
            assert field.value == OFF
            assert not field.problem
            assert not form.problem
    assert moved
    assert form.fields["adapter"].value == "none"


# The command line ---------------------------------------------------------------------------------


def test_a_part_on_the_command_line(forked, runs):
    asked = [
        "-p",
        "details.clip_value",
        "0.3",
        "-p",
        "rewards.format",
        "0.2",
        "-p",
        "details.normalize",
        "off",
    ]
    short = [word for name, value in SHORT.items() for word in ("-p", name, str(value))]
    done = forked("run", "ppo", "--bare", *asked, *short, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(
        (runs / json.loads(done.stdout.splitlines()[-1])["run"] / "run.json").read_text()
    )
    assert (
        record["settings"]["details"]
        == "whiten_advantages,clip_reward:5,clip_value:0.3,missing_eos:1"
    )
    assert record["settings"]["rewards"] == "correct,format:0.2"
    assert not any("." in name for name in record["settings"])
    done = forked("run", "ppo", "-p", "details.clip_valeu", "3")
    assert done.returncode == 2
    assert "did you mean 'clip_value'" in done.stderr
    done = forked("run", "ppo", "--details.clip_value", "3")
    assert done.returncode == 2
    assert "write -p details.clip_value 3" in done.stderr


def test_a_judge_on_the_command_line(forked, runs):
    quick = dict(data="sums", prompts=24, max_new_tokens=8, steps=1, batch_size=4, eval_rows=4)
    words = [word for name, value in quick.items() for word in ("-p", name, str(value))]
    asked = ["-p", "judge.kind", "rule", "-p", "judge.format", "0.5"]
    done = forked("run", "rlaif", "--bare", *asked, *words, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(
        (runs / json.loads(done.stdout.splitlines()[-1])["run"] / "run.json").read_text()
    )
    assert record["settings"]["judge"] == "rule:correct,format:0.5"
    assert (
        launch.clone(Run(runs / record["id"]), **{"judge.format": "off"})["judge"] == "rule:correct"
    )


def test_commands_clone_and_presets_hold_the_string(runs):
    said = launch.commands("ppo", {"details.clip_value": 0.3})
    text = PPO().details.replace("clip_value:0.2", "clip_value:0.3")
    assert f"-p details {text}" in said["polm"]
    assert f"details={text!r}" in said["python"]
    run = launch.create("ppo", dict(details="normalize"))
    assert launch.clone(run, **{"details.clip_value": 0.3}) == dict(
        details="normalize,clip_value:0.3"
    )
    assert [k.name for k in knobs(PPO)].count("details") == 1
