"""A preview of data shows what training learns, for ten chat templates, kinds of rows and cuts."""

import json
from pathlib import Path

import pytest
import torch
import trl
from click.testing import CliRunner

import polm_lab as lab
from polm_lab.cli import polm
from polm_lab.core.knobs import WrongInput
from polm_lab.models.policy import Policy
from polm_lab.models.preview import preview

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TEN = (
    "cohere",
    "deepseekv3",
    "gemma",
    "glm4moe",
    "lfm2_v2",
    "idefics3",
    "llama3",
    "phi3",
    "qwen2_5",
    "qwen3",
)


def conversation(n: int, turns: int = 1) -> list[dict]:
    "Messages about a sum, in which the last answer is that of the assistant."
    found = []
    for turn in range(turns):
        a, b = n + turn, 2 * n + 1
        found += [dict(role="user", content=f"What is {a}+{b}? Überlege."), None]
        found[-1] = dict(role="assistant", content=f"{a}+{b}={a + b} ✓")
    return found


def pair(n: int) -> dict:
    turns = conversation(n)
    wrong = [dict(role="assistant", content=f"I do not know number {n}.")]
    return dict(prompt=turns[:1], chosen=turns[1:], rejected=wrong)


KINDS = {  # kind -> method, knobs, rows
    "text": (
        "sft",
        dict(completion_only=True),
        [dict(messages=conversation(n, 2)) for n in range(9)],
    ),
    "completion": (
        "sft",
        {},
        [dict(prompt=(c := conversation(n))[:1], completion=c[1:]) for n in range(9)],
    ),
    "preference": ("dpo", {}, [pair(n) for n in range(9)]),
}


@pytest.fixture
def learned(monkeypatch):
    "The rows that go through a model with gradients: ids and whether each is learned."
    found, forward = set(), Policy.forward

    def watched(self, input_ids, attention_mask=None, completion_mask=None, *args, **more):
        if torch.is_grad_enabled():
            for ids, seen, mask in zip(input_ids, attention_mask, completion_mask):
                marks = mask[seen.bool()].bool().tolist()
                found.add((tuple(ids[seen.bool()].tolist()), (False, *marks[1:])))
        return forward(self, input_ids, attention_mask, completion_mask, *args, **more)

    monkeypatch.setattr(Policy, "forward", watched)
    return found


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_learned(found: dict) -> set:
    return {(tuple(row["ids"]), tuple(row["learned"])) for row in found["rows"]}


def compare(tmp_path, learned, kind: str, template: str, max_length: int = 160):
    method, knobs, rows = KINDS[kind]
    data = written(tmp_path / "rows.jsonl", rows)
    held = written(tmp_path / "held.jsonl", rows[:1])
    shared = dict(data=data, max_length=max_length, chat_template=template)
    lab.run(
        method,
        out=tmp_path / "runs",
        eval_data=held,
        eval_rows=1,
        steps=1,
        batch_size=8,
        **knobs,
        **shared,
    )
    found = preview("tiny", kind=kind, rows=99, **shared)
    assert found["lengths"]["rows"] == 8  # one of nine is held out
    assert as_learned(found) == learned
    assert any(any(marks) for _, marks in learned)
    return found


@pytest.mark.parametrize("template", TEN)
@pytest.mark.parametrize("kind", ["text", "preference"])
def test_equals_what_is_learned(tmp_path, learned, kind, template):
    compare(tmp_path, learned, kind, str(TEMPLATES / f"{template}.jinja"))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_what_is_learned_where_rows_are_cut(tmp_path, learned, kind):
    longest = {"text": 60, "completion": 32, "preference": 32}[kind]
    found = compare(tmp_path, learned, kind, "", max_length=longest)
    assert found["cut"]
    assert all(one["tokens"] > one["kept"] == longest for one in found["cut"])


def test_left_out_rows_have_their_reasons(tmp_path):
    rows = [dict(prompt=f"{n}=", completion=str(n) if n % 3 else "") for n in range(30)]
    rows.append(dict(prompt="long " * 200, completion="x"))
    data = written(tmp_path / "rows.jsonl", rows)
    found = preview("tiny", f"{data}#skip", max_length=64)
    assert found["lengths"]["rows"] + len(found["left_out"]) >= len(rows) - 2
    assert sum("completion is empty" in reason for reason in found["left_out"]) == 10
    with pytest.raises(WrongInput, match=r"rows.jsonl:1: completion is empty"):
        preview("tiny", data)


def test_command_line(tmp_path, capsys):
    rows = [dict(frage=f"{n}+1=", antwort=f"{n + 1}\x1b[31m") for n in range(5)]
    data = written(tmp_path / "rows.jsonl", rows) + "#prompt=frage,completion=antwort"
    words = ["preview", "-p", "model", "tiny", "-p", "data", data]
    text = CliRunner().invoke(polm, words)
    assert text.exit_code == 0
    assert "\x1b" not in text.output
    assert "⟦" in text.output
    asked = CliRunner().invoke(polm, [*words, "--rows", "2", "--json"])
    found = json.loads(asked.output)
    assert {"rows", "cut", "left_out", "lengths"} <= set(found)
    assert len(found["rows"]) == 2
    assert all({"tokens", "ids", "learned"} <= set(row) for row in found["rows"])
    assert polm.main([*words, "-p", "steps", "3"]) == 2
    assert "unknown knob 'steps'" in capsys.readouterr().err
