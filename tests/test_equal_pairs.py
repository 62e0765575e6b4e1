"""Rows that teach nothing: pairs whose answers are equal within `max_length`.

They are counted and left out, or the run is refused. Every pairwise method behaves alike.
"""

import json
import math

import pytest
import torch

import polm_lab as lab
from polm_lab.training.answers import answer_batches, drop_equal, encode_answers, side_logps
from polm_lab.alignment.dpo import dpo_loss
from polm_lab.alignment.reward import encode_pairs as encode_for_reward
from polm_lab.cli import polm
from polm_lab.data.rows import Row
from polm_lab.data.encode import encode_rows
from polm_lab.data.load import load_data
from polm_lab.core.knobs import WrongInput
from polm_lab.models.policy import Policy
from polm_lab.models.load import load_model
from polm_lab.core.run import Run, all_runs
from polm_lab.finetuning.sft import class_accuracy
from polm_lab.workbench.diagnose import diagnose

LENGTH = 64  # tokens
SAME = "2, and once more: 1+1 is 2, and 1+1 is " * 4
EARLY = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
LATE = {"prompt": "1+1=", "chosen": f"{SAME}2", "rejected": f"{SAME}3"}
SHORT = dict(
    steps=2,
    batch_size=4,
    eval_rows=64,
    max_length=LENGTH,
    device="cpu",
    dtype="float32",
    save_every=0,
)
WAYS = {
    "dpo": ("dpo", {}),
    "dpo, precomputed": ("dpo", dict(reference="precomputed")),
    "dpo, copy": ("dpo", dict(reference="copy")),
    "dpo, trl": ("dpo", dict(engine="trl")),
    "reward": ("reward", {}),
    "reward, pairwise": ("reward", dict(head="pairwise")),
    "reward, trl": ("reward", dict(engine="trl")),
}


def put(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_such_a_pair_has_no_margin_and_no_gradient(tokenizer):
    """A run on it alone had a loss of log 2 for all weights, and gradients of rounding."""
    [whole], [cut] = (encode_answers(tokenizer, [LATE], length) for length in (512, LENGTH))
    assert whole["chosen"] != whole["rejected"]
    assert cut["chosen"] == cut["rejected"]
    assert len(cut["chosen"]["input_ids"]) == LENGTH
    model = load_model("tiny", dtype="float32", device="cpu")
    norms = {}
    for name, pair in dict(whole=whole, cut=cut).items():
        model.zero_grad()
        loss = dpo_loss(
            *side_logps(Policy(model), answer_batches([pair], 1, 0)[0]),
            torch.zeros(1),
            torch.zeros(1),
            0.1,
        ).sum()
        loss.backward()
        norms[name] = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
        if name == "cut":
            assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert norms["cut"] < 1e-3 * norms["whole"]


@pytest.mark.parametrize("way", WAYS)
def test_equal_pairs_are_left_out_and_counted(way, tmp_path, runs):
    method, knobs = WAYS[way]
    data, held_out = (
        put(tmp_path / "d.jsonl", [EARLY, LATE, LATE] * 20),
        put(tmp_path / "e.jsonl", [LATE] + [EARLY] * 3),
    )
    mixed = lab.run(method, data=data, eval_data=held_out, **SHORT, **knobs)
    record = mixed.read()
    train, held = record["left_out"]["train"], record["left_out"]["held out"]
    assert held == dict(equal=1, pairs=4)
    rows = load_data(data, "preference")
    assert train == dict(equal=sum(row["chosen"] != "2" for row in rows), pairs=len(rows))
    notes = [
        line
        for line in (mixed.path / "log.txt").read_text().splitlines()
        if line.startswith("left out: ")
    ]
    assert len(notes) == 2
    assert notes[0].startswith(
        f"left out: {train['equal']} of {len(rows)} pairs (train) hold the same tokens on both "
        f"sides within max_length = {LENGTH}, first {data}:"
    )
    pure = lab.run(
        method,
        data=put(tmp_path / "p.jsonl", [row for row in rows if row["chosen"] == "2"] * 2),
        eval_data=put(tmp_path / "q.jsonl", [EARLY] * 3),
        **SHORT,
        **knobs,
    )
    assert "left_out" not in pure.read()
    for when in ("before", "after"):
        assert mixed.summary[when] == pytest.approx(pure.summary[when], rel=1e-4, abs=1e-6), when
    assert [row["loss"] for row in mixed.lines()] == pytest.approx(
        [row["loss"] for row in pure.lines()], rel=1e-5
    )
    [finding] = [f for f in diagnose(mixed) if f.rule == "equal_pairs"]
    assert finding.severity == "warning"
    assert f"{train['equal']} of {len(rows)} pairs (train, " in finding.evidence
    assert "equal_pairs" not in {f.rule for f in diagnose(pure)}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_on_nothing_else_is_refused(way, tmp_path, runs, capsys):
    method, knobs = WAYS[way]
    data = put(tmp_path / "d.jsonl", [LATE] * 40)
    words = [word for name, value in (SHORT | knobs).items() for word in ("-p", name, str(value))]
    assert polm.main(args=["run", method, "--bare", "-p", "data", data, *words]) == 2
    assert capsys.readouterr().err == (
        "polm: data: 38 of 38 pairs (train) hold the same tokens on both sides "
        f"within max_length = {LENGTH}, first {data}:1; expected answers that differ within it; "
        "raise max_length, or shorten what comes before the difference\n"
    )
    [run] = all_runs(runs)
    assert run.status == "failed"
    assert not run.lines()
    assert run.summary == {}


def test_the_command_line_says_so(tmp_path, runs, capsys):
    data = put(tmp_path / "d.jsonl", [EARLY, LATE] * 20)
    words = [
        word for name, value in (SHORT | dict(steps=0)).items() for word in ("-p", name, str(value))
    ]
    assert polm.main(args=["run", "dpo", "--bare", "-p", "data", data, *words]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")][
        0
    ] == "left out:  19 of 38 pairs (train), whose answers are equal within max_length"


def test_numbers_follow_the_rows_that_are_left(tokenizer, tmp_path):
    rows = [
        Row(row, f"a:{n}", skip=True)
        for n, row in enumerate(
            [LATE, EARLY, {**EARLY, "prompt": "1+1=" * 99}, LATE, {**EARLY, "prompt": "2+1="}], 1
        )
    ]
    run = Run.create("dpo", {}, out=tmp_path)
    for encode in (encode_answers, encode_for_reward):
        left, pairs = drop_equal(run, "train", rows, encode(tokenizer, rows, LENGTH), LENGTH)
        assert [row.where for row in left] == ["a:2", "a:5"]
        assert [pair["row"] for pair in pairs] == [0, 1]
        assert tokenizer.decode(pairs[1]["chosen"]["input_ids"]).startswith("2+1=")
    assert run.read()["left_out"] == {"train": dict(equal=2, pairs=4)}
    rows[2].skip = False
    for encode in (encode_answers, encode_for_reward):
        with pytest.raises(WrongInput, match="a:3: prompt has"):
            encode(tokenizer, rows, LENGTH)


def test_a_pairwise_answer_that_is_cut_away_is_left_out(tokenizer, tmp_path):
    """The pairwise head reads the other answer first.

    If that one fills the row, nothing is left of the answer itself.
    """
    rows = [
        Row(EARLY, "a:1"),
        Row({"prompt": "1+1=", "chosen": "2", "rejected": f"3{SAME}"}, "a:2"),
    ]
    run = Run.create("reward", {}, out=tmp_path)
    for head, left in (("pointwise", ["a:1", "a:2"]), ("pairwise", ["a:1"])):
        pairs = encode_for_reward(tokenizer, rows, LENGTH, head)
        kept, _ = drop_equal(run, "train", rows, pairs, LENGTH)
        assert [row.where for row in kept] == left


def test_other_rows_that_teach_nothing(tokenizer):
    """A text of one token has nothing to predict.

    Classes that are cut to the same tokens cannot be distinguished.
    """
    row = Row({"text": tokenizer.eos_token}, "a:1")
    with pytest.raises(WrongInput) as wrong:
        encode_rows(tokenizer, [row], "text", LENGTH)
    assert str(wrong.value) == (
        "a:1: nothing to learn: no token but the first; expected at least one more; remove this row"
    )
    rows = [Row(row, "a:1", skip=True), Row({"text": "two"}, "a:2")]
    assert len(encode_rows(tokenizer, rows, "text", LENGTH)) == 1
    policy = Policy(load_model("tiny", dtype="float32", device="cpu"))
    rows = [Row({"prompt": "1+1=", "completion": f"{SAME}2"}, "a:1")]
    assert class_accuracy(policy, tokenizer, rows, [f"{SAME}2", f"{SAME}3"], 512) in (0.0, 1.0)
    with pytest.raises(
        WrongInput, match=f"a:1: two classes are the same tokens within max_length = {LENGTH}"
    ):
        class_accuracy(policy, tokenizer, rows, [f"{SAME}2", f"{SAME}3"], LENGTH)
