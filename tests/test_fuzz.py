"""Every reader of a user's file, on a thousand damaged files.

The result is rows, or `WrongInput` of one line, and never anything else.
"""

import csv
import functools
import gzip
import io
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from polm_lab.rewards.judges import read_constitution
from polm_lab.cli import _values
from polm_lab.data.rows import KINDS
from polm_lab.data.schema import check_row as _check, convert, normalize_schema
from polm_lab.data.files import read_file
from polm_lab.core.knobs import WrongInput
from polm_lab.models.sources import read_config as _config, find_weight_files as _weight_files
from polm_lab.models.tokenizers import _set_template
from polm_lab.core.run import Run
from polm_lab.models.weights import read_header
from polm_lab.integration.retrieval.documents import load_documents
from polm_lab.integration.merging.vocabulary import vocabulary
from polm_lab.reasoning.refine.tools import read_passages

FILES = 1000  # of each reader

ROWS = [
    {
        "prompt": f"What is {i} plus {i}?",
        "completion": f"It is {2 * i}, «é», 加.",
        "label": i % 2 == 0,
        "messages": [
            {"role": "user", "content": "hi\nthere"},
            {"role": "assistant", "content": "yes"},
        ],
        "completions": ["one", "two"],
        "scores": [1.0, 2.5],
        "labels": [True, False],
        "answer": str(i),
        "subject": "plus",
        "target": f" {2 * i}",
        "paraphrases": ["And?", "«é»?"],
        "neighbours": [{"prompt": "1+1=", "target": "2"}],
        "others": [],
    }
    for i in range(4)
]

# Values in users' files where something else was expected.
STRANGE = (
    None,
    True,
    -1,
    0.5,
    float("nan"),
    10**30,
    "",
    " ",
    "\n",
    "\r",
    "\0",
    "\ud800",
    "\u2028",
    "text",
    [],
    {},
    [[]],
    [None],
    [{}],
    {"role": None},
    {"from": 1, "value": []},
    [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": ["user"], "content": "x"}],
    [{"role": "assistant", "content": None, "tool_calls": "x"}],
    {"text": "a", "answer_start": 0},
    [{"role": "user", "content": "a\x1b[2Jb"}],
    "\n\nHuman: a\n\nAssistant: b",
)
NAMES = (
    "",
    " ",
    "a\nb",
    "\ud800",
    "chosen",
    "rejected",
    "instruction",
    "question",
    "input",
    "output",
    "system",
    "test_list",
    "code",
    "text",
    "messages",
    "images",
    "paragraphs",
    "answers",
    "tools",
)


def change(value, rng: random.Random, depth: int = 0):
    """Copy JSON with one place changed.

    It gets another value or another name, or a part is left out or doubled.
    """
    if isinstance(value, dict) and value and (depth < 1 or rng.random() < 0.7):
        name = rng.choice(list(value))
        how = rng.randrange(4)
        if how == 0:
            return {k: v for k, v in value.items() if k != name}
        if how == 1:
            return {(rng.choice(NAMES) if k == name else k): v for k, v in value.items()}
        return {k: change(v, rng, depth + 1) if k == name else v for k, v in value.items()}
    if isinstance(value, list) and value and (depth < 1 or rng.random() < 0.7):
        place = rng.randrange(len(value))
        if rng.random() < 0.1:
            return value[:place] + value[place + 1 :]
        return [change(v, rng, depth + 1) if i == place else v for i, v in enumerate(value)]
    return rng.choice(STRANGE)


def damage(raw: bytes, rng: random.Random) -> bytes:
    "Bytes as a bad disk, a broken download or a wrong program leave them."
    out = bytearray(raw)
    start, stop = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    how = rng.randrange(8)
    if how == 0:  # flipped bits
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif how == 1:  # cut off
        del out[start:]
    elif how == 2:  # a hole
        del out[start:stop]
    elif how == 3:  # a block of another file
        out[start:stop] = rng.randbytes(min(stop - start, 64))
    elif how == 4:  # a block that was never written
        out[start:stop] = bytes(stop - start)
    elif how == 5:  # a block twice
        out[start:start] = out[start:stop]
    elif how == 6:  # the end, where formats keep their directory
        for _ in range(4):
            out[-rng.randrange(1, min(200, len(out)) + 1)] = rng.randrange(256)
    else:  # another encoding
        out = bytearray(
            raw.decode("utf-8", "replace").encode(
                rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "utf-7")),
                "replace",
            )
        )
    return bytes(out)


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()


def table(rows, delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    for row in [list(ROWS[0])] + [
        list(row.values()) if isinstance(row, dict) else [row] for row in rows
    ]:
        writer.writerow([json.dumps(v) if isinstance(v, (list, dict)) else v for v in row])
    return text.getvalue().encode("utf-8", "surrogatepass")


@functools.cache
def parquet(compression: str, checksums: bool, pages: int) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS * 3),
        out,
        row_group_size=5,
        compression=compression,
        write_page_checksum=checksums,
        data_page_size=pages,
        version="2.6",
    )
    return out.getvalue()


def strange_parquet(rows) -> bytes:
    "Rows as a table, where Arrow takes them."
    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)] or ROWS), out
        )
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
        return parquet("snappy", False, 100)
    return out.getvalue()


def article(rng):
    return {
        "data": [
            {
                "title": "t",
                "paragraphs": [
                    {
                        "context": "c",
                        "qas": [
                            {
                                "id": "1",
                                "question": "q?",
                                "answers": [{"text": "a", "answer_start": 0}],
                            }
                        ],
                    }
                ],
            }
        ]
    }


def one_of(*makers):
    return lambda rng: rng.choice(makers)(rng)


def changed(write):
    return lambda rng: write(change(ROWS, rng))


TEXT = ("One line, «é».\nAnother.\n\nA paragraph.\n\n\nMore | less\n" * 6).encode()
PAGE = (
    b"<html><head><title>T</title></head><body><p>one <b>two</p>"
    b"<table><tr><td>a</td></tr></table></body></html>"
)
CONFIG = json.dumps(
    {"model_type": "llama", "vocab_size": 12, "hidden_size": 8, "layers": [1, 2]}
).encode()
TOKENS = json.dumps(
    {
        "model": {"type": "BPE", "vocab": {"a": 0, "é": 1}, "merges": ["a é"]},
        "added_tokens": [{"id": 2, "content": "<s>"}],
    }
).encode()
KNOBS = (
    b"steps: 3\nlearning_rate: 1e-4\ndata: sums\nadapter: 'lora:r=8'\n"
    b"# a note\nschedule: {a: [1, 2]}\n"
)
RUN = json.dumps(
    {"id": "x", "method": "sft", "settings": {"steps": 2}, "status": "finished", "summary": {}}
).encode()


def weights(rng) -> bytes:
    header = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
        "__metadata__": {"format": "pt"},
    }
    words = json.dumps(change(header, rng) if rng.random() < 0.5 else header).encode()
    return len(words).to_bytes(8, "little") + words + bytes(22)


def settings_of(path):
    return _values((), path)


def rows_of(path):
    "The rows of a file, and what becomes of them as each kind."
    rows = read_file(path)
    for kind in KINDS:  # what `load_data` does with them
        for row in rows:
            try:
                for one in convert(normalize_schema(row), kind):
                    _check(one, kind)
            except WrongInput as wrong:
                assert_one_line(wrong)


class Tokenizer:
    "As much of one as `_set_template` needs."

    bos_token_id = None


# reader: (file name, whole files of it, the reader)
READERS = {
    "jsonl": ("d.jsonl", one_of(lambda rng: lines(ROWS), changed(lines)), rows_of),
    "json": (
        "d.json",
        one_of(
            lambda rng: json.dumps(ROWS, indent=1).encode(),
            changed(lambda rows: json.dumps(rows).encode()),
        ),
        rows_of,
    ),
    "squad": ("d.json", lambda rng: json.dumps(change(article(rng), rng)).encode(), rows_of),
    "csv": (
        "d.csv",
        one_of(lambda rng: table(ROWS, ","), changed(lambda rows: table(rows, ","))),
        rows_of,
    ),
    "tsv": (
        "d.tsv",
        one_of(lambda rng: table(ROWS, "\t"), changed(lambda rows: table(rows, "\t"))),
        rows_of,
    ),
    "txt": (
        "d.txt",
        one_of(lambda rng: TEXT, lambda rng: TEXT.replace(b"Another", b"<|endoftext|>")),
        rows_of,
    ),
    "parquet": (
        "d.parquet",
        one_of(
            lambda rng: parquet(
                rng.choice(("none", "snappy", "gzip", "zstd", "lz4", "brotli")),
                rng.random() < 0.5,
                rng.choice((40, 1 << 20)),
            ),
            changed(strange_parquet),
        ),
        rows_of,
    ),
    "jsonl.gz": ("d.jsonl.gz", lambda rng: gzip.compress(lines(ROWS), 1, mtime=0), rows_of),
    "parquet.gz": (
        "d.parquet.gz",
        lambda rng: gzip.compress(parquet("snappy", False, 100), 1, mtime=0),
        rows_of,
    ),
    "documents of text": ("d.md", lambda rng: TEXT, load_documents),
    "documents of HTML": ("d.html", lambda rng: PAGE, load_documents),
    "documents of rows": (
        "d.jsonl",
        lambda rng: lines(change([{"text": "one", "id": i} for i in range(3)], rng)),
        load_documents,
    ),
    "configuration": (
        "config.json",
        one_of(
            lambda rng: CONFIG, lambda rng: json.dumps(change(json.loads(CONFIG), rng)).encode()
        ),
        lambda path: _config(path.parent),
    ),
    "weights, streamed": ("model.safetensors", weights, read_header),
    "weights, loaded": ("model.safetensors", weights, lambda path: _weight_files(path.parent)),
    "shards": (
        "model.safetensors.index.json",
        lambda rng: json.dumps(change({"weight_map": {"a": "x", "b": "y"}}, rng)).encode(),
        lambda path: _weight_files(path.parent),
    ),
    "vocabulary": (
        "tokenizer.json",
        one_of(
            lambda rng: TOKENS, lambda rng: json.dumps(change(json.loads(TOKENS), rng)).encode()
        ),
        lambda path: vocabulary(path.parent),
    ),
    "template": (
        "t.jinja",
        lambda rng: "{{ bos_token }}{% for m in messages %}«{{ m.content }}»{% endfor %}".encode(),
        lambda path: _set_template(Tokenizer(), str(path)),
    ),
    "knobs": ("k.yaml", lambda rng: KNOBS, settings_of),
    "run": (
        "run.json",
        one_of(lambda rng: RUN, lambda rng: json.dumps(change(json.loads(RUN), rng)).encode()),
        lambda path: Run(path.parent).settings,
    ),
    "constitution": ("c.txt", lambda rng: TEXT, lambda path: read_constitution(str(path))),
    "passages": ("p.txt", lambda rng: TEXT, lambda path: read_passages(str(path))),
}


def assert_one_line(wrong: WrongInput):
    text = str(wrong)
    assert text, repr(text)
    assert len(text.splitlines()) == 1, repr(text)
    assert len(text) < 2000, repr(text)
    text.encode("utf-8")  # any terminal can show it


@pytest.mark.parametrize("name", READERS)
def test_a_thousand_files(name, tmp_path):
    file, make, read = READERS[name]
    rng, path, seen = random.Random(f"fuzz {name}"), tmp_path / file, {"read": 0, "refused": 0}
    for number in range(FILES):
        raw = make(rng)
        if rng.random() < 0.6:
            raw = damage(raw, rng)
        path.unlink(
            missing_ok=True
        )  # to write over a file makes some file systems wait for the disk
        path.write_bytes(raw)
        try:
            read(path)
            seen["read"] += 1
        except WrongInput as wrong:
            assert_one_line(wrong)
            assert str(path.parent) in str(wrong), f"it names the place: {wrong}"
            seen["refused"] += 1
        except BaseException as error:
            pytest.fail(f"file {number} of {name}: {type(error).__name__}: {error}; {raw[:300]!r}")
    assert seen["read"] + seen["refused"] == FILES, seen
    assert seen["refused"] > 20, seen
