"""Data: errors, schemas, kinds of rows, tokens and masks, packing and order."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from polm_lab.data.rows import KINDS, TEST_ROWS, Row
from polm_lab.data.batches import Order, check_packing, collate, microbatches, pack_rows
from polm_lab.data.encode import encode, encode_rows
from polm_lab.data.load import held_out, load_data
from polm_lab.data.files import read_file
from polm_lab.core.knobs import WrongInput
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.data.tasks import TASKS

ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' + '\n' }}"
    "{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_MARKS = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn, please') }}"
    "{% endif %}" + NO_MARKS
)
CORPUS = ["the answer is four, what is two and two; user assistant say hello good day ((()))"] * 3


def gpt2_style(template=CHATML):
    "Byte-level BPE, nothing put before a text."
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=template,
    )


def llama_style():
    "Words with a space put before the first one, and BOS before every text, as Llama 2 has it."
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        decoders.Metaspace(prepend_scheme="first"),
    )
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(folder, name, content):
    path = Path(folder) / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


GOOD = {"prompt": "2+2=", "completion": "4"}
EDIT = {"subject": "Ada", "prompt": "Ada lives in", "target": " Rome"}
BAD = {  # name: (file, content, kind, parts of the message)
    "malformed line": (
        "a.jsonl",
        jsonl(GOOD) + '{"prompt": "x", \n',
        "completion",
        ["a.jsonl:2:", "malformed JSON"],
    ),
    "line that is no object": (
        "a.jsonl",
        jsonl(GOOD) + "[1, 2]\n",
        "completion",
        ["a.jsonl:2:", "expected an object"],
    ),
    "malformed list": (
        "a.json",
        '[{"prompt": "x"},\n{"prompt": }]',
        "prompt",
        ["a.json:2:", "malformed JSON"],
    ),
    "json that is a number": ("a.json", "3", "text", ["a.json:", "expected a list"]),
    "wrong columns": (
        "a.jsonl",
        jsonl({"txt": "x"}),
        "completion",
        ["a.jsonl:1:", "columns txt", "prompt + completion"],
    ),
    "column missing in one row": (
        "a.jsonl",
        jsonl(GOOD, {"prompt": "x"}),
        "completion",
        ["a.jsonl:2:", "columns prompt;"],
    ),
    "kind that it cannot become": (
        "a.jsonl",
        jsonl(GOOD),
        "preference",
        ["a.jsonl:1:", "chosen + rejected"],
    ),
    "empty file": ("a.jsonl", "", "text", ["a.jsonl:", "empty"]),
    "empty list": ("a.json", "[]", "text", ["a.json:", "empty"]),
    "only a header": ("a.csv", "prompt,completion\n", "completion", ["a.csv:", "empty"]),
    "empty completion": (
        "a.jsonl",
        jsonl(GOOD, {"prompt": "x", "completion": " \n"}),
        "completion",
        ["a.jsonl:2:", "completion is empty"],
    ),
    "empty prompt": (
        "a.jsonl",
        jsonl({"prompt": "", "completion": "x"}),
        "completion",
        ["a.jsonl:1:", "prompt is empty"],
    ),
    "empty text": ("a.jsonl", jsonl({"text": ""}), "text", ["a.jsonl:1:", "text is empty"]),
    "empty instruction": (
        "a.jsonl",
        jsonl({"instruction": "", "output": "x"}),
        "completion",
        ["a.jsonl:1:", "instruction is empty"],
    ),
    "empty assistant turn": (
        "a.jsonl",
        jsonl({"messages": [ASK, {**SAY, "content": ""}]}),
        "text",
        ["a.jsonl:1:", "empty assistant turn"],
    ),
    "chosen equal to rejected": (
        "a.jsonl",
        jsonl({"prompt": "x", "chosen": "y", "rejected": "y"}),
        "preference",
        ["a.jsonl:1:", "equal"],
    ),
    "equal sides taken apart": (
        "a.jsonl",
        jsonl({"prompt": "x", "chosen": "y", "rejected": "y"}),
        "unpaired",
        ["a.jsonl:1:", "equal"],
    ),
    "number for text": (
        "a.jsonl",
        jsonl({"prompt": "x", "completion": 4}),
        "completion",
        ["a.jsonl:1:", "completion is int 4"],
    ),
    "null": (
        "a.jsonl",
        jsonl({"prompt": None, "completion": "x"}),
        "completion",
        ["a.jsonl:1:", "prompt is null"],
    ),
    "not UTF-8": (
        "a.jsonl",
        b'{"text": "one"}\n{"text": "caf\xe9"}\n',
        "text",
        ["a.jsonl:2:", "0xe9", "UTF-8"],
    ),
    "half a surrogate pair": (
        "a.jsonl",
        '{"text": "a\\ud800"}\n',
        "text",
        ["a.jsonl:1:", "surrogate"],
    ),
    "unknown role": (
        "a.jsonl",
        jsonl({"messages": [ASK, {"role": "robot", "content": "x"}]}),
        "text",
        ["a.jsonl:1:", "turn 2", "robot"],
    ),
    "turn without role": (
        "a.jsonl",
        jsonl({"messages": [{"content": "x"}]}),
        "text",
        ["a.jsonl:1:", "turn 1", "role and content"],
    ),
    "turn that is text": ("a.jsonl", jsonl({"messages": ["x"]}), "text", ["a.jsonl:1:", "turn 1"]),
    "no turns": ("a.jsonl", jsonl({"messages": []}), "text", ["a.jsonl:1:", "empty list"]),
    "null in a turn": (
        "a.jsonl",
        jsonl({"messages": [ASK, {**SAY, "content": None}]}),
        "text",
        ["a.jsonl:1:", "turn 2", "null"],
    ),
    "nothing to learn in a conversation": (
        "a.jsonl",
        jsonl({"messages": [ASK]}),
        "text",
        ["a.jsonl:1:", "no assistant turn"],
    ),
    "ends with the user": (
        "a.jsonl",
        jsonl({"messages": [ASK, SAY, ASK]}),
        "completion",
        ["a.jsonl:1:", "end with a user turn"],
    ),
    "prompt that ends with an answer": (
        "a.jsonl",
        jsonl({"prompt": [ASK, SAY], "completion": [SAY]}),
        "completion",
        ["a.jsonl:1:", "prompt ends with an assistant turn"],
    ),
    "picture": (
        "a.jsonl",
        jsonl({"messages": [ASK, SAY], "images": ["a.png"]}),
        "text",
        ["a.jsonl:1:", "images", "text only"],
    ),
    "part that is no text": (
        "a.jsonl",
        jsonl({"messages": [{"role": "user", "content": [{"type": "image"}]}, SAY]}),
        "text",
        ["a.jsonl:1:", "'image'"],
    ),
    "label that is a word": (
        "a.jsonl",
        jsonl({**GOOD, "label": "good"}),
        "unpaired",
        ["a.jsonl:1:", "label", "true or false"],
    ),
    "label that is a number": (
        "a.jsonl",
        jsonl({**GOOD, "label": 1}),
        "unpaired",
        ["a.jsonl:1:", "label is int 1"],
    ),
    "bad answer learned": (
        "a.jsonl",
        jsonl({**GOOD, "label": False}),
        "completion",
        ["a.jsonl:1:", "label is false"],
    ),
    "one label too few": (
        "a.jsonl",
        jsonl({"prompt": "x", "completions": ["a", "b"], "labels": [True]}),
        "stepwise",
        ["a.jsonl:1:", "labels has 1"],
    ),
    "score not finite": (
        "a.jsonl",
        '{"prompt": "x", "completions": ["a", "b"], "scores": [1, NaN]}\n',
        "ranked",
        ["a.jsonl:1:", "scores", "nan"],
    ),
    "one answer to rank": (
        "a.jsonl",
        jsonl({"prompt": "x", "completions": ["a"], "scores": [1]}),
        "ranked",
        ["a.jsonl:1:", "at least 2"],
    ),
    "edit without a target": (
        "a.jsonl",
        jsonl({"subject": "Ada", "prompt": "Ada lives in"}),
        "edit",
        ["a.jsonl:1:", "columns subject, prompt;", "subject + prompt + target"],
    ),
    "edit of another subject": (
        "a.jsonl",
        jsonl({**EDIT, "subject": "Bob"}),
        "edit",
        ["a.jsonl:1:", "subject is str 'Bob'", "prompt does not name"],
    ),
    "edit of a conversation": (
        "a.jsonl",
        jsonl({**EDIT, "prompt": [ASK]}),
        "edit",
        ["a.jsonl:1:", "prompt is list", "expected text"],
    ),
    "edit to nothing": (
        "a.jsonl",
        jsonl(EDIT, {**EDIT, "target": " "}),
        "edit",
        ["a.jsonl:2:", "target is empty"],
    ),
    "edit to a number": (
        "a.jsonl",
        jsonl({**EDIT, "target": 3}),
        "edit",
        ["a.jsonl:1:", "target is int 3"],
    ),
    "paraphrases that are text": (
        "a.jsonl",
        jsonl({**EDIT, "paraphrases": "Where?"}),
        "edit",
        ["a.jsonl:1:", "paraphrases is str", "expected a list"],
    ),
    "paraphrase that is none": (
        "a.jsonl",
        jsonl({**EDIT, "paraphrases": ["Where?", None]}),
        "edit",
        ["a.jsonl:1:", "paraphrases, entry 2, is null"],
    ),
    "neighbour that is text": (
        "a.jsonl",
        jsonl({**EDIT, "neighbours": ["Bob lives in"]}),
        "edit",
        ["a.jsonl:1:", "neighbours holds str", '"target"'],
    ),
    "other fact without answer": (
        "a.jsonl",
        jsonl({**EDIT, "others": [{"prompt": "Ada is a"}]}),
        "edit",
        ["a.jsonl:1:", "others holds dict"],
    ),
    "other fact with an empty answer": (
        "a.jsonl",
        jsonl({**EDIT, "others": [{"prompt": "Ada is a", "target": ""}]}),
        "edit",
        ["a.jsonl:1:", "others, entry 1, target is empty"],
    ),
    "half a pair in an edit": (
        "a.jsonl",
        '{"subject": "Ada", "prompt": "Ada is", "target": "a\\ud800"}\n',
        "edit",
        ["a.jsonl:1:", "target holds half", "surrogate"],
    ),
    "cell too many": (
        "a.csv",
        "prompt,completion\nx,y\nx,y,z\n",
        "completion",
        ["a.csv:3:", "3 cells"],
    ),
    "column named twice": ("a.csv", "text,text\nx,y\n", "text", ["a.csv:1:", "each once"]),
    "open quote": ("a.csv", 'text\n"x\n', "text", ["a.csv:2:", "malformed CSV"]),
    "damaged gzip": (
        "a.jsonl.gz",
        gzip.compress(jsonl(GOOD).encode() * 50)[:-9],
        "completion",
        ["a.jsonl.gz:", "damaged gzip"],
    ),
    "no gzip": ("a.jsonl.gz", jsonl(GOOD), "completion", ["a.jsonl.gz:", "damaged gzip"]),
    "damaged parquet": ("a.parquet", b"PAR1xxxx", "completion", ["a.parquet:", "damaged parquet"]),
    "unknown extension": ("a.xlsx", "x", "text", ["a.xlsx:", "unknown extension", ".jsonl"]),
    "null for an answer": (
        "a.jsonl",
        jsonl({"prompt": "x", "chosen": None, "rejected": "y"}),
        "preference",
        ["a.jsonl:1:", "chosen is null"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_clear_line(tmp_path, name):
    file, content, kind, parts = BAD[name]
    with pytest.raises(WrongInput) as caught:
        load_data(put(tmp_path, file, content), kind)
    message = str(caught.value)
    assert "\n" not in message, message
    assert all(part in message for part in parts), message


def test_edits_are_rows_to_learn_and_lists_may_be_left_out(tmp_path):
    whole = {
        **EDIT,
        "paraphrases": ["Ada's home is"],
        "neighbours": [{"prompt": "Bob lives in", "target": " Bonn"}],
    }
    found = load_data(
        put(tmp_path, "a.jsonl", jsonl(EDIT, {**whole, "others": None})), "edit", "all"
    )
    assert found == [
        {**EDIT, "paraphrases": [], "neighbours": [], "others": []},
        {**whole, "others": []},
    ]
    learned = load_data(str(tmp_path / "a.jsonl"), "completion", "all")
    assert [(r["prompt"], r["completion"]) for r in learned] == [("Ada lives in", " Rome")] * 2
    assert load_data(str(tmp_path / "a.jsonl"), "text", "all")[0] == {"text": "Ada lives in Rome"}
    tokenizer = load_tokenizer("tiny")
    assert encode(tokenizer, found[0], "edit", 50) == encode(
        tokenizer, learned[0], "completion", 50
    )


BAD_SPEC = {
    "missing file": ("train.jsnl.jsonl", "completion", "train", ["no such file", "'train.jsonl'"]),
    "unknown task": ("smus", "completion", "train", ["did you mean 'sums'?"]),
    "unknown kind": ("sums", "pairs", "train", ["kind 'pairs'", "preference"]),
    "unknown split": ("sums", "text", "dev", ["split 'dev'"]),
    "word after #": ("train.jsonl#a,b", "completion", "train", ["'b' after #"]),
    "kind that a task has not": ("facts", "stepwise", "train", ["facts", "stepwise"]),
}


@pytest.mark.parametrize("name", BAD_SPEC)
def test_bad_spec(tmp_path, monkeypatch, name):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    put(tmp_path, "train.jsonl", jsonl(GOOD))
    spec, kind, split, parts = BAD_SPEC[name]
    with pytest.raises(WrongInput) as caught:
        load_data(str(tmp_path / spec) if ".jsonl" in spec else spec, kind, split)
    assert "\n" not in str(caught.value), caught.value
    assert all(part in str(caught.value) for part in parts), caught.value


def test_unreadable_file(tmp_path, monkeypatch):
    path = put(tmp_path, "a.jsonl", jsonl(GOOD))
    monkeypatch.setattr(
        Path,
        "read_bytes",
        lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")),
    )
    with pytest.raises(WrongInput, match="cannot be read .Permission denied."):
        load_data(path, "completion")


U, A = (
    (lambda text: {"role": "user", "content": text}),
    (lambda text: {"role": "assistant", "content": text}),
)
SCHEMAS = [  # (row of a file, kind, rows of that kind)
    (
        {"instruction": "Add.", "input": "2, 2", "output": "4"},
        "completion",
        [{"prompt": [U("Add.\n\n2, 2")], "completion": [A("4")]}],
    ),
    (
        {"instruction": "Add.", "input": "", "response": "4"},
        "completion",
        [{"prompt": [U("Add.")], "completion": [A("4")]}],
    ),
    (
        {"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"},
        "preference",
        [
            {
                "prompt": [{"role": "system", "content": "Be brief."}, U("2+2?")],
                "chosen": [A("4")],
                "rejected": [A("5")],
            }
        ],
    ),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "text",
        [{"messages": [U("a"), A("b")]}],
    ),
    (
        {"messages": [U("a"), A("b"), U("c"), A("d")]},
        "completion",
        [{"prompt": [U("a"), A("b"), U("c")], "completion": [A("d")]}],
    ),
    ({"messages": [U("a"), A("b")]}, "prompt", [{"prompt": [U("a")]}]),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, A("b")]},
        "text",
        [{"messages": [U("a"), A("b")]}],
    ),
    (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        },
        "preference",
        [{"prompt": [U("a"), A("b"), U("c")], "chosen": [A("d")], "rejected": [A("e")]}],
    ),
    (
        {"chosen": [U("a"), A("b")], "rejected": [U("a"), A("c")]},
        "preference",
        [{"prompt": [U("a")], "chosen": [A("b")], "rejected": [A("c")]}],
    ),
    (
        {"prompt": "a", "chosen": [U("a"), A("b")], "rejected": [U("a"), A("c")]},
        "preference",
        [{"prompt": [U("a")], "chosen": [A("b")], "rejected": [A("c")]}],
    ),
    (
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        "preference",
        [{"prompt": [U("a")], "chosen": [A("b")], "rejected": [A("c")]}],
    ),
    (
        {"chosen": "The sum is four", "rejected": "The sum is five"},
        "preference",
        [{"prompt": "The sum is", "chosen": " four", "rejected": " five"}],
    ),
    (
        {"question": "2000+2?", "answer": "so\n#### 2,002"},
        "completion",
        [{"prompt": [U("2000+2?")], "completion": [A("so\n#### 2,002")], "answer": "2002"}],
    ),
    (
        {"question": "2000+2?", "answer": "so\n#### 2,002"},
        "prompt",
        [{"prompt": [U("2000+2?")], "answer": "2002"}],
    ),
    (
        {"question": "Who?", "answer": "Me."},
        "completion",
        [{"prompt": [U("Who?")], "completion": [A("Me.")], "answer": "Me."}],
    ),
    ({"prompt": "2+2=", "response": "4"}, "completion", [GOOD]),
    ({"prompt": "2+2=", "completion": "4"}, "text", [{"text": "2+2=4"}]),
    ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, "completion", [GOOD]),
    (
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        "unpaired",
        [{**GOOD, "label": True}, {"prompt": "2+2=", "completion": "5", "label": False}],
    ),
    (
        {"messages": [U("a"), A("b")], "label": False},
        "unpaired",
        [{"prompt": [U("a")], "completion": [A("b")], "label": False}],
    ),
    (
        {"prompt": [U("a")], "completion": "b"},
        "completion",
        [{"prompt": [U("a")], "completion": [A("b")]}],
    ),
    (
        {"prompt": [U("a")], "completions": ["b", "c"], "scores": [1, 0.5]},
        "ranked",
        [{"prompt": [U("a")], "completions": [[A("b")], [A("c")]], "scores": [1, 0.5]}],
    ),
]


@pytest.mark.parametrize("case", range(len(SCHEMAS)))
def test_schemas(tmp_path, case):
    row, kind, expected = SCHEMAS[case]
    assert load_data(put(tmp_path, "a.jsonl", jsonl(row)), kind, "all") == expected


def test_the_same_rows_from_every_format(tmp_path):
    import pandas as pd

    rows = [{"prompt": f'é {i}, "quoted"\nline', "completion": str(i)} for i in range(5)]
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    put(tmp_path, "a.json", json.dumps(rows))
    put(tmp_path, "b.json", jsonl(*rows))
    put(tmp_path, "c.json", json.dumps({"version": 1, "data": rows}))
    put(tmp_path, "a.jsonl", "\ufeff" + jsonl(*rows).replace("\n", "\r\n"))
    put(tmp_path, "a.jsonl.gz", gzip.compress(jsonl(*rows).encode()))
    for file in sorted(tmp_path.iterdir()):
        found = load_data(str(file), "completion", "all")
        assert found == rows, file
        assert all(r.where.startswith(f"{file}:") for r in found), file


def test_text_files(tmp_path):
    cases = {
        "one\ntwo\n": [("one", 1), ("two", 2)],
        "a\nb\n\nc\n": [("a\nb\n\nc", 1)],
        "x" * 1500 + "\n\n" + "y" * 1500 + "\n\n\nz\n": [
            ("x" * 1500, 1),
            ("y" * 1500 + "\n\nz", 3),
        ],
        "a\n\nb<|endoftext|>\nc\n<|endoftext|>": [("a\n\nb", 1), ("c", 4)],
    }
    for content, expected in cases.items():
        rows = read_file(put(tmp_path, "a.txt", content))
        assert [(r["text"], int(r.where.rpartition(":")[2])) for r in rows] == expected


def test_skip_limit_and_split(tmp_path):
    path = put(
        tmp_path,
        "a.jsonl",
        jsonl(*({"prompt": f"{i}=", "completion": str(i) if i % 10 else ""} for i in range(200))),
    )
    assert len(load_data(path + "#skip", "completion", "all")) == 180
    assert len(load_data(path + "#50,skip", "completion", "all")) == 45
    train, test = (load_data(path + "#skip", "completion", s) for s in ("train", "test"))
    assert len(test) == 9
    assert not {r.where for r in train} & {r.where for r in test}
    assert len(train) == 171
    assert test == load_data(path + "#skip", "completion", "test")
    for n in (2, 3, 19, 20, 1000, 10_000):
        assert len(set(held_out(n))) == len(held_out(n)) == min(256, max(1, n // 20))
    assert held_out(1) == []
    pairs = put(
        tmp_path,
        "b.jsonl",
        jsonl(*({"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(40))),
    )
    train, test = (load_data(pairs, "unpaired", s) for s in ("train", "test"))
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert len(test) == 4  # a pair stays together
    with pytest.raises(WrongInput, match="no row is left"):
        load_data(
            put(tmp_path, "c.jsonl", jsonl({"prompt": "x", "completion": ""})) + "#skip",
            "completion",
        )


def test_tasks_are_data():
    for name, task in TASKS.items():
        for kind in task.kinds:
            rows = load_data(f"{name}#20", kind)
            assert len(rows) == 20
            assert all(set(KINDS[kind][0]) <= set(r) or "messages" in r for r in rows)
    asked = [
        json.dumps(r["prompt"])
        for s in ("train", "test")
        for r in load_data("sums#50", "prompt", s)
    ]
    assert not set(asked[:50]) & set(asked[50:])


def test_who_changes_rows_of_a_task_changes_only_their_own():
    kept, changed = load_data("chat", "completion"), load_data("chat", "completion")
    changed[0]["prompt"].append(dict(role="user", content="More?"))
    changed[0]["completion"][0]["content"] = "?"
    changed[1].where = "elsewhere"
    del changed[2:]
    assert load_data("chat", "completion") == kept
    assert [row.where for row in load_data("chat", "completion")[:2]] == [
        "chat (train):row 1",
        "chat (train):row 2",
    ]
    assert len(load_data("chat", "completion", "test")) == TEST_ROWS
    assert load_data("chat#3", "completion") == kept[:3]


def test_hub_data_from_the_cache(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub.constants as hub

    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "datasets--org--rows"
    snapshot = repo / "snapshots" / revision
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    for split, n in (("train", 30), ("test", 4)):
        (repo / "blobs" / split).write_text(
            jsonl(*({"prompt": f"{split} {i}", "completion": "x"} for i in range(n)))
        )
        (snapshot / f"{split}.jsonl").symlink_to(f"../../blobs/{split}")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    assert [len(load_data("org/rows", "completion", s)) for s in ("train", "test")] == [30, 4]
    assert load_data(str(snapshot), "completion", "test") == load_data(
        "org/rows", "completion", "test"
    )
    assert (
        len(load_data("org/rows#test", "completion")) == 3
    )  # a split of its own choice keeps a part of itself back
    with pytest.raises(WrongInput, match="no split 'tset'; did you mean 'test'"):
        load_data("org/rows#tset", "completion")
    with pytest.raises(WrongInput, match="'org/none'.*not to be had from the Hub"):
        load_data("org/none", "completion")


# Tokens

DIALOG = [U("say hello"), A("hello"), U("two and two"), A("four")]


def test_conversation_equals_transformers():
    tokenizer, unmarked = gpt2_style(), gpt2_style(NO_MARKS)
    theirs = tokenizer.apply_chat_template(
        DIALOG, return_dict=True, return_assistant_tokens_mask=True
    )
    for t in (tokenizer, unmarked):
        assert encode(t, {"messages": DIALOG}, "text", 99) == {
            "input_ids": theirs["input_ids"],
            "completion_mask": theirs["assistant_masks"],
        }
    prompt = encode(tokenizer, {"prompt": DIALOG[:3]}, "prompt", 99)["input_ids"]
    assert (
        prompt == tokenizer.apply_chat_template(DIALOG[:3], add_generation_prompt=True)["input_ids"]
    )
    last = encode(tokenizer, {"prompt": DIALOG[:3], "completion": DIALOG[3:]}, "completion", 99)
    assert last["input_ids"] == theirs["input_ids"]
    assert last["completion_mask"] == [
        int(t >= len(prompt)) for t in range(len(theirs["input_ids"]))
    ]
    everything = encode(tokenizer, {"messages": DIALOG}, "text", 99, completion_only=False)
    assert everything["completion_mask"] == [0] + [1] * (len(theirs["input_ids"]) - 1)


def random_text(words: list[str], rng: random.Random) -> str:
    "One to five words, each with or without a space after it."
    return "".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randint(1, 5)))


@pytest.mark.parametrize("make", [gpt2_style, llama_style])
def test_the_prompt_is_the_beginning(make):
    tokenizer = make()
    rng = random.Random(0)
    words = "two and is four ( (( ))) what hello , ;".split(" ")
    together = 0
    for _ in range(200):
        prompt, completion = random_text(words, rng), random_text(words, rng)
        if not prompt.strip() or not completion.strip():
            continue
        asked = encode(tokenizer, {"prompt": prompt}, "prompt", 99)["input_ids"]
        out = encode(tokenizer, {"prompt": prompt, "completion": completion}, "completion", 99)
        ids, mask = out["input_ids"], out["completion_mask"]
        assert asked == tokenizer(prompt).input_ids == ids[: len(asked)]
        assert mask == [0] * len(asked) + [1] * (len(ids) - len(asked))
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1
        if make is gpt2_style:
            assert tokenizer.decode(ids[:-1]) == prompt + completion
        together += ids[:-1] == tokenizer(prompt + completion).input_ids
    assert together > 100


def test_cut_rows():
    tokenizer = gpt2_style()
    row = Row({"prompt": "two and two is", "completion": " four" * 30}, "a.jsonl:7")
    whole = encode(tokenizer, row, "completion", 999)
    for length in (6, 10, 20):
        cut = encode(tokenizer, row, "completion", length)
        assert cut == {key: whole[key][:length] for key in whole}  # without EOS: the answer goes on
    with pytest.raises(WrongInput, match="a.jsonl:7: prompt has 5 tokens.*max_length = 5"):
        encode(tokenizer, row, "completion", 5)
    with pytest.raises(
        WrongInput, match="a.jsonl:7: prompt has 5 tokens; expected at most max_length = 4"
    ):
        encode(tokenizer, row, "prompt", 4)
    with pytest.raises(WrongInput, match="a.jsonl:8: no token of an assistant turn"):
        encode(tokenizer, Row({"messages": DIALOG}, "a.jsonl:8"), "text", 6)
    with pytest.raises(WrongInput, match="a.jsonl:8: a conversation.*no chat template"):
        encode(gpt2_style(None), Row({"messages": DIALOG}, "a.jsonl:8"), "text", 60)
    with pytest.raises(WrongInput, match="a.jsonl:9: the chat template refuses.*no system turn"):
        encode(
            gpt2_style(STRICT),
            Row({"messages": [{"role": "system", "content": "x"}, *DIALOG]}, "a.jsonl:9"),
            "text",
            60,
        )
    rows = [row, Row({"prompt": "two " * 50, "completion": "two"}, "a.jsonl:8", skip=True)]
    assert len(encode_rows(tokenizer, rows, "completion", 20)) == 1
    rows[1].skip = False
    with pytest.raises(WrongInput, match="a.jsonl:8"):
        encode_rows(tokenizer, rows, "completion", 20)


def test_every_kind_encodes():
    tokenizer = gpt2_style()
    pair = encode(
        tokenizer, {"prompt": "two is", "chosen": " two", "rejected": " four"}, "preference", 50
    )
    assert {side: tokenizer.decode(pair[side]["input_ids"]) for side in pair} == {
        "chosen": "two is two<|im_end|>",
        "rejected": "two is four<|im_end|>",
    }
    one = encode(
        tokenizer, {"prompt": "two is", "completion": " two", "label": True}, "unpaired", 50
    )
    assert one == {**pair["chosen"], "label": True}
    many = encode(
        tokenizer,
        {"prompt": "two is", "completions": [" two", " four"], "scores": [1, 0]},
        "ranked",
        50,
    )
    assert many == {"completions": [pair["chosen"], pair["rejected"]], "scores": [1, 0]}
    steps = encode(
        tokenizer,
        {"prompt": "two\n", "completions": ["is", "four"], "labels": [True, False]},
        "stepwise",
        50,
    )
    marked = [i for i, m in enumerate(steps["completion_mask"]) if m]
    assert [tokenizer.decode(steps["input_ids"][: i + 1]) for i in marked] == [
        "two\nis\n",
        "two\nis\nfour\n",
    ]
    assert steps["labels"] == [True, False]
    text = encode(tokenizer, {"text": "two is"}, "text", 50)
    assert tokenizer.decode(text["input_ids"]) == "two is<|im_end|>"
    assert text["completion_mask"] == [0] + [1] * (len(text["input_ids"]) - 1)


def test_a_row_of_a_megabyte(tmp_path):
    tokenizer = gpt2_style()
    long = "".join(f"the answer is {i} " for i in range(60_000))
    assert len(long) > 2**20
    whole = tokenizer(long, verbose=False).input_ids
    path = put(
        tmp_path,
        "a.jsonl",
        jsonl(
            {"prompt": "what is two?", "completion": long}, {"prompt": long, "completion": "two"}
        ),
    )
    rows = load_data(path, "completion", "all")
    assert encode(tokenizer, {"text": long}, "text", 256)["input_ids"] == whole[:256]
    assert len(encode(tokenizer, rows[0], "completion", 256)["input_ids"]) == 256
    with pytest.raises(WrongInput, match="a.jsonl:2: prompt has more than 256 tokens"):
        encode(tokenizer, rows[1], "completion", 256)
    said = [U("what is two?"), A(long)]
    for t in (tokenizer, gpt2_style(NO_MARKS)):
        assert sum(encode(t, {"messages": said}, "text", 256)["completion_mask"]) > 200


# Batches


def small(config, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, vocab_size=330, **more)
    ).double()


MODELS = {
    "llama": lambda: small(LlamaConfig, intermediate_size=64, num_key_value_heads=2),
    "qwen2": lambda: small(Qwen2Config, intermediate_size=64, num_key_value_heads=2),
    "gpt2": lambda: small(
        GPT2Config,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
}


def summed_loss(model, batch):
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch.get("position_ids"),
        use_cache=False,
    ).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
    )
    loss = (loss * batch["completion_mask"][:, 1:]).sum()
    return loss.item(), torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
    )


def made_examples(n=24, seed=0):
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        length = rng.randint(2, 40)
        mask = [0] + [rng.randint(0, 1) for _ in range(length - 2)] + [1]
        out.append(
            {"input_ids": [rng.randrange(3, 330) for _ in range(length)], "completion_mask": mask}
        )
    return out


@pytest.mark.parametrize("name", MODELS)
def test_packing_and_microbatches_change_no_loss(name):
    model, examples = MODELS[name](), made_examples()
    check_packing(model)
    loss, gradient = summed_loss(model, collate(examples, 0))
    packed = collate(examples, 0, pack=48)
    assert packed["input_ids"].shape[0] < len(examples)
    assert packed["attention_mask"] is None
    assert packed["completion_mask"].sum() == sum(sum(e["completion_mask"]) for e in examples)
    packed_loss, packed_gradient = summed_loss(model, packed)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-9, atol=1e-12)
    parts = [summed_loss(model, collate(part, 0)) for part in microbatches(examples, 5)]
    assert packed_loss == pytest.approx(loss, rel=1e-12)
    assert sum(p[0] for p in parts) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(sum(p[1] for p in parts), gradient, rtol=1e-9, atol=1e-12)


def test_packing_is_refused_where_examples_mix():
    from transformers import BloomConfig, OPTConfig

    torch.manual_seed(0)
    for config in (
        BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=330),
        OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=330,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            dropout=0.0,
        ),
    ):
        with pytest.raises(WrongInput, match="mixes the examples"):
            check_packing(AutoModelForCausalLM.from_config(config))


def test_pack_rows():
    rng = random.Random(1)
    for _ in range(50):
        lengths = [rng.randint(1, 64) for _ in range(rng.randint(1, 60))]
        rows = pack_rows(lengths, 64)
        assert sorted(sum(rows, [])) == list(range(len(lengths)))
        for row in rows:
            assert sum(lengths[i] for i in row) <= 64
        assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) * 1.5 + 1
    assert pack_rows([5, 3, 2, 5, 5], 10) == [[0, 3], [4, 1, 2]]
    with pytest.raises(WrongInput, match="65 tokens does not fit rows of 64"):
        pack_rows([65], 64)


def test_microbatches_group_lengths():
    examples = made_examples(50)
    parts = microbatches(examples, 8)
    assert [len(p) for p in parts] == [8] * 6 + [2]
    assert sorted(map(id, sum(parts, []))) == sorted(map(id, examples))
    assert (
        sum(collate(p, 0)["input_ids"].numel() for p in parts)
        < 0.7 * collate(examples, 0)["input_ids"].numel()
    )


def test_padding_is_right_and_masked():
    batch = collate(
        [
            {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]},
            {"input_ids": [8], "completion_mask": [0]},
        ],
        pad_id=9,
    )
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "completion_mask": [[0, 1, 1], [0, 0, 0]],
    }


@pytest.mark.parametrize(
    "n, rows, seed", [(10, 4, 0), (7, 7, 1), (3, 8, 2), (1, 4, 3), (1000, 16, 4)]
)
def test_order(n, rows, seed):
    order = Order(n, rows, seed)
    steps = [order.rows(step) for step in range(2 * n)]
    flat = sum(steps, [])
    for epoch in range(len(flat) // n):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))
    late = Order(n, rows, seed)  # asked for in another order: the same answer
    assert all(late.rows(step) == steps[step] for step in reversed(range(2 * n)))
    assert n < 5 or Order(n, rows, seed + 1).rows(0) != steps[0]


def test_data_imports_without_torch():
    import subprocess
    import sys

    code = (
        "import sys, polm_lab.data.load, polm_lab.data.encode; print([m for m in ('torch', "
        "'transformers', 'datasets', 'pandas', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_a_hundred_thousand_rows(tmp_path):
    path = put(
        tmp_path,
        "a.jsonl",
        jsonl(
            *(
                {"instruction": f"What is {i} plus {i}?", "input": "", "output": f"It is {2 * i}."}
                for i in range(100_000)
            )
        ),
    )
    rows = load_data(path, "completion")
    assert len(rows) == 100_000 - 256
    assert Counter(map(len, rows)) == {2: len(rows)}
    assert rows[-1].where == f"{path}:100000"


def test_what_was_encoded_is_remembered_and_nothing_else_is(monkeypatch):
    from polm_lab.data import encode as module

    monkeypatch.setattr(module, "ENCODED", module.Encoded(2**20))
    row = load_data("chat", "preference")[0]
    calls = []
    plain = module._encoded
    monkeypatch.setattr(module, "_encoded", lambda *a: calls.append(a) or plain(*a))
    tokenizer = load_tokenizer("tiny")
    first = encode(tokenizer, row, "preference", 128)
    first["chosen"]["input_ids"].append(0)  # what a caller does with it changes nothing
    assert encode(load_tokenizer("tiny"), dict(row), "preference", 128) != first
    assert len(calls) == 1
    other = load_tokenizer("tiny")
    other.chat_template = other.chat_template.replace("\n", "\n\n") + " "
    changed = [
        (tokenizer, row, "preference", 127, True),
        (tokenizer, row, "preference", 128, False),
        (tokenizer, row | {"chosen": row["rejected"]}, "preference", 128, True),
        (other, row, "preference", 128, True),
    ]
    longer = load_tokenizer("tiny")
    longer.add_tokens(["wordthatnobodyuses"])
    changed.append((longer, row, "preference", 128, True))
    ended = load_tokenizer("tiny")
    ended.eos_token = ended.convert_ids_to_tokens(5)
    changed.append((ended, row, "preference", 128, True))
    for number, one in enumerate(changed, 2):
        encode(*one)
        assert len(calls) == number
    with pytest.raises(WrongInput):
        encode(tokenizer, row, "preference", 2)
    with pytest.raises(WrongInput):
        encode(tokenizer, row, "preference", 2)
    small = module.Encoded(5000)
    monkeypatch.setattr(module, "ENCODED", small)
    for length in range(100, 120):
        encode(tokenizer, row, "preference", length)
        assert small.size == sum(map(len, small.rows.values())) <= 5000
    assert 1 <= len(small.rows) < 20
    dated = load_tokenizer("tiny")
    dated.chat_template += "{# strftime_now #}"
    before = len(calls)
    for _ in range(2):
        encode(dated, row, "preference", 128)
    assert len(calls) == before + 2
