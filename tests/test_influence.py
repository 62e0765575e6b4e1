"""Influence of a row: Adam's direction, random projection, gradients of rows, warm-up, scores."""

import copy
import math

import pytest
import torch
from torch.nn.functional import normalize
from transformers import LlamaConfig, LlamaForCausalLM

from polm_lab.core.knobs import WrongInput
from polm_lab.data.batches import collate
from polm_lab.data.encode import encode_rows
from polm_lab.finetuning.selection import influence as page
from polm_lab.finetuning.selection.influence import Checkpoint, Projection, adam_direction
from polm_lab.finetuning.selection.influence import checkpoint_of, influence, less_scores
from polm_lab.finetuning.selection.influence import project_each, row_gradients, task_gradient
from polm_lab.finetuning.selection.influence import trainable, warm_checkpoints, warm_rows
from polm_lab.models.policy import Policy
from polm_lab.training.evaluate import mean_nll

SIZES = dict(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
WARM = dict(share=1.0, batch_size=4, dtype="float32", device="cpu", adapter="lora:r=2")
SCRIPTS = [
    dict(prompt="首都是哪里?", completion="北京"),
    dict(prompt="ما هي العاصمة؟", completion="القاهرة"),
    dict(prompt="राजधानी क्या है?", completion="नई दिल्ली"),
    dict(prompt="What is 2+2?", completion="4 🙂"),
]


def says(call, *args, **kwargs) -> str:
    with pytest.raises(WrongInput) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def small() -> Policy:
    "A small model in 64 bits, away from its start."
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).double().train()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return Policy(model)


def row(*ids: int, prompt: int = 1) -> dict:
    "An encoded row whose first `prompt` tokens are not learned."
    mask = [0] * prompt + [1] * (len(ids) - prompt)
    return {"input_ids": list(ids), "completion_mask": mask}


ROWS = [row(3, 7, 2, 9), row(5, 1, 1, 8, 30, 4, 12, prompt=3), row(2, 6)]


def flat(parts) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def encoded(tokenizer, rows=SCRIPTS) -> list[dict]:
    return encode_rows(tokenizer, rows, "completion", 64)


# the direction of a step


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.5)])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_the_direction_is_the_step_that_adamw_makes(steps, betas):
    generator = torch.Generator().manual_seed(steps)
    weight = torch.nn.Parameter(torch.zeros(40, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=betas, eps=1e-3, weight_decay=0.0)
    first = second = torch.zeros(40, dtype=torch.float64)
    for step in range(steps + 1):
        weight.grad = torch.randn(40, generator=generator, dtype=torch.float64)
        if step == steps and steps:
            state = optimizer.state[weight]
            first, second = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        before = weight.detach().clone()
        optimizer.step()
    found = adam_direction(weight.grad, first, second, steps, betas, 1e-3)
    torch.testing.assert_close(before - weight.detach(), found, rtol=1e-10, atol=1e-12)


def test_a_direction_by_hand():
    one = torch.tensor(1.0)
    assert adam_direction(3 * one, one, one, 1, (0.5, 0.5), 0.0).item() == pytest.approx(
        4 / math.sqrt(15)
    )
    # no gradient and no moments: no step, and no 0 / 0
    zero = torch.zeros(3)
    assert adam_direction(zero, zero, zero, 0).tolist() == [0, 0, 0]


# projection


def whole(projection: Projection) -> torch.Tensor:
    "The matrix [size, to] of a projection: what it makes of the unit vectors."
    return projection(torch.eye(projection.size, dtype=torch.float64)) * math.sqrt(projection.to)


def test_a_projection_is_a_matrix_of_signs(monkeypatch):
    monkeypatch.setattr(page, "BLOCK_SIGNS", 40)  # blocks of four rows, and a short last one
    projection = Projection(11, 10, seed=3)
    matrix = whole(projection)
    assert set(matrix.round(decimals=9).flatten().tolist()) == {-1.0, 1.0}
    blocks = [projection.signs(block, rows) for block, rows in enumerate((4, 4, 3))]
    assert torch.equal(torch.cat(blocks).double() * 2 - 1, matrix.round())
    assert not torch.equal(blocks[0], blocks[1])
    vectors = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(projection(vectors), vectors @ matrix / math.sqrt(10))
    torch.testing.assert_close(projection(vectors[0, 0]), vectors[0, 0] @ matrix / math.sqrt(10))


def test_signs_are_a_function_of_the_seed():
    assert Projection(4, 8).signs(0, 2).tolist() == [
        [0, 1, 0, 1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0, 0, 1, 0],
    ]
    same = Projection(100, 16, 1), Projection(100, 16, 1), Projection(100, 16, 2)
    one, two, other = (projection.signs(0, 100) for projection in same)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    # fair coins that do not hang together
    signs = Projection(2000, 64, 5).signs(0, 2000).double() * 2 - 1
    assert abs(signs.mean().item()) < 4 / math.sqrt(signs.numel())
    between = (signs.T @ signs / 2000).fill_diagonal_(0)
    assert between.abs().max() < 5 / math.sqrt(2000)


def test_products_are_unbiased_and_cosines_within_the_bound():
    generator = torch.Generator().manual_seed(1)
    x, y = normalize(torch.randn(2, 400, generator=generator), dim=-1)
    products = []
    for seed in range(300):
        projection = Projection(400, 16, seed)
        products.append((projection(x) @ projection(y)).item())
    products = torch.tensor(products)
    limit = math.sqrt(2 / 16)
    assert abs(products.mean().item() - (x @ y).item()) < 4 * limit / math.sqrt(300)
    assert products.std().item() < 1.15 * limit
    pairs = normalize(torch.randn(2, 200, 400, generator=generator), dim=-1)
    cosines = torch.cosine_similarity(*pairs, dim=-1)
    found = torch.cosine_similarity(*map(Projection(400, 1024), pairs), dim=-1)
    assert 0.8 < (found - cosines).std().item() * math.sqrt(1024) < 1.2


def test_no_block_is_larger_than_said(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(page, "BLOCK_SIGNS", 2**12)

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if torch.is_tensor(made) and "split" not in str(function):
                self.numbers = max(self.numbers, made.numel())
            return made

    vector = torch.ones(1, 3000)
    with Largest() as largest:
        Projection(3000, 64)(vector)
    assert largest.numbers <= 2**12


def test_projections_refuse_other_lengths_and_keep_precision():
    projection = Projection(6, 4)
    assert "length 5; expected 6" in says(projection, torch.ones(2, 5))
    assert "to = 0" in says(Projection, 6, 0)
    assert "size = 0" in says(Projection, 0, 6)
    assert projection(torch.ones(6, dtype=torch.bfloat16)).dtype == torch.float32
    assert projection(torch.ones(6, dtype=torch.float64)).dtype == torch.float64


def test_vectors_are_projected_in_groups(monkeypatch):
    vectors = torch.randn(7, 10, generator=torch.Generator().manual_seed(2))
    projection = Projection(10, 3)
    monkeypatch.setattr(page, "FLOATS_AT_ONCE", 30)
    torch.testing.assert_close(project_each(iter(vectors), projection), projection(vectors))
    assert project_each([], projection).shape == (0, 3)


# gradients of rows


def test_a_gradient_is_that_of_the_mean_of_a_row_alone(small):
    found = list(row_gradients(small, ROWS, 0))
    names = trainable(small)
    for example, gradient in zip(ROWS, found):
        ids = torch.tensor([example["input_ids"]])
        logps = small.model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        logps = logps.gather(1, ids[0, 1:, None])[:, 0]
        learned = torch.tensor(example["completion_mask"][1:]).bool()
        by_hand = torch.autograd.grad(-logps[learned].mean(), list(names.values()))
        torch.testing.assert_close(gradient, flat(by_hand), rtol=1e-8, atol=1e-10)
    assert gradient.dtype == torch.float64
    assert all(p.grad is None for p in small.parameters())
    one = names["model.model.layers.1.mlp.down_proj.weight"]
    part = next(row_gradients(small, ROWS[2:], 0, [one]))
    assert part.shape == (one.numel(),)
    assert torch.isin(part, found[2]).all()


def test_weighted_by_tokens_the_rows_are_the_batch(small):
    rows = torch.stack(list(row_gradients(small, ROWS, 0)))
    tokens = torch.tensor([3.0, 4.0, 1.0]).double()
    loss = -small(**collate(ROWS, 0)).logp.sum() / 8
    batch = flat(torch.autograd.grad(loss, list(trainable(small).values())))
    # rotary embeddings are in 32 bits, and round another way in a batch
    torch.testing.assert_close(tokens @ rows / 8, batch, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(task_gradient(small, ROWS, 0), rows.mean(0))


def test_a_weight_that_a_row_does_not_reach_has_gradient_zero(small):
    unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    assert next(row_gradients(small, ROWS, 0, [unused])).tolist() == [0, 0, 0]


def test_rows_without_a_gradient_are_refused(small):
    rows = [ROWS[0], row(4, 5, prompt=2)]
    assert "row 1: no learned token" in says(list, row_gradients(small, rows, 0))
    small.model.model.norm.weight.data[0] = math.inf
    assert "row 0: its gradient is not finite" in says(list, row_gradients(small, ROWS, 0))
    small.requires_grad_(False)
    assert "no weight is trainable" in says(list, row_gradients(small, ROWS, 0))


# the formula


def test_the_formula_by_hand():
    train = [torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, 0.0]])] * 2
    targets = [torch.tensor([[5.0, 0.0], [0.0, -1.0]]), torch.tensor([[0.0, 0.5], [-1.0, 0.0]])]
    # by tasks: 2·1 + 1·0, 2·0 − 1·1; then 2·.6 + 1·.8, −2·.8 − 1·.6
    found = influence(train, targets, [2.0, 1.0])
    torch.testing.assert_close(found, torch.tensor([2.0, 2.0, 0.0]))
    found = influence(train, [-task for task in targets], [2.0, 1.0])
    torch.testing.assert_close(found, torch.tensor([1.0, 2.2, 0.0]))
    longer = influence([7 * rows for rows in train], targets, [2.0, 1.0])
    torch.testing.assert_close(longer, torch.tensor([2.0, 2.0, 0.0]))


def test_lists_of_other_lengths_are_refused():
    one = [torch.ones(2, 2)]
    assert "1 sets of rows, 1 of targets, 2 rates" in says(influence, one, one, [1.0, 2.0])
    assert "0 sets of rows" in says(influence, [], [], [])


def test_a_step_changes_the_loss_as_predicted(small):
    "To first order a step of AdamW on a row lowers the loss of the target by rate · ⟨∇, Γ⟩."
    target, rate = [row(8, 3, 9, 4), row(11, 2, 2, 2, 6)], 1e-6
    weights, names = list(small.parameters()), list(trainable(small))
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for example in ROWS * 2:
        (-small(**collate([example], 0)).logp.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = checkpoint_of(small, optimizer, 6, 1e-3)
    assert list(saved.moments) == names
    goal = task_gradient(small, target, 0)
    before = target_loss(small, target)
    for gradient in list(row_gradients(saved.load(), ROWS, 0)):
        direction = adam_direction(
            gradient, *saved.flat_moments(), saved.step, saved.betas, saved.eps
        )
        again = torch.optim.AdamW(list(saved.load().parameters()), lr=rate, weight_decay=0.0)
        again = torch.optim.AdamW(list(saved.load().parameters()))
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        again.param_groups[0]["lr"] = rate
        for p, part in zip(weights, gradient.split([p.numel() for p in weights])):
            p.grad = part.view_as(p).clone()
        again.step()
        found = before - target_loss(small, target)
        assert found == pytest.approx(rate * (goal @ direction).item(), rel=1e-2)


def target_loss(policy: Policy, rows: list[dict]) -> float:
    losses = [-policy(**collate([one], 0)).logp.sum() for one in rows]
    return sum(x.item() / sum(one["completion_mask"]) for x, one in zip(losses, rows)) / len(rows)


# checkpoints and the warm-up


def test_a_checkpoint_is_a_copy_and_names_must_agree(small):
    optimizer = torch.optim.AdamW(small.parameters(), lr=0.1)
    (-small(**collate(ROWS, 0)).logp.sum()).backward()
    optimizer.step()
    saved = checkpoint_of(small, optimizer, 1, 0.1)
    before = [p.detach().clone() for p in small.parameters()]
    optimizer.step()
    assert not torch.equal(before[0], next(small.parameters()))
    assert all(map(torch.equal, before, saved.load().parameters()))
    first, second = saved.flat_moments()
    gradient = flat([p.grad for p in small.parameters()])
    torch.testing.assert_close(first, 0.1 * gradient)
    torch.testing.assert_close(second, 0.001 * gradient.square())
    moments = dict(saved.moments, other=saved.moments.popitem()[1])
    found = says(Checkpoint, small, saved.weights, moments, 1, 0.1)
    assert "checkpoint of step 1: its moments" in found


def test_rows_of_the_warm_up_are_a_random_share():
    rows = warm_rows(200, 0.05, 4, 0)
    assert len(set(rows)) == 10
    assert rows != warm_rows(200, 0.05, 4, 1)
    assert rows != sorted(rows)
    assert len(warm_rows(200, 0.05, 16, 0)) == 16
    assert sorted(warm_rows(5, 0.05, 16, 0)) == [0, 1, 2, 3, 4]
    assert "share = 0" in says(warm_rows, 5, 0, 1, 0)
    assert "share = 1.5" in says(warm_rows, 5, 1.5, 1, 0)


def test_the_warm_up_keeps_weights_moments_and_rates(tokenizer):
    examples, how = encoded(tokenizer), dict(WARM, learning_rate=1e-2, seed=3)
    saved = warm_checkpoints("tiny", tokenizer, examples, steps=5, checkpoints=2, **how)
    assert [one.step for one in saved] == [2, 5]
    # one step of warm-up at the peak, then a line to 0 over four steps
    assert saved[0].rate == pytest.approx(1e-2 * (1 + 1) / 2)
    assert saved[1].rate == pytest.approx(1e-2 * (0.75 + 0.5 + 0.25) / 3)
    losses = [mean_nll(one.load(), examples, tokenizer.pad_token_id) for one in saved]
    assert losses[1] < losses[0]
    (one,) = warm_checkpoints("tiny", tokenizer, examples, steps=1, checkpoints=1, **how)
    policy, group = one.policy, list(trainable(one.policy).values())
    fresh = warm_checkpoints("tiny", tokenizer, examples, steps=1, checkpoints=1, **how)[0]
    assert all(torch.equal(fresh.weights[name], one.weights[name]) for name in one.weights)
    # at the start B = 0: the first gradient is that of B alone, and m = (1 − β1) g
    for name, (m, v) in one.moments.items():
        torch.testing.assert_close(v / 0.05, (m / 0.1).square())
        assert ("lora_A" in name) == (not m.any())
    assert all(p.dtype == torch.float32 for p in group)
    assert policy.training


def test_a_warm_up_that_cannot_be_is_refused(tokenizer):
    examples = encoded(tokenizer)
    call = warm_checkpoints, "tiny", tokenizer, examples
    assert "checkpoints = 4, steps = 3" in says(*call, steps=3, device="cpu")
    assert "float16" in says(*call, device="cpu", dtype="float16")


def test_bfloat16_keeps_the_adapter_in_32_bits(tokenizer):
    examples, how = encoded(tokenizer), dict(WARM, dtype="bfloat16", learning_rate=1e-2)
    saved = warm_checkpoints("tiny", tokenizer, examples, steps=2, checkpoints=1, **how)
    assert {t.dtype for t in saved[0].weights.values()} == {torch.float32}
    found = less_scores(saved, tokenizer, examples, {"a": examples[:1]}, to=64)
    assert max(found) == found[0] > 0


# scores


@pytest.fixture(scope="module")
def states(tokenizer):
    how = dict(WARM, adapter="lora:r=2,lora_dropout=0.5", learning_rate=1e-2)
    return warm_checkpoints("tiny", tokenizer, encoded(tokenizer), steps=4, checkpoints=2, **how)


def test_scores_are_the_formula_over_checkpoints(states, tokenizer):
    examples, pad = encoded(tokenizer), tokenizer.pad_token_id
    for momentum in (True, False):
        expected = torch.zeros(4)
        for one in states:
            policy, (first, second) = one.load(), one.flat_moments()
            goal = (task_gradient(policy, examples[:2], pad)) @ matrix_of(first.numel())
            for k, gradient in enumerate(row_gradients(policy, examples, pad)):
                found = adam_direction(gradient, momentum * first, second, one.step, one.betas)
                cosine = torch.cosine_similarity(found @ matrix_of(first.numel()), goal, dim=0)
                expected[k] += one.rate * cosine
        aim = {"two": examples[:2]}
        found = less_scores(states, tokenizer, examples, aim, to=16, seed=5, momentum=momentum)
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-3, atol=1e-6)


def matrix_of(size: int) -> torch.Tensor:
    return Projection(size, 16, 5).signs(0, size).float() * 2 - 1


def test_dropout_is_off_and_tasks_compete(states, tokenizer):
    examples = encoded(tokenizer)
    aims = {"chinese": examples[:1], "hindi": examples[2:3]}
    both = less_scores(states, tokenizer, examples, aims, to=64)
    drops = [m for m in states[0].policy.modules() if isinstance(m, torch.nn.Dropout)]
    assert drops
    for drop in drops:
        drop.p = 0.5
    assert both == less_scores(states, tokenizer, examples, aims, to=64)
    alone = []
    for name, rows in aims.items():
        alone.append(less_scores(states, tokenizer, examples, {name: rows}, to=64))
    assert both == pytest.approx([max(pair) for pair in zip(*alone)], rel=1e-5)
    assert alone[0] != alone[1]
    assert all(map(math.isfinite, both))


def test_scores_without_something_are_refused(states, tokenizer):
    examples = encoded(tokenizer)
    assert "no task" in says(less_scores, states, tokenizer, examples, {})
    found = says(less_scores, states, tokenizer, examples, {"北京": []})
    assert "task '北京' has no rows" in found
    assert "0 sets" in says(less_scores, [], tokenizer, examples, {"a": examples})
    assert less_scores(states, tokenizer, [], {"a": examples[:1]}, to=8) == []
