"""Check every command in README and CONTRIBUTING.

- Those of polm are run; training ones with fewer steps and without their notebook, which other
  tests run.
- Targets of make are resolved, and pytest's files and names are collected.
- Everything that is only mentioned must exist. Adding a method is run in test_template.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import ROOT

BIN = Path(sys.executable).parent
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")
}
PROGRAMS = (
    "polm",
    "polm_site",
    "make",
    "pytest",
    "nbdev_export",
    "nbdev_clean",
    "nbdev_test",
    "pip",
    "python",
    "accelerate",
    "cp",
    "sed",
    "playwright",
    "pre-commit",
    "git",
)


def blocks(text: str) -> list[str]:
    "Lines of indented or fenced code, Python and trees left out."
    fenced = re.findall(r"```(\w*)\n(.*?)```", text, re.S)
    lines = [
        line
        for language, body in fenced
        if language in ("bash", "sh", "console")
        for line in body.split("\n")
    ]
    lines += re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return [line.removeprefix("$ ").split("  #")[0].strip() for line in lines if line.strip()]


def mentions(text: str) -> list[str]:
    "Commands in running text: inline code that begins with a program."
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [
        c
        for c in inline
        if shlex.split(c.replace("'", ""))[:1] and Path(c.split()[0]).name in PROGRAMS and " " in c
    ]


def program(line: str) -> list[str]:
    words = [w for w in shlex.split(line)]
    while words and "=" in words[0] and not words[0].startswith(("-", ".", "/")):
        words.pop(0)  # VARIABLE=value before a command
    return [Path(words[0]).name, *words[1:]] if words else [""]


# these wait, or need a run: the options of the command have to exist
HELP_ONLY = ("lab", "app", "resume", "stop", "show", "compare", "sweep")
COMMANDS = sorted({(page, line) for page, text in PAGES.items() for line in blocks(text)})
MENTIONED = sorted({(page, line) for page, text in PAGES.items() for line in mentions(text)})


def call(*words, **more):
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        timeout=300,
        **more,
    )


def check(words: list[str]):
    "Run a command, or as much of it as a test may; raises AssertionError."
    name, *rest = words
    if name == "make":
        done = call("make", "--dry-run", *rest)
    elif name == "polm" and rest[:1] == ["run"]:
        short = [
            re.sub(r"^\d+$", "2", w) if before == "steps" else w
            for before, w in zip(["", *rest], rest)
        ]
        done = call(
            BIN / "polm",
            *short,
            *([] if "--bare" in rest else ["--bare"]),
            *([] if "eval_rows" in rest else ["-p", "eval_rows", 4]),
        )
    elif name == "polm" and rest and rest[0] in HELP_ONLY:
        done = call(BIN / "polm", rest[0], "--help")
        for option in re.findall(r"(?<=\s)--?[a-z][\w-]*", " " + " ".join(rest)):
            assert option in done.stdout, f"{option} is no option of polm {rest[0]}"
    elif name == "polm":
        done = call(BIN / "polm", *rest)
    elif name == "polm_site" and rest[0] == "execute":
        # takes minutes: it is enough that it looks for its page
        done = call(BIN / "polm_site", "execute", "no/such/page")
        assert done.returncode == 2
        assert "no/such/page" in done.stderr
        return
    elif name == "polm_site":
        assert rest[0] in ("write", "check", "build", "filter", "seeds", "real")
        if rest[0] in ("seeds", "real"):  # its runs take minutes
            done = call(BIN / "polm_site", rest[0], "nothing")
            assert done.returncode == 2
            assert "nothing" in done.stderr
            return
        done = (
            call(BIN / "polm_site", "check" if rest == ["build"] else rest[0])
            if rest != ["filter"]
            else call("true")
        )
    elif name == "pytest":
        done = call(
            BIN / "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            *[w.replace("mine", "sft") for w in rest if w not in ("-q",)],
        )
    elif name == "nbdev_test":
        paths = [w for w in rest if w.endswith(".ipynb")]
        assert all((ROOT / p).is_file() for p in paths)
        assert (BIN / name).is_file()
        return
    elif name == "pip":
        extras = re.findall(r"polm_lab\[(\w+)\]", " ".join(rest))
        settings = ConfigParser(interpolation=None)
        settings.read(ROOT / "settings.ini", encoding="utf-8")
        assert all(f"{e}_requirements" in settings["DEFAULT"] for e in extras), extras
        return
    else:
        assert name in PROGRAMS, f"no test knows {name!r}"
        return
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-800:]}{done.stderr[-800:]}"


@pytest.mark.parametrize(
    ("page", "line"), COMMANDS, ids=lambda v: v if len(str(v)) < 60 else str(v)[:57] + "..."
)
def test_a_command_runs(page, line):
    for part in line.split(" && "):
        check(["sft" if word == "mine" else word for word in program(part)])


@pytest.mark.parametrize(
    ("page", "line"), MENTIONED, ids=lambda v: v if len(str(v)) < 60 else str(v)[:57] + "..."
)
def test_a_command_in_the_text_is_there(page, line):
    words = program(line)
    if words[0] == "polm":
        assert call(BIN / "polm", words[1], "--help").returncode == 0, f"polm has no {words[1]}"
        check(["polm", *words[1:]]) if words[1] in (
            "sweep",
            "resume",
            "stop",
            "show",
            "compare",
            "app",
            "lab",
        ) else None
    elif words[0] in ("make", "pytest", "pip", "nbdev_test", "polm_site"):
        check(words)


def test_there_are_commands_and_a_wrong_one_is_caught():
    assert len(COMMANDS) >= 8
    assert {"README.md", "CONTRIBUTING.md"} == {page for page, _ in COMMANDS}
    for wrong in (
        ["make", "rnu"],
        ["polm", "rnus"],
        ["polm", "run", "dop"],
        ["polm", "sweep", "--grit"],
        ["pytest", "tests/test_nothing.py"],
        ["pip", "install", "polm_lab[nothing]"],
        ["nbdev_test", "nbs/core/x.ipynb"],
    ):
        with pytest.raises(AssertionError):
            check(wrong)


def test_the_python_of_the_readme_is_what_the_package_has():
    import polm_lab as lab

    for body in re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.S):
        for node in ast.walk(ast.parse(body)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "lab"
            ):
                assert callable(getattr(lab, node.attr)), node.attr
