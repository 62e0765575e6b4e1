"""The command line in processes that begin as copies of one that has imported all methods.

An import takes 8 s on a slow machine. Such a process is a real one otherwise: it can be killed, and
ends with the command's exit status.
"""

import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from polm_lab.core.method import methods

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([method.function.__module__ for method in methods().values()])


def command(words: list[str], place: str, environment: dict, out: str, errors: str):
    "Be the command line in the folder `place`, with its output appended to two files."
    import torch

    from polm_lab.cli import main

    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(out, "a") as one, open(errors, "a") as two:
        os.dup2(one.fileno(), 1)
        os.dup2(two.fileno(), 2)
    sys.argv = ["polm", *words]
    main()


def start(*words, out=os.devnull, errors=os.devnull, **environment):
    "Start the command line in a process of its own."
    words, places = [str(word) for word in words], (str(out), str(errors))
    given = (words, os.getcwd(), {**os.environ, **environment}, *places)
    process = PROCESSES.Process(target=command, args=given)
    process.start()
    return process


def call(*words, folder: Path, timeout: float = 300, **environment) -> SimpleNamespace:
    "Run the command line to its end; its output goes to files in `folder` first."
    number = len(list(folder.glob("out-*")))
    out, errors = folder / f"out-{number}", folder / f"errors-{number}"
    process = start(*words, out=out, errors=errors, **environment)
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"polm {' '.join(map(str, words))}: not over after {timeout} s")
    return SimpleNamespace(
        returncode=process.exitcode, stdout=out.read_text(), stderr=errors.read_text()
    )
