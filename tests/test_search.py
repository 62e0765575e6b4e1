"""Search: beams against a search over all sequences and against transformers.

Also forked rows, draws of forks, and budgets.
"""

import itertools
import math

import pytest
import torch
from test_rollout import KINDS, make, recomputed, some_prompts

from polm_lab.core.knobs import WrongInput
from polm_lab.core.run import Run
from polm_lab.models.cache import compact_places
from polm_lab.models.load import load_model
from polm_lab.models.rollout import Batch, evaluating, rollout, steps
from polm_lab.models.sampling import row_seeds
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.training.search import Answer, Budget, Candidate, Samples, compare_widths, continuing
from polm_lab.training.search import log_probability, most_for, sampled, search

SMALL = dict(vocab_size=6, eos_token_id=1)


def beam(model, prompt, width, new, tokens=10**9, power=0.0, branches=None):
    "The kept candidates of a beam search, and its budget."
    budget = Budget(tokens)
    score = lambda fresh, _: [log_probability(one.state, power) for one in fresh]
    propose = continuing(model, None, prompt, branches or width, new)
    *_, kept = search(propose, score, width, budget)
    return kept, budget


def all_sequences(model, prompt, new, end):
    "Every sequence of at most `new` tokens, cut at its first end token, with its log-probability."
    vocab = model.config.vocab_size
    tails = torch.tensor(list(itertools.product(range(vocab), repeat=new)))
    ids = torch.cat([torch.tensor([prompt]).expand(len(tails), -1), tails], 1)
    with torch.no_grad():
        logps = model(ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
    logps = logps.gather(-1, tails[:, :, None])[:, :, 0]
    found = {}
    for tail, logp in zip(tails.tolist(), logps.tolist()):
        cut = tail.index(end) + 1 if end in tail else new
        found[tuple(tail[:cut])] = sum(logp[:cut])
    return found


# Beams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_sequences(seed, power):
    model, new = make(seed=seed, **SMALL), 4
    every = all_sequences(model, [2, 3, 4], new, end=1)
    ranked = sorted(every, key=lambda s: -every[s] / len(s) ** power)
    kept, _ = beam(model, [2, 3, 4], 6**new, new, power=power, branches=6)
    assert len(kept) == len(every)
    for one, best in zip(kept[:20], ranked):
        assert math.isclose(one.score, every[best] / len(best) ** power, abs_tol=1e-4)
        assert (
            math.isclose(
                one.score, every[tuple(one.state.tokens)] / len(best) ** power, abs_tol=1e-4
            )
            or power
        )


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_a_beam_keeps_what_a_beam_by_hand_keeps(width):
    "Each prefix scored by a plain forward pass of its own, in a loop over lists."
    for seed in range(4):
        model, prompt, new = make(seed=seed, **SMALL), [2, 5], 6
        rows = [((), 0.0)]
        for _ in range(new):
            pool = [row for row in rows if row[0][-1:] == (1,)]
            for tokens, logp in rows:
                if tokens[-1:] != (1,):
                    with torch.no_grad():
                        last = (
                            model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].log_softmax(-1)
                        )
                    pool += [((*tokens, k), logp + last[k].item()) for k in range(6)]
            rows = sorted(pool, key=lambda row: -row[1])[:width]
        kept, budget = beam(model, prompt, width, new)
        assert [tuple(one.state.tokens) for one in kept] == [tokens for tokens, _ in rows]
        assert max(abs(one.score - logp) for one, (_, logp) in zip(kept, rows)) < 1e-4
        assert budget.read == 2


@pytest.mark.parametrize("width", [2, 4])
def test_beams_equal_those_of_transformers_where_nothing_ends(width):
    "On the embedded model, without end tokens: there a finished row cannot be treated differently."
    model, tokenizer = load_model("tiny", "float32", "cpu").eval(), load_tokenizer("tiny")
    model.generation_config.eos_token_id = []
    changed = 0
    for text in ("12+34=", "Once upon", "The capital of", "a", "Where does", "<|im_start|>"):
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        kept, budget = beam(model, prompt, width, 10)
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=width,
            do_sample=False,
            max_new_tokens=10,
            length_penalty=0.0,
            eos_token_id=None,
            pad_token_id=0,
            num_return_sequences=width,
            output_scores=True,
            return_dict_in_generate=True,
        )
        assert [one.state.tokens for one in kept] == out.sequences[:, len(prompt) :].tolist()
        assert torch.allclose(
            torch.tensor([one.score for one in kept]), out.sequences_scores, atol=1e-4
        )
        assert budget.spent == len(prompt) + 1 + 9 * width
        changed += kept[0].state.tokens != beam(model, prompt, 1, 10)[0][0].state.tokens
    assert changed, "greedy everywhere: the comparison is empty"


@pytest.mark.parametrize("kind", KINDS)
def test_one_beam_is_greedy_and_wide_ones_have_the_log_probs_of_a_plain_pass(kind):
    model = make(kind)
    for prompt in some_prompts():
        (one,), budget = beam(model, prompt, 1, 12)
        greedy = rollout(model, None, [prompt], max_new_tokens=12, temperature=0)
        assert one.state.tokens == greedy.completions[0]
        assert one.state.ended == greedy.ended[0]
        assert budget.spent == len(prompt) + len(one.state.tokens)
        for row in (one.state for one in beam(model, prompt, 4, 12)[0]):
            plain = recomputed(model, prompt, row.tokens, 1.0)
            assert (plain - torch.tensor(row.logps)).abs().max() < 1e-4


# Rows that go on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_selected_rows_equal_rows_that_were_computed_apart(kind, share):
    """Rows of padded prompts are dropped, reordered and repeated, and then two tokens are read.

    There are more rows than before.
    """
    from polm_lab.models.rollout import shared_prefix

    model, prompts, samples = make(kind), some_prompts(), 2
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), evaluating(model), shared_prefix(model, share) as shared:
        batch = Batch(model, prompts, samples, 6, shared)
        sequences = [list(prompt) for prompt in prompts for _ in range(samples)]
        for rows in (
            [0, 1, 2, 3, 4, 5, 6, 7],
            [7, 0, 0, 2, 2, 2, 5, 5, 1, 6, 0],
            [3, 10, 3],
            [1, 1, 0, 2],
            compact_places([True, False, True, True]),
        ):
            batch.select(rows)
            sequences = [list(sequences[row]) for row in rows]
            for one, logits in zip(sequences, batch.logits):
                assert (model(torch.tensor([one])).logits[0, -1] - logits).abs().max() < 2e-3
            token = torch.randint(4, 128, (len(rows),), generator=generator)
            batch.step(token)
            for one, k in zip(sequences, token.tolist()):
                one.append(k)
            for one, logits in zip(sequences, batch.logits):
                assert (model(torch.tensor([one])).logits[0, -1] - logits).abs().max() < 2e-3


def test_a_dropped_batch_moves_as_few_rows_as_it_can():
    assert compact_places([True] * 4) == [0, 1, 2, 3]
    assert compact_places([False] * 3) == []
    assert compact_places([False, True, False, True, True]) == [3, 1, 4]


def test_steps_without_an_answer_are_a_rollout():
    model, prompts = make(), some_prompts()
    seeds = row_seeds(4, 8)
    rolled = rollout(model, None, prompts, 2, 16, 0.8, seeds=seeds)
    walk = steps(model, None, prompts, 2, 16, 0.8, seeds=seeds)
    first = list(next(walk))
    lengths = [len(rows) for rows in walk]
    assert [row.number for row in first] == list(range(8))
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 1
    assert [row.tokens for row in first] == rolled.completions
    assert [row.ended for row in first] == rolled.ended
    assert [row.prompt for row in first] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_row_that_is_sent_twice_draws_differently_and_the_first_goes_on_as_if_alone():
    model, prompt = make(eos_token_id=None), [7, 8, 9]
    whole = rollout(model, None, [prompt], 1, 12, seeds=[5])
    for share in (True, False):
        walk = steps(model, None, [prompt], 1, 12, seeds=[5], share=share)
        for _ in range(3):
            next(walk)
        rows = walk.send([0] * 16)
        for rows in walk:
            pass
        assert len(rows) == 16
        assert rows[0].tokens == whole.completions[0]
        assert len({row.seed for row in rows}) == 16
        assert all(row.tokens[:3] == whole.completions[0][:3] for row in rows)
        assert len({tuple(row.tokens) for row in rows}) > 8
        assert len({row.tokens[3] for row in rows}) > 3
        for row in rows:
            assert (
                recomputed(model, prompt, row.tokens, 1.0) - torch.tensor(row.logps)
            ).abs().max() < 1e-4
    again = steps(model, None, [prompt], 1, 12, seeds=[5])
    for _ in range(3):
        next(again)
    again.send([0] * 16)
    for same in again:
        pass
    assert [row.tokens for row in same] == [row.tokens for row in rows], (
        "forks depend on the seed alone"
    )


def test_whoever_reads_the_steps_computes_as_before():
    model = make("gpt2", resid_pdrop=0.5).train()
    walk = steps(model, None, [[5, 6]], 2, 8)
    next(walk)
    assert torch.is_grad_enabled()
    assert not model.training
    loss = model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    first = [list(row.tokens) for row in next(walk)]
    walk.close()
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert [c[:2] for c in rollout(model, None, [[5, 6]], 2, 8).completions] == first


def test_what_cannot_go_on_is_refused():
    model = make(**SMALL)
    for wrong in (
        dict(branches=0),
        dict(branches=7, temperature=0),
        dict(branches=2, temperature=1.0),
        dict(branches=1.5, temperature=0),
    ):
        with pytest.raises(WrongInput, match="branches: found"):
            steps(model, None, [[5]], **wrong)
    with pytest.raises(WrongInput, match="prompts:0"):
        steps(model, None, [[]])
    walk = steps(model, None, [[2]], 1, 8, 0, branches=6)
    over = next(i for i, row in enumerate(next(walk)) if row.ended)
    with pytest.raises(ValueError, match="has ended"):
        walk.send([over])
    with pytest.raises(StopIteration):
        next(walk)


# Budgets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", range(4, 40, 3))
def test_a_budget_is_never_exceeded_and_is_used(tokens):
    model, width = make(eos_token_id=None), 3
    kept, budget = beam(model, [5, 6, 7], width, 12, tokens)
    assert budget.spent <= tokens
    assert budget.read == 3
    length = len(kept[0].state.tokens)
    assert budget.written == 1 + width * (length - 1)
    assert length == 12 or budget.spent + width > tokens


def test_no_room_for_a_first_token_is_said():
    with pytest.raises(WrongInput, match="nothing was proposed within 3 tokens"):
        beam(make(), [5, 6, 7], 2, 4, tokens=3)


def test_a_payment_is_taken_whole_or_not_at_all():
    budget = Budget(5)
    assert budget.pay(2, 2)
    assert not budget.pay(1, 1)
    assert budget.spent == 4
    assert budget.pay(written=1)
    assert not budget.pay(1)


def test_best_of_n_keeps_the_best_and_the_first_among_equals():
    worths = iter([("a", 1.0), ("b", 3.0), ("c", 3.0), ("d", 2.0), ("e", 9.0)])
    scored = []

    def score(fresh, budget):
        assert budget.pay(read=1)  # a judge that reads
        scored.extend(one.state[0] for one in fresh)
        return [one.state[1] for one in fresh]

    propose = lambda kept, budget: (
        [*kept, Candidate(next(worths))]
        if budget.spent + 4 <= budget.tokens and budget.pay(written=3)
        else []
    )
    budget = Budget(17)
    bests = []
    for kept in search(propose, score, 2, budget):
        bests.append([one.state[0] for one in kept])
    assert bests == [["a"], ["b", "a"], ["b", "c"], ["b", "c"]]
    assert scored == list("abcd")
    assert budget.spent == 16


def test_a_score_for_each_candidate_or_an_error():
    with pytest.raises(ValueError):
        list(
            search(
                lambda kept, budget: [Candidate(1), Candidate(2)],
                lambda fresh, budget: [1.0],
                1,
                Budget(1),
            )
        )


def seen_of(sample):
    return sample.tokens, round(sample.logp, 3)


# Samples for the same tokens ----------------------------------------------------------------------


def test_samples_drawn_bit_by_bit_are_those_drawn_at_once_and_cost_what_they_are():
    model, prompts = make(), some_prompts()
    samples, sizes = sampled(model, None, prompts, 8, 10, seed=3), []
    for tokens in (1, 20, 40, 60, 10**6):
        group = samples.within(tokens)
        sizes.append(len(group[0]))
        n = sizes[-1]
        assert n == 1 or samples.cost(n) <= tokens
        assert n == 8 or samples.cost(n + 1) > tokens
        value, cost = samples.compared(tokens, lambda question, some: len(some) + question)
        assert (value, cost) == (n + 1.5, samples.cost(n))
    assert sizes[0] == 1
    assert sizes[-1] == 8
    assert len(set(sizes)) > 3
    whole = sampled(model, None, prompts, 8, 10, seed=3)
    whole.draw(8)
    for group, other in zip(whole.groups, samples.groups, strict=True):
        assert list(map(seen_of, group)) == list(map(seen_of, other))
    by_hand = sum(map(len, prompts)) + sum(one.tokens for group in whole.groups for one in group)
    assert whole.cost(8) == by_hand / 4
    assert most_for(5, [3, 5, 6]) == 2
    assert most_for(1, [3, 5, 6]) == 1
    assert most_for(5, []) == 1


def test_a_search_is_recorded_with_its_tokens_and_samples_to_compare(tmp_path):
    model, prompts = make(), some_prompts()
    rows = [dict(prompt=str(i), answer=str(i)) for i in range(4)]
    made = lambda wanted: [
        Answer("good" if number == 1 else "bad", float(number), 5) for _, number in wanted
    ]
    samples = Samples(4, made, lambda question, group: 5 * len(group), 2)
    run = Run.create("beam", {}, out=tmp_path)
    with run.active():
        answer = lambda question, width, budget: beam_row(model, prompts[question], width, budget)
        compare_widths(
            run, rows, lambda row, text: float(text == "good"), [1, 3], answer, 45, samples
        )
    before, after = run.summary["before"], run.summary["after"]
    assert before["rows"] == 4
    assert before["tokens"] == (sum(map(len, prompts)) / 4 + before["length"])
    assert after["tokens"] > before["tokens"]
    assert after["logp_chosen"] >= before["logp_chosen"] - 1e-4
    assert (before["accuracy/best"], before["tokens/best"]) == (1.0, 10.0)
    assert before["accuracy"] == 0
    assert [line["step"] for line in run.lines()] == [1, 3]
    assert len(run.lines("samples")) == 8
    assert all(line["tokens"] <= 45 for line in run.lines("samples"))


def beam_row(model, prompt, width, budget):
    *_, kept = search(
        continuing(model, None, prompt, width, 8),
        lambda new, _: [log_probability(one.state) for one in new],
        width,
        budget,
    )
    return kept[0].state
