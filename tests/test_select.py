"Selection of rows: scores against plain references, every selector in a run, refusals."

import json
import math

import numpy as np
import pytest
import torch

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.core.run import Run
from polm_lab.data.encode import encode
from polm_lab.data.load import load_data
from polm_lab.data.messages import text_of
from polm_lab.finetuning.select import ALGORITHMS, INDICATORS, NAMES, Select, experienced
from polm_lab.finetuning.selection.pool import (
    FAULTS,
    PRINCIPLE,
    Pool,
    best,
    read_graded,
    spoiled,
    statistics,
)
from polm_lab.finetuning.selection.scores import (
    apply_rule,
    bare_answer,
    contrasting_subsets,
    embed,
    fit_rule,
    from_each_cluster,
    ifd_scores,
    k_center,
    k_means,
    lexical_diversity,
    neighbour_distance,
    scaled,
)
from polm_lab.models.load import load_model
from polm_lab.models.policy import Policy
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.rewards.judges import MARK, question_about
from polm_lab.training.evaluate import sequence_logps
from polm_lab.training.making import KEPT

LITTLE = dict(data="chat#24", steps=1, experience=4, eval_rows=6, batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLM_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield


def pool_of(tmp_path, **knobs) -> Pool:
    settings = Select(**LITTLE | knobs)
    return Pool(settings, Run.create("select", vars(settings), out=tmp_path))


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(*texts) -> list[dict]:
    return [dict(prompt=prompt, completion=completion) for prompt, completion in texts]


# scores


def test_ifd_is_the_ratio_of_two_losses_of_the_model(tmp_path):
    model, tokenizer = load_model("tiny", "float32", "cpu"), load_tokenizer("tiny")
    examples = [
        encode(tokenizer, row, "completion", 64) for row in load_data("stories#3", "completion")
    ]
    found = ifd_scores(Policy(model), examples, tokenizer.pad_token_id)

    def loss(ids: list[int], first: int) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        logp = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        return -logp[first - 1 :].mean().item()

    for example, ratio in zip(examples, found):
        ids = example["input_ids"]
        first = example["completion_mask"].index(1)
        # the first token of the answer has nothing before it when it is alone
        assert ratio == pytest.approx(loss(ids, first + 1) / loss(ids[first:], 1), rel=1e-4)


def test_an_answer_of_one_token_has_no_ifd_unless_something_begins_each_text():
    model, tokenizer = load_model("tiny", "float32", "cpu"), load_tokenizer("tiny")
    one = [dict(input_ids=[5, 6, 7], completion_mask=[0, 0, 1])]
    assert math.isnan(ifd_scores(Policy(model), one, tokenizer.pad_token_id)[0])
    assert ifd_scores(Policy(model), one, tokenizer.pad_token_id, opening=[1])[0] > 0


def test_a_bare_answer_learns_the_tokens_that_the_row_learns():
    row = dict(input_ids=[3, 4, 5, 6], completion_mask=[0, 1, 1, 1])
    for opening in ([], [9], [9, 8]):
        whole, alone = bare_answer(row, opening)
        learned = [
            [i for i, m in zip(e["input_ids"], e["completion_mask"]) if m] for e in (whole, alone)
        ]
        assert learned[0] == learned[1] == ([5, 6] if not opening else [4, 5, 6])
    assert row["completion_mask"] == [0, 1, 1, 1]


def test_k_center_covers_within_twice_the_best_radius():
    from itertools import combinations

    points = np.random.default_rng(0).normal(size=(12, 2))
    chosen, radius = k_center(points, 3)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    assert radius == pytest.approx(distances[chosen].min(0).max())
    least = min(distances[list(some)].min(0).max() for some in combinations(range(12), 3))
    assert least <= radius <= 2 * least
    assert len(set(k_center(np.zeros((5, 2)), 5)[0])) == 5
    assert k_center(points, 20)[1] == pytest.approx(0.0, abs=1e-9)


def test_clusters_are_the_same_for_the_same_seed_and_give_rows_in_turns():
    points = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    points[:20] += 10
    labels = k_means(points, 2, seed=0)
    assert labels == k_means(points, 2, seed=0)
    assert len(set(labels[:20])) == len(set(labels[20:])) == 1
    found = from_each_cluster(labels, 4, list(range(40)))
    assert sorted(labels[i] for i in found) == [0, 0, 1, 1]
    assert k_means(points[:1], 5) == [0]


def test_distances_to_neighbours_and_scaling():
    points = np.array([[0.0], [1.0], [3.0], [7.0]], dtype=np.float32)
    assert neighbour_distance(points, 2).tolist() == [3.0, 2.0, 3.0, 6.0]
    assert neighbour_distance(points[:1]).tolist() == [0.0]
    found = scaled(np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert found.tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_points_do_not_depend_on_padding():
    model, tokenizer = load_model("tiny", "float32", "cpu"), load_tokenizer("tiny")
    texts = [[5, 6, 7], list(range(4, 30)), [9]]
    together = embed(Policy(model), texts, tokenizer.pad_token_id)
    alone = [embed(Policy(model), [text], tokenizer.pad_token_id)[0] for text in texts]
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(np.linalg.norm(together, axis=1), 1)


def test_lexical_diversity_by_hand():
    # a b a: the share falls to 2/3 < 0.72, twice
    assert lexical_diversity("a b a b a b".split()) == pytest.approx(3.0)
    # forwards: a factor of three words, and a part at 3/4; backwards: 5/7 at the end
    forwards = 7 / (1 + (1 - 3 / 4) / (1 - 0.72))
    assert lexical_diversity("a b a c d e c".split()) == pytest.approx((forwards + 7) / 2)
    assert lexical_diversity([]) == 0.0


def test_a_rule_needs_two_subsets_and_finds_its_coefficients():
    means = np.random.default_rng(0).normal(size=(30, 3))
    losses = 0.5 + means @ np.array([1.0, 0.0, -2.0])
    assert np.allclose(fit_rule(means, losses, ridge=0.0), [0.5, 1, 0, -2])
    assert np.abs(fit_rule(means, losses, ridge=10.0)[1:]).max() < 1
    with pytest.raises(WrongInput, match="1 subsets: expected at least 2"):
        fit_rule(means[:1], losses[:1])
    assert apply_rule(np.array([0.5, 1.0, -2.0]), np.array([[3.0, 1.0]])).tolist() == [1.5]
    assert contrasting_subsets(np.array([[3.0], [1.0], [2.0]]), 1) == [[1], [0]]


def test_the_best_are_kept_whatever_has_no_score():
    scores = [0.5, None, math.nan, 0.9, 0.5, math.inf]
    found = best(scores, 0.5, among=[True, True, True, False, True, True])
    assert found == [KEPT, "no score", "no score", "no score", KEPT, "no score"]
    assert best([1.0, 2.0], 0.001).count(KEPT) == 1


# damage


def test_damage_is_known_and_the_same_for_the_same_seed():
    rows = load_data("chat#70", "completion")
    held = load_data("chat#8", "completion", "test")
    found = spoiled(rows, held, 0.5, seed=3)
    assert found == spoiled(rows, held, 0.5, seed=3) != spoiled(rows, held, 0.5, seed=4)
    faults = [row["fault"] for row in found if row["fault"]]
    assert len(faults) == 35
    assert {faults.count(name) for name in FAULTS} == {5}
    whole = [row for row, same in zip(found, rows) if not row["fault"] and same]
    assert all(row["completion"] in [r["completion"] for r in rows] for row in whole)
    assert spoiled(rows, held, 0.0, 0) == rows
    with pytest.raises(WrongInput, match="spoil: the rows are whole texts"):
        spoiled([dict(text="a")], [], 0.5, 0)


# runs


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_keeps_some_rows_and_says_why_the_others_not(name):
    run = lab.run("select", algorithm=name, spoil=0.4, **LITTLE)
    kept, dropped = run.lines("kept"), run.lines("dropped")
    assert kept
    assert {row["verdict"] for row in kept} == {KEPT}
    assert all(row["verdict"] not in ("", KEPT) for row in dropped)
    seen = {parent["row"] for row in [*kept, *dropped] for parent in row["parents"]}
    assert seen == set(range(24))
    after, before = run.summary["after"], run.summary["before"]
    assert after["kept"] == pytest.approx(len(kept) / 24)
    assert before["rows"] == after["rows"] == 24
    assert sum(v for k, v in after.items() if k.startswith("verdict/")) == len(kept) + len(dropped)
    if name in ("ifd", "judge", "kcenter", "influence", "random"):
        assert len(kept) == 7
    ids = [row["id"] for row in [*kept, *dropped]]
    assert len(set(ids)) == len(ids)


def test_all_names_have_a_selector():
    assert sorted(ALGORITHMS) == sorted(NAMES)


def test_kept_rows_are_data_to_learn_from():
    run = lab.run("select", algorithm="weighting", **LITTLE)
    learned = lab.run(
        "sft", data=str(run.path / "kept.jsonl"), eval_data="chat", eval_rows=2, steps=1
    )
    assert learned.status == "finished"
    assert "gold_score" in learned.summary["after"]


def test_ifd_keeps_the_hardest_rows_below_one(tmp_path):
    pool = pool_of(tmp_path, spoil=0.5, experience=0)
    assert experienced(pool) is pool.own
    choices = ALGORITHMS["ifd"](pool)
    kept = [choice.score for choice in choices if choice.verdict == KEPT]
    lower = [choice.score for choice in choices if choice.verdict == "lower score"]
    assert 1 > max(kept)
    assert min(kept) >= max(lower)
    assert all(c.score >= 1 for c in choices if c.verdict == "instruction misleads")


def test_rows_with_a_known_fault_are_found():
    found = {}
    for name in ("dedup", "decontaminate", "rules", "screen"):
        knobs = LITTLE | dict(data="chat#96", eval_rows=64)
        found[name] = lab.run("select", algorithm=name, spoil=0.4, **knobs).summary["after"]
    assert found["dedup"]["found/copy"] == 1
    assert found["dedup"]["found/near_copy"] > 0.5
    assert found["decontaminate"]["found/leak"] == 1
    assert found["rules"]["found/markup"] == found["rules"]["found/repetition"] == 1
    assert found["rules"]["found/refusal"] == 1
    assert found["screen"]["found/wrong_answer"] > 0.5
    assert found["rules"]["kept"] > 0.8
    assert found["screen"]["kept"] > 0.8


def test_rules_repair_markup(tmp_path):
    rows = pairs(("a < b?", "<div><b>yes</b></div>"), ("What?", "This &amp; that."))
    pool = pool_of(tmp_path, data=written(tmp_path / "rows.jsonl", rows), eval_data="sums")
    found = ALGORITHMS["rules"](pool)
    assert text_of(found[0].row["completion"]) == "**yes**"
    assert found[0].row["prompt"] == "a < b?"
    assert (found[0].verdict, found[0].why) == (KEPT, "markup removed")


def test_long_conversations_are_split(tmp_path):
    turns = []
    for i in range(6):
        turns += [
            dict(role="user", content=f"Tell me of {i}."),
            dict(role="assistant", content="x y z " * 3),
        ]
    path = written(tmp_path / "talk.jsonl", [dict(messages=turns)] * 3)
    pool = pool_of(tmp_path, data=path, eval_data="stories", max_length=64)
    found = ALGORITHMS["rules"](pool)
    assert len(pool.rows) == 2  # one of three is held out
    assert {c.parents for c in found} == {(0,), (1,)}
    assert len(found) > 4
    assert sum(len(c.row["messages"]) for c in found) == 24
    assert all(len(pool.encoded(c.row)["input_ids"]) < 64 for c in found)


def test_weights_and_rates_follow_the_sources():
    knobs = LITTLE | dict(data="chat#30 + sums#10", eval_data="sums", temperature=1000)
    run = lab.run("select", algorithm="mixing", **knobs | dict(keep=0.5))
    sources = [row["source"] for row in run.lines("kept")]
    assert sources.count("sums#10") == sources.count("chat#30") == 10
    run = lab.run("select", algorithm="weighting", **knobs)
    rows = run.lines("kept")
    totals = {s: sum(r["weight"] for r in rows if r["source"] == s) for s in ("sums#10", "chat#30")}
    assert totals["sums#10"] == pytest.approx(totals["chat#30"], rel=0.01)
    assert sum(totals.values()) == pytest.approx(40)


def test_templates_come_from_a_file_and_after_examples(tmp_path):
    path = tmp_path / "asked.toml"
    path.write_text('[short]\nprompt = "{{ request }}?"\ncompletion = " {{ answer }}"\n')
    run = lab.run(
        "select",
        algorithm="templates",
        templates=str(path),
        shots=2,
        **LITTLE | dict(data="sums#9"),
    )
    rows = run.lines("kept")
    given = {row["prompt"]: row["completion"] for row in load_data("sums#9", "completion")}
    assert len(rows) == 9
    for row in rows:
        assert row["prompt"].count("?") == 3
        asked = row["prompt"].rpartition("\n")[2].removesuffix("?")
        assert row["completion"].strip() == given[asked] == row["answer"]


def test_instruction_mining_records_its_rule_and_takes_the_best_size():
    run = lab.run("select", algorithm="instruction_mining", keep=0.5, **LITTLE)
    rule, sizes = run.record["rule"], run.record["sizes"]
    assert list(rule) == ["constant", *INDICATORS]
    assert sorted(map(int, sizes)) == [3, 6, 12]
    assert len(run.lines("kept")) == int(min(sizes, key=sizes.get))


def test_mods_says_which_rows_cover_and_which_are_needed(tmp_path):
    run = lab.run("select", algorithm="mods", keep=0.5, **LITTLE)
    why = [row["why"] for row in run.lines("kept")]
    assert why.count("covers") == 6
    assert set(why) <= {"covers", "necessary"}
    run = lab.run("select", algorithm="mods", keep=0.5, spoil=0.5, **LITTLE)
    assert min(row["score"] for row in run.lines("kept")) >= 0.7
    with pytest.raises(WrongInput, match="threshold = 9: no row has such a grade"):
        lab.run("select", algorithm="mods", **LITTLE | dict(threshold=9))


def test_the_comparison_tunes_on_as_many_random_rows():
    run = lab.run("select", algorithm="judge", compare=True, **LITTLE)
    counts = {
        name: len((run.path / f"{name}.jsonl").read_text().splitlines())
        for name in ("random", "chosen")
    }
    assert counts == {"random": 7, "chosen": 7}
    assert run.summary["before"]["tuned_gold_score"] != run.summary["after"][
        "tuned_gold_score"
    ] or (run.summary["before"]["tuned_perplexity"] != run.summary["after"]["tuned_perplexity"])


def test_a_grader_that_reads_sees_the_examples_and_is_asked_once(tmp_path):
    rows = [
        dict(prompt="1+1=", completion="2", mark=10),
        dict(prompt="2+2=", completion="5", mark=1),
    ]
    path = written(tmp_path / "graded.jsonl", rows)
    asked = question_about(
        MARK, [(PRINCIPLE, "")], dict(prompt="3+3="), read_graded(path), reply="6"
    )
    assert [turn["role"] for turn in asked] == ["user", "assistant"] * 2 + ["user"]
    assert [asked[1]["content"], asked[3]["content"]] == ["10", "1"]
    assert "2+2=" in asked[2]["content"]
    assert "3+3=" in asked[-1]["content"]
    pool = pool_of(tmp_path, data="sums#6", judge="model:self", examples=path)
    first = pool.grades
    assert all(-1 <= mark <= 1 for mark in first)
    plain = pool_of(tmp_path / "other", data="sums#6", judge="model:self").grades
    assert first != plain
    again = Pool(pool.settings, pool.run)
    again.judge.mark = None  # it is not asked again
    assert again.grades == first


def test_statistics_count_tokens_and_copies(tmp_path):
    pool, rows = pool_of(tmp_path, data="sums#4"), pairs(("ab", "c d"), ("ab", "c d"), ("x", "y"))
    found = statistics(pool, rows)
    examples = [pool.encoded(row) for row in rows]
    learned = [sum(e["completion_mask"]) for e in examples]
    assert found["length"] == pytest.approx(sum(learned) / 3)
    asked = sum(len(e["input_ids"]) for e in examples) - sum(learned)
    assert found["prompt_length"] == pytest.approx(asked / 3)
    assert found["copies"] == pytest.approx(1 / 3)
    assert found["diversity"] == pytest.approx((2 + 2 + 1) / 3)
    loss = -sequence_logps(pool.own, examples, pool.pad).sum().item() / sum(learned)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


# what is refused


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(data="chat#8 + stories.txt"), "no such file|cannot|no built-in"),
        (dict(data="sums#8 + sums#8"), "a source comes twice"),
        (dict(algorithm="judge", judge="nobody"), "judge: found 'nobody'"),
        (dict(algorithm="judge", judge="rule:tests"), "column `tests`|bubblewrap|sandbox"),
        (dict(algorithm="best"), "algorithm"),
        (dict(algorithm="templates", templates="none.toml"), "none.toml"),
        (dict(keep=0.0), "keep"),
    ],
)
def test_wrong_input_is_one_line(knobs, words):
    with pytest.raises(WrongInput, match=words) as caught:
        lab.run("select", **LITTLE | knobs)
    assert "\n" not in str(caught.value)


def test_whole_texts_have_no_instruction(tmp_path):
    path = written(tmp_path / "texts.jsonl", [dict(text="One day."), dict(text="Another one.")])
    for name in ("ifd", "judge", "influence", "templates"):
        with pytest.raises(WrongInput, match="whole texts or conversations"):
            lab.run("select", algorithm=name, **LITTLE | dict(data=path))
    with pytest.raises(WrongInput, match="expected rows of one kind"):
        lab.run("select", **LITTLE | dict(data=f"sums#8 + {path}"))
    assert (
        lab.run("select", algorithm="dedup", **LITTLE | dict(data=path)).summary["after"]["kept"]
        == 1
    )


def test_a_mark_is_a_whole_number_from_one_to_ten(tmp_path):
    for mark in (0, 11, "9", True, None):
        path = written(tmp_path / "graded.jsonl", [dict(prompt="a", completion="b", mark=mark)])
        with pytest.raises(WrongInput, match="expected a whole number from 1 to 10"):
            read_graded(path)
