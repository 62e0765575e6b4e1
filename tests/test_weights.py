"""The stream of weights reads and writes the library's format.

A folder is whole or not there, and wrong input is reported in one line.
"""

import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from polm_lab.core.knobs import WrongInput
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.models.sources import model_path
from polm_lab.models.weights import DTYPES, Weights, blocks, check_alike, differences, read_header
from polm_lab.models.transform import Block, Writer, each_block, transform, walk

ODD = {  # sizes that end a tensor off every alignment
    "a": torch.arange(7, dtype=torch.uint8),
    "b": torch.randn(3, 5),
    "c": torch.randn(11, 2, 3).bfloat16(),
    "d": torch.tensor(2.5, dtype=torch.float64),
    "e": torch.randn(4).half(),
    "f": torch.arange(6).view(2, 3),
    "g": torch.tensor([True, False, True]),
    "h": torch.randn(2, 2).to(torch.float8_e4m3fn),
    "i": torch.empty(0, 4),
}


def folder(path, tensors, **config):
    "A model folder as the library writes it."
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(
        json.dumps(dict(model_type="llama", vocab_size=8, dtype="float32", **config))
    )
    return path


def plan_of(tensors):
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def listing(path):
    return sorted(p.name for p in path.iterdir())


def test_reading_is_the_librarys_for_every_dtype(tmp_path):
    weights = Weights(folder(tmp_path / "m", ODD))
    assert weights.entries.keys() == ODD.keys()
    for name, value in ODD.items():
        read = weights.read(name)
        assert read.dtype == value.dtype, name
        assert torch.equal(read.view(torch.uint8), value.reshape(read.shape).view(torch.uint8)), (
            name
        )
        weights.release(name)
        assert torch.equal(
            weights.read(name).view(torch.uint8), value.reshape(read.shape).view(torch.uint8)
        ), name
    assert torch.equal(weights.read("c", 2, 5), ODD["c"][2:5])


def test_a_file_whose_tensors_are_not_aligned(tmp_path):
    data = torch.randn(3).numpy().tobytes()
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * (1 - len(header) % 2)
    path = folder(tmp_path / "m", {"x": torch.zeros(3)})
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    assert Weights(path).read("x").numpy().tobytes() == data


@pytest.mark.parametrize("shard_bytes", [10**9, 100, 1])
def test_writing_is_read_by_the_library(tmp_path, shard_bytes):
    like = folder(tmp_path / "like", {"x": torch.zeros(1)}, torch_dtype="float32")
    (
        (like / "tokenizer.json").write_text("{}"),
        (like / "chat_template.jinja").write_text("hello"),
        (like / "generation_config.json").write_text("{}"),
        (like / "pytorch_model.bin").write_text("no"),
    )
    with Writer(tmp_path / "out", plan_of(ODD), like, shard_bytes=shard_bytes) as writer:
        for name, value in reversed(ODD.items()):
            for start, stop in reversed(blocks(tuple(value.shape), 6)):
                writer.write(
                    name,
                    value.reshape(-1, *value.shape[1:])[start:stop]
                    if value.ndim
                    else value.view(1),
                    start,
                )
    files = list((tmp_path / "out").glob("*.safetensors"))
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    assert found.keys() == ODD.keys()
    assert all(
        found[n].dtype == v.dtype
        and found[n].shape == v.shape
        and torch.equal(found[n].flatten().view(torch.uint8), v.flatten().view(torch.uint8))
        for n, v in ODD.items()
    )
    assert {
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "config.json",
    } <= set(listing(tmp_path / "out"))
    assert "pytorch_model.bin" not in listing(tmp_path / "out")
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == ODD.keys()
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in ODD.values())
    assert all(
        torch.equal(
            Weights(tmp_path / "out").read(n).flatten().view(torch.uint8),
            v.flatten().view(torch.uint8),
        )
        for n, v in ODD.items()
    )


def test_a_rewritten_model_loads_with_transformers(tmp_path):
    tiny = Weights("tiny")
    transform(
        [tiny],
        tmp_path / "half",
        lambda name: lambda block: block.part(0),
        dtype=torch.bfloat16,
        shard_bytes=1_000_000,
    )
    loaded = load_model(tmp_path / "half", dtype="float32", device="cpu").state_dict()
    expected = load_file(tiny.folder / "model.safetensors")
    assert all(torch.equal(loaded[n], v.bfloat16().float()) for n, v in expected.items())
    assert load_tokenizer(tmp_path / "half").chat_template == load_tokenizer("tiny").chat_template
    assert len(list((tmp_path / "half").glob("model-*"))) > 2


def test_blocks_cover_a_tensor_once():
    for shape in [(7, 5), (1, 9), (3, 2, 4), (0, 4), (5,), ()]:
        for entries in (1, 6, 1000):
            found = blocks(shape, entries)
            assert [i for start, stop in found for i in range(start, stop)] == list(
                range(shape[0] if shape else 1)
            ), shape


def test_both_threads_work_and_the_first_error_ends_it():
    before, seen = torch.get_num_threads(), []
    assert walk(range(20), lambda i: i * i, threads=3) == [i * i for i in range(20)]

    def fail(i):
        seen.append(i)
        time.sleep(0.01)
        if i == 2:
            raise WrongInput("two")

    with pytest.raises(WrongInput, match="two"):
        walk(range(500), fail, threads=2)
    assert len(seen) < 30
    assert torch.get_num_threads() == before


def test_threads_change_nothing(tmp_path):
    make = lambda name: lambda block: block.part(0) * 0.3 + block.part(1).sin()  # noqa: E731
    tiny = [Weights("tiny"), Weights("tiny")]
    one, three = (transform(tiny, tmp_path / str(n), make, threads=n) for n in (1, 3))
    assert (one / "model.safetensors").read_bytes() == (three / "model.safetensors").read_bytes()


def test_memory_is_given_back(tmp_path):
    """Resident memory after a walk over 128 MiB is within 24 MiB of what it was.

    Without `release` all of the file would stay mapped.
    """
    code = """
import sys, torch
from polm_lab.models.transform import *; from polm_lab.models.weights import *
from polm_lab.models.sources import model_path
from pathlib import Path
here = Path(sys.argv[1])
plan = {f"layer.{i}": (torch.float32, (1024, 1024)) for i in range(32)}
with Writer(here / "a", plan, model_path("tiny")) as writer:
    for name in plan: writer.write(name, torch.ones(1024, 1024))
def high():
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024
transform([Weights("tiny")], here / "warm", lambda name: lambda block: block.part(0))
before = high()
transform([Weights(here / "a")], here / "b", lambda name: lambda block: block.part(0))
print(high() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 24


# A folder is whole or not there -------------------------------------------------------------------


def test_an_error_leaves_nothing_and_keeps_what_was_there(tmp_path):
    like = folder(tmp_path / "like", ODD)
    old = folder(tmp_path / "out", {"b": torch.ones(2)})
    # rows are missing; an error
    for action in (lambda w: w.write("b", ODD["b"][:1]), lambda w: 1 / 0):
        with (
            pytest.raises((RuntimeError, ZeroDivisionError)),
            Writer(old, plan_of(ODD), like) as writer,
        ):
            action(writer)
        assert listing(tmp_path) == ["like", "out"]
        assert torch.equal(load_file(old / "model.safetensors")["b"], torch.ones(2))


def test_a_killed_merge_leaves_no_model_and_the_next_one_works(tmp_path):
    code = """
import sys, time
from polm_lab.models.transform import *; from polm_lab.models.weights import *
def slow(name):
    print(name, flush=True); time.sleep(0.2)
    return lambda block: block.part(0)
transform([Weights("tiny")], sys.argv[1] + "/out", slow)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    )
    for _ in range(4):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL), process.wait()
    assert listing(tmp_path) == [".out.new"]
    assert "config.json" not in listing(tmp_path / ".out.new")
    with pytest.raises(WrongInput):
        load_model(tmp_path / ".out.new")
    transform([Weights("tiny")], tmp_path / "out", lambda name: lambda block: block.part(0))
    assert listing(tmp_path) == ["out"]
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys() == Weights("tiny").entries.keys()
    )


FULL = """
mount -t tmpfs -o size=5m tmpfs {disk}
{python} - <<'END'
import shutil
from polm_lab.core.knobs import WrongInput
from polm_lab.models.transform import *; from polm_lab.models.weights import *
try:
    transform([Weights("tiny")], "{disk}/out", lambda name: lambda block: block.part(0))
except WrongInput as error:
    print("early:", error)
# somebody else fills it on the way
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)
try:
    transform([Weights("tiny")], "{disk}/out", lambda name: lambda block: block.part(0))
except OSError as error:
    print("late:", error)
END
ls -A {disk} | wc -l
"""


def test_a_full_disk(tmp_path):
    before = (model_path("tiny") / "model.safetensors").read_bytes()
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        [
            "unshare",
            "-rm",
            "bash",
            "-e",
            "-c",
            FULL.format(disk=tmp_path / "disk", python=sys.executable),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    if "unshare" in done.stderr:
        pytest.skip(f"no mount namespaces here: {done.stderr}")
    early, late, left = done.stdout.strip().split("\n")
    assert early.startswith("early:")
    assert "5 MiB left and 7 are needed" in early
    assert late.startswith("late:")
    assert "No space left on device while writing" in late
    assert "nothing was left behind" in late
    assert left.strip() == "0"
    assert (model_path("tiny") / "model.safetensors").read_bytes() == before


# Wrong input --------------------------------------------------------------------------------------


def refused(action, *words):
    with pytest.raises(WrongInput) as error:
        action()
    text = str(error.value)
    assert "\n" not in text, text
    assert all(word in text for word in words), text


def test_files_that_cannot_be_read(tmp_path):
    path = folder(tmp_path / "m", ODD)
    file, whole = path / "model.safetensors", (path / "model.safetensors").read_bytes()

    def damaged(content, *words):
        file.write_bytes(content)
        refused(lambda: Weights(path), "model.safetensors", *words)

    damaged(whole[:-3], "truncated")
    damaged(whole[:100], "truncated")
    damaged(b"", "truncated")
    damaged(b"\xff" * 64, "truncated")
    damaged(struct.pack("<Q", 8) + b"{no json" + whole, "damaged")
    damaged(struct.pack("<Q", 2) + b"[]" + whole, "damaged")
    damaged(whole.replace(b'"F16"', b'"F12"'), "F12")
    file.unlink()
    refused(lambda: Weights(path), "No such file")
    (path / "model.safetensors.index.json").write_text("[1]")
    refused(lambda: Weights(path), "index")
    (path / "model.safetensors.index.json").unlink(), (path / "config.json").unlink()
    refused(lambda: Weights(path), "config.json")
    (path / "adapter_config.json").write_text("{}")
    refused(lambda: Weights(path), "adapter")
    refused(lambda: Weights(tmp_path / "nothing"), "no such folder")


def test_what_differs_is_said(tmp_path):
    def other(name, tensors=None, **config):
        return Weights(folder(tmp_path / name, ODD if tensors is None else tensors, **config))

    first = other("first")
    assert not differences(other("same"), first)
    assert not check_alike([first, first])
    refused(
        lambda: check_alike(
            [first, other("less", {k: v for k, v in ODD.items() if k not in "bc"})]
        ),
        "less: lacks b and 1 more",
    )
    refused(
        lambda: check_alike([first, other("more", ODD | {"z": torch.ones(1)})]), "has in excess z"
    )
    refused(
        lambda: check_alike([first, other("shape", ODD | {"b": torch.ones(3, 6)})]),
        "b is [3, 6], not [3, 5]",
    )
    refused(
        lambda: check_alike([first, other("type", ODD | {"b": ODD["b"].half()})]),
        "b is float16, not float32",
    )
    refused(
        lambda: check_alike([first, other("layers", num_hidden_layers=3)]),
        "num_hidden_layers is 3, not None",
    )
    check_alike([first, Weights(tmp_path / "type")], dtypes=False)
    refused(
        lambda: check_alike(
            [first, other("kind", ODD | {"b": torch.ones(3, 5, dtype=torch.int32)})], dtypes=False
        ),
        "b is int32, not float32",
    )
    check_alike([first, other("rows", ODD | {"b": torch.ones(9, 5)})], rows_of=["b"])


def test_integers_that_differ_and_numbers_that_are_none(tmp_path):
    def sum_of(a, b):
        return transform(
            [Weights(folder(tmp_path / f"{a}-{i}", t)) for i, t in enumerate(b)],
            tmp_path / "out",
            lambda name: lambda block: sum(block.parts()),
        )

    ints = {"f": torch.arange(6).view(2, 3), "x": torch.ones(2)}
    assert torch.equal(load_file(sum_of("ok", [ints, ints]) / "model.safetensors")["f"], ints["f"])
    refused(
        lambda: sum_of("int", [ints, ints | {"f": torch.ones(2, 3, dtype=torch.long)}]),
        "f holds int64 and differs",
    )
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(3, 4)
        x[2, 1] = bad
        refused(
            lambda: sum_of(f"bad{bad}", [{"x": torch.ones(3, 4)}, {"x": x}]),
            "-1: x[2, 1] is " + str(bad),
        )
    shutil.rmtree(tmp_path / "out")
    huge = {"x": torch.full((4, 4), 3e38)}  # their sum is infinite, they are not
    assert torch.equal(
        next(iter(each_block([Weights(folder(tmp_path / "huge", huge))], "x"))).part(0), huge["x"]
    )


def test_outputs_that_cannot_be(tmp_path):
    like = folder(tmp_path / "like", ODD)
    refused(lambda: Writer(like, plan_of(ODD), like), "this is an input")
    (tmp_path / "file").write_text("")
    refused(lambda: Writer(tmp_path / "file", plan_of(ODD), like), "a file is in the way")
    refused(lambda: Writer(tmp_path / "file" / "below", plan_of(ODD), like), "cannot be written")
    refused(
        lambda: Writer(tmp_path / "large", {"x": (torch.float32, (1 << 26, 1 << 20))}, like),
        "are needed",
    )
    assert listing(tmp_path) == ["file", "like"]


def test_part_is_a_copy(tmp_path):
    path = folder(tmp_path / "m", {"x": torch.ones(2, 2)})
    Block([Weights(path)], "x", 0, 2).part(0).mul_(5)
    assert torch.equal(Weights(path).read("x"), torch.ones(2, 2))
    assert read_header(path / "model.safetensors")["x"].shape == (2, 2)
    assert len(DTYPES) == 15
