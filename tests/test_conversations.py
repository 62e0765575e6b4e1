"""The learned text of a conversation, by every chat template in the installed TRL.

It is the assistant's turns with their ends and nothing else.
"""

import copy
import functools
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import trl

import polm_lab as lab
from polm_lab.models import rollout as sampling
from polm_lab.data.rows import Row
from polm_lab.data.encode import encode
from polm_lab.data.load import load_data
from polm_lab.data.turns import turn_ends
from polm_lab.data.spelling import to_messages
from polm_lab.core.knobs import WrongInput
from polm_lab.core.machine import data_folder
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.models.save import save_model
from polm_lab.models.rollout import end_strings, end_tokens, rollout

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
WRITTEN = (
    r"<\|[\w▁]+\|?>|<[\w▁]+\|>|<｜[^<>]+｜>"
    r"|</?(?:start_of_turn|end_of_turn|end_of_utterance|tool_call|tool_response|think|s)>"
    r"|\[gMASK\]|<sop>"
)
# The ends of an assistant's turn, by the start of the template's name; the longest match counts.
ENDS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    # This template leaves a single tool call open.
    "deepseek_r1": ("<｜end▁of▁sentence｜>", "<｜tool▁outputs▁begin｜>"),
    "deepseekv3": ("<｜end▁of▁sentence｜>", "<｜tool▁outputs▁begin｜>"),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gemma": ("<end_of_turn>",),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "glm4moe": ("<|user|>", "<|observation|>"),  # no end of its own: the next role
    "gptoss": ("<|end|>", "<|return|>", "<|call|>"),
    "idefics3": ("<end_of_utterance>",),
    "llama3": ("<|eot_id|>",),
    "llava_next": ("</s>",),
    "muse_glimmer": ("<|eot|>", "<|eom|>"),
    "phi3": ("<|end|>", "<|endoftext|>"),
    "smolvlm": ("<end_of_utterance>",),
    "": ("<|im_end|>",),  # ChatML: Qwen, LFM2, Nemotron
}
CALLING = """deepseek_r1_distill deepseekv3 diffusion_gemma
gemma4 gemma4_v2 gemma4_v3 gemma4_v4 gemma4_v5 glm4moe gptoss
lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl lfm2_v2 llama3_1 llama3_2 muse_glimmer
nemotron_3_5_lightning nemotron_3_nano nemotron_3_super nemotron_3_ultra
qwen2_5 qwen3 qwen3_5_nothink qwen3_5_think qwen3_6 qwen3_8
qwen3_instruct_2507 qwen3_vl""".split()
NAMES = sorted(file.stem for file in TEMPLATES.glob("*.jinja"))
ORIGINAL = [name for name in NAMES if not name.endswith("_training")]


@functools.cache
def plain_tokenizer():
    return load_tokenizer("tiny")


def tokenizer_of(template: str, **special):
    """Give the tokenizer of `tiny` a template of TRL (or a text).

    The special tokens of the template become tokens.
    """
    tokenizer = copy.deepcopy(plain_tokenizer())
    source = (TEMPLATES / f"{template}.jinja").read_text() if template in NAMES else template
    names = sorted(set(re.findall(WRITTEN, source)) | {"<|endoftext|>", "</s>"})
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.chat_template = source
    eos = next(
        (
            name
            for name in (
                "<｜end▁of▁sentence｜>",
                "</s>" if "llava" in template else "<|im_end|>",
                "<|endoftext|>",
            )
            if name in source
        ),
        "<|endoftext|>",
    )
    tokenizer.eos_token = special.get("eos", "</s>" if "llava" in template else eos)
    return tokenizer


def ends_of(template: str) -> tuple[str, ...]:
    return ENDS[max((name for name in ENDS if template.startswith(name)), key=len)]


class Writer:
    """Seeded conversations in which every word shows its turn.

    The text around the words is there to mislead.
    """

    def __init__(self, seed: int):
        self.rng, self.number = random.Random(seed), 0

    def words(self, who: str) -> str:
        out = []
        for _ in range(self.rng.randint(1, 5)):
            self.number += 1
            around = self.rng.choice(
                [
                    "{}",
                    "{}.",
                    "<b>{}</b>",
                    "assistant {}",
                    "user {}",
                    "{}\nyes",
                    '"{}"',
                    "0 {} é",
                    "{} no",
                ]
            )
            out.append(around.format(f"{who}{self.number}x"))
        return " ".join(out)

    def conversation(self, calling: bool) -> list[dict]:
        out = []
        for _ in range(self.rng.randint(1, 3)):
            out.append({"role": "user", "content": self.words("u")})
            for number in range(self.rng.choice([0, 1, 1, 2]) if calling else 0):
                arguments = {"text": self.words("a"), "count": self.rng.randint(0, 9)}
                function = {
                    "name": self.rng.choice(["search", "weather"]),
                    "arguments": json.dumps(arguments),
                }
                out.append(
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": f"call{number}", "type": "function", "function": function}
                        ],
                    }
                )
                out.append(
                    {
                        "role": "tool",
                        "name": function["name"],
                        "tool_call_id": f"call{number}",
                        "content": self.words("t"),
                    }
                )
            out.append({"role": "assistant", "content": self.words("a")})
        if calling and self.rng.random() < 0.2 and out[-2]["role"] == "tool":
            out = out[:-2]  # ends with a call
        return out


def learned_texts(tokenizer, row: dict, kind: str = "text") -> list[str]:
    "The runs of learned tokens, as text."
    made = encode(tokenizer, row, kind, 10**6)
    runs, last = [], 0
    for token, mark in zip(made["input_ids"], made["completion_mask"]):
        if mark and not last:
            runs.append([])
        if mark:
            runs[-1].append(token)
        last = mark
    return [tokenizer.decode(run) for run in runs]


def marks_of(text: str) -> set[str]:
    return set(re.findall(r"[uat]\d+x", text))


def check(template: str, messages: list[dict]) -> int:
    "Asserts on one conversation; returns the number of the assistant's turns."
    tokenizer = tokenizer_of(template) if isinstance(template, str) else template[1]
    name = template if isinstance(template, str) else template[0]
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    row = Row({"messages": to_messages(messages, {}, "messages")}, "a.jsonl:1")
    runs = learned_texts(tokenizer, row)
    said = set().union(
        *(
            marks_of((turn["content"] or "") + json.dumps(turn.get("tool_calls", "")))
            for turn in answers
        )
    )
    assert marks_of("".join(runs)) == said, "every word of the assistant, and no other"
    ended = sum(len(re.findall("|".join(map(re.escape, ends_of(name))), run)) for run in runs)
    twice = len(
        re.findall(r"<\|end\|>\s*<\|endoftext\|>", "".join(runs))
    )  # Phi-3 ends a conversation, too
    assert ended - twice == len(answers), (runs, messages)
    assert all(run.rstrip().endswith(ends_of(name)) for run in runs), runs
    return len(answers)


@pytest.mark.parametrize("template", NAMES)
def test_every_template_learns_the_answers_with_their_ends(template):
    writer, tokenizer = Writer(0), tokenizer_of(template)
    for _ in range(8):
        check((template, tokenizer), writer.conversation(calling=False))


@pytest.mark.parametrize("template", CALLING)
def test_tool_calls_are_learned_with_their_ends(template):
    writer, tokenizer = Writer(1), tokenizer_of(template)
    for _ in range(
        30 if template in ("qwen2_5", "qwen3", "deepseek_r1_distill", "gptoss", "llama3_1") else 6
    ):
        check((template, tokenizer), writer.conversation(calling=True))


@pytest.mark.parametrize("template", sorted(set(ORIGINAL) - set(CALLING)))
def test_a_template_without_tool_calls_refuses_them_in_one_line(template):
    writer, tokenizer = Writer(1), tokenizer_of(template)
    messages = next(
        m
        for m in iter(lambda: writer.conversation(calling=True), None)
        if any(t.get("tool_calls") for t in m)
    )
    with pytest.raises(WrongInput) as caught:
        learned_texts(tokenizer, Row({"messages": messages}, "a.jsonl:1"))
    assert str(caught.value).startswith("a.jsonl:1: the chat template")
    assert "\n" not in str(caught.value)


# Templates that render the same with TRL's generation marks as without.
# The marks are an independent statement of what is learned.
@pytest.mark.parametrize(
    "template",
    [
        "cohere",
        "cohere2",
        "gemma",
        "gemma3",
        "idefics3",
        "lfm2",
        "llama3",
        "llava_next",
        "phi3",
        "phi3_5",
        "qwen3_instruct_2507",
        "smolvlm",
    ],
)
def test_equals_the_generation_marks_of_trl(template):
    writer, compared = Writer(2), 0
    plain, marked = tokenizer_of(template), tokenizer_of(f"{template}_training")
    for tokenizer in (plain, marked):
        tokenizer.add_tokens(
            sorted({*plain.get_added_vocab(), *marked.get_added_vocab()}), special_tokens=True
        )
        tokenizer.eos_token = plain.eos_token
    for _ in range(12):
        messages = writer.conversation(calling=template == "qwen3_instruct_2507")
        row = Row({"messages": messages}, "a.jsonl:1")
        ours, theirs = (
            [run.rstrip() for run in learned_texts(tokenizer, row)] for tokenizer in (plain, marked)
        )
        assert ours == theirs
        compared += len(ours)
    assert compared > 12


# The cases of the kind


def test_the_answer_is_not_looked_for_in_the_question():
    tokenizer = tokenizer_of("deepseek_r1_distill")
    messages = [
        {"role": "user", "content": "Is 0 a number? yes or no"},
        {"role": "assistant", "content": "yes"},
    ]
    made = encode(tokenizer, {"messages": messages}, "text", 99)
    text = tokenizer.decode(made["input_ids"])
    assert (
        text == "<｜User｜>Is 0 a number? yes or no<｜Assistant｜>yes<｜end▁of▁sentence｜>"
    )  # and no word for a missing BOS
    assert learned_texts(tokenizer, {"messages": messages}) == ["yes<｜end▁of▁sentence｜>"]
    assert learned_texts(
        tokenizer, {"prompt": messages[:1], "completion": messages[1:]}, "completion"
    ) == ["yes<｜end▁of▁sentence｜>"]
    assert learned_texts(tokenizer_of("qwen3"), {"messages": messages}) == [
        "<think>\n\n</think>\n\nyes<|im_end|>\n"
    ]


def test_an_answer_that_goes_on_as_the_opening_does():
    for answer in ("<b>x</b>", "<think", "<"):
        messages = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": answer},
        ]
        assert (
            learned_texts(tokenizer_of("deepseek_r1_distill"), {"messages": messages})
            == [f"{answer}<｜end▁of▁sentence｜>"] * 2
        )
        assert (
            learned_texts(tokenizer_of("qwen3_5_think"), {"messages": messages})[0]
            == f"{answer}<|im_end|>\n"
        )


def test_a_call_without_content_is_learned():
    call = {"type": "function", "function": {"name": "search", "arguments": '{"text": "cats"}'}}
    messages = [
        {"role": "user", "content": "find cats"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    answered = [
        *messages,
        {"role": "tool", "content": "two cats"},
        {"role": "assistant", "content": "two"},
    ]
    qwen = (
        '<tool_call>\n{"name": "search", "arguments": {"text": "cats"}}\n</tool_call><|im_end|>\n'
    )
    assert learned_texts(tokenizer_of("qwen2_5"), {"messages": messages}) == [qwen]
    deepseek = (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n```json\n{"text": '
        '"cats"}\n```<｜tool▁call▁end｜><｜tool▁outputs▁begin｜>'
    )
    assert learned_texts(tokenizer_of("deepseek_r1_distill"), {"messages": messages}) == [deepseek]
    assert learned_texts(tokenizer_of("deepseek_r1_distill"), {"messages": answered}) == [
        deepseek,
        "two<｜end▁of▁sentence｜>",
    ]


def test_a_template_without_an_end_learns_the_next_role():
    messages = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "d"},
    ]
    tokenizer = tokenizer_of("glm4moe")
    assert learned_texts(tokenizer, {"messages": messages}) == [
        "\n<think></think>\nb<|user|>",
        "\n<think></think>\nd<|user|>",
    ]
    assert turn_ends(tokenizer) == ["<|user|>", "<|observation|>"]
    textual = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.raises(
        WrongInput,
        match=(
            "a.jsonl:1: the chat template writes no token at the end of assistant turn "
            "2.*chat_template = FILE.jinja.*generation"
        ),
    ):
        learned_texts(tokenizer_of(textual), Row({"messages": messages}, "a.jsonl:1"))


def test_what_cannot_be_aligned_is_refused():
    messages = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "d"},
    ]
    numbers = (
        "{% for i in range(messages | length) %}"
        "{{ '<|im_start|>' + messages[i].role + '\n' + messages[i].content + '<|im_end|>\n' }}"
        "{% endfor %}"
    )
    numbers += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    assert learned_texts(tokenizer_of(numbers), {"messages": messages}) == [
        "b<|im_end|>\n",
        "d<|im_end|>\n",
    ]  # each rendering begins the next
    changing = "{{ messages | length }}" + numbers
    with pytest.raises(
        WrongInput,
        match=(
            "a.jsonl:1: the chat template changes the text of assistant turn 2.*chat_template "
            "= FILE.jinja"
        ),
    ):
        learned_texts(tokenizer_of(changing), Row({"messages": messages}, "a.jsonl:1"))
    fetched = numbers.replace(
        "%}{{ '<|im_start|>' + messages[i].role",
        "%}{% set m = messages[i] %}{{ '<|im_start|>' + messages[i].role",
    )
    assert learned_texts(
        tokenizer_of("{{ messages | length }}" + fetched), {"messages": messages}
    ) == ["b<|im_end|>\n", "d<|im_end|>\n"]


def test_marks_that_leave_the_end_out_learn_it():
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% generation %}"
        "{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}{% endfor %}"
    )
    only = marked.replace(
        "{% generation %}", "{% if m.role == 'assistant' %}{% generation %}"
    ).replace("{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content }}{% endif %}")
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    assert learned_texts(tokenizer_of(only), {"messages": messages}) == ["b<|im_end|>"]


def test_an_answer_that_is_opened_inside_of_the_loop():
    "As Zephyr's template has it; and Llama 2's, which opens no answer."
    messages = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "d"},
    ]
    inside = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        "{% endfor %}"
    )
    assert learned_texts(tokenizer_of(inside, eos="</s>"), {"messages": messages}) == [
        "b</s>\n",
        "d</s>\n",
    ]
    without = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    assert learned_texts(tokenizer_of(without, eos="</s>"), {"messages": messages}) == [
        " b </s>",
        " d </s>",
    ]
    closing = (
        "{% for m in messages %}{% if not loop.first %}{{ '<|im_end|>\n' }}{% endif %}"
        "{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{{ '<|im_end|>\n' }}"
    )
    # a turn is closed by what comes next
    closing += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    runs = learned_texts(tokenizer_of(closing), {"messages": messages})
    assert [run.rstrip() for run in runs] == ["b<|im_end|>", "d<|im_end|>"]


def test_marks_around_some_turns_say_which_are_learned():
    last = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "d"},
    ]
    assert learned_texts(tokenizer_of(last), {"messages": messages}) == ["d<|im_end|>"]
    with pytest.raises(
        WrongInput, match="a.jsonl:1: the generation marks of the chat template hold nothing"
    ):
        learned_texts(tokenizer_of(last), Row({"messages": messages[:3]}, "a.jsonl:1"))


def test_another_turn_in_the_midst_of_an_answer_is_refused():
    template = (
        "{% for m in messages %}{% if m.role != 'tool' %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if not loop.last and messages[loop.index0 + 1].role == 'tool' %}"
    )
    template += (
        "{{ '[found: ' + messages[loop.index0 + 1].content + ']' }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "look"},
        {"role": "tool", "content": "cats"},
        {"role": "assistant", "content": "b"},
    ]
    with pytest.raises(
        WrongInput,
        match="a.jsonl:1: the chat template writes another turn in the midst of assistant turn 2",
    ):
        learned_texts(tokenizer_of(template), Row({"messages": messages}, "a.jsonl:1"))
    assert learned_texts(tokenizer_of(template), {"messages": [messages[0], messages[3]]}) == [
        "b<|im_end|>\n"
    ]


def test_no_token_of_two_turns_is_learned():
    """Without special tokens, a token may cross the border between turns.

    There the text is tokenized apart, as it is when the model is asked.
    """
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template, apart = template, 0
    for answer in ("the", " the", "\n\nwell", "yes", " 4", ": is"):
        row = {
            "messages": [
                {"role": "user", "content": "hello "},
                {"role": "assistant", "content": answer + "."},
            ]
        }
        asked = encode(tokenizer, {"prompt": row["messages"][:1]}, "prompt", 99)["input_ids"]
        made = encode(tokenizer, row, "text", 99)
        assert made["input_ids"][: len(asked)] == asked
        assert made["completion_mask"] == [0] * len(asked) + [1] * (
            len(made["input_ids"]) - len(asked)
        )
        assert tokenizer.decode(made["input_ids"][len(asked) :]) == answer + ".</s>"
        apart += (
            made["input_ids"]
            != tokenizer(
                "user: hello </s>assistant: " + answer + ".</s>", add_special_tokens=False
            ).input_ids
        )
    assert apart, "some token would have reached over the seam"


# Fields


def test_thinking_is_learned_where_it_is_written_and_refused_where_it_is_dropped():
    tokenizer = tokenizer_of("qwen3")
    one = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
    ]
    for name in ("reasoning_content", "reasoning", "thinking"):
        turn = {"role": "assistant", "content": "b", name: "hm"}
        assert learned_texts(
            tokenizer, {"messages": to_messages([one[0], turn], {}, "messages")}
        ) == ["<think>\nhm\n</think>\n\nb<|im_end|>\n"]
    parts = {
        "role": "assistant",
        "content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "b"}],
    }
    assert learned_texts(tokenizer, {"messages": to_messages([one[0], parts], {}, "messages")}) == [
        "<think>\nhm\n</think>\n\nb<|im_end|>\n"
    ]
    with pytest.raises(
        WrongInput,
        match="a.jsonl:1: the chat template drops the thinking of assistant turn 2.*weight 0",
    ):
        learned_texts(
            tokenizer, Row({"messages": [*one, *one]}, "a.jsonl:1")
        )  # turn 2 is an earlier one
    first = {**one[1], "weight": 0}
    assert learned_texts(tokenizer, {"messages": [one[0], first, *one]}) == [
        "<think>\nhm\n</think>\n\nb<|im_end|>\n"
    ]
    assert learned_texts(
        tokenizer, {"prompt": [*one, one[0]], "completion": one[1:]}, "completion"
    ) == ["<think>\nhm\n</think>\n\nb<|im_end|>\n"]
    within = [one[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}]
    assert learned_texts(tokenizer, {"messages": within}) == [
        "<think>\nhm\n</think>\n\nb<|im_end|>\n"
    ]
    for messages in (one, within):
        with pytest.raises(WrongInput, match="drops the thinking of assistant turn 2"):
            learned_texts(tokenizer_of("deepseek_r1_distill"), {"messages": messages})
        with pytest.raises(WrongInput, match="drops the thinking of assistant turn 2"):
            learned_texts(
                tokenizer_of("deepseek_r1_distill"), {"messages": messages[:1] + messages[1:]}
            )


@pytest.mark.parametrize("name", ["weight", "loss_weight", "loss", "train"])
def test_a_turn_of_weight_0_is_not_learned(name):
    tokenizer = tokenizer_of("qwen2_5")
    messages = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b", name: 0},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "d", name: 1},
    ]
    read = to_messages(messages, {}, "messages")
    assert (
        learned_texts(tokenizer, {"messages": read})
        == ["d<|im_end|>\n"]
        == learned_texts(tokenizer, {"messages": messages})
    )
    for wrong in (0.5, 2, -1, "0"):
        with pytest.raises(
            WrongInput,
            match=f"a.jsonl:3: messages, turn 2, has {name}.*expected 0 .not learned. or 1",
        ):
            to_messages(
                [messages[0], {**messages[1], name: wrong}], Row({}, "a.jsonl:3"), "messages"
            )
    with pytest.raises(WrongInput, match="weight 0 on each assistant turn"):
        learned_texts(tokenizer, {"messages": read[:2]})
    with pytest.raises(WrongInput, match="weight 0 on turn 2, and everything is to be learned"):
        encode(tokenizer, {"messages": read}, "text", 99, completion_only=False)


def test_nulls_of_arrow_are_not_learned(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def call(name, **arguments):
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": name, "arguments": arguments}}
            ],
        }

    rows = [
        [{"role": "user", "content": "a?"}, call("search", text="cats")],
        [{"role": "user", "content": "b?"}, call("weather", city={"name": "Rome"}, days=[1, 2])],
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": m} for m in rows]), tmp_path / "a.parquet"
    )
    stored = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()[0]["messages"][1][
        "tool_calls"
    ][0]["function"]["arguments"]
    assert stored == {"text": "cats", "city": None, "days": None}  # what Arrow makes of it
    (tmp_path / "a.jsonl").write_text(
        "\n".join(
            json.dumps({"messages": r["messages"]})
            for r in pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
        )
    )
    for file in ("a.parquet", "a.jsonl"):
        texts = [
            learned_texts(tokenizer_of("qwen2_5"), row)
            for row in load_data(str(tmp_path / file), "text", "all")
        ]
        assert texts == [
            [
                '<tool_call>\n{"name": "search", "arguments": {"text": '
                '"cats"}}\n</tool_call><|im_end|>\n'
            ],
            [
                '<tool_call>\n{"name": "weather", "arguments": {"city": {"name": "Rome"}, '
                '"days": [1, 2]}}\n</tool_call><|im_end|>\n'
            ],
        ]
    meant = call("search")
    meant["tool_calls"][0]["function"]["arguments"] = (
        '{"text": null}'  # text in the file: the null is the author's
    )
    assert (
        '{"text": null}'
        in learned_texts(tokenizer_of("qwen2_5"), {"messages": [rows[0][0], meant]})[0]
    )


def test_other_fields_are_followed_or_refused():
    user = {"role": "user", "content": "a?"}
    old = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "search", "arguments": '{"text": "cats"}'},
    }
    wanted = [
        '<tool_call>\n{"name": "search", "arguments": {"text": "cats"}}\n</tool_call><|im_end|>\n'
    ]
    assert learned_texts(tokenizer_of("qwen2_5"), {"messages": [user, old]}) == wanted
    parts = {
        "role": "assistant",
        "content": [
            {"type": "tool_call", "value": '{"name": "search", "arguments": {"text": "cats"}}'}
        ],
    }
    assert learned_texts(tokenizer_of("qwen2_5"), {"messages": [user, parts]}) == wanted
    for turn, message in (
        ({"role": "assistant", "content": "b", "images": ["x.png"]}, "has images.*text only"),
        (
            {"role": "user", "content": "b", "tool_calls": [{"name": "f", "arguments": {}}]},
            "user turn with tool_calls",
        ),
        ({"role": "assistant", "content": "b", "thinking": "x", "reasoning": "y"}, "it differs"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]},
            "has the tool call",
        ),
        ({"role": "user", "content": "b", "weight": 1}, "user turn with weight 1"),
    ):
        with pytest.raises(WrongInput, match=f"a.jsonl:3: messages, turn 1,.*{message}"):
            to_messages([turn], Row({}, "a.jsonl:3"), "messages")
    tool = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
    said = [user, {"role": "assistant", "content": "b"}]
    with pytest.raises(WrongInput, match="a.jsonl:1: the chat template drops the tools .search"):
        learned_texts(tokenizer_of("phi3"), Row({"messages": said, "tools": tool}, "a.jsonl:1"))
    with pytest.raises(WrongInput, match="a.jsonl:1: the chat template drops turn 3 .tool"):
        learned_texts(
            tokenizer_of("phi3"),
            Row({"messages": [*said, {"role": "tool", "content": "found"}, said[1]]}, "a.jsonl:1"),
        )


def test_system_beside_messages_and_functions_are_followed(tmp_path):
    row = {
        "system": "Be kind.",
        "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}],
        "functions": [{"name": "search", "parameters": {}}],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    [read] = load_data(str(tmp_path / "a.jsonl"), "text", "all")
    tokenizer = tokenizer_of("qwen2_5")
    text = tokenizer.decode(encode(tokenizer, read, "text", 999)["input_ids"])
    assert "Be kind." in text
    assert '"search"' in text
    assert learned_texts(tokenizer, read) == ["b<|im_end|>\n"]


# The end of an answer


def test_whatever_ends_an_answer_ends_sampling(tmp_path):
    model, tokenizer = load_model("tiny", "float32", "cpu"), load_tokenizer("tiny")
    assert end_tokens(model, tokenizer) == [2]
    model.generation_config.eos_token_id = 1
    assert end_tokens(model, tokenizer) == [1, 2] == end_tokens(model, tokenizer_of("qwen3"))
    chat = tokenizer_of("llama3", eos="<|endoftext|>")
    eot, eos = chat.convert_tokens_to_ids(["<|eot_id|>", "<|endoftext|>"])
    assert end_tokens(model, chat) == [1, eos, eot]
    model.generation_config.eos_token_id = [5, 2]
    assert end_tokens(model, tokenizer) == [5, 2]
    assert end_tokens(model) == [5, 2]
    model.generation_config.eos_token_id = []
    assert end_tokens(model, tokenizer) == []
    for before, saved in ((1, [1, 2]), ([5, 2], [5, 2]), (2, 2), (None, 2)):
        model.generation_config.eos_token_id = before
        save_model(model, tokenizer, tmp_path / "m")
        assert (
            json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"]
            == saved
        )
        assert model.generation_config.eos_token_id == before


def test_an_end_of_several_tokens_is_a_stop_string():
    model, tokenizer = load_model("tiny", "float32", "cpu"), load_tokenizer("tiny")
    asked = [tokenizer("The capital of").input_ids]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content + '<eot>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert turn_ends(tokenizer) == ["<eot>"] == list(end_strings(tokenizer))
    assert end_tokens(model, tokenizer) == [2]
    text = rollout(model, None, asked, 1, 12, temperature=0).completions[0]
    text = tokenizer.decode(text, skip_special_tokens=True)
    end = next(
        text[i : i + 3]
        for i in range(3, len(text))
        if text[i : i + 3].isalpha() and len(tokenizer(text[i : i + 3]).input_ids) > 1
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("<eot>", end)
    assert end_strings(tokenizer) == (end,)
    cut = rollout(model, tokenizer, asked, 1, 12, temperature=0)
    assert cut.ended == [True]
    assert cut.texts == [text[: text.index(end)]]


def other_ends(folder: Path, generation, tokenizer: str) -> str:
    "A copy of `tiny` with other ends in its generation config and its tokenizer."
    shutil.copytree(data_folder() / "tiny", folder)
    for file, change in (
        ("generation_config.json", {"eos_token_id": generation}),
        (
            "tokenizer_config.json",
            {"eos_token": tokenizer, "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]},
        ),
    ):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    return str(folder)


def test_sft_of_a_base_model_that_was_given_a_chat_token(tmp_path, monkeypatch):
    settings = dict(
        out=tmp_path / "runs",
        data="sums",
        steps=8,
        eval_rows=16,
        batch_size=8,
        device="cpu",
        dtype="float32",
    )
    run = lab.run("sft", model=other_ends(tmp_path / "m", 2000, "<|im_end|>"), **settings)
    agreed = lab.run("sft", model="tiny", **settings)
    for when in ("before", "after"):
        assert run.summary[when]["accuracy"] == agreed.summary[when]["accuracy"]
        assert run.summary[when]["truncated"] == 0
    assert run.summary["after"]["accuracy"] > 0.25
    saved = json.loads((run.path / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2000, 2]
    # the generation config's EOS alone, as it was: the same weights answer nothing
    model, tokenizer = load_model(str(run.path), "float32", "cpu"), load_tokenizer(str(run.path))
    model.generation_config.eos_token_id = 2000
    asked = [
        tokenizer(row["prompt"]).input_ids for row in load_data("sums#16", "completion", "test")
    ]
    new = rollout(model, tokenizer, asked, 1, 24, temperature=0)
    monkeypatch.setattr(
        sampling, "end_tokens", lambda model, tokenizer=None: [model.generation_config.eos_token_id]
    )
    old = rollout(model, tokenizer, asked, 1, 24, temperature=0)
    assert all(new.ended)
    assert not any(old.ended)
