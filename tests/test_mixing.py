"""Mixtures of sources, weights of tasks and rows, templates of rows, and solved examples."""

import copy
import dataclasses
import json
import math
import random
from collections import Counter

import numpy
import pytest
import torch
from datasets import Dataset, interleave_datasets
from safetensors.torch import load_file

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.data.batches import collate
from polm_lab.data.encode import encode, encode_rows
from polm_lab.data.load import load_data
from polm_lab.data.rows import Row
from polm_lab.data.schema import check_row, normalize_schema
from polm_lab.finetuning.selection import mixing
from polm_lab.finetuning.selection.mixing import Template, apply_template, as_instruction
from polm_lab.finetuning.selection.mixing import draw_mixture, exact_counts, mixing_rates
from polm_lab.finetuning.selection.mixing import read_templates, task_weights, templated
from polm_lab.finetuning.selection.mixing import with_demonstrations
from polm_lab.finetuning.sft import SFT, sft_loss
from polm_lab.models.load import load_model
from polm_lab.models.policy import Policy
from polm_lab.training.loop import token_batches


def says(call, *args, **kwargs) -> str:
    with pytest.raises(WrongInput) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parsed(text: str, row: dict):
    return apply_template(Template.parse("t", text), row)


SIZES = {"a": 16, "b": 4, "c": 1}


@pytest.mark.parametrize(
    ("temperature", "cap", "expected"),
    [
        (1, 0, (16, 4, 1)),
        (2, 0, (4, 2, 1)),
        (0.5, 0, (256, 16, 1)),
        (math.inf, 0, (1, 1, 1)),
        (1, 4, (4, 4, 1)),
        (2, 4, (2, 2, 1)),  # the cap comes first
        (1, 100, (16, 4, 1)),
        (1, 1, (1, 1, 1)),
    ],
)
def test_rates_in_closed_form(temperature, cap, expected):
    rates = mixing_rates(SIZES, temperature, cap)
    assert list(rates) == list(SIZES)
    assert list(rates.values()) == pytest.approx([one / sum(expected) for one in expected])
    assert sum(rates.values()) == pytest.approx(1, abs=1e-15)


def test_rates_neither_overflow_nor_vanish():
    rates = mixing_rates({"a": 10**15, "b": 1}, 1e-3)
    assert rates == {"a": 1, "b": 0}
    assert mixing_rates({"only": 7}, 3) == {"only": 1}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (dict(sizes={}), "no source"),
        (dict(sizes={"a": 3, "b": 0}), "source 'b': 0 rows"),
        (dict(sizes=SIZES, temperature=0), "temperature: 0"),
        (dict(sizes=SIZES, temperature=math.nan), "temperature: nan"),
        (dict(sizes=SIZES, cap=-1), "cap: -1"),
    ],
)
def test_wrong_rates_are_refused(words, expected):
    assert expected in says(mixing_rates, **words)


def test_counts_are_exact_and_nearest():
    assert exact_counts({"a": 0.5, "b": 0.3, "c": 0.2}, 10) == {"a": 5, "b": 3, "c": 2}
    assert exact_counts({"a": 0.46, "b": 0.27, "c": 0.27}, 10) == {"a": 4, "b": 3, "c": 3}
    rng = random.Random(0)
    for total in (1, 7, 100, 12_345):
        sizes = {str(n): rng.randint(1, 10**6) for n in range(9)}
        rates = mixing_rates(sizes, 2)
        counts = exact_counts(rates, total)
        assert sum(counts.values()) == total
        assert max(abs(counts[name] - rates[name] * total) for name in sizes) < 1


def numbered(**sizes) -> dict[str, list[dict]]:
    return {
        name: [Row(dict(prompt=f"{name}{n}", completion="x"), f"{name}:{n}") for n in range(size)]
        for name, size in sizes.items()
    }


def test_a_mixture_has_exact_counts_and_repeats_whole_passes():
    sources = numbered(large=50, small=3)
    before = copy.deepcopy(sources)
    mixture = draw_mixture(sources, 40, temperature=math.inf, seed=1)
    assert Counter(row["source"] for row in mixture) == {"large": 20, "small": 20}
    seen = Counter()
    for row in mixture:  # in every beginning of it
        seen[row["prompt"]] += 1
        small = [seen[f"small{n}"] for n in range(3)]
        assert max(small) - min(small) <= 1
    assert max(count for name, count in seen.items() if name.startswith("large")) == 1
    assert {row.where.split(":")[0] for row in mixture} == set(sources)
    assert sources == before
    mixture[0]["prompt"] = "changed"
    assert sources == before


def test_a_mixture_depends_on_the_seed_only():
    sources = numbered(a=30, b=9)
    first = draw_mixture(sources, 26, seed=3)
    assert first == draw_mixture(sources, 26, seed=3)
    assert first != draw_mixture(sources, 26, seed=4)
    assert Counter(row["source"] for row in first) == {"a": 20, "b": 6}
    shuffled = [row["source"] for row in first]
    assert shuffled != sorted(shuffled)
    order = [row["prompt"] for row in first if row["source"] == "a"]
    assert order != sorted(order, key=lambda name: int(name[1:]))
    # which rows of a source come first does not depend on the other sources
    alone = [row["prompt"] for row in draw_mixture({"a": sources["a"]}, 20, seed=3)]
    assert order == alone


def test_the_column_source_is_that_of_the_mixture():
    (row,) = draw_mixture({"मिश्रण": [{"text": "x", "source": "other"}]}, 1)
    assert row["source"] == "मिश्रण"


def test_wrong_mixtures_are_refused():
    assert "total: 0" in says(draw_mixture, numbered(a=2), 0)
    assert "source 'b': 0 rows" in says(draw_mixture, numbered(a=2, b=0), 4)
    assert "no source" in says(draw_mixture, {}, 4)


@pytest.mark.parametrize("temperature", [1, 2, math.inf])
def test_shares_are_those_of_datasets(temperature):
    sizes = dict(a=900, b=100, c=30)
    rates = mixing_rates(sizes, temperature)
    held = [Dataset.from_dict({"source": [name] * size}) for name, size in sizes.items()]
    mixed = interleave_datasets(
        held, probabilities=[*rates.values()], seed=0, stopping_strategy="all_exhausted"
    )
    count = 900
    theirs = Counter(mixed[:count]["source"])
    ours = Counter(row["source"] for row in draw_mixture(numbered(**sizes), count, temperature))
    for name, rate in rates.items():
        assert abs(ours[name] - rate * count) < 1
        assert abs(theirs[name] - rate * count) < 4 * math.sqrt(count * rate * (1 - rate))


@pytest.mark.parametrize("temperature", [0.5, 1, 3, math.inf])
def test_weighted_rows_follow_the_rates(temperature):
    weights, rates = task_weights(SIZES, temperature), mixing_rates(SIZES, temperature)
    total = sum(SIZES[name] * weights[name] for name in SIZES)
    assert total / sum(SIZES.values()) == pytest.approx(1, abs=1e-14)
    for name in SIZES:
        assert SIZES[name] * weights[name] / total == pytest.approx(rates[name])


def test_weights_in_closed_form():
    assert task_weights(SIZES) == pytest.approx(dict(a=1, b=1, c=1))
    assert task_weights(SIZES, math.inf) == pytest.approx(dict(a=7 / 16, b=7 / 4, c=7))
    assert task_weights(dict(a=9, b=1), 2) == pytest.approx(dict(a=7.5 / 9, b=2.5))
    assert "source 'b': 0 rows" in says(task_weights, {"a": 1, "b": 0})


def test_an_instruction_is_a_row_of_a_file():
    row = as_instruction("ما هي عاصمة مصر؟", "القاهرة")
    assert row == normalize_schema(Row({"instruction": "ما هي عاصمة مصر؟", "output": "القاهرة"}))
    check_row(Row(row), "completion")
    assert "instance: ' '" in says(as_instruction, "Do it.", " ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Q: {{ q }} A: ||| {{ a }}", ("Q: क्या? A:", " हाँ")),
        ("{{ q }}\n|||{{ a }}", ("क्या?", "\nहाँ")),
        ("{{ q }}|||\n\n  {{ a }}\n", ("क्या?", "\nहाँ")),
        ("{{ q }}|||{{ a }}", ("क्या?", "हाँ")),
        ("\n {{ q }}|||{{ a }} \n", ("क्या?", "हाँ")),
        ("{% if n > 2 %}{{ q }} ||| {{ a }}{% endif %}", ("क्या?", " हाँ")),
        ("{% if n > 3 %}{{ q }} ||| {{ a }}{% endif %}", None),
        ("{{ q }} ||| {% if n > 3 %}{{ a }}{% endif %}", None),
        ("{{ empty }} ||| {{ a }}", None),
        ("{% set x = q %}{{ x }}|||{{ x }}!", ("क्या?", "क्या?!")),
        ("{{ row['odd name'] }} ||| {{ n * 2 }}", ("yes", " 6")),
        ("{% for o in list %}{{ loop.index }}/{{ loop.length }}{{ o }} {% endfor %}|||{{ n }}",
         ("1/2x 2/2y", " 3")),
        ("{{ 'none' if null is none else 'some' }} ||| {{ missing | default('d') }}", ("none", " d")),
        ("a | b || c ||| {{ pipes }}", ("a | b || c", " ||| |||")),
    ],
)  # fmt: skip
def test_a_template_writes_a_row(text, expected):
    row = dict(q="क्या?", a="हाँ", n=3, empty=" ", list=["x", "y"], null=None, pipes="||| |||")
    row["odd name"] = "yes"
    before = copy.deepcopy(row)
    found = parsed(text, row)
    assert found == (expected and dict(zip(("prompt", "completion"), expected)))
    assert row == before


WRONG = Row({"premise": "p", "answer": "4", "null": None, "list": []}, "nli.jsonl:3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ premis }} ||| {{ answer }}", "'t' needs the column premis; expected one of premise,"),
        ("{{ premise }} ||| {% if anwser %}x{% endif %}", "needs the column anwser"),
        ("{{ premise.text }} ||| {{ answer }}", "has no attribute 'text'"),
        ("{{ null }} ||| {{ answer }}", "writes null, which is null"),
        ("{% for i in row.nothing %}{% endfor %} ||| x", "has no attribute 'nothing'"),
        ("{{ list.append(1) }} ||| x", "SecurityError"),
        ("{{ ''.__class__.__mro__ }} ||| x", "SecurityError"),
        ("{{ range(100001) }} ||| x", "Range too big"),
        ("{{ 1 / 0 }} ||| x", "ZeroDivisionError"),
        ("{{ premise | int(1) + premise }} ||| x", "TypeError"),
        ("{{ premise * 10 }} ||| x", "repeats text"),
        ("{{ [1] * 10 }} ||| x", "repeats text"),
        ("{{ 'x' * 1000000000 }} ||| x", "repeats text"),
        ("{% for i in range(400) %}{% for j in range(400) %}{% endfor %}{% endfor %} ||| x",
         "more than 100,000 rounds"),
        ("{% for i in range(99999) %}long{% endfor %} ||| x", "more than 100,000 characters"),
        ("p{% for i in range(3) %} ||| x{% endfor %}", "writes 3 completions"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_is_named(text, expected):
    message = says(parsed, text, WRONG)
    assert message.startswith("nli.jsonl:3: template 't' ")
    assert expected in message


def test_the_limits_of_a_template_are_exact():
    def loops(rounds: int) -> str:
        rest = rounds - 1 - 99_000  # one round of the outer loop
        inner = "{% for j in range(99000) %}{% endfor %}{% for j in range(REST) %}{% endfor %}"
        return "{% for i in [1] %}" + inner.replace("REST", str(rest)) + "{% endfor %}p ||| x"

    assert parsed(loops(mixing.ROUNDS), {})
    assert "rounds" in says(parsed, loops(mixing.ROUNDS + 1), {})
    assert parsed(loops(mixing.ROUNDS), {})  # each rendering has a budget of its own
    most = mixing.CHARACTERS - 2  # the completion, and what divides the two
    assert len(parsed("{{ q }}|||x", {"q": "界" * most})["prompt"]) == most
    assert "characters" in says(parsed, "{{ q }}|||x", {"q": "界" * (most + 1)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ q ||| {{ a }}", "line 1: unexpected char '|||'"),
        ("\n{% if q %} ||| x", "template 't'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }} ||| x", "a macro"),
        ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %} ||| x", "a recursive loop"),
        ("{{ 9 ** 9 ** 9 }} ||| x", "a power"),
        ("{% include 'x' %} ||| x", "include"),
        ("{{ q | random }} ||| x", "random"),
        ("{% for x in [1] %}" * 30 + "{% endfor %}" * 30 + " ||| x", "nested too deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }} ||| x", "nested too deeply"),
        ("prompt only", "0 times |||"),
        ("a ||| b ||| c", "2 times |||"),
        (" ||| x", "prompt is str ' '"),
        ("x |||\n", "completion is str"),
    ],
)
def test_a_wrong_template_is_refused_when_it_is_made(text, expected):
    message = says(Template.parse, "t", text)
    assert message.startswith("template 't'")
    assert expected in message
    assert mixing.BETWEEN not in message


def test_a_template_is_a_constant():
    one = Template("t", "{{ q }}", "{{ a }}")
    assert one == Template("t", "{{ q }}", "{{ a }}")
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.prompt = "other"
    assert "prompt is null" in says(Template, "t", None, "x")


def test_nothing_in_a_template_is_random():
    assert "lipsum" in says(parsed, "{{ lipsum() }} ||| x", {"q": 1})


FILE = '''
[ask]
prompt = """
{{ question }}
"""
completion = "{{ answer }}"

["दूसरा"]
prompt = "उत्तर {{ answer }}:"
completion = " {{ question }}"
'''


def test_a_file_of_templates(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(FILE, encoding="utf-8")
    templates = read_templates(path)
    assert [one.name for one in templates] == ["ask", "दूसरा"]
    row = {"question": "2+2?", "answer": "4"}
    assert apply_template(templates[0], row) == {"prompt": "2+2?", "completion": "\n4"}
    assert apply_template(templates[1], row) == {"prompt": "उत्तर 4:", "completion": " 2+2?"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no template"),
        (b"[ask\n", "cannot be read as TOML"),
        (b"\xff\xfe", "cannot be read as TOML"),
        (b"ask = 'x'\n", "template 'ask' has str 'x'"),
        (b"[ask]\nprompt = 'x'\n", "template 'ask' has prompt;"),
        (b"[ask]\n", "template 'ask' has nothing"),
        (b"[ask]\nprompt = 'x'\ncompletion = 'y'\njinja = 'z'\n", "completion, jinja, prompt"),
        (b"[ask]\nprompt = 'x'\ncompletion = 3\n", "completion is int 3"),
        (b"[ask]\nprompt = 'x'\ncompletion = '{{'\n", "template 'ask', line 1"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content, expected):
    path = tmp_path / "t.toml"
    path.write_bytes(content)
    assert expected in says(read_templates, path)


def test_a_missing_file_is_refused(tmp_path):
    assert "No such file" in says(read_templates, tmp_path / "none.toml")


def test_each_row_gets_a_template_that_applies():
    templates = [
        Template.parse("all", "{{ q }} ||| {{ a }}"),
        Template.parse("even", "{% if q % 2 == 0 %}even {{ q }} ||| {{ a }}{% endif %}"),
    ]
    rows = [Row({"q": n, "a": "x" if n else "", "more": n}, f"f:{n}") for n in range(200)]
    before = copy.deepcopy(rows)
    found = templated(rows, templates, seed=5)
    assert rows == before
    assert found == templated(rows, templates, seed=5)
    assert found != templated(rows, templates, seed=6)
    assert [row["more"] for row in found] == [*range(1, 200)]  # row 0 has no answer
    assert found[0].where == "f:1"
    by_name = Counter((row["template"], row["q"] % 2) for row in found)
    assert by_name["even", 1] == 0
    assert by_name["all", 1] == 100
    assert 25 < by_name["even", 0] < 75
    for row in found:
        assert row["prompt"] == ("even " * (row["template"] == "even")) + str(row["q"])
    assert templated([], templates) == []
    assert "none applies to any of 1 rows" in says(templated, rows[:1], templates)
    assert "templates: none" in says(templated, rows, [])
    assert "f:3: template" in says(templated, [Row({"q": 1}, "f:3")], templates)


def test_examples_of_plain_prompts_are_blocks_of_text():
    rows = [{"prompt": f"{n}+{n}=", "completion": f"{2 * n}", "n": n} for n in range(20)]
    before = copy.deepcopy(rows)
    found = with_demonstrations(rows, shots=3, seed=1)
    assert rows == before
    assert len(found) == 20
    drawn = Counter()
    for row, own in zip(found, rows):
        *blocks, last = row["prompt"].split("\n\n")
        assert last == own["prompt"]
        assert row["completion"] == own["completion"]
        assert row["n"] == own["n"]
        assert len(set(blocks)) == 3
        for block in blocks:
            asked, answer = block.split("=")
            assert int(answer) == 2 * int(asked.split("+")[0])
            assert asked + "=" != own["prompt"]
            drawn[block] += 1
    assert len(drawn) == 20  # 60 draws of 20 rows: all of them come
    assert found == with_demonstrations(rows, shots=3, seed=1)
    assert found != with_demonstrations(rows, shots=3, seed=2)
    assert with_demonstrations(rows, shots=0) == rows


def test_no_example_has_the_prompt_of_the_row_or_of_another_example():
    rows = [{"prompt": text, "completion": "x"} for text in ("a", "a ", "b", "b", "b", "c")]
    for row, own in zip(with_demonstrations(rows, 2), rows):
        asked = [block.strip()[0] for block in row["prompt"].split("\n\n")]
        assert sorted(asked) == ["a", "b", "c"]
        assert asked[-1] == own["prompt"].strip()
    message = says(with_demonstrations, rows, 3)
    assert "2 other prompts of its form; expected at least shots = 3" in message
    assert "shots: -1" in says(with_demonstrations, rows, -1)
    assert with_demonstrations([], 2) == []


def turns(*texts: str) -> list[dict]:
    "A conversation; a text that begins with ! is a system turn."
    said, roles = [], iter("user assistant".split() * len(texts))
    for text in texts:
        role = "system" if text[0] == "!" else next(roles)
        said.append({"role": role, "content": text})
    return said


def answered(prompt: list[dict], answer: str, **more) -> dict:
    return dict(prompt=prompt, completion=[{"role": "assistant", "content": answer}], **more)


def test_examples_of_conversations_are_turns():
    rows = [answered(turns("!system", f"ask{n}"), f"say{n}") for n in range(4)]
    rows += [answered(turns("!system", "ask9", "well", "more9"), "say9")]
    before = copy.deepcopy(rows)
    found = with_demonstrations(rows, 4)
    assert rows == before
    for row, own in zip(found, rows):
        prompt = row["prompt"]
        assert prompt[0] == {"role": "system", "content": "!system"}
        assert [turn["role"] for turn in prompt[1:]] == [*["user", "assistant"] * 5, "user"]
        assert prompt[-1] == own["prompt"][-1]
        assert sum(turn["role"] == "system" for turn in prompt) == 1
        asked = [turn["content"] for turn in prompt if turn["role"] == "user"]
        assert len(asked) == len(set(asked)) == 6
        check_row(Row(row), "completion")


def test_examples_have_the_form_of_the_row():
    plain = [dict(prompt=f"p{n}", completion="x") for n in range(2)]
    chats = [answered(turns(f"c{n}"), "x") for n in range(2)]
    french = [answered(turns("!français", f"f{n}"), "x") for n in range(2)]
    tools = [answered(turns(f"t{n}"), "x", tools=["search"]) for n in range(2)]
    rows = [*plain, *chats, *french, *tools]
    for number, row in enumerate(with_demonstrations(rows, 1)):
        text = json.dumps(row["prompt"], ensure_ascii=False)
        other = rows[number ^ 1]["prompt"]
        other = other if isinstance(other, str) else other[-1]["content"]
        assert other in text
    assert "1 other prompts" in says(with_demonstrations, rows, 2)
    # the same question under another system turn is the same question
    twins = [answered(turns("!a", "q"), "x"), answered(turns("!a", "q"), "y")]
    assert "0 other prompts" in says(with_demonstrations, twins, 1)


def test_worked_steps_come_before_every_answer():
    rows = [
        {"prompt": "q0", "completion": " 4", "steps": ["2+1=3", "3+1=4\n"]},
        {"prompt": "q1", "completion": " 5", "steps": "दो और तीन\n"},
        {"prompt": "q2", "completion": " 6", "steps": None},
        {"prompt": "q3", "completion": " 7", "steps": []},
    ]
    found = with_demonstrations(rows, 3, steps_key="steps")
    answers = [" 2+1=3\n3+1=4\n4", " दो और तीन\n5", " 6", " 7"]
    assert [row["completion"] for row in found] == answers
    blocks = {f"q{n}{answer}" for n, answer in enumerate(answers)}
    for n, row in enumerate(found):
        *shown, last = row["prompt"].split("\n\n")
        assert set(shown) == blocks - {f"q{n}{answers[n]}"}
        assert last == f"q{n}"
    chat = [answered(turns(f"q{n}"), f"{n}", why=f"since {n}") for n in range(2)]
    row = with_demonstrations(chat, 1, steps_key="why")[0]
    assert row["completion"][-1]["content"] == "since 0\n0"
    assert row["prompt"][1]["content"] == "since 1\n1"
    assert chat[0]["completion"][-1]["content"] == "0"
    plain = with_demonstrations(rows, 3)
    assert [row["completion"] for row in plain] == [row["completion"] for row in rows]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q"}, "f:1: no column completion"),
        ({"completion": "q", "steps": ""}, "f:1: no column prompt"),
        ({"prompt": "q", "completion": "a"}, "f:1: no column steps"),
        ({"prompt": "q", "completion": "a", "steps": 3}, "f:1: steps is int 3"),
        ({"prompt": "q", "completion": "a", "steps": [True]}, "f:1: steps is list [True]"),
    ],
)
def test_rows_without_what_an_example_needs_are_refused(row, expected):
    assert expected in says(with_demonstrations, [Row(row, "f:1")], 0, steps_key="steps")


def test_nothing_is_learned_of_an_example(tokenizer):
    rows = load_data("chat#40", "completion")
    for shown, own in list(zip(with_demonstrations(rows, 2), rows))[:5]:
        learned = []
        for row in (shown, own):
            found = encode(tokenizer, row, "completion", 1024)
            pairs = zip(found["input_ids"], found["completion_mask"])
            learned.append([token for token, mask in pairs if mask])
        assert learned[0] == learned[1]


def test_many_rows_are_no_harder_than_few():
    rows = [{"prompt": f"{n}", "completion": "x"} for n in range(30_000)]
    assert len(with_demonstrations(rows, 2)) == 30_000
    assert len(draw_mixture({"a": rows, "b": rows[:7]}, 30_000, math.inf)) == 30_000


# The column `weight` in SFT.


def weighed(rows: list[dict], *weights) -> list[Row]:
    return [
        Row({**row, "weight": w}, f"w.jsonl:{n}") for n, (row, w) in enumerate(zip(rows, weights))
    ]


@pytest.fixture(scope="module")
def policy():
    return Policy(load_model("tiny", dtype="float32", device="cpu"))


@pytest.fixture
def step(policy, tokenizer):
    "The loss and gradient of one update of SFT on rows, in microbatches of three."

    def step_of(rows: list[dict], packing: bool = False) -> tuple[float, torch.Tensor]:
        examples = encode_rows(tokenizer, rows, "completion", 256, weighted=True)
        settings = SFT(batch_size=3)
        batches = token_batches(examples, settings, tokenizer.pad_token_id, packing)
        total = sum(batch["weight"] for batch in batches)
        policy.zero_grad()
        loss = 0.0
        for batch in batches:
            stats = policy(
                batch["input_ids"],
                batch["attention_mask"],
                batch["completion_mask"],
                batch.get("position_ids"),
            )
            share = sft_loss(stats.logp, batch.get("token_weight")) / total
            share.backward()
            loss += share.item()
        return loss, torch.cat([p.grad.flatten() for p in policy.parameters()])

    return step_of


CHATS = load_data("chat#7", "completion")


def near(one, other, bound: float = 2e-6) -> bool:
    (loss, gradient), (other_loss, other_gradient) = one, other
    gap = (gradient - other_gradient).norm() / other_gradient.norm()
    return abs(loss - other_loss) <= bound * abs(other_loss) and gap <= bound


@pytest.mark.parametrize("packing", [False, True])
def test_equal_weights_change_nothing(step, packing):
    loss, gradient = step(CHATS, packing)
    for weight in (1, 2.0, 0.25):  # powers of two have no rounding
        found, moved = step(weighed(CHATS, *[weight] * 7), packing)
        assert found == loss
        assert torch.equal(moved, gradient)
    assert near(step(weighed(CHATS, *[0.3] * 7), packing), (loss, gradient))


@pytest.mark.parametrize("packing", [False, True])
def test_a_weight_is_how_often_a_row_counts(step, packing):
    weights = (2, 0, 1, 3, 0, 1, 0)
    copies = [row for row, weight in zip(CHATS, weights) for _ in range(weight)]
    found = step(weighed(CHATS, *weights), packing)
    assert near(found, step(copies, packing))
    assert near(found, step(copies))
    assert not near(found, step(CHATS), 1e-2)
    # a row without a weight has weight 1
    mixed = [*weighed(CHATS[:2], 2, 0), CHATS[2], *weighed(CHATS[3:], *weights[3:])]
    assert near(step(mixed, packing), found)


def test_weights_of_tasks_make_them_equal(step):
    rows = [*CHATS[:6], *load_data("sums#2", "completion")]
    weights = task_weights({"chat": 6, "sums": 2}, math.inf)
    drawn = [*rows[:6], *rows[6:] * 3]  # six of each
    found = step(weighed(rows, *[weights["chat"]] * 6, *[weights["sums"]] * 2))
    assert near(found, step(drawn))


def test_weights_are_on_learned_tokens_only():
    examples = [
        dict(input_ids=[1, 2, 3], completion_mask=[0, 1, 1], weight=0.5),
        dict(input_ids=[4, 5], completion_mask=[1, 1]),
        dict(input_ids=[6, 7, 8, 9], completion_mask=[0, 0, 1, 0], weight=3),
    ]
    padded = collate(examples, 0)
    assert padded["token_weight"].tolist() == [[0, 0.5, 0.5, 0], [0, 1, 0, 0], [0, 0, 3, 0]]
    packed = collate(examples, 0, pack=9)
    assert packed["input_ids"].tolist() == [[6, 7, 8, 9, 1, 2, 3, 4, 5]]
    assert packed["token_weight"].tolist() == [[0, 0, 3, 0, 0, 0.5, 0.5, 0, 1]]
    for batch in (padded, packed):
        assert torch.equal(batch["token_weight"] > 0, batch["completion_mask"] > 0)
    for name in ("input_ids", "completion_mask"):
        plain = [{k: v for k, v in example.items() if k != "weight"} for example in examples]
        assert torch.equal(collate(plain, 0)[name], padded[name])
    assert "token_weight" not in collate(plain, 0)
    assert "token_weight" not in collate(plain, 0, pack=9)


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, True, "2", None, [1]])
def test_a_wrong_weight_is_refused(tokenizer, weight):
    rows = weighed(CHATS[:2], 1, weight)
    message = says(encode_rows, tokenizer, rows, "completion", 256, weighted=True)
    assert message.startswith("w.jsonl:1: weight is ")
    # a method that knows no weights does not look at the column
    assert not any("weight" in e for e in encode_rows(tokenizer, rows, "completion", 256))
    rows[1].skip = True
    (left,) = encode_rows(tokenizer, rows, "completion", 256, weighted=True)
    assert left["weight"] == 1


def test_weights_may_be_numbers_of_numpy(tokenizer):
    rows = weighed(CHATS[:3], numpy.int64(2), numpy.float32(0.5), 0)
    found = encode_rows(tokenizer, rows, "completion", 256, weighted=True)
    assert [example["weight"] for example in found] == [2, 0.5, 0]


def test_a_row_counts_somewhere(tokenizer):
    rows = weighed(CHATS[:2], 0, 0.0)
    message = says(encode_rows, tokenizer, rows, "completion", 256, weighted=True)
    assert message.startswith("w.jsonl:0: weight is 0, and so is that of all 2 rows")


def written(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_column_is_read_for_each_kind_and_is_not_the_weight_of_a_turn(tmp_path, tokenizer):
    first = [dict(turn, weight=0) for turn in CHATS[1]["completion"]]
    talk = [*CHATS[0]["prompt"], *first, *CHATS[1]["prompt"], *CHATS[1]["completion"]]
    path = written(tmp_path / "talk.jsonl", [{"messages": talk, "weight": 3}])
    for kind in ("text", "completion"):
        (row,) = load_data(path, kind, "train")
        assert row["weight"] == 3
        (found,) = encode_rows(tokenizer, [row], kind, 256, weighted=True)
        (plain,) = encode_rows(tokenizer, [row], kind, 256)
        assert found == plain | {"weight": 3}
    path = written(tmp_path / "named.jsonl", [{"text": "x y z", "importance": 2}])
    (row,) = load_data(f"{path}#weight=importance", "text")
    assert row["weight"] == 2


def sft_run(folder, name: str, rows: list[dict], held: list[dict], **words):
    data = written(folder / f"{name}.jsonl", rows)
    held = written(folder / f"{name}-held.jsonl", held)
    return lab.run(
        "sft", model="tiny", data=data, eval_data=held, eval_rows=4, steps=2,
        batch_size=4, max_length=64, dtype="float32", device="cpu", **words,
    )  # fmt: skip


def trained(run) -> dict:
    return load_file(run.path / "model" / "model.safetensors")


def test_a_run_with_weights(tmp_path):
    rows = [dict(row) for row in load_data("sums#20", "completion")]
    held = [dict(row) for row in load_data("sums#4", "completion", "test")]
    heavy = [dict(row, weight=n) for n, row in enumerate(held)]
    plain = sft_run(tmp_path, "plain", rows, held)
    equal = sft_run(tmp_path, "equal", [dict(row, weight=0.5) for row in rows], heavy)
    uneven = [dict(row, weight=n % 3) for n, row in enumerate(rows)]
    other = sft_run(tmp_path, "uneven", uneven, heavy)
    # the evaluation knows no weights
    assert plain.summary["before"] == equal.summary["before"] == other.summary["before"]
    assert plain.summary["after"]["perplexity"] == equal.summary["after"]["perplexity"]
    for name in ("loss", "grad_norm"):
        first, same, changed = (list(run.metrics()[name]) for run in (plain, equal, other))
        assert first == same
        assert all(a != b for a, b in zip(first, changed))
    first, same, changed = map(trained, (plain, equal, other))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], changed[name]) for name in first)


def test_trl_takes_no_weights(tmp_path):
    rows = [dict(row, weight=1) for row in load_data("sums#20", "completion")]
    message = says(sft_run, tmp_path, "trl", rows, rows, engine="trl")
    assert message.startswith("engine = 'trl': ")
    assert "trl.jsonl:" in message
    assert "has a weight" in message
