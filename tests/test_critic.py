"""Trained critics, correctors and editors, on their tasks and on data of one's own.

With any model; refused where they cannot be trained; continued where they were killed.
"""

import gzip
import json
import os
import shutil
import signal
import subprocess
import time
from unittest import mock

import pytest
from conftest import POLM

import polm_lab as lab
from polm_lab.training.chain import execute
from polm_lab.data.load import load_data
from polm_lab.core.knobs import WrongInput
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.core.run import all_runs, open_run
from polm_lab.data.tasks import TASKS
from polm_lab.reasoning.refine import corrections as learning
from polm_lab.reasoning import critic as trained
from polm_lab.reasoning.refine.trace import read_traces
from polm_lab.reasoning.refine.tiny_prompts import SumSteps
from polm_lab.reasoning.refine.tools import run_tests, scoring, source_of
from polm_lab.reasoning.refine.prompts import Prompts

ALGORITHMS = ("corrector", "selfee", "critique", "refiner", "editor", "coderl")
CPU = dict(dtype="float32", device="cpu")
SMALL = dict(questions=16, num_generations=2, steps=2, eval_rows=4, rounds=1, batch_size=4, **CPU)


def says(call, *args, **more):
    with pytest.raises(WrongInput) as found:
        call(*args, **more)
    assert "\n" not in str(found.value)
    return str(found.value)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(values):
    return [w for k, v in values.items() for w in ("-p", k, str(v))]


def learned(run):
    return run.lines("learned")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_trained_part_is_made_and_used(algorithm, tmp_path):
    run = lab.run("critic", out=tmp_path, algorithm=algorithm, **SMALL)
    assert run.status == "finished"
    assert {"accuracy", "accuracy/draft", "tokens"} <= set(run.summary["after"])
    assert {"accuracy", "accuracy/draft", "tokens"} <= set(run.summary["before"])
    assert (run.path / "model" / "model.safetensors").exists()
    assert len(learned(run)) == run.record["rows"] >= 2
    assert [row["step"] for row in run.lines()] == [1, 2], (
        "it trains itself, and not by another run"
    )
    assert len(all_runs(tmp_path)) == 1, "it trains itself, and not by another run"
    assert all(
        row["prompt"] and (row["tests"] if algorithm == "coderl" else row["completion"])
        for row in learned(run)
    )
    assert len(read_traces(run)) == 4, "the traces of the loop are in the record"


def test_learned_rows_are_of_training_questions():
    held_out = {row["prompt"].rstrip("=") for row in TASKS["sums"].rows("prompt", 400, 0, "test")}
    rows = learning.spoiled_steps("sums", 64, 0, SumSteps())
    assert len(rows) == 64
    assert not held_out & {row["prompt"].split(" in steps")[0] for row in rows}


def test_rewards_of_coderl_are_graded():
    row = TASKS["code"].rows("prompt", 1, 3)[0]
    tries = {
        f" {row['answer']}": 1.0,
        f" {row['answer']} + 1": -0.3,
        " (": -1.0,
        " q": -0.6,
        " __import__('os')._exit(0)": -0.6,
    }
    assert learning.coderl([row["prompt"]] * 5, list(tries), [row["tests"]] * 5) == list(
        tries.values()
    )
    chatty = f"Sure:\n```python\nf = lambda x, y: {row['answer']}\n```"
    assert (
        learning.coderl(["Write f."], [chatty], [row["tests"]])
        == [1.0]
        == learning.coderl(
            [row["prompt"] + "\n\nIn a block, please."],
            [chatty],
            [row["tests"]],
            question=["Write f."],
        )
    )


# Data of one's own ------------------------------------------------------------------------------


def asked(n, split="train", seed=1):
    "Sums as questions and answers, in another form than the task's."
    return [
        dict(question=f"What is {row['prompt'].rstrip('=')}?", answer=int(row["answer"]))
        for row in TASKS["sums"].rows("prompt", n, seed, split)
    ]


def test_a_critic_learns_from_a_file_on_the_command_line(forked, tmp_path):
    """Questions and answers as JSON lines, and the embedded model with the prompts of sums.

    Its critiques become better, and so do the answers.
    """
    data, held_out = (
        jsonl(tmp_path / "mine.jsonl", asked(160)),
        jsonl(tmp_path / "held.jsonl", asked(48, "test")),
    )
    done = forked(
        "run",
        "critic",
        "--bare",
        "--json",
        *words(
            dict(
                algorithm="critique",
                data=data,
                eval_data=held_out,
                prompt_style="sums",
                questions=96,
                steps=30,
                eval_rows=48,
                **CPU,
            )
        ),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])["summary"]
    before, after = summary["before"], summary["after"]
    assert after["accuracy"] > before["accuracy"] + 0.05
    assert after["accuracy"] > 0.85
    assert after["accuracy/verdict"] > before["accuracy/verdict"]
    assert after["accuracy/draft"] == before["accuracy/draft"]


def test_a_corrector_learns_english_from_a_file(forked, tmp_path):
    "The embedded model has never read English prompts: it learns the format with the correction."
    data, held_out = (
        jsonl(tmp_path / "mine.jsonl", asked(200)),
        jsonl(tmp_path / "held.jsonl", asked(32, "test")),
    )
    values = dict(
        algorithm="corrector",
        data=data,
        eval_data=held_out,
        prompt_style="english",
        questions=120,
        num_generations=3,
        steps=40,
        eval_rows=32,
        rounds=1,
        token_budget=1000,
        max_new_tokens=12,
        learning_rate=1e-3,
        max_length=400,
        **CPU,
    )
    done = forked("run", "critic", "--bare", "--json", *words(values), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])["summary"]
    assert summary["after"]["accuracy"] > summary["before"]["accuracy"] + 0.15
    assert (
        summary["after"]["incorrect_to_correct"]
        > summary["before"].get("incorrect_to_correct", 0) + 0.15
    )
    run = all_runs()[0]
    assert all(
        isinstance(row["prompt"], list)
        and row["prompt"][-1]["role"] == "user"
        and row["completion"][0]["role"] == "assistant"
        for row in learned(run)
    )


def test_an_editor_learns_from_prompts_with_tests(tmp_path):
    "Code in a file of one's own, without right programs in it: own ones that pass are used."
    assertions = lambda tests: [f"assert {test}" for test in tests]
    rows = [
        dict(prompt=row["prompt"], tests=assertions(row["tests"]))
        for row in TASKS["code"].rows("prompt", 80, 2, "train")
    ]
    run = lab.run(
        "critic",
        out=tmp_path,
        data=jsonl(tmp_path / "code.jsonl", rows),
        prompt_style="code",
        algorithm="editor",
        **SMALL | dict(questions=48, num_generations=4),
    )
    right = {row["prompt"]: row["answer"] for row in TASKS["code"].rows("prompt", 80, 2, "train")}
    for row in learned(run):
        prompt = "\n".join(row["prompt"].split("\n")[:2])
        prompt = prompt[: prompt.index("y:") + 2]
        tests = next(r["tests"] for r in rows if r["prompt"] == prompt)
        assert run_tests(f"{prompt}{row['completion']}", tests) == "passes"
        assert prompt in right
        assert (
            run_tests(prompt + row["prompt"][len(prompt) :].split("\n")[0], tests[:2]) != "passes"
        ), "what is edited fails"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Two models with a vocabulary of their own: one with a chat template, one without."
    folder, tokenizer, model = (
        tmp_path_factory.mktemp("models"),
        load_tokenizer("tiny"),
        load_model("tiny", "float32", "cpu"),
    )
    tokenizer.add_tokens(["<extra>"])
    model.resize_token_embeddings(len(tokenizer))
    for name in ("chat", "plain"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "plain" / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize("kind", ["chat", "plain"])
@pytest.mark.parametrize("algorithm", ["refiner", "coderl"])
def test_another_model_is_trained_in_english(kind, algorithm, models, tmp_path):
    "Whatever it says; a model without a chat template reads, and learns, the same text."
    rows = (
        GSM
        if algorithm == "refiner"
        else [
            dict(prompt=row["prompt"], tests=row["tests"])
            for row in TASKS["code"].rows("prompt", 24, 2)
        ]
    )
    values = SMALL | dict(token_budget=2000, max_new_tokens=8, max_length=480)
    run = lab.run(
        "critic",
        out=tmp_path,
        model=str(models / kind),
        data=jsonl(tmp_path / "mine.jsonl", rows),
        algorithm=algorithm,
        **values,
    )
    assert run.status == "finished"
    assert len(learned(run)) >= 16
    assert all(isinstance(row["prompt"], list) == (kind == "chat") for row in learned(run))
    asked = [
        part.prompt
        for t in read_traces(run)
        for step in t.steps
        for part in step.parts
        if part.prompt and not part.role.startswith("tool")
    ]
    assert asked
    assert all(isinstance(prompt, list) and prompt[-1]["role"] == "user" for prompt in asked)
    if kind == "plain":
        assert all(row["prompt"].endswith("\n\n") for row in learned(run))


def test_a_trained_model_goes_into_the_loop(tmp_path):
    "Its run is the parent of what is run with it."
    run = lab.run("critic", out=tmp_path, algorithm="editor", **SMALL)
    edited = lab.run(
        "selfrefine",
        out=tmp_path,
        algorithm="self_edit",
        model=str(run.path),
        questions=4,
        num_generations=0,
        **CPU,
    )
    assert edited.status == "finished"
    assert edited.read()["parents"] == [run.id]
    again = lab.run("critic", out=tmp_path, algorithm="editor", model=str(run.path), **SMALL)
    assert again.read()["parents"] == [run.id]


GSM = [
    dict(
        question=f"Anna has {a} pears and gets {b}, then {c} more. How many has she?",
        answer=(
            f"Anna has {a}+{b} = <<{a}+{b}={a + b}>>{a + b} pears.\n"
            f"Then {a + b}+{c} = <<{a + b}+{c}={a + b + c}>>{a + b + c} pears.\n"
            f"#### {a + b + c}"
        ),
    )
    for a in range(2, 8)
    for b in range(2, 6)
    for c in (1, 3)
]
MBPP = dict(
    text="Write a function to double a number.",
    code="def double(x):\n    return 2 * x",
    task_id=1,
    test_setup_code="",
    test_list=["assert double(2) == 4", "assert double(-1) == -2"],
    challenge_test_list=[],
)
HUMANEVAL = dict(
    task_id="X/0",
    prompt=(
        "from typing import List\n\n\ndef half(x: int) -> int:\n    return x // 2\n\n\n"
        'def halves(numbers: List[int]) -> List[int]:\n    """ Half of each.\n    """\n'
    ),
    entry_point="halves",
    canonical_solution="    return [half(n) for n in numbers]\n",
    test=(
        "def check(candidate):\n"
        "    assert candidate([2, 4]) == [1, 2]\n    assert candidate([]) == []\n"
    ),
)


def test_worked_answers_in_the_manner_of_gsm8k(tmp_path):
    """The refiner's rows: mistakes put in by a rule, calculators' marks taken out.

    Held-out questions are scored by the last number.
    """
    from polm_lab.reasoning.refine.prompts import StepPrompts, wrong_step

    rows = learning.spoiled_steps(jsonl(tmp_path / "gsm.jsonl", GSM), 40, 0, StepPrompts())
    found = [wrong_step(row["completion"]) for row in rows]
    assert len(rows) == 40
    assert {0, 1, 2} == set(found)
    assert not any("<<" in str(row) or "####" in str(row) for row in rows)
    for row, place in zip(rows, found):
        steps = row["prompt"][-2]["content"].splitlines()
        sums = [
            eval(step.split(" = ")[0].split()[-1]) == int(step.split(" = ")[1].split()[0])
            for step in steps
        ]
        assert sums == [i != place for i in (1, 2)]
    held_out = load_data(str(tmp_path / "gsm.jsonl"), "prompt", "all")
    score = scoring("gsm.jsonl", held_out, StepPrompts())
    assert score(held_out[0], "2+2 = 4\nso **the answer is 5**.") == 1.0
    assert score(held_out[0], "4") == 0.0
    run = lab.run(
        "critic",
        out=tmp_path,
        data=str(tmp_path / "gsm.jsonl"),
        prompt_style="english",
        algorithm="refiner",
        **SMALL | dict(max_length=512, token_budget=2000, max_new_tokens=8),
    )
    assert run.status == "finished"
    assert run.record["rows"] == 32


def test_mbpp_and_humaneval_as_they_are(tmp_path):
    """Prompts, tests and solutions of the published schemas.

    Whole programs, bare bodies and chatty replies run with the prompt's imports and helpers.
    """
    mbpp, human = (
        load_data(jsonl(tmp_path / "mbpp.jsonl", [MBPP] * 4), "prompt", "all")[0],
        load_data(jsonl(tmp_path / "human.jsonl", [HUMANEVAL] * 4), "prompt", "all")[0],
    )
    assert mbpp["tests"] == MBPP["test_list"]
    assert mbpp["prompt"][0]["content"].endswith("assert double(2) == 4")
    assert mbpp["solution"] == MBPP["code"]
    score = scoring("mine.jsonl", [mbpp, human], Prompts())
    assert (
        score(mbpp, MBPP["code"])
        == 1.0
        == score(mbpp, f"Sure!\n```python\n{MBPP['code']}\n```\nDone.")
    )
    assert score(mbpp, "def double(x):\n    return x") == 0.0
    body, wrong = HUMANEVAL["canonical_solution"], "    return [half(n) + 1 for n in numbers]\n"
    whole = f"def halves(numbers: List[int]) -> List[int]:\n{body}"
    assert [
        score(human, text)
        for text in (body, whole, f"```python\n{whole}\n```", human["solution"], wrong, "I cannot.")
    ] == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert "half" in source_of(human, whole)
    with gzip.open(tmp_path / "mbpp.jsonl.gz", "wt") as file:
        file.write((tmp_path / "mbpp.jsonl").read_text() * 10)
    run = lab.run(
        "critic",
        out=tmp_path,
        data=str(tmp_path / "mbpp.jsonl.gz"),
        prompt_style="english",
        algorithm="editor",
        **SMALL | dict(max_length=512, token_budget=2000, max_new_tokens=8),
    )
    assert run.status == "finished", "the data's programs are what is learned"
    assert all(MBPP["code"] in row["completion"][0]["content"] for row in learned(run)), (
        "the data's programs are what is learned"
    )


# Wrong input ------------------------------------------------------------------------------------

PLAIN = [dict(prompt=f"What is {i}+1?") for i in range(40)]
WITH = [dict(row, answer=str(i + 1)) for i, row in enumerate(PLAIN)]
REFUSED = {
    "an unknown variant": (dict(algorithm="corector"), None, ["algorithm", "corrector"]),
    "unknown words": (dict(prompt_style="latin"), None, ["prompt_style", "english"]),
    "no answers": (
        dict(algorithm="critique", prompt_style="english"),
        PLAIN,
        ["answer", "tests", "add it"],
    ),
    "an answer is missing": (
        dict(algorithm="critique", prompt_style="english"),
        [dict(prompt="What is 1+1?"), *WITH],
        ["mine.jsonl:1", "neither answer nor tests"],
    ),
    "no tests": (dict(algorithm="editor", prompt_style="english"), WITH, ["editor", "tests"]),
    "no tests for coderl": (
        dict(algorithm="coderl", prompt_style="english"),
        WITH,
        ["coderl", "tests"],
    ),
    "tests that are no list": (
        dict(algorithm="editor", prompt_style="english"),
        [dict(row, tests="f(2) == 4") for row in PLAIN],
        ["tests", "list"],
    ),
    "tests that are numbers": (
        dict(algorithm="editor", prompt_style="english"),
        [dict(row, tests=[4]) for row in PLAIN],
        ["tests", "list"],
    ),
    "the embedded model and unknown data": (
        dict(algorithm="critique"),
        WITH,
        ["prompts", "english"],
    ),
    "words that do not fit the data": (
        dict(algorithm="critique", prompt_style="sums"),
        [dict(row, prompt="Who is Anna?") for row in WITH],
        ["a sum such as"],
    ),
    "words without a form for it": (
        dict(algorithm="editor", prompt_style="sums"),
        [dict(row, tests=["f(2) == 4"]) for row in WITH],
        ["editing"],
    ),
    "a task without a form for it": (
        dict(algorithm="critique", data="chat"),
        None,
        ["feedback in chat"],
    ),
    "steps where there are none": (
        dict(algorithm="refiner", prompt_style="english"),
        [dict(question=row["prompt"], answer=row["answer"]) for row in WITH],
        ["refiner", "several lines"],
    ),
    "no completion to spoil": (
        dict(algorithm="refiner", prompt_style="english"),
        WITH,
        ["completion"],
    ),
    "no steps in a task": (
        dict(algorithm="refiner", prompt_style="english", data="facts"),
        None,
        ["refiner", "several lines"],
    ),
    "a single row": (dict(algorithm="critique", prompt_style="english"), WITH[:1], ["no rows"]),
    "a broken file": (
        dict(algorithm="critique", prompt_style="english"),
        '{"prompt": "1+1=", "answer"',
        ["mine.jsonl:1", "malformed"],
    ),
    "no file": (dict(algorithm="critique", data="nowhere.jsonl"), None, ["no such file"]),
    "held-out data without answers": (
        dict(algorithm="critique", data="sums", eval_data="{}"),
        PLAIN,
        ["neither answer nor tests"],
    ),
    "no model": (dict(model="tinny"), None, ["tinny"]),
    "no rounds": (dict(rounds=0), None, ["rounds"]),
    "an engine that is not there": (dict(engine="trl"), None, ["engine"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_learned_is_refused_in_one_line_before_a_model_is_loaded(what, tmp_path):
    values, rows, expected = REFUSED[what]
    if rows is not None:
        path = tmp_path / "mine.jsonl"
        path.write_text(rows) if isinstance(rows, str) else jsonl(path, rows)
        values = (
            {k: v.format(path) if isinstance(v, str) else v for k, v in values.items()}
            if "eval_data" in values
            else values | dict(data=str(path))
        )
    loaded = AssertionError("a model was loaded")
    with (
        mock.patch.object(trained, "load_model", side_effect=loaded),
        mock.patch.object(trained, "load_policy", side_effect=loaded),
    ):
        message = says(lab.run, "critic", out=tmp_path / "runs", **SMALL | values)
    assert all(part in message for part in expected), message


def test_too_little_to_learn_from_is_reported(tmp_path):
    message = says(
        lab.run,
        "critic",
        out=tmp_path,
        algorithm="critique",
        **SMALL | dict(questions=2, num_generations=1, max_new_tokens=1),
    )
    assert "gave 0 rows to learn from" in message or "gave 1 rows" in message


# Stopped, killed, resumed -----------------------------------------------------------------------


def same(run, other):
    timed = ("seconds", "tokens_per_second", "memory_mib")
    untimed = lambda row: {k: v for k, v in row.items() if k not in timed}
    bare = lambda rows: list(map(untimed, rows))
    bits = lambda run: (run.path / "model" / "model.safetensors").read_bytes()
    assert bits(run) == bits(other)
    assert bare(run.lines()) == bare(other.lines())
    assert bare(run.lines("samples")) == bare(other.lines("samples"))
    assert run.summary == other.summary
    assert learned(run) == learned(other)


def test_killed_before_it_trains_and_resumed(tmp_path):
    """Killed when the rows are there.

    tests/test_kill.py kills it while it trains; tests/test_conformance.py stops and resumes it.
    """
    values = dict(algorithm="critique", **SMALL | dict(steps=6, save_every=2))
    whole = lab.run("critic", out=tmp_path / "whole", **values)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [POLM, "run", "critic", "--bare", "--out", str(tmp_path / "killed"), *words(values)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("*/learned.jsonl")):
        assert time.monotonic() < deadline, process.stderr.read()
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run = all_runs(tmp_path / "killed")[0]
    assert run.status == "dead"
    assert "after" not in run.summary
    execute(run)
    same(open_run(run.path), whole)


def test_interrupted_in_the_loop_at_the_end(tmp_path):
    "What was written of it is written once."
    values = dict(algorithm="critique", **SMALL)
    whole = lab.run("critic", out=tmp_path / "whole", **values)
    plain, count = trained.trace_rows, []

    def once(*args):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return plain(*args)

    with mock.patch.object(trained, "trace_rows", once), pytest.raises(KeyboardInterrupt):
        lab.run("critic", out=tmp_path / "again", **values)
    run = all_runs(tmp_path / "again")[0]
    assert run.lines("samples")
    assert "after" not in run.summary
    execute(run)
    same(open_run(run.path), whole)


def test_a_torn_file_of_rows_is_made_again(tmp_path):
    values = dict(algorithm="corrector", **SMALL)
    whole = lab.run("critic", out=tmp_path / "whole", **values)
    with (
        mock.patch.object(trained, "imitate", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        lab.run("critic", out=tmp_path / "again", **values)
    run = all_runs(tmp_path / "again")[0]
    (run.path / "learned.jsonl").write_text("")
    execute(run)
    same(open_run(run.path), whole)
    shutil.rmtree(tmp_path / "again")
