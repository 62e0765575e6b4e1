"""Requests of an `accelerate launch` configuration are carried out and recorded, or refused.

A refusal is one line, before anything is computed. The environment of a configuration is made by
accelerate's own code, so a change of its names shows here.
"""

import json
import os
import subprocess

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import POLM

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.core.settings import Settings
from polm_lab.core.run import all_runs
from polm_lab.core.machine import check_launch

BASE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "num_machines": 1,
    "num_processes": 2,
    "mixed_precision": "no",
    "use_cpu": False,
}
FSDP = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_state_dict_type": "FULL_STATE_DICT",
}
WHOLE = (
    "expected distributed_type MULTI_GPU, MULTI_CPU or NO, since each process holds the whole "
    "model here; change accelerate's configuration, or start with accelerate launch --multi_gpu"
)

OTHER_TYPE = "is asked for, and the run's dtype is float32; expected the same of both"


def environment(tmp_path, **config) -> dict:
    "The variables that accelerate sets for this configuration."
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**BASE, **config}))
    args = launch_command_parser().parse_args(
        ["--config_file", str(tmp_path / "config.yaml"), "script.py"]
    )
    args, _, _ = _validate_launch_command(args)
    before = dict(os.environ)
    try:
        return prepare_multi_gpu_env(args)
    finally:
        os.environ.clear()
        os.environ.update(before)


# configuration -> the message, None where it runs
ASKED = {
    "plain": ({}, {}, None),
    "FSDP 2": (
        dict(distributed_type="FSDP", fsdp_config=FSDP),
        {},
        f"accelerate: distributed_type: FSDP is asked for; {WHOLE}",
    ),
    "FSDP 1": (
        dict(
            distributed_type="FSDP",
            fsdp_config={**FSDP, "fsdp_version": 1, "fsdp_sharding_strategy": "FULL_SHARD"},
        ),
        {},
        f"accelerate: distributed_type: FSDP is asked for; {WHOLE}",
    ),
    "Megatron": (
        dict(distributed_type="MEGATRON_LM", megatron_lm_config={"megatron_lm_tp_degree": 2}),
        {},
        f"accelerate: distributed_type: MEGATRON_LM is asked for; {WHOLE}",
    ),
    "bf16": (
        dict(mixed_precision="bf16"),
        {},
        f"accelerate: mixed_precision bf16 {OTHER_TYPE}; write -p dtype bfloat16",
    ),
    "bf16, and the run too": (dict(mixed_precision="bf16"), {"dtype": "bfloat16"}, None),
    "fp16": (
        dict(mixed_precision="fp16"),
        {},
        f"accelerate: mixed_precision fp16 {OTHER_TYPE}; write -p dtype float16",
    ),
    "dynamo": (
        dict(dynamo_config={"dynamo_backend": "INDUCTOR"}),
        {},
        "accelerate: dynamo_backend inductor is asked for; expected no, since nothing is compiled "
        "here; start with accelerate launch --dynamo_backend no",
    ),
}


def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "MEGATRON", "PARALLELISM_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("case", ASKED)
def test_a_configuration_of_accelerate(case, tmp_path, monkeypatch):
    clean(monkeypatch)
    config, knobs, message = ASKED[case]
    for name, value in environment(tmp_path, **config).items():
        if name.startswith(("ACCELERATE_", "FSDP_", "MEGATRON", "PARALLELISM_")):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = Settings(**{"dtype": "float32", "device": "cpu", **knobs})
    if message is None:
        assert check_launch(settings) == "ddp"
        return
    with pytest.raises(WrongInput) as wrong:
        check_launch(settings)
    assert str(wrong.value) == message


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "ACCELERATE_USE_DEEPSPEED",
            "true",
            f"accelerate: distributed_type: DEEPSPEED is asked for; {WHOLE}",
        ),
        (
            "ACCELERATE_USE_PARALLELISM_CONFIG",
            "true",
            f"accelerate: parallelism_config is asked for; {WHOLE}",
        ),
        (
            "ACCELERATE_MIXED_PRECISION",
            "fp8",
            f"accelerate: mixed_precision fp8 {OTHER_TYPE}; take it out there",
        ),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            "accelerate: gradient_accumulation_steps 4 is asked for; expected 1, since a run has a "
            "knob for it; take it out there, and write -p accumulate 4",
        ),
    ],
)
def test_what_a_variable_asks_for(name, value, message, monkeypatch, runs):
    """The launchers for DeepSpeed and others set these variables.

    The run fails with the reason, and nothing is computed.
    """
    clean(monkeypatch)
    monkeypatch.setenv(name, value)
    for engine in ("lab", "trl"):
        with pytest.raises(WrongInput) as wrong:
            lab.run("sft", engine=engine, data="sums", steps=2, eval_rows=4, dtype="float32")
        assert str(wrong.value) == message
    assert [
        (run.status, run.read()["reason"], run.lines(), run.summary) for run in all_runs(runs)
    ] == [("failed", message, [], {})] * 2


def test_a_run_of_one_process_records_none(monkeypatch, runs):
    clean(monkeypatch)
    run = lab.run("sft", data="sums", steps=0, eval_rows=1)
    assert run.read()["parallel"] == "none"
    assert run.read()["processes"] == 1


def launched(tmp_path, config, *words):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**BASE, **config}))
    command = [
        POLM.parent / "accelerate",
        "launch",
        "--config_file",
        tmp_path / "config.yaml",
        "--main_process_port",
        "0",
        "--no_python",
        POLM,
        "run",
        "sft",
        "--bare",
        "--out",
        tmp_path / "runs",
    ]
    short = [
        "-p",
        "steps",
        "1",
        "-p",
        "eval_rows",
        "1",
        "-p",
        "data",
        "sums",
        "-p",
        "batch_size",
        "4",
    ]
    return subprocess.run(
        [*command, *short, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_are_launched_with_fsdp(tmp_path):
    done = launched(tmp_path, dict(distributed_type="FSDP", fsdp_config=FSDP))
    errors = {line for line in done.stderr.splitlines() if line.startswith("polm: ")}
    assert done.returncode
    assert errors == {f"polm: accelerate: distributed_type: FSDP is asked for; {WHOLE}"}
    [run] = all_runs(tmp_path / "runs")
    record = json.loads((run.path / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["reason"].startswith("accelerate: distributed_type: FSDP")
    assert not run.lines()
    assert record["summary"] == {}
