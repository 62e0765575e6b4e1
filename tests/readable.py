"""Measure how readable the source is: `python tests/readable.py`, and with `--list WHAT` where.

It looks at the notebooks of nbs/, at tests/*.py and at benchmarks/*.py; prose also in README.md and
CONTRIBUTING.md. Exit status 1 if a bar is missed.

- long: share of lines of code above 100 characters; too long: lines above 120.
- nested: comprehensions inside of a comprehension, in 1,000 lines of code.
- joined: asserts of conditions joined by `and`, whose failure does not say which.
- words: words that the style avoids, in prose, docstrings, comments and messages.
- sentences: share of sentences of prose and docstrings with more than 25 words.
"""

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BARS = {"long": 0.02, "too long": 0, "nested": 3.0, "joined": 0, "words": 0, "sentences": 0.03}
AVOIDED = (
    "stands",
    "bears",
    "beside",
    "of which",
    "in place of",
    "all the same",
    "gone on with",
    "mend",
    "mends",
    "mended",
    "mending",
    "dear",
    "likelier",
    "told",
    "said",
)
QUOTED = (  # what the embedded model was trained on, and what chat models write
    "stands on which river",
    "stands on the river",
    "correct as it stands",
    "is|stands|written",
)
WORDS = re.compile(r"\b(?:" + "|".join(AVOIDED) + r")\b", re.IGNORECASE)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class Found:
    "What was found, as places with the text there."

    lines: int = 0
    sentences: int = 0
    places: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in BARS})

    def add(self, name: str, where: str, text: str):
        self.places[name].append(f"{where}: {' '.join(text.split())[:160]}")

    def values(self) -> dict[str, float]:
        "The number for each bar."
        counts = {name: len(places) for name, places in self.places.items()}
        counts["long"] /= max(1, self.lines)
        counts["nested"] *= 1000 / max(1, self.lines)
        counts["sentences"] /= max(1, self.sentences)
        return counts


def plain(markdown: str) -> str:
    "Markdown as running text: code, formulas, tables, links' targets and HTML are taken out."
    for pattern in (r"```.*?```", r"\$\$.*?\$\$", r"<!--.*?-->", r"^\|.*$", r"^---\n.*?^---$"):
        markdown = re.sub(
            pattern, "\n\n", markdown, flags=re.DOTALL * (pattern[0] != "^") | re.MULTILINE
        )
    markdown = re.sub(r"`[^`\n]*`|\$[^$\n]*\$", " X ", markdown)
    markdown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return re.sub(r"<[^>\n]+>|[*_]{1,3}", " ", markdown)


def sentences(text: str) -> list[str]:
    "The sentences of running text; a heading, an item of a list and a paragraph end one."
    found = []
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*>]|\d+\.)\s)|\n(?=#)|(?<=\S)\n(?=#)", text):
        lines = " ".join(block.split()).lstrip("#>-* ")
        for part in re.split(r"(?<=[.!?])[\"”)]*\s+(?=[A-Z\"“(])", lines):
            if len(part.split()) > 2:
                found.append(part)
    return found


def look_at_prose(found: Found, where: str, text: str):
    "Count sentences, and note long ones and avoided words."
    text = plain(text)
    for one in sentences(text):
        found.sentences += 1
        if len(re.findall(r"\w[\w'’-]*", one)) > 25:
            found.add("sentences", where, one)
    look_for_words(found, where, text)


def look_for_words(found: Found, where: str, text: str):
    for phrase in QUOTED:
        text = text.replace(phrase, "")
    for word in WORDS.finditer(text):
        around = text[max(0, word.start() - 50) : word.end() + 50]
        found.add("words", where, around)


def look_at_code(found: Found, where: str, source: str):
    "Count lines, and note long ones, nested comprehensions, docstrings, comments and messages."
    lines = source.splitlines()
    found.lines += len(lines)
    for number, line in enumerate(lines, 1):
        if len(line) > 100:
            found.add("long", f"{where}:{number}", line)
        if len(line) > 120:
            found.add("too long", f"{where}:{number}", line)
    clean = "\n".join("" if re.match(r"\s*[%!]", line) else line for line in lines)
    try:
        tree = ast.parse(clean)
    except SyntaxError:
        return
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    docstrings.add(id(first.value))
                    text = re.sub(r"^    +(?=\S)", "", first.value.value, flags=re.MULTILINE)
                    look_at_prose(found, f"{where}:{first.lineno}", text)
        if isinstance(node, COMPREHENSIONS):
            inner = sum(isinstance(n, COMPREHENSIONS) for n in ast.walk(node)) - 1
            if inner:
                found.add("nested", f"{where}:{node.lineno}", ast.unparse(node))
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.BoolOp):
            if isinstance(node.test.op, ast.And):
                found.add("joined", f"{where}:{node.lineno}", ast.unparse(node))
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if text and id(node) not in docstrings and len(node.value.split()) > 3:
            look_for_words(found, f"{where}:{node.lineno}", node.value)
    for token in tokenize.generate_tokens(io.StringIO(clean + "\n").readline):
        if token.type == tokenize.COMMENT:
            look_for_words(found, f"{where}:{token.start[0]}", token.string)


def look_at_notebook(found: Found, where: str, path: Path):
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source, place = "".join(cell["source"]), f"{where}#{number}"
        if cell["cell_type"] == "markdown":
            look_at_prose(found, place, source)
        elif cell["cell_type"] == "code":
            look_at_code(found, place, source)


def measure(root: Path = ROOT) -> Found:
    "All that is measured of a checkout."
    found = Found()
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            look_at_notebook(found, path.relative_to(root).as_posix(), path)
    for folder in ("tests", "benchmarks"):
        for path in sorted((root / folder).glob("*.py")):
            if path.stem not in ("readable", "test_readable"):  # they name the words
                look_at_code(found, path.relative_to(root).as_posix(), path.read_text("utf-8"))
    for name in ("README.md", "CONTRIBUTING.md"):
        look_at_prose(found, name, (root / name).read_text(encoding="utf-8"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", choices=sorted(BARS), help="print the places")
    parser.add_argument("--under", default="", help="only places that begin with this")
    options = parser.parse_args()
    found = measure()
    if options.list:
        for place in found.places[options.list]:
            if place.startswith(options.under):
                print(place)
        return 0
    print(f"{found.lines:,} lines of code, {found.sentences:,} sentences")
    values = found.values()
    for name, value in values.items():
        print(f"{name:10} {value:8.4g}   bar {BARS[name]:g}   {len(found.places[name])} places")
    return int(any(value > BARS[name] for name, value in values.items()))


if __name__ == "__main__":
    sys.exit(main())
