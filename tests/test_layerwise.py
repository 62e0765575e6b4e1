"A model that is larger than memory: finished blocks, and codes, wait in files of the run."

import copy
from types import SimpleNamespace

import pytest
import torch

import polm_lab as lab
from polm_lab.core.run import Stopped
from polm_lab.efficiency.quantize import Codes, Quantize, quantize_model
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.training.layerwise import SHELF, calibration, shelves

LITTLE = dict(calibration_samples=4, max_length=64, eval_rows=4, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def windows():
    return calibration(load_tokenizer("tiny"), "chat", 4, 64)


def tiny():
    return load_model("tiny", dtype="float32", device="cpu").eval()


def place(tmp_path, writes=True):
    "What `shelves` needs of a run."
    return SimpleNamespace(path=tmp_path, writes=writes)


def test_a_block_is_the_same_after_it_went_into_a_file(tmp_path):
    model, whole = tiny(), tiny()
    ids = torch.arange(30)[None]
    with shelves(place(tmp_path), model) as shelve:
        for number in range(5):
            with torch.no_grad():
                model.model.layers[number].mlp.up_proj.weight.mul_(0.5)
            shelve(number)
            assert (tmp_path / SHELF / f"{number}.safetensors").is_file()
        shelve(5)  # there is none: methods may report more
        for layer in whole.model.layers:
            layer.mlp.up_proj.weight.data *= 0.5
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(model(ids).logits, whole(ids).logits)  # what is mapped stays


def test_what_is_written_next_changes_neither_file(tmp_path):
    "A block in a file can be changed again, and so can the next one; the files stay."
    model = tiny()
    with shelves(place(tmp_path), model) as shelve:
        shelve(0)
        file = tmp_path / SHELF / "0.safetensors"
        before = file.read_bytes()
        with torch.no_grad():
            for layer in model.model.layers[:2]:
                layer.mlp.up_proj.weight.zero_()
        assert file.read_bytes() == before
    assert tiny().model.layers[1].mlp.up_proj.weight.count_nonzero() > 0


def test_the_files_are_gone_after_a_failure_and_after_a_kill(tmp_path):
    (tmp_path / SHELF).mkdir()
    (tmp_path / SHELF / "old.safetensors").write_text("of a run that was killed")
    with pytest.raises(RuntimeError):
        with shelves(place(tmp_path), tiny()) as shelve:
            assert list((tmp_path / SHELF).iterdir()) == []
            shelve(0)
            raise RuntimeError
    assert not (tmp_path / SHELF).exists()


def test_a_process_that_does_not_write_has_no_files(tmp_path):
    model = tiny()
    kept = [p.data_ptr() for p in model.parameters()]
    with shelves(place(tmp_path, writes=False), model) as shelve:
        shelve(0)
        assert list(tmp_path.iterdir()) == []
    assert [p.data_ptr() for p in model.parameters()] == kept


@pytest.mark.parametrize("algorithm", ["rtn", "squeezellm", "awq"])
def test_codes_that_wait_in_files_are_those_of_memory(algorithm, windows, tmp_path):
    found, (here, there) = {}, (Codes(), Codes(tmp_path))
    settings = Quantize(algorithm=algorithm, bits=3)
    for _ in quantize_model(tiny(), windows, settings, found):
        here.take(copy.copy(found))
        there.take(found)
        assert found == {}
    assert here.bits == there.bits
    assert here.facts == there.facts
    assert here.tensors.keys() == there.tensors.keys()
    assert all(torch.equal(t, there.tensors[name]) for name, t in here.tensors.items())
    assert len(list(tmp_path.iterdir())) == len(here.bits) == 35


@pytest.mark.parametrize(
    "method, values",
    [("quantize", dict(bits=3)), ("prune", dict(algorithm="sparsegpt")), ("slim", {})],
)
def test_a_run_leaves_no_files_behind(method, values, tmp_path):
    run = lab.run(method, **values, **LITTLE, out=tmp_path)
    assert not (run.path / SHELF).exists()
    model = load_model(str(run.path), dtype="float32", device="cpu")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_run_that_is_stopped_leaves_no_files_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("polm_lab.core.run.Run.stop_requested", lambda self: True)
    with pytest.raises(Stopped):
        lab.run("quantize", **LITTLE, out=tmp_path)
    assert not list(tmp_path.glob(f"*/{SHELF}"))
