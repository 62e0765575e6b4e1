"""Editing: the score of a model with known answers, the prompts, wrong rows, failed runs.

Wrong rows are refused in one line, and runs that fail begin again.
"""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.core.metrics import metric
from polm_lab.core.run import Run
from polm_lab.data.load import load_data
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.training.editing import Answer, EditSettings, Probe, edit_model, probes_of
from polm_lab.training.editing import read_answers, contains_answer, score_edits
from polm_lab.workbench.controls import known_data, preview_data

WORDS = "<pad> <end> home of Ada Bob Eve she job Rome now later Bonn Kiel Oslo smith".split()
SIZE = len(WORDS)
NEXT = {  # the model's answer to each word: it sees no other
    "Ada": "Bonn",
    "she": "Bonn",
    "Bob": "Kiel",
    "Eve": "Oslo",
    "job": "smith",
    "Rome": "later",
    "Bonn": "<end>",
    "Kiel": "<end>",
    "Oslo": "<end>",
    "smith": "<end>",
    "later": "<end>",
    "now": "<end>",
}
EDIT = {
    "subject": "Ada",
    "prompt": "home of Ada",
    "target": " Rome now",
    "paraphrases": ["Ada home of she"],
    "neighbours": [
        {"prompt": "home of Bob", "target": " Kiel"},
        {"prompt": "home of Eve", "target": " Oslo"},
    ],
    "others": [{"prompt": "Ada job", "target": " smith"}],
}
SURE = 5.0  # logit of the answer; all others have 0
P = math.exp(SURE) / (math.exp(SURE) + SIZE - 1)
Q = 1 / (math.exp(SURE) + SIZE - 1)  # of any other word


def answer(model, word: str, after: str) -> None:
    "Let the model answer `after` to `word`."
    column = model.get_output_embeddings().weight.data[:, WORDS.index(word)]
    column.zero_()
    column[WORDS.index(after)] = SURE / math.sqrt(SIZE)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder with a Llama that is a table of words.

    No layer adds anything, and the head maps a word to the next.
    """
    folder = tmp_path_factory.mktemp("table")
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        rms_norm_eps=1e-12,
    )
    model = LlamaForCausalLM(config)
    model.model.embed_tokens.weight.data = torch.eye(SIZE)
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    model.lm_head.weight.data.zero_()
    for word, after in NEXT.items():
        answer(model, word, after)
    model.save_pretrained(folder)
    words = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def settings_for(table, tmp_path, *edits) -> EditSettings:
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    return EditSettings(model=str(table), data=str(path), device="cpu", dtype="float32")


def new_run(settings, tmp_path) -> Run:
    return Run.create("edited", vars(settings), out=tmp_path / "runs")


def test_the_score_of_a_model_whose_answers_are_known(table, tmp_path):
    settings = settings_for(table, tmp_path, EDIT)
    run = new_run(settings, tmp_path)

    def apply(model, edits):
        answer(model, "Ada", "Rome")  # one token of two is right now; the paraphrase is not reached
        answer(model, "Eve", "Rome")  # and a neighbour is broken

    edit_model(run, settings, apply)
    before, after = run.summary["before"], run.summary["after"]
    wanted = {
        "efficacy": (0, 0),
        "efficacy/tokens": (0, 0.5),
        "efficacy/probability": (Q * Q, P * Q),
        "efficacy/said": (0, 0),
        "paraphrase": (0, 0),
        "paraphrase/tokens": (0, 0),
        "paraphrase/probability": (Q * Q, Q * Q),
        "paraphrase/said": (0, 0),
        "neighbourhood": (1, 0.5),
        "neighbourhood/tokens": (1, 0.5),
        "neighbourhood/probability": (P, (P + Q) / 2),
        "neighbourhood/said": (1, 0.5),
        "other_relation": (1, 1),
        "other_relation/tokens": (1, 1),
        "other_relation/probability": (P, P),
        "other_relation/said": (1, 1),
        "rows": (1, 1),
        "rows/neighbourhood": (2, 2),
    }
    assert before == pytest.approx({name: first for name, (first, _) in wanted.items()}, rel=1e-4)
    assert after == pytest.approx({name: second for name, (_, second) in wanted.items()}, rel=1e-4)
    rows = {row["prompt"]: row for row in run.lines("edits")}
    assert [row["what"] for row in rows.values()] == [
        "efficacy",
        "paraphrase",
        "neighbourhood",
        "neighbourhood",
        "other_relation",
    ]
    assert (rows["home of Ada"]["before"], rows["home of Ada"]["after"]) == ("Bonn", "Rome later")
    assert (rows["home of Eve"]["after"], rows["home of Eve"]["holds"]) == ("Rome later", False)
    assert rows["Ada job"]["holds"]
    assert rows["Ada job"]["probability_after"] == pytest.approx(P, rel=1e-4)


def test_a_fact_that_is_learned_whole_is_said_and_the_saved_model_says_it(table, tmp_path):
    settings = settings_for(table, tmp_path, EDIT)
    run = new_run(settings, tmp_path)

    def apply(model, edits):
        assert [edit["target"] for edit in edits] == [" Rome now"]
        for word, after in (("Ada", "Rome"), ("she", "Rome"), ("Rome", "now")):
            answer(model, word, after)

    edit_model(run, settings, apply)
    after = run.summary["after"]
    names = ("efficacy", "paraphrase", "neighbourhood", "other_relation")
    assert all(after[name + part] == 1 for name in names for part in ("", "/tokens", "/said"))
    saved, tokenizer = (
        load_model(run.path / "model", "float32", "cpu"),
        load_tokenizer(str(run.path / "model")),
    )
    [found] = read_answers(saved, tokenizer, [Probe(0, "efficacy", EDIT["prompt"], EDIT["target"])])
    assert found.text == "Rome now"
    assert all(found.right)
    assert found.logp == pytest.approx(2 * math.log(P), rel=1e-4)


def test_the_end_of_the_text_is_no_part_of_the_answer(table, tmp_path):
    settings = settings_for(table, tmp_path, EDIT | {"target": " Rome"})
    run = new_run(settings, tmp_path)
    edit_model(
        run, settings, lambda model, edits: answer(model, "Ada", "Rome")
    )  # which goes on with `later`
    after = run.summary["after"]
    assert after["efficacy"] == after["efficacy/said"] == 1
    assert after["efficacy/probability"] == pytest.approx(P, rel=1e-4)


def test_padding_and_batches_change_no_answer():
    model, tokenizer = load_model("tiny", "float32", "cpu").eval(), load_tokenizer("tiny")
    probes = probes_of(load_data("facts#3", "edit"))
    one, many = (read_answers(model, tokenizer, probes, rows=rows) for rows in (1, 16))
    assert [(a.top, a.right, a.text) for a in one] == [(a.top, a.right, a.text) for a in many]
    assert [a.logp for a in one] == pytest.approx([a.logp for a in many], abs=1e-4)


def test_what_is_edited_itself_is_not_asked_to_stay():
    other = {
        "subject": "Bob",
        "prompt": "home of Bob",
        "target": " Oslo",
        "paraphrases": ["Ada job"],
    }
    asked = [(p.edit, p.what, p.prompt) for p in probes_of([EDIT, other])]
    assert asked == [
        (0, "efficacy", "home of Ada"),
        (0, "paraphrase", "Ada home of she"),
        (0, "neighbourhood", "home of Eve"),
        (1, "efficacy", "home of Bob"),
        (1, "paraphrase", "Ada job"),
    ]


def test_said_is_whole_words_in_any_case():
    for text, target, wanted in (
        ("In Rome.", " rome", True),
        ("romeo", " Rome", False),
        ("chrome", "Rome", False),
        ("12", " 1", False),
        ("about 1.", " 1", True),
        ("C++ (the language)", " c++", True),
        ("", " Rome", False),
    ):
        assert contains_answer(text, target) == wanted, (text, target)


def test_kinds_that_are_not_asked_are_not_scored():
    answers = [Answer([1], [True], 0.0, "x")]
    found = score_edits([Probe(0, "efficacy", "a", " x")], answers, answers)
    assert found == {
        "efficacy": 1,
        "efficacy/tokens": 1,
        "efficacy/probability": 1,
        "efficacy/said": 1,
        "rows": 1,
    }
    assert all(
        metric(name).meaning
        for name in ("efficacy/said", "paraphrase", "neighbourhood/tokens", "other_relation")
    )


def test_facts_to_change_are_seen_before_a_run():
    seen = preview_data("facts#3", "edit")
    assert seen["rows"] == 3
    assert {"paraphrases", "neighbours", "others"} <= set(seen["columns"])
    assert "Question" in seen["first"][0]["neighbours"]
    assert known_data("edit") == ["facts"]


WRONG = {
    "no target": ({"subject": "Ada", "prompt": "home of Ada"}, "columns subject, prompt;"),
    "another subject": (EDIT | {"subject": "Eva"}, "which the prompt does not name"),
    "a conversation": (
        EDIT | {"prompt": [{"role": "user", "content": "home of Ada"}]},
        "expected text",
    ),
    "a neighbour without answer": (
        EDIT | {"neighbours": [{"prompt": "home of Bob"}]},
        "neighbours holds",
    ),
    "an empty paraphrase": (EDIT | {"paraphrases": [" "]}, "paraphrases, entry 1, is empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows_are_one_line_before_anything_is_computed(table, tmp_path, name):
    row, part = WRONG[name]
    settings = settings_for(table, tmp_path, EDIT, row)
    run = new_run(settings, tmp_path)
    with pytest.raises(WrongInput) as caught, run.active():
        edit_model(run, settings, lambda model, edits: pytest.fail("applied"))
    assert "\n" not in str(caught.value)
    assert "edits.jsonl:2:" in str(caught.value)
    assert part in str(caught.value)
    assert run.status == "failed"
    assert run.summary == {}


def test_a_run_that_fails_begins_again(table, tmp_path):
    settings = settings_for(table, tmp_path, EDIT)
    run = new_run(settings, tmp_path)

    def broken(model, edits):
        run.log(1, loss=2.0)
        raise WrongInput("no such layer")

    with pytest.raises(WrongInput), run.active():
        edit_model(run, settings, broken)
    assert run.status == "failed"
    assert not (run.path / "edits.jsonl").exists()
    assert "after" not in run.summary
    with run.active():
        edit_model(run, settings, lambda model, edits: run.log(1, loss=1.0))
    assert [row["loss"] for row in run.lines()] == [1.0]
    assert run.status == "finished"


def test_a_task_that_the_model_knows_shows_what_an_edit_costs_elsewhere(tmp_path):
    settings = EditSettings(data="facts#2", device="cpu", dtype="float32")
    run = lab.Run.create("edited", vars(settings), out=tmp_path / "runs")

    def shake(model, edits):
        torch.manual_seed(0)
        for weight in model.parameters():
            weight.data += 0.05 * torch.randn_like(weight)

    edit_model(run, settings, shake)
    assert run.summary["after"]["forgetting"] > 0.1
    assert "perplexity/sums" in run.summary["before"]
    assert "perplexity/facts" not in run.summary["before"]


def test_what_stays_is_what_the_model_said_and_not_what_is_true():
    same = Answer([7, 8], [False, True], math.log(0.1), "x")
    found = score_edits([Probe(0, "neighbourhood", "a", " b")], [same], [same])
    assert (
        found["neighbourhood"]
        == found["neighbourhood/tokens"]
        == found["neighbourhood/said"]
        == 1.0
    )
    other = Answer([5, 8], [True, True], math.log(0.9), "b")
    assert (
        score_edits([Probe(0, "neighbourhood", "a", " b")], [other], [same])["neighbourhood/tokens"]
        == 0.5
    )
