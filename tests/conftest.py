"What tests share."

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polm_lab.core.knobs import WrongInput
from polm_lab.rewards.sandbox import missing

ROOT = Path(__file__).parent.parent
POLM = Path(sys.executable).parent / "polm"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    "A test that runs code of a model is skipped where no sandbox works, and says so; with POLM_SANDBOX=required (as in CI) it fails."
    try:
        return (yield)
    except WrongInput as wrong:
        if "sandbox: " in str(wrong) and missing() and os.environ.get("POLM_SANDBOX") != "required":
            pytest.skip(str(wrong))
        raise


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    "Runs of a test go to a folder of its own."
    folder = tmp_path / "runs"
    monkeypatch.setenv("POLM_RUNS", str(folder))
    monkeypatch.delenv("POLM_RUN", raising=False)
    return folder


@pytest.fixture
def polm(runs):
    "The command line in a process of its own: `polm('run', 'sft', ...)`."

    def call(*words, timeout=300, **env):
        return subprocess.run([POLM, *map(str, words)], capture_output=True, text=True, timeout=timeout, env={**os.environ, **env})

    return call
