"""Asking: a file of questions, one question alone, and questions without answers.

Also the data that is learned from and recorded, and a reader that renews its passages' vectors.
"""

import json

import pytest
import torch

import polm_lab as lab
from polm_lab.cli import _report
from polm_lab.core.knobs import WrongInput
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.training.loop import Meter
from polm_lab.integration import reader as reader_module
from polm_lab.integration.retrieval.library import open_library, open_questions
from polm_lab.integration.reader import Reader

TEXTS = {
    "adran.md": "Adran plays the lute.",
    "ennan.md": "Ennan plays the drum.",
    "beka.md": "Beka plays the harp.",
    "zh.txt": "阿德兰演奏鲁特琴。",
}
ASKED = [
    {"question": "Which instrument does Adran play?", "answer": "lute"},
    {"question": "Which instrument does Ennan play?", "answer": "drum"},
    {"question": "谁演奏鲁特琴？", "answer": "阿德兰"},
    {"question": "Which instrument does Beka play?"},
    {"question": "Where does Adran live?", "answer": None},
    {"question": "Which instrument does Ilia play?", "answer": "viola"},
]


@pytest.fixture
def books(tmp_path):
    (tmp_path / "books").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "books" / name).write_text(text, encoding="utf-8")
    return str(tmp_path / "books")


@pytest.fixture
def written(tmp_path):
    def write(rows, name="asked.jsonl"):
        (tmp_path / name).write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
        return str(tmp_path / name)

    return write


def answers(run):
    return [
        json.loads(line)
        for line in (run.path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_a_file_of_questions_is_asked_whole(books, written, runs):
    run = lab.run("rag", corpus=books, data=written(ASKED), dtype="float32", device="cpu", out=runs)
    after, record = run.summary["after"], run.read()
    said = answers(run)
    assert [row["question"] for row in said] == [row["question"] for row in ASKED]
    assert said[0] == dict(
        question=ASKED[0]["question"],
        answer="lute",
        passages=["adran.md"],
        cited=["adran.md"],
        expected="lute",
        right=True,
    )
    assert "expected" not in said[3]
    assert "right" not in said[4]
    # answers of 4 of 6 are known, those of 3 are in a passage: each is found first
    counts = {name: value for name, value in after.items() if name.partition("/")[0] == "rows"}
    assert counts == {
        "rows": 6,
        "rows/accuracy": 4,
        "rows/recall/1": 3,
        "rows/recall/2": 3,
        "rows/recall/5": 3,
        "rows/mrr": 3,
        "rows/accuracy/no_passages": 4,
        "rows/accuracy/bm25": 4,
        "rows/accuracy/right_passage": 3,
        "rows/accuracy/altered_passage": 3,
        "rows/accuracy/wrong_passages": 4,
    }
    assert after["recall/1"] == after["mrr"] == 1.0
    right = sum(row.get("right", False) for row in said)
    assert after["accuracy"] == after["accuracy/bm25"] == right / 4
    assert right >= 2
    assert after["faithfulness"] == sum(bool(row["cited"]) for row in said) / 6
    assert record["search"] == "bm25"
    assert "stages" not in record
    first, second, third = record["notes"]
    assert first.startswith("search is bm25, not hybrid")
    assert "eval_data" in first
    assert (
        second
        == "2 of 6 questions have no answer to compare with: they are asked, and get no score"
    )
    assert third.startswith("the answers of 1 of 6 questions are in no passage")
    assert (run.path / "log.txt").read_text().count("\n") >= 3
    samples = run.samples()
    assert set(samples.way) == {
        "no passages",
        "bm25",
        "right passage",
        "altered passage",
        "wrong passages",
    }
    assert len(samples[samples.way == "right passage"]) == 3
    assert samples[samples.way == "bm25"].reward.isna().sum() == 2


@pytest.mark.parametrize("row", ASKED[:4:3])
def test_one_question_alone(books, written, row):
    run = lab.run(
        "rag",
        corpus=books,
        data=written([row]),
        search="bm25",
        top_k_passages=1,
        dtype="float32",
        device="cpu",
    )
    after = run.summary["after"]
    assert after["rows"] == 1
    assert len(answers(run)) == 1
    known = "answer" in row
    assert ("accuracy" in after) == ("recall/1" in after) == known
    assert answers(run)[0]["passages"] == [["adran.md"], ["beka.md"]][not known]
    assert "wrong passages" not in run.read()["ways"]


def test_rows_are_bounded_and_come_in_order(books, written):
    rows = [{"question": f"Which instrument does Adran play, {n}?"} for n in range(40)]
    _, learnable, asked = open_questions(written(rows), books, rows=7)
    assert [row["question"] for row in asked] == [row["question"] for row in rows[:7]]
    assert not learnable
    assert len(open_questions(written(rows), books)[2]) == 40
    assert len(open_questions(written(rows) + "#3", books)[2]) == 3
    other = written(ASKED, "others.jsonl")
    for data in (written(rows), "facts"):
        _, learnable, asked = open_questions(data, books, eval_data=other)
        assert len(asked) == 6, "nothing to learn: no answers there, or another library"
        assert not learnable, "nothing to learn: no answers there, or another library"
    assert open_questions(other, books, eval_data=written(rows))[1]
    passages, learnable, asked = open_questions("facts")
    library, learned, held_out = open_library("facts")
    assert passages == library
    assert asked == held_out
    assert learnable == bool(learned)


def test_contexts_are_the_library_of_questions_without_answers(written):
    rows = [
        {"question": f"Who plays {n}?", "context": f"Adran plays the lute {n % 3}."}
        for n in range(6)
    ]
    passages, _, asked = open_questions(written(rows), rows=2)
    assert [p["text"] for p in passages] == [f"Adran plays the lute {n}." for n in range(3)]
    assert [q["positives"] for q in asked] == [["context-1"], ["context-2"]]
    empty = [dict(row, answers=[]) for row in rows]
    assert len(open_questions(written(empty))[2]) == 6, (
        "SQuAD's questions without an answer are asked where there are no others"
    )
    assert len(open_questions(written([*empty, dict(rows[0], answer="Adran")]))[2]) == 1


def test_a_retriever_learns_from_other_questions_than_those_that_are_asked(books, written):
    learn = written(
        [{"question": f"What is it that Beka plays, {n}?", "answer": "harp"} for n in range(30)],
        "learn.jsonl",
    )
    asked = written(ASKED)
    run = lab.run(
        "rag",
        corpus=books,
        data=learn,
        eval_data=asked,
        retriever_steps=1,
        top_k_passages=1,
        dtype="float32",
        device="cpu",
    )
    trained = lab.open_run(run.path.parent / run.read()["stages"]["retriever"])
    assert run.read()["search"] == "hybrid"
    assert run.summary["after"]["rows"] == 6
    assert (trained.settings["data"], trained.settings["eval_data"]) == (learn, asked)
    assert trained.read()["rows"] == 29  # 5 % of 30 are held out


def test_what_cannot_be_asked_is_refused_in_one_line(books, written):
    bad = written([{"question": "Who?", "answer": 4}], "bad.jsonl")
    for settings, words in (
        (
            dict(corpus=books, data=written(ASKED), search="dense"),
            ("no encoder can be trained", "eval_data", "bm25"),
        ),
        (dict(corpus=books), ("corpus", "facts", "questions about your documents")),
        (dict(data=written(ASKED)), ("asked.jsonl:1", "no context", "corpus")),
        (dict(corpus=books, data=bad, search="bm25"), ("bad.jsonl:1", "answer is int 4")),
    ):
        with pytest.raises(WrongInput) as caught:
            lab.run("rag", **settings, dtype="float32", device="cpu")
        assert "\n" not in str(caught.value), caught.value
        assert all(word in str(caught.value) for word in words), caught.value
    for method in (
        "retriever",
        "reader",
    ):  # these learn: rows without answers, or a library without its own, are refused
        with pytest.raises(WrongInput, match="asked.jsonl:4: no answer"):
            lab.run(method, corpus=books, data=written(ASKED), dtype="float32", device="cpu")
        with pytest.raises(WrongInput, match="passages of its own"):
            lab.run(method, corpus=books, dtype="float32", device="cpu")


def test_the_terminal_shows_the_answers(books, written, capsys):
    run = lab.run(
        "rag", corpus=books, data=written(ASKED), search="bm25", dtype="float32", device="cpu"
    )
    _report(run, as_json=False)
    shown = capsys.readouterr().out
    assert "Which instrument does Adran play? -> lute (adran.md)\n" in shown
    assert "note: 2 of 6 questions have no answer" in shown
    assert "answers.jsonl" in shown
    line = json.dumps(dict(question="Who?\n", answer="\x1b[2J\u202e<b>", passages=["a"], cited=[]))
    (run.path / "answers.jsonl").write_text(line + "\n")
    _report(run, as_json=False)
    assert "Who?  ->  [2J <b> (in no passage)\n" in capsys.readouterr().out, (
        "what a model writes cannot steer the terminal"
    )


# refresh


def plain_vectors(model, tokenizer, texts, before):
    "Means of the last states of a causal LM, by transformers, a text at a time; of length 1."
    found = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(before + text).input_ids])
            last = model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
            found.append(last / last.norm())
    return torch.stack(found)


@pytest.mark.parametrize("refresh", [0, 2])
def test_the_vectors_of_passages_are_renewed_each_so_many_steps(
    monkeypatch, refresh, written, runs
):
    names = ["Adran", "Ennan", "Beka", "Ilia", "Otto", "Rena", "Sel", "Tova"]
    rows = [
        {
            "question": f"Which instrument does {n} play?",
            "answer": "lute",
            "context": f"{n} plays the lute.",
        }
        for n in names
    ]
    seen = []

    def steps(run, settings, pair, updates, loss, evaluate):
        "Evaluate, and move the encoder's weights by hand after each step, instead of training."
        tokenizer = load_tokenizer("tiny")
        evaluate()
        generator = torch.Generator().manual_seed(0)
        for step in range(5):
            (batch,), *_ = [*updates(step, Meter())]
            texts = [f"{n} plays the lute." for n in library(settings)]
            now = plain_vectors(pair.encoder.model, tokenizer, texts, "Passage: ")
            seen.append(
                (
                    now,
                    pair.vectors.clone(),
                    batch["numbers"],
                    pair.encoder(batch["question_ids"], batch["question_mask"]).detach(),
                )
            )
            with torch.no_grad():
                for weight in pair.encoder.parameters():
                    weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)

    def library(settings):
        return [p["text"].split()[0] for p in open_library(settings.data)[0]]

    monkeypatch.setattr(reader_module, "fit", steps)
    settings = Reader(
        data=written(rows),
        loss="sequence",
        search="dense",
        top_k_passages=2,
        refresh=refresh,
        batch_size=2,
        steps=5,
        dtype="float32",
        device="cpu",
    )
    run = lab.run(
        "reader",
        **{
            name: getattr(settings, name)
            for name in (
                "data",
                "loss",
                "search",
                "top_k_passages",
                "refresh",
                "batch_size",
                "steps",
                "dtype",
                "device",
            )
        },
        out=runs,
    )
    assert run.status == "finished"
    assert len(seen) == 5
    for step, (now, held, numbers, asked) in enumerate(seen):
        made = step - step % refresh if refresh else 0  # the step whose encoder made the vectors
        assert torch.allclose(held, seen[made][0], atol=1e-4), step
        assert step == made or not torch.allclose(now, held, atol=1e-2), (
            "the encoder has moved since"
        )
        assert numbers.tolist() == (asked @ seen[made][0].T).topk(2, dim=1).indices.tolist(), (
            "what is found is found by them"
        )


def test_the_model_of_the_test_is_what_the_reader_starts_from():
    model, tokenizer = load_model("tiny", "float32", "cpu"), load_tokenizer("tiny")
    vectors = plain_vectors(model, tokenizer, ["Adran plays the lute."], "Passage: ")
    assert vectors.shape == (1, model.config.hidden_size)
    assert torch.allclose(vectors.norm(), torch.tensor(1.0))
