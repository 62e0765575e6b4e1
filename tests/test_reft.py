"ReFT: voting and ranking on known answers, a chain that goes on where it was, and what is refused."

import json
import threading
import time

import pytest

import polm_lab as lab
from polm_lab.training.chain import create, execute
from polm_lab.core.knobs import WrongInput
from polm_lab.core.run import Run, Stopped, open_run
from polm_lab.finetuning.reft import ReFT, best, load_questions, majority, right_and_wrong
from polm_lab.training.evaluate import result_of
from polm_lab.finetuning.reft import (
    tested as figures,
)  # pytest takes names that begin with test for its own
from polm_lab.runner.launch import running_part
from polm_lab.runner.real import arithmetic_rows

SHORT = dict(
    questions=8,
    warmup_steps=2,
    steps=2,
    batch_size=4,
    num_generations=2,
    judge_steps=1,
    votes=2,
    prompts=4,
    max_new_tokens=12,
    device="cpu",
    dtype="float32",
)


def test_the_majority_is_of_results_and_the_first_of_equals():
    assert majority(["7", "so 8", "1+7=8", "9"]) == "so 8"
    assert majority(["3", "4"]) == "3"
    assert result_of("2+3=5\n5+1=6") == "6"
    assert result_of(" No  idea") == "no idea"
    assert best(["a", "b", "c"], [1.0, 2.0, 2.0]) == "b"


def test_the_tests_on_known_answers():
    rows = [dict(prompt=f"{i}=", completion=str(i), answer=str(i)) for i in (1, 2, 3)]
    answers = [["1", "1", "0"], ["0", "0", "2"], ["0", "4", "5"]]
    judge = lambda prompts, completions: [
        float(c == p.rstrip("=")) for p, c in zip(prompts, completions)
    ]
    assert figures(rows, answers, judge) == pytest.approx(
        {
            "accuracy": 3 / 9,
            "accuracy/majority": 1 / 3,
            "accuracy/reranked": 2 / 3,
            "pass_at_k": 2 / 3,
        }
    )
    assert "accuracy/reranked" not in figures(rows, answers)
    assert right_and_wrong(rows, answers) == [
        dict(prompt=p, chosen=c, rejected=r)
        for p, c, r in (
            ("1=", "1", "0"),
            ("2=", "2", "0"),
            ("3=", "3", "0"),
            ("3=", "3", "4"),
            ("3=", "3", "5"),
        )
    ]


def test_training_and_held_out_questions_are_apart():
    settings = ReFT(questions=200, prompts=100)
    prompts_of = lambda split: {row["prompt"] for row in load_questions(settings, split)}
    train, test = prompts_of("train"), prompts_of("test")
    assert not train & test
    assert all("in steps" in prompt for prompt in train)


@pytest.mark.parametrize("learner", ["ppo", "grpo"])
def test_a_chain_with_equal_data_and_updates(learner):
    run = lab.run("reft", **SHORT | dict(learner=learner))
    stages = {
        label: open_run(run.path.parent / name) for label, name in run.record["stages"].items()
    }
    assert run.read()["total"] == run.last_line()["step"] == 3
    assert [stages[label].method for label in ("warm-up", "sft alone", "second stage")] == [
        "sft",
        "sft",
        learner,
    ]
    warm, alone, second = (stages[label] for label in ("warm-up", "sft alone", "second stage"))
    assert alone.settings["data"] == second.settings["data"] == warm.settings["data"]
    assert alone.settings["model"] == second.settings["model"] == str(warm.path)
    assert len(alone.lines()) == len(second.lines()) == 2
    assert alone.settings["batch_size"] == second.settings["batch_size"]
    assert set(run.record["states"]) == {"base", "warm-up", "sft alone", "reft"}
    assert run.summary["after"] == {
        **run.record["states"]["reft"],
        "rows": len(run.path.joinpath("test.jsonl").read_text().splitlines()),
    }
    assert (run.path / "model" / "model.safetensors").read_bytes() == (
        second.path / "model" / "model.safetensors"
    ).read_bytes()


def test_a_chain_that_was_asked_to_stop_stops_in_its_part_goes_on_and_comes_to_the_same():
    settings = SHORT | dict(steps=30)
    whole, run = lab.run("reft", **settings), create("reft", settings)

    def stop_in_the_second_stage():
        while run.status in ("created", "running"):
            name, part = running_part(run) or ("", None)
            if name == "second stage" and part.last_line():
                return run.request_stop()
            time.sleep(0.01)

    threading.Thread(target=stop_in_the_second_stage, daemon=True).start()
    with pytest.raises(Stopped, match=f"polm resume {run.id}"):
        execute(run)
    part = open_run(run.path.parent / run.read()["stages"]["second stage"])
    assert run.status == part.status == "stopped"
    assert 0 < part.last_line()["step"] < 30
    run.clear_stop()
    again = execute(Run(run.path))
    assert again.record["states"] == whole.record["states"]
    assert len(again.record["stages"]) == len(whole.record["stages"])
    assert (again.path / "model" / "model.safetensors").read_bytes() == (
        whole.path / "model" / "model.safetensors"
    ).read_bytes()


def test_what_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(dict(prompt="1+1=", completion="2")) + "\n")
    for change, words in (
        (dict(batch_size=5), "multiple of num_generations"),
        (dict(learner="sft"), "one of ppo, grpo"),
        (dict(data=str(tmp_path / "rows.jsonl")), "field answer"),
    ):
        with pytest.raises(WrongInput) as refused:
            lab.run("reft", **SHORT | change)
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("adapter", ["none", "lora:r=4"])
def test_conversations_are_questions_too(tmp_path, adapter):
    "Right and wrong answers of a conversation are turns, also for the model that ranks them."
    files = {}
    for split in ("train", "test"):
        files[split] = tmp_path / f"{split}.jsonl"
        rows = arithmetic_rows(split)[:12]
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dict(data=str(files["train"]), eval_data=str(files["test"]))
    run = lab.run("reft", out=tmp_path / "runs", adapter=adapter, **data, **SHORT)
    states = run.record["states"]
    assert set(states) == {"base", "warm-up", "sft alone", "reft"}
    assert all("accuracy/reranked" in state for state in states.values())
    assert run.summary["after"]["rows"] == SHORT["prompts"]
    held = {json.dumps(row["prompt"]) for row in arithmetic_rows("test")[:12]}
    tried = [json.loads(line) for line in (run.path / "test.jsonl").read_text().splitlines()]
    assert {json.dumps(row["prompt"]) for row in tried} <= held
