"Where a reward is read: at the last token of the mask, whichever side is padded, and with what."

import json

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)
from zoo import make

import polm_lab as lab
from polm_lab.rewards.learned import Scorer, load_reward, padding_for, read_by_mask, score_rows
from polm_lab.data.encode import encode
from polm_lab.core.knobs import WrongInput
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.models.save import save_model
from polm_lab.core.run import Run

EOS = 2
FAMILIES = (
    "llama",
    "qwen3",
    "gemma",
    "phi3",
    "gpt2",
    "opt",
    "gpt_neox",
    "bloom",
    "mpt",
    "falcon",
    "mixtral",
)
SHORT = dict(
    data="sums",
    steps=2,
    batch_size=4,
    eval_rows=4,
    max_length=48,
    device="cpu",
    dtype="float32",
    learning_rate=1e-3,
    warmup=0.0,
)


def scored(family, folder, adapter="none"):
    "A tiny model of `family` with a scalar head of some size."
    save_model(make(family), None, folder)
    model = load_model(folder, dtype="float32", device="cpu", head="score", adapter=adapter).eval()
    whole = model.get_base_model() if adapter != "none" else model
    whole.config.pad_token_id = EOS
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "score" in name or "lora" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    return model


def texts():
    "Rows of 5 to 12 tokens; some end in EOS, one in two."
    found = [
        torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in (5, 12, 8, 9)
    ]
    found[0][-1:], found[2][-2:] = [EOS], [EOS, EOS]
    return found


def padded(rows, side):
    "Ids and mask, padded with EOS."
    time = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        rest = time - len(row)
        ids.append(row + [EOS] * rest if side == "right" else [EOS] * rest + row)
        mask.append([1] * len(row) + [0] * rest if side == "right" else [0] * rest + [1] * len(row))
    return torch.tensor(ids), torch.tensor(mask)


def plainly(model, row) -> torch.Tensor:
    "The head at the last token of one text alone."
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    backbone = getattr(whole, whole.base_model_prefix)
    return whole.score(backbone(input_ids=torch.tensor([row]), use_cache=False)[0][0, -1])[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_score_is_that_of_the_last_real_token(family, tmp_path):
    model = scored(family, tmp_path / "model")
    expected = torch.stack([plainly(model, row) for row in texts()])
    assert expected.std() > 0.05
    for side in ("right", "left"):
        assert torch.allclose(Scorer(model)(*padded(texts(), side)), expected, atol=1e-5)
    assert torch.allclose(
        score_rows(Scorer(model), [{"input_ids": row} for row in texts()], EOS), expected, atol=1e-5
    )
    ids, mask = padded(texts(), "right")
    wrong = model(input_ids=ids, attention_mask=mask).logits[:, 0]  # what transformers reads
    # rows that do not end in EOS
    assert (wrong - expected).abs()[[0, 2]].min() > 1e-3
    assert (wrong - expected).abs()[[1, 3]].max() < 1e-5


@torch.no_grad()
def test_an_adapter_is_read_the_same_way(tmp_path):
    model = scored("llama", tmp_path / "model", "lora:r=2")
    expected = torch.stack([plainly(model, row) for row in texts()])
    with model.disable_adapter():
        assert (torch.stack([plainly(model, row) for row in texts()]) - expected).abs().max() > 1e-2
    for side in ("right", "left"):
        assert torch.allclose(Scorer(model)(*padded(texts(), side)), expected, atol=1e-5)


def test_gradients_are_those_of_each_text_alone(tmp_path):
    model = scored("llama", tmp_path / "model")
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    found = []
    for side in ("right", "left", None):
        model.zero_grad()
        scores = (
            Scorer(model)(*padded(texts(), side))
            if side
            else torch.stack([plainly(model, row) for row in texts()])
        )
        (weights * scores).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in found[:2]:
        assert (other - found[2]).norm() < 1e-5 * found[2].norm()


def test_a_call_of_the_model_itself_reads_by_the_mask(tmp_path):
    "As TRL's trainer calls it."
    model = scored("llama", tmp_path / "model")
    ids, mask = padded(texts(), "right")
    names = list(dict(model.named_parameters()))
    expected, before = Scorer(model)(ids, mask), model(input_ids=ids, attention_mask=mask).logits
    read_by_mask(model)
    assert torch.equal(
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0], expected
    )
    assert list(dict(model.named_parameters())) == names
    del model.forward
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert not torch.allclose(before[:, 0], expected)


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pads_with_eos(tmp_path_factory):
    "The embedded model with a tokenizer that pads with EOS, on the left."
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = load_tokenizer("tiny")
    tokenizer.pad_token = tokenizer.eos_token
    save_model(load_model("tiny", dtype="float32", device="cpu"), tokenizer, folder)
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(facts | dict(padding_side="left")))
    assert load_tokenizer(folder).pad_token_id == tokenizer.eos_token_id
    return folder


@pytest.fixture(scope="module")
def run(pads_with_eos, tmp_path_factory):
    return lab.run("reward", out=tmp_path_factory.mktemp("runs"), model=str(pads_with_eos), **SHORT)


def answers():
    return ["12+5="] * 3, ["17", "9", "The answer is 17."]


def test_training_scoring_and_plain_transformers_agree(run):
    """Plain transformers read the saved model and tokenizer, and give the same scores.

    The texts come in one padded batch, on either side, and one at a time.
    """
    prompts, replies = answers()
    found = torch.tensor(
        load_reward(str(run.path), device="cpu", dtype="float32")(prompts, replies)
    )
    model = AutoModelForSequenceClassification.from_pretrained(run.path / "model").eval()
    words = AutoTokenizer.from_pretrained(run.path / "model")
    assert model.config.pad_token_id == words.pad_token_id != words.eos_token_id
    ours = load_tokenizer(run.path)
    rows = [
        encode(ours, dict(prompt=p, completion=c), "completion", 256)["input_ids"]
        for p, c in zip(prompts, replies)
    ]
    assert rows[0][-1] == words.eos_token_id
    with torch.no_grad():
        alone = torch.stack([plainly(model, row) for row in rows])
        for side in ("right", "left"):
            batch = words.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
            assert torch.allclose(model(**batch).logits[:, 0], alone, atol=1e-5)
    assert torch.allclose(found, alone, atol=1e-5)
    assert found.std() > 1e-4


def test_the_run_trained_what_it_says(run, pads_with_eos):
    "The recorded rewards are those of plain scores of the saved model."
    row = next(iter(run.lines("samples")))
    words = load_tokenizer(run.path)
    ids = encode(words, dict(prompt=row["prompt"], completion=row["completion"]), "completion", 48)[
        "input_ids"
    ]
    model = load_model(run.path, dtype="float32", device="cpu", head="any").eval()
    with torch.no_grad():
        assert row["reward"] == pytest.approx(plainly(model, ids).item(), abs=1e-4)
        assert row["length"] == len(ids)
        assert row["values"][-1] == pytest.approx(row["reward"], abs=1e-3)
        assert ids[-1] == words.eos_token_id


def test_trl_reads_where_we_do(run, pads_with_eos, tmp_path):
    theirs = lab.run("reward", out=tmp_path, model=str(pads_with_eos), engine="trl", **SHORT)
    ours = torch.tensor([row["loss"] for row in run.lines()])
    assert torch.allclose(torch.tensor([row["loss"] for row in theirs.lines()]), ours, atol=1e-4)
    assert theirs.summary["after"] == pytest.approx(run.summary["after"], abs=2e-3)
    assert (theirs.path / "model" / "model.safetensors").exists()


def test_a_model_of_others_that_pads_with_eos_is_read_by_the_mask(run, tmp_path):
    "As TRL and others save them: pad_token_id is that of EOS, in tokenizer and configuration."
    model = load_model(run.path, dtype="float32", device="cpu", head="any")
    words = load_tokenizer(run.path)
    words.pad_token = words.eos_token
    model.config.pad_token_id = words.eos_token_id
    save_model(model, words, tmp_path / "theirs")
    prompts, replies = answers()
    again = load_reward(str(tmp_path / "theirs"), device="cpu", dtype="float32")(prompts, replies)
    assert again == pytest.approx(
        load_reward(str(run.path), device="cpu", dtype="float32")(prompts, replies), abs=1e-5
    )


def test_without_another_token_plain_transformers_refuses_a_batch(tmp_path):
    words = load_tokenizer("tiny")
    special, end = sorted(words.all_special_ids), words.eos_token_id
    own = words.pad_token_id
    assert own != end
    assert padding_for(words, {end}) == own  # nothing to do
    words.pad_token = words.eos_token
    others = [t for t in special if t != end]
    assert (
        padding_for(words, set(others[:1]))
        == words.pad_token_id
        == min(set(others) - set(others[:1]))
    )
    words.pad_token = words.eos_token
    assert padding_for(words, set(special)) is None
    assert words.pad_token_id == end
    model = scored("llama", tmp_path / "model")
    model.config.pad_token_id = None
    with torch.no_grad():
        assert torch.allclose(
            model(torch.tensor([texts()[2]])).logits[0, 0], plainly(model, texts()[2]), atol=1e-6
        )
        with pytest.raises(ValueError, match="padding"):
            model(*padded(texts(), "right"))


def test_the_side_of_the_padding_stays(pads_with_eos, run, tmp_path):
    side = lambda folder: json.loads((folder / "tokenizer_config.json").read_text())["padding_side"]
    assert side(pads_with_eos) == "left" == side(run.path / "model")
    assert load_tokenizer(run.path).padding_side == "left"
    tuned = lab.run("sft", out=tmp_path, model=str(pads_with_eos), **SHORT | dict(steps=1))
    assert side(tuned.path / "model") == "left"
    assert load_tokenizer("tiny").padding_side == "right"
    assert isinstance(tuned, Run)


def test_a_model_without_such_a_head_is_refused(tmp_path):
    with pytest.raises(WrongInput, match="gives no reward"):
        load_reward("tiny")
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=1024,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
    )
    save_model(
        BertForSequenceClassification(BertConfig(**sizes)),
        load_tokenizer("tiny"),
        tmp_path / "first",
    )
    with pytest.raises(WrongInput, match="does not read the last token"):
        load_reward(str(tmp_path / "first"))
