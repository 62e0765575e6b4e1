"""Reward models: closed forms, encodings of both heads, and TRL's loss.

Also the saved model, the reward that it gives to others, and wrong input.
"""

import json
import math

import pytest
import torch
from torch import nn

import polm_lab as lab
from polm_lab.alignment.reward import (
    RewardModel,
    calibration,
    encode_pairs,
    length_bias,
    margin_of,
    reward_loss,
    trl_rows,
)
from polm_lab.training.pairwise import pair_metrics
from polm_lab.rewards.learned import (
    Scorer,
    encode_sides,
    load_reward,
    members,
    score_rows,
    together,
)
from polm_lab.data.load import load_data
from polm_lab.core.knobs import WrongInput
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.rewards.functions import make_rewards, short_name

SHORT = dict(
    data="sums",
    steps=3,
    batch_size=4,
    eval_rows=4,
    max_length=64,
    device="cpu",
    dtype="float32",
    learning_rate=1e-3,
    warmup=0.0,
)
CHAT = [[dict(role="user", content="How do I make tea?")]] * 2
SAID = [[dict(role="assistant", content=text)] for text in ("Gladly! Boil water and wait.", "No.")]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return lab.run("reward", out=tmp_path_factory.mktemp("reward"), **SHORT)


# The loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_pull_is_the_chance_of_being_wrong(margin):
    chosen, rejected = (
        torch.tensor([-3.0, 0.0, 4.0], requires_grad=True),
        torch.zeros(3, requires_grad=True),
    )
    loss = reward_loss(chosen, rejected, margin)
    loss.sum().backward()
    assert torch.allclose(loss, torch.log1p(torch.exp(margin - chosen)))
    assert torch.allclose(-chosen.grad, torch.sigmoid(margin - chosen))
    assert torch.equal(chosen.grad, -rejected.grad)


def test_half_sure_is_the_same_both_ways_round_and_certain_is_bradley_terry():
    a, b, doubt = torch.randn(5), torch.randn(5), torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
    assert torch.allclose(reward_loss(a, b, 0.3, doubt), reward_loss(b, a, 0.3, 1 - doubt))
    assert torch.allclose(reward_loss(a, b), -torch.log(a.exp() / (a.exp() + b.exp())), atol=1e-6)


def test_centering_is_the_only_term_that_sees_an_offset():
    a, b = torch.randn(6), torch.randn(6)
    assert torch.allclose(reward_loss(a + 7, b + 7), reward_loss(a, b), atol=1e-5)
    assert torch.allclose(
        reward_loss(a, b, center=0.5) - reward_loss(a, b), 0.5 * (a + b) ** 2, atol=1e-5
    )


def test_large_gaps_stay_finite():
    found = reward_loss(torch.tensor([-1e4, 1e4]), torch.zeros(2))
    assert found.tolist() == [1e4, 0.0]


# Measures -----------------------------------------------------------------------------------------


def test_measures_on_known_cases():
    sure = math.log(0.8 / 0.2)
    table, error = calibration(torch.tensor([sure] * 8 + [-sure] * 2 + [0.0] * 4))
    assert error == pytest.approx(0.0, abs=1e-6)
    assert sorted(b["pairs"] for b in table) == [4, 10]
    assert calibration(torch.tensor([50.0, -50.0]))[1] == pytest.approx(0.5)
    assert length_bias(torch.tensor([1.0, 1.0, -1.0]), torch.tensor([3.0, 3.0, 0.0])) == 0.0
    assert length_bias(torch.tensor([-1.0, -1.0]), torch.tensor([3.0, 3.0])) == -1.0
    assert length_bias(torch.tensor([1.0]), torch.tensor([0.0])) == 0.0
    assert pair_metrics(torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 1]))[
        "pair_accuracy"
    ].tolist() == [1.0, 0.5, 0.0]
    members_say = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    assert together(members_say).tolist() == [2.0, -1.0]
    assert together(members_say, "min").tolist() == [1.0, -2.0]


# Pairs in the model -------------------------------------------------------------------------------


def test_a_pairwise_side_has_read_the_other_answer_first(tokenizer):
    row = load_data("chat", "preference")[0]
    alone, both = (encode_sides(tokenizer, row, 256, head) for head in ("pointwise", "pairwise"))
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        text = tokenizer.decode(both[side]["input_ids"])
        first, last = row[other][-1]["content"], row[side][-1]["content"]
        assert text.startswith(tokenizer.decode(alone[other]["input_ids"]))
        assert text.rstrip().endswith(last + "<|im_end|>")
        assert text.count(first) >= 1
    assert sorted(both["chosen"]["input_ids"]) == sorted(both["rejected"]["input_ids"])


def test_scores_do_not_depend_on_padding_or_batch_and_are_those_of_transformers(tokenizer):
    model = load_model("tiny", dtype="float32", device="cpu", head="score")
    model.config.pad_token_id = tokenizer.pad_token_id
    nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    rows = [
        side
        for pair in encode_pairs(tokenizer, load_data("chat", "preference")[:5], 256)
        for side in (pair["chosen"], pair["rejected"])
    ]
    whole, single = (score_rows(Scorer(model), rows, tokenizer.pad_token_id, n) for n in (10, 1))
    with torch.no_grad():
        plain = torch.stack([model(torch.tensor([row["input_ids"]])).logits[0, 0] for row in rows])
    assert torch.allclose(whole, single, atol=1e-4)
    assert torch.allclose(single, plain, atol=1e-5)
    assert whole.std() > 0.1


def test_the_head_is_a_function_of_the_seed():
    a, b, c = (
        load_model("tiny", dtype="float32", device="cpu", head="score", seed=s).score.weight
        for s in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# The run ------------------------------------------------------------------------------------------


def test_what_is_saved_is_a_sequence_classifier_that_plain_transformers_loads(run, tokenizer):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = run.path / "model"
    assert (folder / "model.safetensors").exists()
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    model, words = (
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    text = words.apply_chat_template(CHAT[0] + SAID[0], return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert load_reward(str(run.path), dtype="float32")(prompts=CHAT[:1], completions=SAID[:1])[
            0
        ] == pytest.approx(model(**text).logits.item(), abs=1e-5)
    with pytest.raises(WrongInput, match="a reward model, which writes no text"):
        load_model(run.path)
    assert {row["side"] for row in run.lines("samples")} == {"chosen", "rejected"}
    assert all(math.isfinite(row["reward"]) for row in run.lines("samples"))


def test_it_goes_on_from_a_reward_model(run, tmp_path):
    more = lab.run("reward", out=tmp_path, **SHORT | dict(model=str(run.path), steps=1))
    assert more.summary["before"] == pytest.approx(run.summary["after"], abs=1e-5)


def test_an_adapter_is_merged_into_what_is_saved(tmp_path):
    run = lab.run("reward", out=tmp_path, **SHORT | dict(adapter="lora:r=2"))
    assert not (run.path / "model" / "adapter_config.json").exists()
    again = lab.run("reward", out=tmp_path, **SHORT | dict(model=str(run.path), steps=0))
    assert again.summary["before"] == pytest.approx(run.summary["after"], abs=1e-3)
    assert run.summary["after"]["margin"] != run.summary["before"]["margin"]
    with pytest.raises(WrongInput, match="cannot be merged"):
        lab.run("reward", out=tmp_path, **SHORT | dict(adapter="prompt_tuning"))


def test_trl_trains_the_same_model(run, tmp_path):
    theirs = lab.run("reward", out=tmp_path, **SHORT | dict(engine="trl"))
    a = torch.tensor([row["loss"] for row in run.lines()])
    b = torch.tensor([row["loss"] for row in theirs.lines()])
    assert torch.allclose(a, b, atol=1e-4)
    assert theirs.summary["after"] == pytest.approx(run.summary["after"], abs=2e-3)
    assert {"pair_accuracy", "margin"} <= set(theirs.lines()[0])
    assert (theirs.path / "model" / "model.safetensors").exists()


def test_margin_and_probability_columns_are_used(tmp_path, tokenizer):
    rows = [
        dict(prompt="2+2=", chosen="4", rejected="5", margin=1.0, probability=0.75),
        dict(prompt="3+3=", chosen="6", rejected="7"),
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 20))
    settings = SHORT | dict(
        data=str(data), steps=1, batch_size=40, eval_rows=2, learning_rate=0.0, center=0.0
    )
    losses = {
        margin: lab.run("reward", out=tmp_path / "runs", **settings, margin=margin).lines()[0]
        for margin in (0.0, 2.0)
    }
    assert losses[0.0]["margin"] == losses[2.0]["margin"]
    assert losses[2.0]["loss"] > losses[0.0]["loss"] + 0.3
    pairs = encode_pairs(tokenizer, rows, 64)
    assert [(p["margin"], p["doubt"]) for p in pairs] == [(1.0, 0.25), (0.0, 0.0)]
    with pytest.raises(WrongInput, match="takes every label as certain"):
        trl_rows(RewardModel(), pairs)
    certain = [dict(p, doubt=0.0) for p in pairs]
    rows = trl_rows(RewardModel(margin=3.0), certain)
    assert [row["margin"] for row in rows] == [3.0, 0.0]


# As a reward --------------------------------------------------------------------------------------


def test_every_rewards_knob_takes_a_reward_model(run):
    [one] = make_rewards(f"model:{run.path}")
    assert (one.name, one.weight) == ("model", 1.0)
    assert short_name(f"model:{run.path}") == "model"
    [half, gold] = make_rewards(f"model:{run.path}/model:0.5,gold:0", lambda row, text: 1.0)
    assert (half.weight, gold.name, gold.weight) == (0.5, "gold", 0.0)
    single = one.function(prompts=CHAT, completions=SAID)
    assert load_reward(f"{run.path}+{run.path}")(CHAT, SAID) == pytest.approx(single)
    assert load_reward(f"min({run.path}+{run.path})")(CHAT, SAID) == pytest.approx(single)
    assert len(single) == 2
    assert single[0] != single[1]
    assert all(isinstance(r, float) for r in single)
    assert (
        one.function(prompts=["2+2="], completions=[""], extra=[1], completion_ids=[[2]])[0]
        is not None
    )


@pytest.mark.parametrize("method", ["grpo", "rloo", "ppo"])
def test_a_reward_model_is_a_parent_of_the_run_that_learns_from_it(method, run):
    few = dict(
        data="sums",
        steps=1,
        batch_size=4,
        num_generations=2,
        eval_rows=2,
        max_new_tokens=4,
        device="cpu",
        dtype="float32",
    )
    found = lab.run(method, out=run.path.parent, rewards=f"model:{run.path}", **few)
    assert found.record["parents"] == [run.id]


def test_a_pairwise_model_says_how_often_a_completion_wins(tmp_path):
    run = lab.run("reward", out=tmp_path, **SHORT | dict(head="pairwise"))
    judge = load_reward(str(run.path))
    three = judge(["2+2="] * 3 + ["1+1="], ["4", "5", "6", "2"])
    assert three[3] is None
    assert sum(three[:3]) == pytest.approx(1.5)
    assert all(0 < r < 1 for r in three[:3])
    model = Scorer(load_model(run.path, dtype="float32", device="cpu", head="any"))
    sides = encode_sides(
        load_tokenizer(run.path), dict(prompt="2+2=", chosen="4", rejected="5"), 256, "pairwise"
    )
    r = score_rows(model, [sides["chosen"], sides["rejected"]], 0)
    assert judge(["2+2="] * 2, ["4", "5"])[0] == pytest.approx(
        torch.sigmoid(r[0] - r[1]).item(), abs=1e-4
    )


# Wrong input --------------------------------------------------------------------------------------

WRONG = {
    "model": "model of what",
    "model:": "a name is empty",
    "model:no_such_run": "no such folder or run",
    "model:tiny": "a language model, which gives no reward",
    "model:a++b": "a name is empty",
    "model:RUN,model:RUN:0.5": "join the models as model:a\\+b",
}


@pytest.mark.parametrize("spec", WRONG)
def test_a_wrong_reward_model_is_refused_in_one_line(spec, run):
    with pytest.raises(WrongInput, match=WRONG[spec]) as wrong:
        make_rewards(spec.replace("RUN", str(run.path)))
    assert "\n" not in str(wrong.value)


def test_wrong_pairs_are_refused():
    for value in (-1.0, "much", True, math.inf, None):
        with pytest.raises(WrongInput, match="margin is"):
            margin_of({"margin": value})
    assert margin_of({}) == 0.0
    assert members("min(a + b)") == (["a", "b"], "min")


def test_a_classifier_with_several_labels_is_refused(run, tmp_path):
    import shutil

    shutil.copytree(run.path / "model", tmp_path / "three")
    config = json.loads((tmp_path / "three" / "config.json").read_text())
    (tmp_path / "three" / "config.json").write_text(
        json.dumps(config | dict(id2label={str(i): str(i) for i in range(3)}))
    )
    with pytest.raises(WrongInput, match="a classifier of 3 labels"):
        load_reward(str(tmp_path / "three"))
