"""Wrong input at the command line ends in one clear line.

The exit status is 2, or the run has failed with its reason. That happens before any compute, and
nothing earlier is lost.
Each case is a line of a table: what is wrong, the files it needs, the command, and words that the
message must have.
"""

import json
import shutil
import subprocess

import pytest
from conftest import POLM

import polm_lab as lab
from polm_lab.cli import polm
from polm_lab.models.sources import model_path
from polm_lab.core.run import all_runs

PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
ROW = {"prompt": "1+1=", "completion": "2"}


def jsonl(*rows):
    return "".join(
        (row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows
    ).encode()


# name: (content of the data file, its name, method, knobs, words of the message)
DATA = {
    "malformed JSON on line 3": (
        jsonl(ROW, ROW, '{"prompt": "1', ROW),
        "d.jsonl",
        "sft",
        {},
        ["d.jsonl", "3"],
    ),
    "a list instead of an object": (jsonl(ROW, "[1, 2]"), "d.jsonl", "sft", {}, ["d.jsonl", "2"]),
    "a missing column": (jsonl({"prompt": "1+1="}), "d.jsonl", "sft", {}, ["prompt", "completion"]),
    "columns of another kind": (jsonl(ROW), "d.jsonl", "dpo", {}, ["chosen", "rejected"]),
    "an empty file": (b"", "d.jsonl", "sft", {}, ["d.jsonl", "empty"]),
    "an empty completion": (
        jsonl(ROW, {"prompt": "1+1=", "completion": "  "}),
        "d.jsonl",
        "sft",
        {},
        ["2", "completion"],
    ),
    "an empty prompt": (
        jsonl({"prompt": "", "completion": "2"}),
        "d.jsonl",
        "sft",
        {},
        ["1", "prompt"],
    ),
    "chosen equal to rejected": (
        jsonl(PAIR, {**PAIR, "rejected": "2"}),
        "d.jsonl",
        "dpo",
        {},
        ["2", "chosen", "rejected"],
    ),
    "a number for a prompt": (
        jsonl({"prompt": 7, "completion": "2"}),
        "d.jsonl",
        "sft",
        {},
        ["1", "prompt", "7"],
    ),
    "a null": (
        jsonl(ROW, {"prompt": "1+1=", "completion": None}),
        "d.jsonl",
        "sft",
        {},
        ["2", "completion"],
    ),
    "bytes that are not UTF-8": (
        b'{"prompt": "caf\xe9", "completion": "2"}\n',
        "d.jsonl",
        "sft",
        {},
        ["d.jsonl", "UTF-8"],
    ),
    "a prompt longer than max_length": (
        jsonl(ROW, {"prompt": "1+1=" * 200, "completion": "2"}),
        "d.jsonl",
        "sft",
        {"max_length": 64},
        ["max_length", "64"],
    ),
    "a prompt too long to answer": (
        jsonl(*[{"prompt": "1+1=" * 200, "answer": "2"}] * 30),
        "d.jsonl",
        "grpo",
        {"max_length": 64},
        ["max_length"],
    ),
    "a role nobody knows": (
        jsonl(
            {
                "messages": [
                    {"role": "oracle", "content": "x"},
                    {"role": "assistant", "content": "y"},
                ]
            }
        ),
        "d.jsonl",
        "sft",
        {},
        ["oracle", "role"],
    ),
    "a conversation without an answer": (
        jsonl({"messages": [{"role": "user", "content": "x"}]}),
        "d.jsonl",
        "sft",
        {},
        ["assistant"],
    ),
    "an unknown kind of file": (b"x", "d.docx", "sft", {}, ["d.docx"]),
    "a broken parquet file": (b"PAR1 no", "d.parquet", "sft", {}, ["d.parquet"]),
    "a csv without the columns": (b"a,b\n1,2\n", "d.csv", "sft", {}, ["a, b"]),
    "JSON that is no list of rows": (b'"text"', "d.json", "sft", {}, ["d.json"]),
    "no answers to check": (jsonl(*[{"prompt": "1+1="}] * 30), "d.jsonl", "grpo", {}, ["answer"]),
    "a label outside the classes": (
        jsonl(*[ROW] * 30),
        "d.jsonl",
        "sft",
        {"classes": "yes,no"},
        ["classes", "'2'"],
    ),
}

# name: (method, knobs, words)
KNOBS = {
    "an unknown method": ("sfd", {}, ["unknown method", "sft"]),
    "an unknown knob": ("sft", {"learning_rat": "1"}, ["unknown knob", "learning_rate"]),
    "a knob out of range": ("sft", {"steps": "-1"}, ["steps", "-1", "≥ 0"]),
    "no whole number": ("sft", {"steps": "2.5"}, ["steps", "whole number"]),
    "no number at all": ("sft", {"learning_rate": "fast"}, ["learning_rate", "fast"]),
    "not a number": ("sft", {"learning_rate": "nan"}, ["learning_rate", "nan"]),
    "not a choice": ("sft", {"schedule": "cosin"}, ["schedule", "cosine"]),
    "an engine nobody has": ("sft", {"engine": "verl"}, ["engine", "trl"]),
    "an unknown model": ("sft", {"model": "tinny"}, ["tinny", "tiny"]),
    "an unknown task": ("sft", {"data": "sum"}, ["sum", "sums"]),
    "a file that is not there": ("sft", {"data": "nothing/there.jsonl"}, ["there.jsonl"]),
    "an unknown adapter": ("sft", {"adapter": "lorra"}, ["lorra", "lora"]),
    "an unknown setting of an adapter": ("sft", {"adapter": "lora:rank=8"}, ["rank"]),
    "an adapter for layers that do not exist": (
        "sft",
        {"adapter": "lora:target_modules=c_attn"},
        ["c_attn"],
    ),
    "a device that is not there": ("sft", {"device": "cuda:7"}, ["cuda:7"]),
    "a tracker that is not installed": ("sft", {"tracker": "wandb"}, ["wandb", "install"]),
    "batches of nothing": ("sft", {"batch_size": "0"}, ["batch_size"]),
    "a reference without an adapter": ("dpo", {"reference": "adapter"}, ["adapter"]),
    "a negative beta": ("dpo", {"beta": "-0.1"}, ["beta"]),
    "a group of one": ("grpo", {"samples": "1"}, ["samples"]),
    "an unknown reward": ("grpo", {"rewards": "corect"}, ["corect", "correct"]),
    "a reward file that is not there": ("grpo", {"rewards": "nothing.py:fn"}, ["nothing.py"]),
}

REWARDS = {
    "a reward that raises": ("raise KeyError('x')", ["KeyError"]),
    "a reward that is NaN": ("return [float('nan')] * len(completions)", ["nan"]),
    "a reward of the wrong length": ("return [1.0]", ["1"]),
    "a reward that is None everywhere": ("return [None] * len(completions)", ["None"]),
    "a reward that is text": ("return ['good'] * len(completions)", ["good"]),
    "a reward that is no list": ("return 1.0", ["float", "list"]),
}


def attempt(capsys, *words):
    "Exit status and the lines of standard error."
    code = polm.main(args=[str(w) for w in words])
    return code, capsys.readouterr().err.strip().split("\n")


def refused(capsys, words, *command):
    code, lines = attempt(capsys, *command)
    ours = [line for line in lines if line.startswith("polm: ")]
    assert code == 2, (code, lines)
    assert len(lines) == 1, (code, lines)
    assert len(ours) == 1, (code, lines)
    for word in words:
        assert word in ours[0], (word, ours[0])
    return ours[0]


def pairs(knobs):
    return [w for k, v in knobs.items() for w in ("-p", k, v)]


def nothing_was_computed(runs):
    for run in all_runs(runs):
        assert run.status == "failed", run
        assert run.read()["reason"], run
        assert not run.lines(), run


@pytest.mark.parametrize("case", DATA)
def test_data(case, tmp_path, runs, capsys):
    content, name, method, knobs, words = DATA[case]
    (tmp_path / name).write_bytes(content)
    refused(
        capsys,
        words,
        "run",
        method,
        "--bare",
        *pairs({"data": tmp_path / name, "steps": 2} | knobs),
    )
    nothing_was_computed(runs)
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("case", KNOBS)
def test_knobs(case, runs, capsys):
    method, knobs, words = KNOBS[case]
    refused(
        capsys,
        words,
        "run",
        method,
        "--bare",
        *pairs({"data": "sums", "steps": 2} | knobs if method in ("sft", "dpo", "grpo") else knobs),
    )
    nothing_was_computed(runs)


@pytest.mark.parametrize("case", REWARDS)
def test_rewards(case, tmp_path, runs, capsys):
    body, words = REWARDS[case]
    (tmp_path / "mine.py").write_text(f"def mine(prompts, completions, **columns):\n    {body}\n")
    refused(
        capsys,
        ["mine", *words],
        "run",
        "grpo",
        "--bare",
        *pairs({"rewards": f"{tmp_path / 'mine.py'}:mine", "data": "sums", "steps": 2}),
    )
    nothing_was_computed(runs)


@pytest.fixture
def model(tmp_path):
    "A copy of the embedded model, to be damaged."
    return shutil.copytree(model_path("tiny"), tmp_path / "model")


def truncate(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def pickle(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def no_template(model):
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "chat_template.jinja").unlink(missing_ok=True)


def strange(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "abacus"}))


def other_shapes(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "intermediate_size": config["intermediate_size"] + 8})
    )


MODELS = {
    "truncated weights": (truncate, {}, ["model.safetensors"]),
    "pickled weights": (pickle, {}, ["safetensors"]),
    "no configuration": (lambda m: (m / "config.json").unlink(), {}, ["config.json"]),
    "a damaged configuration": (lambda m: (m / "config.json").write_text("{"), {}, ["config.json"]),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), {}, ["tokenizer"]),
    "conversations without a chat template": (no_template, {"data": "chat"}, ["chat template"]),
    "an architecture nobody knows": (strange, {}, ["abacus"]),
    "weights of another shape": (other_shapes, {}, ["shape"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case, model, runs, capsys):
    damage, knobs, words = MODELS[case]
    damage(model)
    refused(
        capsys,
        words,
        "run",
        "sft",
        "--bare",
        *pairs({"model": model, "data": "sums", "steps": 2} | knobs),
    )
    nothing_was_computed(runs)


# Commands and runs


def test_commands(tmp_path, runs, capsys):
    (tmp_path / "bad.yaml").write_text("steps: [1\n")
    (tmp_path / "list.yaml").write_text("- steps\n")
    refused(capsys, ["bad.yaml", "YAML"], "run", "sft", "-f", tmp_path / "bad.yaml")
    refused(capsys, ["list.yaml", "list"], "run", "sft", "-f", tmp_path / "list.yaml")
    refused(capsys, ["missing.yaml"], "run", "sft", "-f", tmp_path / "missing.yaml")
    refused(capsys, ["no such run"], "show", "nothing")
    refused(capsys, ["no such run"], "resume", "nothing")
    (tmp_path / "file").write_text("")
    refused(capsys, ["cannot be written"], "run", "sft", "--out", tmp_path / "file" / "runs")
    assert attempt(capsys, "run", "sft", "-p", "steps")[0] == 2
    assert attempt(capsys, "rum")[0] == 2


def finished():
    return lab.run("sft", data="sums", steps=2, eval_rows=4, batch_size=4, save_every=1)


def test_finished_and_damaged_runs(runs, capsys):
    run = finished()
    weights = (run.path / "model" / "model.safetensors").read_bytes()
    refused(capsys, ["finished"], "resume", run.id)
    refused(capsys, ["finished"], "stop", run.id)
    refused(capsys, ["two runs"], "compare", run.id)
    run.update(status="failed", settings={**run.settings, "steps": 4})
    newest = sorted((run.path / "checkpoints").glob("step-*"))[-1]
    for file in newest.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert "checkpoint cannot be read" in refused(capsys, [newest.name], "resume", run.id)
    shutil.rmtree(newest)
    assert attempt(capsys, "resume", run.id)[0] == 0, "the checkpoint before it is whole"
    assert [row["step"] for row in run.lines()] == [1, 2, 3, 4]
    assert (run.path / "model" / "model.safetensors").read_bytes() != weights
    (run.path / "run.json").write_text("{")
    refused(capsys, ["run.json", "damaged"], "show", run.path)


FULL = """
mount -t tmpfs -o size=12m tmpfs {disk} && cp -r {earlier} {disk}/earlier
{polm} run sft --bare --out {disk} -p data sums -p steps 3 -p save_every 1 -p eval_rows 4 \\
    -p batch_size 4
echo "exit $?"
cat {disk}/*-sft-*/run.json > {seen}/run.json
cat {disk}/*-sft-*/metrics.jsonl > {seen}/metrics.jsonl
ls {disk}/*-sft-*/checkpoints > {seen}/checkpoints
diff -r {earlier} {disk}/earlier && echo same
"""


def test_a_full_disk(tmp_path, runs):
    "A real one of 12 MiB, mounted in a namespace of its own; one checkpoint needs 20."
    earlier, disk = tmp_path / "earlier", tmp_path / "disk"
    earlier.mkdir(), disk.mkdir()
    (earlier / "run.json").write_text(json.dumps({"id": "earlier"}))
    script = FULL.format(disk=disk, earlier=earlier, polm=POLM, seen=tmp_path)
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True)
    if "exit" not in done.stdout:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    record = json.loads((tmp_path / "run.json").read_text())
    assert "exit 1" in done.stdout, done.stdout + done.stderr
    assert "same" in done.stdout, done.stdout + done.stderr
    assert record["status"] == "failed", record["reason"]
    assert "No space left" in record["reason"], record["reason"]
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1]
    assert (tmp_path / "checkpoints").read_text() == "", "no half checkpoint is left"


def test_weights_that_are_not_finite_end_the_run(runs, capsys, model):
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    code, lines = attempt(
        capsys,
        "run",
        "sft",
        "--bare",
        *pairs({"model": model, "data": "sums", "steps": 2, "eval_rows": 4}),
    )
    run = all_runs(runs)[0]
    assert code in (1, 2), (code, lines)
    assert len(lines) == 1, (code, lines)
    assert run.status == "failed", (code, lines)
    assert "finite" in run.read()["reason"], (code, lines)


def test_a_loss_that_is_not_finite_keeps_its_batch(runs):
    import torch
    from safetensors.torch import load_file

    from polm_lab.core.settings import Settings
    from polm_lab.core.run import Run
    from polm_lab.training.loop import fit

    run, batch = Run.create("line", {"steps": 3}), dict(x=torch.tensor([[1.0], [2.0]]), weight=2)
    with pytest.raises(FloatingPointError, match="step 1"), run.active():
        fit(
            run,
            Settings(steps=3, device="cpu", dtype="float32"),
            torch.nn.Linear(1, 1),
            lambda step, meter: [[batch]],
            lambda m, b, _: (m(b["x"]) * float("inf")).sum(),
        )
    assert run.status == "failed"
    assert torch.equal(load_file(run.path / "nonfinite-step-1.safetensors")["x"], batch["x"])


def test_the_table_is_long_enough():
    assert len(DATA) + len(KNOBS) + len(REWARDS) + len(MODELS) >= 40
