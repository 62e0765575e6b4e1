"""The input of somebody on the first day.

The cases are words of the command line, files under other encodings and names, a locale of C, and
numbers in other spellings.
"""

import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from conftest import POLM

from polm_lab.cli import polm
from polm_lab.data.files import read_file, read_text
from polm_lab.training.evaluate import last_number, matches
from polm_lab.core.knobs import WrongInput, nearest
from polm_lab.integration.retrieval.documents import load_documents
from polm_lab.rewards.functions import parse_rewards

# Words

ONE_WORD = "polm: -p steps=2: name and value as one word; expected two; write a space: -p steps 2"
WORDS = {
    "run sft -p steps=2": ONE_WORD,
    "run sft -p steps=2 -p data=sums": ONE_WORD,
    "run sft -p steps=2 --bare": ONE_WORD,
    "sweep sft -g learning_rate=1e-3,1e-4": (
        "polm: -g learning_rate=1e-3,1e-4: name and value as one word; expected two; write a "
        "space: -g learning_rate 1e-3,1e-4"
    ),
    "run sft steps=2": "polm: steps=2: knobs are set with -p; write -p steps 2",
    "run sft --steps 2": "polm: --steps: knobs are set with -p; write -p steps 2",
    "run sft --learning-rate=0.1": (
        "polm: --learning-rate=0.1: knobs are set with -p; write -p learning_rate 0.1"
    ),
    "sweep sft --steps 2,3": "polm: --steps: knobs are set with -g; write -g steps 2,3",
    "run sft -p steps": (
        "polm: Option '-p' requires 2 arguments; expected a knob and its value, such as -p steps "
        "20; `polm --help` tells more"
    ),
    "run": "polm: Missing argument 'METHOD'; `polm run --help` tells how it is called",
    "runn": (
        "polm: No such command 'runn'. (Did you mean one of: 'run', 'runs'?); `polm --help` tells "
        "how it is called"
    ),
}


@pytest.mark.parametrize("words", WORDS)
def test_words_of_the_command_line(words, capsys):
    assert polm.main(args=words.split()) == 2
    assert capsys.readouterr().err == WORDS[words] + "\n"


def test_a_value_may_hold_an_equals_sign(capsys):
    assert (
        polm.main(args=["run", "sft", "-p", "adapter", "lora:r=x", "-p", "steps", "0", "--bare"])
        == 2
    )
    assert "adapter 'lora:r=x': r = 'x'; expected int" in capsys.readouterr().err


def test_names_in_capitals():
    assert nearest("SFT", ["dpo", "sft"]) == "did you mean 'sft'? known: dpo, sft"


def test_a_name_that_is_not_utf8(capsys):
    name = os.fsdecode(b"d\xe9.jsonl")
    assert polm.main(args=["run", "sft", "--bare", "-p", "data", name]) == 2
    assert capsys.readouterr().err == (
        "polm: d\\udce9.jsonl: its bytes are not UTF-8; expected UTF-8, which records are "
        "written in; rename the file or folder\n"
    )


@pytest.mark.parametrize("content", ["steps: 2026-13-45\n", "{" * 5000, "? [a]\n: 1\n"])
def test_knobs_that_yaml_cannot_read(content, tmp_path, capsys):
    (tmp_path / "k.yaml").write_text(content)
    assert polm.main(args=["run", "sft", "-f", str(tmp_path / "k.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"polm: {tmp_path / 'k.yaml'}: cannot be read as YAML"), lines


C = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")


def test_a_locale_of_c_and_names_with_accents(tmp_path):
    "The data, the folder of runs and what is printed all hold letters that ASCII lacks."
    data, out = tmp_path / "dätä.jsonl", tmp_path / "läufe"
    data.write_text('{"prompt": "é=", "completion": "加"}\n' * 20, encoding="utf-8")
    command = [
        POLM,
        "run",
        "sft",
        "--bare",
        "--out",
        out,
        "-p",
        "data",
        data,
        "-p",
        "steps",
        "0",
        "-p",
        "eval_rows",
        "1",
    ]
    done = subprocess.run(
        command, capture_output=True, timeout=300, env={**os.environ, **C, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    record = json.loads(next(out.glob("*/run.json")).read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert record["settings"]["data"] == str(data)
    assert f"record:    {out}/" in done.stdout.decode()


@pytest.mark.parametrize(
    "more", [{}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin1"}]
)
def test_a_message_that_the_terminal_cannot_show(more):
    "It is escaped where it has to be."
    missing = subprocess.run(
        [POLM, "show", "dö加"], capture_output=True, timeout=300, env={**os.environ, **C, **more}
    )
    line = missing.stderr.decode("latin1" if "latin1" in more.values() else "utf-8").strip()
    assert missing.returncode == 2
    assert line.startswith("polm: ")
    assert len(line.splitlines()) == 1
    assert "no such run" in line
    assert ("dö\\u52a0" if "latin1" in more.values() else "dö加") in line, line


# Files

ROWS = '{"prompt": "1+1=", "completion": "zwei é"}\n' * 3


@pytest.mark.parametrize(
    "codec, named",
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32", "UTF-32"),
        ("utf-32-le", "UTF-32LE"),
        ("utf-32-be", "UTF-32BE"),
    ],
)
@pytest.mark.parametrize(
    "name, text",
    [
        ("a.jsonl", ROWS),
        ("a.csv", "prompt,completion\n1,2\n"),
        ("a.txt", "Ein Wort.\n"),
        ("a.md", "加 b\n" * 9),
        ("a.jsonl.gz", ROWS),
    ],
)
def test_text_in_16_or_32_bits_is_named(codec, named, name, text, tmp_path):
    raw = text.encode(codec)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    read = load_documents if name.endswith(".md") else read_file
    with pytest.raises(WrongInput) as wrong:
        read(tmp_path / name)
    expected = (
        f"{tmp_path / name}: text in {named}; expected UTF-8; convert it with iconv -f {named} -t "
        "UTF-8, or save it as UTF-8 where it was written"
    )
    assert str(wrong.value) == expected
    if not name.endswith(".gz"):  # the command does what it says
        done = subprocess.run(
            ["iconv", "-f", named, "-t", "UTF-8", tmp_path / name], capture_output=True, check=True
        )
        assert done.stdout.decode("utf-8-sig") == text


def test_text_of_8_bits_is_read(tmp_path):
    for text in ("é\n", "加\n" * 99, "", "\ufeffa\n", "a"):
        (tmp_path / "a.txt").write_bytes(text.encode())
        assert read_text(tmp_path / "a.txt") == text.removeprefix("\ufeff")


OTHERS = {
    "gzip": (
        gzip.compress(b"{}\n"),
        "d.jsonl",
        "a gzip file; expected text under this name; give it the ending .gz",
    ),
    "a spreadsheet": (
        b"PK\x03\x04" + bytes(50),
        "d.csv",
        "a zip archive, such as a spreadsheet or a document; expected text under this name; "
        "unpack it, or save its table as .csv",
    ),
    "parquet as lines": (
        b"PAR1\x15\x04",
        "d.jsonl",
        "a parquet file; expected text under this name; give it the ending .parquet",
    ),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
        "d.parquet",
        "a Git LFS pointer to a file that was not fetched; expected a parquet file under this name; "
        "fetch it with git lfs pull",
    ),
    "a web page": (
        b"<!DOCTYPE html><html>404</html>",
        "d.jsonl",
        "an HTML page, such as the error page of a failed download; expected rows under this "
        "name; download the file again",
    ),
    "a web page as parquet": (
        b"<html>404</html>",
        "d.parquet",
        "an HTML page, such as the error page of a failed download; expected a parquet file under "
        "this name; download the file again",
    ),
    "a PDF": (
        b"%PDF-1.7\n\xe2\xe3\n",
        "d.txt",
        "a PDF; expected text under this name; take the text out of it first",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_file_under_another_name(case, tmp_path):
    content, name, expected = OTHERS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WrongInput) as wrong:
        read_file(tmp_path / name)
    assert str(wrong.value) == f"{tmp_path / name}: {expected}"


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path):
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a long text that is not packed"] * 3}),
        path,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    assert read_file(path)[0] == {"text": "a long text that is not packed"}
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"long")] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(WrongInput, match="damaged parquet file .*CRC"):
        read_file(path)


def test_parquet_with_a_column_twice(tmp_path):
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays(
            [pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]
        ),
        path,
    )
    with pytest.raises(WrongInput) as wrong:
        read_file(path)
    assert str(wrong.value) == (
        f"{path}: columns ['text', 'text']; expected a name for each column, each once; rename them"
    )


# Rewards and answers


def test_a_reward_called_nan(tmp_path):
    run = tmp_path / "x:nan"
    run.mkdir()
    assert parse_rewards("mine.py:nan") == [("mine.py:nan", 1.0)]
    assert parse_rewards("my.module:inf, correct:0.5") == [("my.module:inf", 1.0), ("correct", 0.5)]
    assert parse_rewards("mine.py:nan:0.5,model:nan:2") == [
        ("mine.py:nan", 0.5),
        ("model:nan", 2.0),
    ]
    assert parse_rewards(f"model:{run}") == [(f"model:{run}", 1.0)]
    for spec in ("correct:nan", "mine.py:f:inf", "correct:1e999", "mine.py:f:-inf"):
        with pytest.raises(WrongInput, match="expected name or name:weight"):
            parse_rewards(spec)


NUMBERS = {
    "so 1,250.0 in all": "1250",
    ".5": "0.5",
    "0.50": "0.5",
    "x=-.50": "-0.5",
    "5-3": "3",
    "3-8=-5": "-5",
    "答案是-5": "-5",
    "−5": "-5",
    "1e3": "1000",
    "1.5e-3": "0.0015",
    "0,5": "0.5",
    "3,4": "3.4",
    "1,2,3": "3",
    "1,00,000": "100000",
    "007": "7",
    "-0": "0",
    "50%": "50",
    "$1,000.": "1000",
    "5, and": "5",
    "(-5)": "-5",
    "1,234.50": "1234.5",
    "+7": "7",
    "10": "10",
    "100": "100",
    "12345678901234567890123456789012345": "12345678901234567890123456789012345",
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_have_one_spelling(text):
    assert last_number(text) == NUMBERS[text]


def test_a_text_without_a_number():
    assert last_number("no ... -") is None


@pytest.mark.parametrize(
    "answer, text, right",
    [
        (".5", "it is 0.5", 1),
        ("0.5", ".5", 1),
        (0.5, "= .50", 1),
        ("1,000", "1000", 1),
        ("1000", "1,000.00", 1),
        ("50%", "so 50 %", 1),
        ("50%", "50", 1),
        ("50%", "0.5", 0),
        ("0.5", "50%", 0),
        ("$5", "5 dollars", 1),
        ("5", "0,5", 0),
        ("3,4", "4", 0),
        (1e-05, "0.00001", 1),
        ("5.", "5", 1),
        ("-5", "5", 0),
        ("5", "10-5", 1),
        ("blue", "Blue.", 1),
        ("5 apples", "5", 0),
        ("1/2", "2", 0),
        ("1/2", "1/2", 1),
    ],
)
def test_answers_are_compared_as_numbers(answer, text, right):
    assert matches({"answer": answer}, text) == right


# A busy machine


@pytest.mark.parametrize("own", [None, "7"])
def test_threads_that_wait_go_to_sleep_soon_unless_the_user_says_otherwise(own):
    "The import sets it before torch is loaded, for this process and for those that it starts."
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    env |= {"GOMP_SPINCOUNT": own} if own else {}
    code = "import sys, os, polm_lab; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    seen = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert seen.stdout.split() == [own or "1000", "False"], seen.stderr
