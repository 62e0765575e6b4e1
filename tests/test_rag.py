"""Check retrieval: broken documents, killed builds, encoders of every layout, readers that fail.

Also that a retriever is saved as it was trained.
"""

import gzip
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from serving import Endpoint, endpoint

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.models.policy import Policy
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.integration.retrieval.text import cut, cut_documents, holds
from polm_lab.integration.retrieval.documents import load_documents
from polm_lab.integration.retrieval.library import open_library
from polm_lab.integration.retrieval.passages import HOWS, Encoder, Index, ids_of
from polm_lab.data.batches import Order
from polm_lab.integration.rag import (
    EndpointReader,
    LocalReader,
    Rag,
    with_other_answer,
    exact_match,
)
from polm_lab.integration.reader import Pair, each_loss, reading_batch, sequence_loss, token_loss
from polm_lab.integration.retriever import (
    DualEncoder,
    Retriever,
    contrastive_loss,
    distillation_loss,
    encode_texts,
    in_batch,
    states_answer,
    teach,
    vectors_of,
)


def one_line(call, *words):
    "The message of the `WrongInput` that `call` raises: one line that holds `words`."
    with pytest.raises(WrongInput) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text, text
    assert all(word in text for word in words), text
    return text


def pdf(text: str) -> bytes:
    "A PDF of one page with a line of text, its table of objects included."
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return (
        out
        + b"xref\n0 6\n0000000000 65535 f \n"
        + table
        + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(out)
    )


# documents


def test_a_pdf_is_read_and_a_broken_one_is_named(tmp_path):
    whole = pdf("Adran plays the lute.")
    (tmp_path / "good.pdf").write_bytes(whole)
    (tmp_path / "empty.pdf").write_bytes(pdf(""))
    assert "Adran plays the lute." in load_documents(tmp_path / "good.pdf")[0].text
    (tmp_path / "cut.pdf").write_bytes(whole[:60])
    one_line(lambda: load_documents(tmp_path / "cut.pdf"), "cut.pdf", "broken PDF")
    one_line(lambda: load_documents(tmp_path / "empty.pdf"), "empty.pdf", "OCR")
    rng = random.Random(0)
    # a parser of a large format meets what nobody thought of: each must end in one line, or in a text
    for n in range(40):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "damaged.pdf").write_bytes(bytes(damaged))
        try:
            load_documents(tmp_path / "damaged.pdf")
        except WrongInput as wrong:
            assert "\n" not in str(wrong)


def test_what_is_no_text_is_refused_or_left_out(tmp_path):
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 50)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9\n".encode("latin1"))
    (tmp_path / "blank.md").write_text(" \n")
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "name": "x"}\n')
    for name, word in {
        "binary.txt": "binary",
        "latin.txt": "UTF-8",
        "blank.md": "empty",
        "rows.jsonl": "column text",
        "none.txt": "no such file",
        "x.docx": "no such file",
    }.items():
        one_line(lambda: load_documents(tmp_path / name), name, word)
    notes = []
    one_line(lambda: load_documents(tmp_path, skip=True, say=notes.append), "no documents")
    (tmp_path / "good.txt").write_text("Adran plays the lute.")
    notes.clear()
    assert [d.id for d in load_documents(tmp_path, skip=True, say=notes.append)] == ["good.txt"]
    assert len(notes) == 4


def test_a_document_of_50_mb_is_cut(tmp_path):
    (tmp_path / "large.txt").write_text(
        "The river Esk flows through the old town of Barton and on to the sea.\n" * 720_000
    )
    assert (tmp_path / "large.txt").stat().st_size > 50e6
    passages = cut_documents(load_documents(tmp_path / "large.txt"), 100)
    assert len(passages) == 720_000 * 15 // 90
    assert len({p["id"] for p in passages}) == len(passages)


def test_cutting_keeps_every_word_in_order():
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(
            rng.choice(
                ["word", "Dr", ".", " ", "  ", "\n", "\n\n", "? ", "! ", '."', " \n \n", "x" * 450]
            )
            for _ in range(rng.randint(1, 80))
        )
        size = rng.randint(1, 12)
        pieces = cut(text, size)
        assert "".join("".join(pieces).split()) == "".join(text.split())
        assert all(0 < len(p.split()) <= size for p in pieces)


def test_an_answer_is_a_whole_word():
    assert holds("The river Esk.", "esk")
    assert not holds("The river Eskford.", "Esk")
    assert not holds("anything", " ")
    assert holds("costs 3 (three).", "(three)")


# encoders


@pytest.fixture(scope="module")
def tiny_encoder():
    return Encoder("tiny", device="cpu")


@pytest.fixture
def bert(tmp_path):
    "A small BERT with a folder as sentence-transformers writes it, and its plain parts."
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"adran plays the lute drum query : bells".split(),
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    model, tokenizer, folder = (
        BertModel(config).eval(),
        BertTokenizerFast(str(tmp_path / "vocab.txt")),
        tmp_path / "encoder",
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()

    def lay(pooling: dict, modules=("Transformer", "Pooling", "Normalize"), prompts=None):
        (folder / "modules.json").write_text(
            json.dumps(
                [
                    dict(idx=n, name=str(n), path="", type=f"sentence_transformers.models.{m}")
                    for n, m in enumerate(modules)
                ]
            )
        )
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        (folder / "config_sentence_transformers.json").write_text(
            json.dumps(dict(prompts=prompts or {}))
        )
        return folder

    return lay, model, tokenizer


def test_folders_of_sentence_transformers_are_read_as_they_say(bert):
    lay, model, tokenizer = bert
    texts = ["adran plays the lute", "bells"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mean = torch.stack(
        [
            states[0, : int(batch["attention_mask"][0].sum())].mean(0),
            states[1, : int(batch["attention_mask"][1].sum())].mean(0),
        ]
    )
    for pooling, expected in (
        ({"pooling_mode_cls_token": True}, states[:, 0]),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, mean),
        ({"pooling_mode": "mean"}, mean),
    ):
        found = Encoder(str(lay(pooling)), device="cpu")(texts)
        assert np.allclose(found, torch.nn.functional.normalize(expected, dim=1).numpy(), atol=1e-5)
    plain = Encoder(str(lay({"pooling_mode_mean_tokens": True})), device="cpu")
    asked = Encoder(
        str(lay({"pooling_mode_mean_tokens": True}, prompts={"query": "query : "})), device="cpu"
    )
    assert np.allclose(asked(["lute"], "query"), plain(["query : lute"]), atol=1e-5)
    assert np.allclose(asked(["lute"]), plain(["lute"]), atol=1e-5)
    assert plain.identity != asked.identity, "the prompt is part of what an encoder is"


def test_what_an_encoder_cannot_be_is_refused(bert, tmp_path):
    lay, model, _ = bert
    one_line(
        lambda: Encoder(
            str(lay({"pooling_mode_mean_tokens": True}, ("Transformer", "Pooling", "Dense")))
        ),
        "modules.json",
        "Dense",
    )
    one_line(lambda: Encoder(str(lay({"pooling_mode_max_tokens": True}))), "1_Pooling")
    folder = lay({"pooling_mode_mean_tokens": True})
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    one_line(lambda: Encoder(str(folder)), "safetensors")


# the index


def texts_of(n, seed=0):
    rng = random.Random(seed)
    words = [
        f"{a}{b}" for a in ("bar", "cor", "dor", "fal") for b in ("beck", "dale", "ham", "ton")
    ]
    return [{"id": f"{seed}-{i}", "text": " ".join(rng.choices(words, k=8))} for i in range(n)]


def test_an_updated_index_equals_one_built_afresh(tiny_encoder, tmp_path):
    rng, index = random.Random(3), Index(texts_of(20), tiny_encoder)
    for round_ in range(6):
        if rng.random() < 0.5:
            index.add(texts_of(rng.randint(1, 5), seed=round_ + 1))
        else:
            index.remove(rng.sample([p["id"] for p in index.passages], rng.randint(1, 5)))
        if round_ == 3:
            index = Index.open(index.save(tmp_path / "index"), tiny_encoder)
        fresh, questions = Index(index.passages, tiny_encoder), ["barbeck cordale", "falham dorton"]
        for how in HOWS:
            ours, theirs = (i.search(questions, 5, how) for i in (index, fresh))
            assert list(map(ids_of, ours)) == list(map(ids_of, theirs))
            assert np.allclose(
                [h.score for hits in ours for h in hits],
                [h.score for hits in theirs for h in hits],
                atol=1e-5,
            )
    before = [p["id"] for p in index.passages]
    one_line(
        lambda: index.add([*texts_of(2, seed=99), {"id": before[0], "text": "again"}]),
        before[0],
        "there already",
    )
    one_line(lambda: index.remove(["nobody"]), "nobody")
    one_line(lambda: index.remove(before), "nothing would be left")
    one_line(
        lambda: Index([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]), "passage 2", "'a'"
    )
    one_line(lambda: Index([{"id": "a", "text": " "}]), "passage 1")
    assert [p["id"] for p in index.passages] == before, "a refused update changes nothing"
    assert index.vectors.ntotal == len(before), "a refused update changes nothing"


SAVES = """
import sys
from polm_lab.integration.retrieval.passages import Index
old, new = ([{"id": f"{w}{i}", "text": f"{w} {i}"} for i in range(3000)] for w in ("old", "new"))
both = [Index(old), Index(new)]
print("begin", flush=True)
while True:
    for index in both:
        index.save(sys.argv[1])
"""


def test_killed_builds_leave_a_whole_index(tmp_path):
    folder, rng, seen = tmp_path / "index", random.Random(5), set()
    Index([{"id": f"old{i}", "text": f"old {i}"} for i in range(3000)]).save(folder)
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES, folder],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout.readline() == "begin\n"
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        index = Index.open(folder)
        assert len(index) == 3000
        assert len({p["text"].split()[0] for p in index.passages}) == 1
        word = index.passages[0]["text"].split()[0]
        assert index.search([f"{word} 17"])[0][0].text == f"{word} 17"
        seen.add(word)
    # how many kills hit which side depends on the machine
    # test_killed_at_each_step_of_a_build hits both
    assert seen <= {"old", "new"}
    Index.open(folder).save(folder)
    assert len(list(folder.glob("build-*"))) == 1, (
        "what killed builds left is cleared away by the next one"
    )


def test_killed_at_each_step_of_a_build(tmp_path):
    import shutil

    folder = Index(texts_of(20)).save(tmp_path / "index")
    new, before = Index(texts_of(30, seed=1)), {p["id"] for p in texts_of(20)}
    new.bm25  # made before the fork, which would not survive its threads
    steps = [("fsync", n) for n in range(1, 8)] + [("dump", 1), ("replace", 1), ("rmtree", 1)]
    left = {}
    for step in steps:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "copy")
        child = os.fork()
        if child == 0:  # dies by itself at the n-th call, in the middle of whatever it is doing
            calls, where = (
                [0],
                {"fsync": os, "replace": os, "dump": json, "rmtree": shutil}[step[0]],
            )
            plain = getattr(where, step[0])

            def deadly(*args, **kwargs):
                calls[0] += 1
                if calls[0] == step[1]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(*args, **kwargs)

            setattr(where, step[0], deadly)
            new.save(tmp_path / "copy")
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        index = Index.open(tmp_path / "copy")
        left[step] = {p["id"] for p in index.passages} == before
        assert killed
        assert left[step] or len(index) == 30
        assert index.search([index.passages[3]["text"]], 1)[0]
    assert all(old for step, old in left.items() if step[0] != "rmtree")
    assert not left["rmtree", 1]


def test_one_writer_and_no_strangers(tmp_path):
    import fcntl

    folder = Index(texts_of(3)).save(tmp_path / "index")
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        one_line(lambda: Index(texts_of(4)).save(folder), "another process")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    one_line(lambda: Index(texts_of(4)).save(tmp_path / "photos"), "other files")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_damaged_index_is_named_and_nothing_is_unpickled(tmp_path, tiny_encoder, monkeypatch):
    folder = Index(texts_of(30), tiny_encoder).save(tmp_path / "index")
    monkeypatch.setattr(pickle, "load", lambda *a, **k: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "loads", lambda *a, **k: pytest.fail("unpickled"))
    assert len(Index.open(folder, tiny_encoder)) == 30
    other = Encoder("tiny", device="cpu", max_length=32)
    one_line(lambda: Index.open(folder, other), tiny_encoder.identity, other.identity)
    for file in sorted(next(folder.glob("build-*")).iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:-3])
        one_line(lambda: Index.open(folder, tiny_encoder), "damaged")
        file.unlink()
        one_line(lambda: Index.open(folder, tiny_encoder), file.name)
        file.write_bytes(whole)
    (folder / "index.json").write_text("{}")
    one_line(lambda: Index.open(folder, tiny_encoder), "damaged")


def test_questions_without_known_words_find_nothing():
    index = Index(texts_of(5))
    assert index.search(["zzz qqq", "the", "barbeck"], 3)[:2] == [[], []]
    assert len(index.search(["barbeck"], 99)[0]) <= 5
    one_line(lambda: index.search(["barbeck", "\n"]), "question 2")
    one_line(lambda: index.search(["barbeck"], 1, "bm52"), "bm25")


# reading


@pytest.fixture(scope="module")
def local():
    return LocalReader(Policy(load_model("tiny", "float32", "cpu")), load_tokenizer("tiny"))


def test_passages_that_do_not_fit_are_left_out(local):
    long = "Adran plays the lute. " * 300
    ids = local.prompt("Which instrument does Adran play?", ["Adran plays the lute.", long, long])
    assert ids == local.prompt("Which instrument does Adran play?", ["Adran plays the lute."])
    assert (
        len(local.prompt("Which instrument does Adran play?", [long]))
        <= local.longest - local.max_new_tokens
    )
    one_line(lambda: local.prompt("Who? " * 500, []), "context")


def test_reading_apart_takes_the_likeliest_answer(local):
    index = Index(
        [
            {"id": "a", "text": "Adran plays the lute."},
            {"id": "b", "text": "Adran is good at the drum."},
            {"id": "c", "text": "Adran plays the lute. Adran keeps a fox."},
        ]
    )
    question = "Which instrument does Adran play?"
    hits = index.search([question], 3)
    read = Rag(index, local, "bm25", 3).read([question], hits)[0]
    texts = [h.text for h in hits[0]]
    options = list(dict.fromkeys(local.write([(question, [t]) for t in texts])))
    end = local.tokenizer.eos_token
    weights = torch.tensor([6 / 11, 3 / 11, 2 / 11])
    prompts, marginal = [local.prompt(question, [t]) for t in texts], []
    for option in options:
        logps = local.likelihood(prompts, [f" {option}{end}"] * 3)
        marginal.append(float((weights * logps.exp()).sum()))
    assert len(options) > 1
    assert read.answer == options[int(np.argmax(marginal))]
    for order in (
        hits[0][:2],
        hits[0][1::-1],
    ):  # two passages that contradict each other: the one that was found first has twice the weight
        assert (
            Rag(index, local, "bm25", 2).read([question], [order])[0].answer
            == local.write([(question, [order[0].text])])[0]
        )


def test_likelihood_puts_the_passage_that_asks_the_question_first(local):
    passages, _, held_out = open_library("facts", rows=24)
    index = Index(passages)
    asked = [q["question"] for q in held_out]
    first = lambda found: (
        sum(hits[0].id in q["positives"] for hits, q in zip(found, held_out)) / len(held_out)
    )
    plain, again = (
        Rag(index, local, "bm25", 2).find(asked),
        Rag(index, local, "bm25", 2, rerank="likelihood").find(asked),
    )
    assert first(again) > first(plain)
    assert all(a.score >= b.score for a, b in again)


server = endpoint(Endpoint)


def test_endpoints_that_fail_end_in_one_line(server):
    index = Index([{"id": "a", "text": "Adran plays the lute."}])
    ask = lambda: Rag(
        index,
        EndpointReader(server.url, "m", key="sk-secret", tries=2, pause=0.01),
        "bm25",
        reading="together",
    )(["What does Adran play?"])[0]
    server.says = "The lute [1]."
    for fails, word in (
        ([401], "401"),
        ([500, 500], "500"),
        (["<html>"] * 2, "malformed"),
        (['{"choices": []}'] * 2, "malformed"),
        ([404], "404"),
    ):
        server.fails[:] = fails
        assert "sk-secret" not in one_line(ask, word, "endpoint")
    server.fails[:] = [503]
    read = ask()
    assert read.cited == [1]
    assert read.faithful
    assert exact_match(read.answer, "lute") == 1.0
    server.says = "<b>\ud800 the harp</b>"
    assert not ask().faithful


def test_a_library_of_ones_own_from_the_command_line(forked, runs, tmp_path):
    books = tmp_path / "books"
    books.mkdir()
    for n, (name, thing) in enumerate(
        [("Adran", "lute"), ("Ennan", "drum"), ("Beka", "harp"), ("Ilia", "viola")] * 10
    ):
        (books / f"{n}.md").write_text(f"{name}{n} plays the {thing}.")
    rows = [
        {"question": f"Which instrument does {n}{i} play?", "answer": t}
        for i, (n, t) in enumerate(
            [("Adran", "lute"), ("Ennan", "drum"), ("Beka", "harp"), ("Ilia", "viola")] * 10
        )
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = [
        "run",
        "rag",
        "--bare",
        "--json",
        "-p",
        "search",
        "bm25",
        "-p",
        "corpus",
        books,
        "-p",
        "data",
        tmp_path / "asked.jsonl",
        "-p",
        "dtype",
        "float32",
        "-p",
        "index",
        tmp_path / "kept",
    ]
    done = forked(*words)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])["summary"]
    assert summary["after"]["recall/1"] == 1.0
    assert "recall/5" in summary["after"], "more are looked for than are read"
    assert summary["after"]["accuracy"] > summary["before"]["accuracy"]
    assert forked(*words).returncode == 0, "the index that was kept is used again"
    (books / "0.md").write_text("Adran0 plays the bagpipe.")
    changed = forked(*words)
    assert changed.returncode == 2
    assert "same documents" in changed.stderr
    assert "Traceback" not in changed.stderr
    (books / "1.md").write_bytes(b"\0\1\2")
    broken = forked(*words)
    assert broken.returncode == 2
    assert "1.md" in broken.stderr
    assert "binary" in broken.stderr


# training


def test_a_saved_retriever_is_the_encoder_that_was_trained():
    run = lab.run("retriever", steps=3, batch_size=8, dtype="float32", device="cpu", eval_rows=8)
    saved = Encoder(str(run.path), device="cpu")
    trained, tokenizer = (
        DualEncoder(load_model(run.path, "float32", "cpu")),
        load_tokenizer(run.path),
    )
    texts = [
        "Adran plays the lute.",
        "Halford is known for its bells. Halford was founded in 1200.",
    ]
    for side in ("query", "document"):
        assert np.allclose(
            saved(texts, side),
            vectors_of(
                trained, encode_texts(tokenizer, texts, side, 256), tokenizer.pad_token_id
            ).numpy(),
            atol=1e-5,
        )
    assert not np.allclose(saved(texts), Encoder("tiny", device="cpu")(texts), atol=1e-2)


def test_teachers_without_labels_agree_with_the_labels():
    passages, learned, _ = open_library("facts")
    learned = learned[:60]
    blind = [dict(q, positives=[]) for q in learned]
    index = Index(passages)
    one_line(
        lambda: teach(Retriever(algorithm="labels"), passages, blind, index), "nothing to learn"
    )
    rows = teach(Retriever(algorithm="reward"), passages, blind, index)
    right = {q["question"]: q["positives"] for q in learned}
    assert (
        sum(passages[r["passages"][r["right"]]]["id"] in right[r["question"]] for r in rows)
        / len(rows)
        > 0.9
    )
    assert states_answer("What does Adran play?", "Adran plays the lute.", "lute") == 2.0
    assert states_answer("What does Adran play?", "Ennan plays the lute.", "lute") == 1.0


@pytest.mark.parametrize("objective", ["sequence", "token"])
def test_marginals_are_those_of_summing_over_passages_one_by_one(objective):
    tokenizer, policy = load_tokenizer("tiny"), Policy(load_model("tiny", "float32", "cpu"))
    question, texts = (
        dict(question="Where was Ennan born?", answer="Dorburg"),
        ["Ennan was born in Dorburg.", "Adran comes from Halford.", "Ennan keeps a goat."],
    )
    batch, weights = (
        reading_batch(tokenizer, [question], [texts], False, 256),
        torch.tensor([0.5, 0.3, 0.2]),
    )
    with torch.no_grad():
        logp, _ = Pair(policy)(batch)
        loss = (sequence_loss if objective == "sequence" else token_loss)(
            weights.log()[None], logp, batch["answers"].float()
        ).item()
        each = []  # π(y_t | x, z) by transformers, a passage at a time
        for text in texts:
            prompt = tokenizer(
                f"Passage: {text}\nQuestion: {question['question']}\nAnswer:"
            ).input_ids
            answer = tokenizer(" Dorburg").input_ids + [tokenizer.eos_token_id]
            logits = policy.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            each.append(
                torch.stack(
                    [logits[len(prompt) + t - 1, token] for t, token in enumerate(answer)]
                ).exp()
            )
    each = torch.stack(each)
    by_hand = (
        -(weights @ each.prod(1)).log()
        if objective == "sequence"
        else -(weights @ each).log().sum()
    )
    assert abs(loss - by_hand.item()) < 1e-4


# the losses, written out


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_contrastive_loss_and_its_gradient_are_dprs_written_out():
    q, d, tau = drawn(3, 4), drawn(6, 4, seed=1), 0.3
    rows = [
        dict(passages=[7, 9], right=0, good={7}),
        dict(passages=[5, 7], right=0, good={5, 9}),
        dict(passages=[2, 7], right=1, good={7}),
    ]
    right, allowed = in_batch(rows)
    # the passages of the step are 7 9 5 7 2 7; for the second question 9 is good as well
    # the third came with 7, as the first did; good passages are no negatives
    assert right.tolist() == [0, 2, 5]
    assert allowed.int().tolist() == [[1, 1, 1, 0, 1, 0], [1, 0, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]]
    losses, pull_q, pull_d = [], torch.zeros_like(q), torch.zeros_like(d)
    for i, row in enumerate(rows):
        among = [j for j in range(6) if allowed[i, j]]
        parts = {}
        for j in among:
            parts[j] = math.exp(sum((q[i, w] * d[j, w]).item() for w in range(4)) / tau)
        losses.append(-math.log(parts[right[i].item()] / sum(parts.values())))
        for j in among:  # the gradient at a score is its probability, less 1 for the right one
            at = (parts[j] / sum(parts.values()) - (j == right[i].item())) / tau
            pull_q[i] += at * d[j]
            pull_d[j] += at * q[i]
    q.requires_grad_(), d.requires_grad_()
    found = contrastive_loss(q, d, right, allowed, tau)
    assert torch.allclose(found, torch.tensor(losses, dtype=torch.float64), atol=1e-12)
    for ours, by_hand in zip(torch.autograd.grad(found.sum(), (q, d)), (pull_q, pull_d)):
        assert torch.allclose(ours, by_hand, atol=1e-12)


def test_the_distillation_loss_and_its_gradient_are_ra_dits_written_out():
    q, d, tau = drawn(2, 4), drawn(2, 3, 4, seed=1), 0.3
    target = torch.log_softmax(drawn(2, 3, seed=2), 1)
    losses, pull = [], torch.zeros_like(d)
    for i in range(2):
        parts = [math.exp((q[i] @ d[i, j]).item() / tau) for j in range(3)]
        p = [part / sum(parts) for part in parts]
        losses.append(
            sum(p[j] * (math.log(p[j]) - target[i, j].item()) for j in range(3))
        )  # KL of the retriever from the reader, not the other way round
        for j in range(3):
            pull[i, j] = p[j] * (math.log(p[j]) - target[i, j].item() - losses[i]) / tau * q[i]
    d.requires_grad_()
    found = distillation_loss(q, d, target, tau)
    assert torch.allclose(found, torch.tensor(losses, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(torch.autograd.grad(found.sum(), d)[0], pull, atol=1e-12)


def test_marginal_losses_and_their_gradients_written_out():
    weights, tokens = (
        torch.tensor([0.7, 0.3], dtype=torch.float64),
        torch.tensor([[0.9, 0.8], [0.1, 0.5]], dtype=torch.float64),
    )
    scores, logp, mask = (
        weights.log().clone().requires_grad_(),
        tokens.log().clone().requires_grad_(),
        torch.ones(1, 2),
    )
    run = lambda loss: loss(torch.log_softmax(scores, 0)[None], logp[None], mask)
    # RAG-sequence: 0.7 · 0.72 + 0.3 · 0.05 = 0.519
    # each token of a passage has that passage's share of it
    loss, share = (
        run(sequence_loss),
        torch.tensor([0.504 / 0.519, 0.015 / 0.519], dtype=torch.float64),
    )
    at_scores, at_logp = torch.autograd.grad(loss.sum(), (scores, logp))
    assert math.isclose(loss.item(), -math.log(0.519), rel_tol=1e-12)
    assert torch.allclose(at_logp, -share[:, None].expand(2, 2), atol=1e-12)
    # REALM, §3.3: the gradient of log p(y|x) at the score of a passage
    # is (p(y|z,x) / p(y|x) - 1) p(z|x)
    realm = torch.tensor([(0.72 / 0.519 - 1) * 0.7, (0.05 / 0.519 - 1) * 0.3], dtype=torch.float64)
    assert torch.allclose(-at_scores, realm, atol=1e-12)
    assert realm[0] > 0 > realm[1]
    # RAG-token: (0.7 · 0.9 + 0.3 · 0.1) (0.7 · 0.8 + 0.3 · 0.5) = 0.66 · 0.71
    loss = run(token_loss)
    at_scores, at_logp = torch.autograd.grad(loss.sum(), (scores, logp))
    assert math.isclose(loss.item(), -math.log(0.66 * 0.71), rel_tol=1e-12)
    assert torch.allclose(
        at_logp,
        -torch.tensor(
            [[0.63 / 0.66, 0.56 / 0.71], [0.03 / 0.66, 0.15 / 0.71]], dtype=torch.float64
        ),
        atol=1e-12,
    )
    assert torch.allclose(
        -at_scores,
        torch.tensor(
            [0.7 * (0.9 / 0.66 + 0.8 / 0.71 - 2), 0.3 * (0.1 / 0.66 + 0.5 / 0.71 - 2)],
            dtype=torch.float64,
        ),
        atol=1e-12,
    )
    # RA-DIT's reader: the mean over passages; and a token that is padding counts nowhere
    loss = each_loss(logp[None], mask)
    assert math.isclose(loss.item(), -(math.log(0.72) + math.log(0.05)) / 2, rel_tol=1e-12)
    assert torch.allclose(
        torch.autograd.grad(loss.sum(), logp)[0],
        torch.full((2, 2), -0.5, dtype=torch.float64),
        atol=1e-12,
    )
    short = torch.tensor([[1.0, 0.0]])
    for loss, expected in ((sequence_loss, 0.66), (token_loss, 0.66)):
        assert math.isclose(
            loss(weights.log()[None], logp[None], short).item(), -math.log(expected), rel_tol=1e-12
        )


def plain_vectors(model, tokenizer, texts, before):
    "Means of the last states of a causal LM, by transformers, a text at a time; of length 1."
    found = []
    for text in texts:
        last = (
            model(torch.tensor([tokenizer(before + text).input_ids]), output_hidden_states=True)
            .hidden_states[-1][0]
            .mean(0)
        )
        found.append(last / last.norm())
    return torch.stack(found)


@pytest.mark.parametrize("algorithm", ["labels", "reader"])
def test_the_first_step_of_a_retriever_is_its_loss_written_out(algorithm):
    run = lab.run(
        "retriever",
        algorithm=algorithm,
        candidates=3,
        negatives=2,
        steps=1,
        batch_size=3,
        accumulate=2,
        eval_rows=8,
        seed=19,
        dtype="float32",
        device="cpu",
    )
    passages, learned, _ = open_library("facts")
    settings = Retriever(
        algorithm=algorithm,
        candidates=3,
        negatives=2,
        steps=1,
        batch_size=3,
        accumulate=2,
        seed=19,
        dtype="float32",
        device="cpu",
    )
    rows = teach(settings, passages, learned, Index(passages))
    step = [rows[i] for i in Order(len(rows), 6, 19).rows(0)]
    assert algorithm == "labels" or len(rows) == 6, "a reader judges no more than is asked about"
    assert algorithm == "reader" or not in_batch(step)[1].all(), (
        "a passage that is right for two questions is in this step"
    )
    model, tokenizer = load_model("tiny", "float32", "cpu"), load_tokenizer("tiny")
    q = plain_vectors(model, tokenizer, [r["question"] for r in step], "Question: ")
    numbers = [n for r in step for n in r["passages"]]
    d = plain_vectors(model, tokenizer, [passages[n]["text"] for n in numbers], "Passage: ")
    losses = []
    for i, row in enumerate(step):
        if algorithm == "labels":
            own = 3 * i + row["right"]
            scores = torch.stack(
                [
                    q[i] @ d[j] / settings.temperature
                    for j, n in enumerate(numbers)
                    if j == own or n not in row["good"]
                ]
            )
            losses.append(scores.logsumexp(0) - q[i] @ d[own] / settings.temperature)
        else:
            p = (d[3 * i : 3 * i + 3] @ q[i] / settings.temperature).softmax(0)
            losses.append((p * (p.log() - row["target"])).sum())
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        .norm()
        .item()
    )
    first = run.metrics().iloc[0]
    assert math.isclose(first["loss"], loss.item(), rel_tol=1e-4)
    assert math.isclose(first["grad_norm"], norm, rel_tol=1e-3)


def test_a_readers_verdict_is_its_likelihood_of_the_answer():
    passages, learned, _ = open_library("facts")
    settings = Retriever(algorithm="reader", candidates=3, dtype="float32", device="cpu")
    row = teach(settings, passages, learned[:1], Index(passages))[0]
    model, tokenizer, likely = load_model("tiny", "float32", "cpu"), load_tokenizer("tiny"), []
    for n in row["passages"]:
        before = tokenizer(
            f"Passage: {passages[n]['text']}\nQuestion: {row['question']}\nAnswer:"
        ).input_ids
        answer_ids = tokenizer(f" {learned[0]['answer']}").input_ids + [tokenizer.eos_token_id]
        logits = model(torch.tensor([before + answer_ids])).logits[0].log_softmax(-1)
        likely.append(
            math.exp(
                sum(logits[len(before) + t - 1, token].item() for t, token in enumerate(answer_ids))
            )
        )
    target = (torch.tensor(likely) / settings.reader_temperature).log_softmax(0)
    assert torch.allclose(row["target"], target, atol=1e-3)
    assert passages[row["passages"][row["right"]]]["id"] in learned[0]["positives"]


@pytest.mark.parametrize("refresh", [0, 1])
def test_the_first_step_of_a_joint_reader_is_its_loss_written_out(refresh):
    run = lab.run(
        "reader",
        loss="sequence",
        top_k_passages=2,
        refresh=refresh,
        temperature=0.2,
        steps=1,
        batch_size=2,
        eval_rows=4,
        seed=4,
        dtype="float32",
        device="cpu",
    )
    passages, learned, _ = open_library("facts")
    step = [learned[i] for i in Order(len(learned), 2, 4).rows(0)]
    reader, encoder, tokenizer = (
        load_model("tiny", "float32", "cpu"),
        load_model("tiny", "float32", "cpu"),
        load_tokenizer("tiny"),
    )
    losses = []
    for q, found in zip(step, Index(passages).search([q["question"] for q in step], 2)):
        question, texts = (
            plain_vectors(encoder, tokenizer, [q["question"]], "Question: ")[0],
            plain_vectors(encoder, tokenizer, [h.text for h in found], "Passage: "),
        )
        weights = ((texts if refresh else texts.detach()) @ question / 0.2).softmax(
            0
        )  # RAG leaves the passages' vectors as they are
        answer, whole = tokenizer(f" {q['answer']}").input_ids + [tokenizer.eos_token_id], []
        for hit in found:
            before = tokenizer(f"Passage: {hit.text}\nQuestion: {q['question']}\nAnswer:").input_ids
            logits = reader(torch.tensor([before + answer])).logits[0].log_softmax(-1)
            whole.append(
                torch.stack([logits[len(before) + t - 1, token] for t, token in enumerate(answer)])
                .sum()
                .exp()
            )
        losses.append(-(weights @ torch.stack(whole)).log())
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = (
        torch.cat(
            [
                p.grad.flatten()
                for m in (reader, encoder)
                for p in m.parameters()
                if p.grad is not None
            ]
        )
        .norm()
        .item()
    )
    first = run.metrics().iloc[0]
    assert math.isclose(first["loss"], loss.item(), rel_tol=1e-4)
    assert math.isclose(first["grad_norm"], norm, rel_tol=1e-3)


# files of others

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": "The Esk is a river.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "What is the Esk?",
                            "answers": [
                                {"text": "a river", "answer_start": 11},
                                {"text": "river", "answer_start": 13},
                            ],
                            "is_impossible": False,
                        }
                    ]
                    * 30,
                },
                {
                    "context": "The Tay is long.",
                    "qas": [
                        {
                            "id": "2",
                            "question": "How wide is the Tay?",
                            "answers": [],
                            "is_impossible": True,
                        }
                    ],
                },
            ],
        }
    ],
}


@pytest.mark.parametrize("name", ["squad.json", "squad.json.gz"])
def test_squads_own_files_are_data_and_library(tmp_path, name):
    (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt").write(json.dumps(SQUAD))
    passages, learned, held_out = open_library(str(tmp_path / name))
    assert [p["text"] for p in passages] == ["The Esk is a river.", "The Tay is long."]
    assert len(learned) + len(held_out) == 30
    assert learned[0]["question"] == "What is the Esk?"
    assert learned[0]["answers"] == ["a river", "river"]
    assert learned[0]["positives"] == [passages[0]["id"]]
    assert [d.text for d in load_documents(tmp_path / name)] == [p["text"] for p in passages], (
        "each context once, also that of a question that has no answer"
    )
    broken = json.loads(json.dumps(SQUAD))
    del broken["data"][0]["paragraphs"][1]["qas"][0]["question"]
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    one_line(lambda: open_library(str(tmp_path / "broken.json")), "article 1", "question")


def test_several_right_answers(tmp_path):
    (tmp_path / "nq.jsonl").write_text(
        "".join(
            json.dumps(
                {"question": f"who wrote song {n}", "answer": ["Bob Russell", "Bobby Scott"]}
            )
            + "\n"
            for n in range(30)
        )
    )
    (tmp_path / "kilt.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": str(n),
                    "input": f"who wrote song {n}",
                    "output": [
                        {"answer": "Bob Russell"},
                        {"answer": "Bobby Scott", "provenance": []},
                    ],
                }
            )
            + "\n"
            for n in range(30)
        )
    )
    (tmp_path / "songs.txt").write_text("Bobby Scott wrote it.\n")
    for name in ("nq.jsonl", "kilt.jsonl"):
        passages, learned, held_out = open_library(
            str(tmp_path / name), corpus=str(tmp_path / "songs.txt")
        )
        assert all(
            q["positives"] == ["songs.txt"]
            and q["answer"] == "Bob Russell"
            and q["answers"] == ["Bob Russell", "Bobby Scott"]
            for q in [*learned, *held_out]
        )
        one_line(lambda: open_library(str(tmp_path / name)), name, "context")
    assert exact_match("Bobby Scott [1].", "Bob Russell", "Bobby Scott") == 1.0
    assert exact_match("Bob", "Bob Russell", "Bobby Scott") == 0.0
    assert (
        with_other_answer(
            "Bobby Scott wrote it, or Bob Russell.",
            ["Bob Russell", "Bobby Scott"],
            ["bob russell", "Ida"],
        )
        == "Ida wrote it, or Ida."
    )
