"""Check pruning where a notebook cannot: command line, broken input, architectures, a full disk.

Also properties over random cases.
"""

import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import polm_lab as lab
from polm_lab.models import save as models
from polm_lab.models.layers import blocks_of, hold_zeros, linear_layers, zeros
from polm_lab.training.layerwise import calibration, read_inputs, walk
from polm_lab.core.knobs import WrongInput
from polm_lab.core.run import Run, Stopped, all_runs
from polm_lab.models.load import load_model
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.efficiency.prune import Prune, prune_model
from polm_lab.efficiency.compression.sparse import (
    parse_pattern,
    smallest,
    sparsegpt,
    swap,
    wanda_score,
)
from polm_lab.efficiency.slim import cut_widths, slice_model
from polm_lab.efficiency.compression.numbers import fit_grid
from polm_lab.efficiency.compression.structured_surgery import (
    SALIENCIES,
    gradients,
    layers_of,
    rebuild,
    taylor,
)
from polm_lab.efficiency.compression.rotation import fold_norms, principal, rotate
from polm_lab.efficiency.compression.rotation import stream_covariances

SMALL = dict(calibration_samples=4, eval_rows=4, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def base():
    return load_model("tiny", dtype="float32", device="cpu").eval()


@pytest.fixture(scope="module")
def windows():
    return calibration(load_tokenizer("tiny"), "chat", 4, 64)


def grouped(kind, **more):
    "A small random model with two query heads a key."
    torch.manual_seed(0)
    config, model = {
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    sizes = dict(
        vocab_size=1024,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        **more,
    )
    return model(config(**sizes)).eval()


# Masks and weights


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.99])
def test_exactly_the_asked_number_goes(sparsity):
    score = torch.rand(7, 33, generator=torch.Generator().manual_seed(1))
    assert (smallest(score, sparsity).sum(1) == int(33 * sparsity)).all()
    assert smallest(score, sparsity, within="layer").sum() == int(7 * 33 * sparsity)
    gone = smallest(torch.zeros(7, 33), sparsity)  # ties
    assert (gone.sum(1) == int(33 * sparsity)).all()


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "columns"])
@pytest.mark.parametrize("within", ["row", "layer"])
def test_the_smallest_go_however_they_are_found(kind, within):
    """What stays is never smaller than what goes, with equals, too, and in a matrix that is a view.

    The processor uses partition, other devices topk.
    """
    score = torch.randn(9, 200, generator=torch.Generator().manual_seed(2)).abs()
    score = {
        "normal": score,
        "ties": (score * 2).round(),
        "zeros": score * (score > 1),
        "columns": torch.cat([score, score], 1)[:, ::2],
    }[kind]
    for sparsity in (0.01, 0.5, 0.9):
        for found in (
            smallest(score, sparsity, within=within),
            smallest(score.double(), sparsity, within=within),
        ):
            rows, gone = (
                (score.reshape(1, -1), found.reshape(1, -1))
                if within == "layer"
                else (score, found)
            )
            assert (gone.sum(1) == int(rows.shape[1] * sparsity)).all()
            assert (
                rows.masked_fill(~gone, -1).amax(1) <= rows.masked_fill(gone, 9e9).amin(1)
            ).all()


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (3, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_keeps_the_pattern_and_beats_wanda_and_magnitude(pattern, seed):
    g = torch.Generator().manual_seed(seed)
    X = (
        torch.randn(64, 64, generator=g)
        @ torch.randn(64, 2048, generator=g)
        * torch.logspace(0.5, -0.5, 64)[:, None]
    )
    W, H = torch.randn(32, 64, generator=g), X @ X.T
    error = lambda V: (((W - V) @ H) * (W - V)).sum().item()
    fitted = sparsegpt(W, H, 0.5, pattern, block=32)
    assert ((fitted == 0).view(32, -1, pattern[1]).sum(2) == pattern[1] - pattern[0]).all()
    wanda = W * ~smallest(wanda_score(W, H.diagonal().sqrt()), 0.5, pattern)
    plain = W * ~smallest(W.abs(), 0.5, pattern)
    assert error(fitted) < error(wanda) < error(plain)


def test_inputs_that_are_always_zero_lose_their_weights():
    X = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    X[3] = 0
    for sparsity in (0.0, 0.25):
        fitted = sparsegpt(torch.ones(4, 16), X @ X.T, sparsity)
        assert torch.isfinite(fitted).all()
        assert (fitted[:, 3] == 0).all()


def test_strips_and_parts_change_nothing():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(40, 40, generator=g) @ torch.randn(40, 512, generator=g)
    W, H = torch.randn(24, 40, generator=g), X @ X.T
    whole = sparsegpt(W, H, 0.5, block=16, parts=[8, 16])
    apart = torch.cat([sparsegpt(part, H, 0.5, block=16, strip=1) for part in W.split([8, 16])])
    assert torch.equal(whole == 0, apart == 0)
    assert torch.allclose(whole, apart, atol=1e-4)


def test_sparsegpt_leaves_its_input_as_it_is():
    for out in (1, 4):  # the transpose of one row is contiguous already
        W = torch.ones(out, 16)
        sparsegpt(W, torch.eye(16), 0.5)
        assert torch.equal(W, torch.ones(out, 16))


def test_swaps_keep_the_number_and_the_pattern():
    g = torch.Generator().manual_seed(0)
    W, X = (
        torch.randn(16, 32, generator=g),
        torch.randn(512, 32, generator=g) + 1.5 * torch.randn(32, generator=g),
    )
    facts = (X.mean(0), X.var(0), X.norm(dim=0))
    for pattern in (None, (2, 4)):
        start = smallest(wanda_score(W, facts[2]), 0.5, pattern)
        done = swap(W, start, *facts, 50, pattern and 4)
        assert torch.equal(done.sum(1), start.sum(1))
        assert not torch.equal(done, start)
        if pattern:
            assert (done.view(16, 8, 4).sum(2) == 2).all()
        shift = lambda gone: ((W * gone) @ facts[0]).abs().mean()
        assert shift(done) < 0.7 * shift(start)


def rows_and_inputs(rows, seed):
    "Weights [rows, 24], and mean, variance and norm [24] of inputs that are off 0."
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, 24, generator=g)
    X = torch.randn(600, 24, generator=g) * (0.2 + torch.rand(24, generator=g))
    X = X + torch.randn(24, generator=g)
    return W, X.mean(0), X.var(0), X.norm(dim=0)


def test_swaps_are_those_of_the_paper_one_row_at_a_time():
    """Which weight comes back and which goes, for a row: Zhang et al. 2023, eq. 3 and 5.

    A swap is made while the expected square of the row's error falls.
    """
    W, mean, var, norm = rows_and_inputs(12, 3)
    start = smallest(wanda_score(W, norm), 0.5)
    done, made = swap(W, start, mean, var, norm, 50), 0
    square = lambda w, gone: ((w * mean)[gone].sum() ** 2 + (w**2 * var)[gone].sum()).item()
    for w, gone, expected in zip(W, start.clone(), done):
        for _ in range(50):
            sign = (w * mean)[gone].sum().sign()
            back = max(
                gone.nonzero()[:, 0].tolist(), key=lambda j: (sign * w[j] * mean[j] / var[j]).item()
            )
            helps = [j for j in (~gone).nonzero()[:, 0].tolist() if sign * w[j] * mean[j] < 0]
            if not helps:
                break
            out, after = min(helps, key=lambda j: (w[j].abs() * norm[j]).item()), gone.clone()
            after[back], after[out] = False, True
            if square(w, after) >= square(w, gone):
                break
            gone, made = after, made + 1
        assert torch.equal(gone, expected)
    assert made > 5


@pytest.mark.parametrize("of", [None, 4])
def test_published_swaps_one_row_at_a_time(of):
    """A row swaps while its mean output is off by more than 0.1, and each weight moves once.

    Among neighbours, one may go whatever its sign, while the sign of the error stays.
    """
    W, mean, var, norm = rows_and_inputs(16, 5)
    start = smallest(wanda_score(W, norm), 0.5, of and (2, of))
    done, made = swap(W, start, mean, var, norm, 50, of, above=0.1), 0
    for w, gone, expected in zip(W, start.clone(), done):
        shift, moved, first = w * mean, set(), (w * mean)[gone].sum().sign()
        while abs(error := shift[gone].sum().item()) > 0.1:
            grow = [j for j in range(24) if gone[j] and j not in moved and error * shift[j] > 0]
            if not grow:
                break
            back = max(grow, key=lambda j: (abs(shift[j]) / var[j]).item())
            cut = [j for j in range(24) if not gone[j] and j not in moved]
            cut = [j for j in cut if (j // of == back // of if of else error * shift[j] < 0)]
            if not cut:
                break
            out = min(cut, key=lambda j: (w[j].abs() * norm[j]).item())
            if of and (error - shift[back] + shift[out]).sign() != first:
                break
            gone[back], gone[out] = False, True
            moved |= {back, out}
            made += 1
        assert torch.equal(gone, expected)
    assert made > 5


def test_what_stays_is_rounded_in_the_same_pass():
    g = torch.Generator().manual_seed(1)
    W = torch.randn(12, 32, generator=g)
    alone = sparsegpt(W, torch.eye(32), 0.5, block=32, bits=3)  # nothing can compensate
    gone, grid = smallest(W.abs(), 0.5, within="layer"), fit_grid(W, 3)
    assert torch.equal(alone, grid.decode(grid.encode(W)).masked_fill(gone, 0.0))

    X = torch.randn(32, 32, generator=g) @ torch.randn(32, 2048, generator=g)
    H = X @ X.T
    for bits in (2, 3):
        together, after = sparsegpt(W, H, 0.5, bits=bits), sparsegpt(W, H, 0.5)
        grid = fit_grid(W, bits)
        assert torch.allclose(together, grid.decode(grid.encode(together)), atol=1e-6)
        assert (together == 0).sum() >= 12 * 16
        after = grid.decode(grid.encode(after)).masked_fill(after == 0, 0.0)
        lost = [((W - one) @ X).square().sum() for one in (together, after)]
        assert lost[0] < 0.95 * lost[1]


def test_a_run_with_bits_says_how_many_are_left():
    run = lab.run("prune", bits=4, **SMALL)
    before, after = run.summary["before"], run.summary["after"]
    assert before["bits_per_weight"] == 32
    model = load_model(run.path, dtype="float32", device="cpu")
    inside = sum(layer.weight.numel() for layer in linear_layers(blocks_of(model)).values())
    share = inside / sum(p.numel() for p in model.parameters())
    packed = (after["bits_per_weight"] - 32 * (1 - share)) / share
    assert 1 + 4 / 2 < packed < 1 + 4 / 2 + 20 / 100


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_importance_by_first_and_second_order(base, windows, saliency):
    "Over w and g of each window: |w ḡ|, w² mean(g²), |w ḡ − ½ w² mean(g²)|, |Σ w ḡ|."
    model, block = copy.deepcopy(base), 1
    gradients(model, windows, 8, squares=saliency in ("second", "mixed"))
    neurons, heads = taylor(blocks_of(model)[block], 32, saliency)
    plain, grads = copy.deepcopy(base), []
    layers = layers_of(blocks_of(plain)[block])
    for window in windows:
        plain.zero_grad()
        plain(window[None], labels=window[None]).loss.backward()
        grads.append({name: layer.weight.grad.clone() for name, layer in layers.items()})

    def units(name, dim):
        w = layers[name].weight.detach()
        g = torch.stack([one[name] for one in grads])
        terms = w * g.mean(0)
        if saliency == "second":
            terms = w**2 * (g**2).mean(0)
        if saliency == "mixed":
            terms = w * g.mean(0) - 0.5 * w**2 * (g**2).mean(0)
        return terms.sum(dim).abs() if saliency == "vector" else terms.abs().sum(dim)

    wanted = units("gate_proj", 1) + units("up_proj", 1) + units("down_proj", 0)
    assert torch.allclose(neurons, wanted, rtol=1e-3, atol=1e-9)
    wanted = sum(units(name, 1).view(5, -1).sum(1) for name in ("q_proj", "k_proj", "v_proj"))
    wanted = wanted + units("o_proj", 0).view(5, -1).sum(1)
    assert torch.allclose(heads, wanted, rtol=1e-3, atol=1e-9)


def test_importance_by_both_orders_where_both_are_large(base):
    "In the model's own gradients the second order is lost among roundings."
    block, g = copy.deepcopy(blocks_of(base)[1]), torch.Generator().manual_seed(0)
    layers, terms = layers_of(block), {}
    for name, layer in layers.items():
        w = layer.weight
        w.grad = torch.randn(w.shape, generator=g)
        w.squares = 20 * torch.rand(w.shape, generator=g)
        terms[name] = (w.grad * w - w.square() * w.squares / 2).abs()
    wanted = sum(terms[name].sum(1) for name in ("gate_proj", "up_proj"))
    neurons, _ = taylor(block, 32, "mixed")
    assert torch.allclose(neurons, wanted + terms["down_proj"].sum(0), rtol=1e-5)


def test_damage_is_compared_over_all_blocks(base, windows):
    "Those with the smallest w² E[g²] go, a third of all; blocks lose unlike shares."
    model, worth = copy.deepcopy(base), {}
    layers = linear_layers(blocks_of(model))
    grads = {name: [] for name in layers}
    for window in windows:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.backward()
        for name, layer in layers.items():
            grads[name].append(layer.weight.grad.square())
    for name, layer in layers.items():
        worth[name] = layer.weight.detach().square() * torch.stack(grads[name]).mean(0)
    every = torch.cat([one.flatten() for one in worth.values()])
    cut = every.kthvalue(len(every) // 3).values
    pruned = copy.deepcopy(base)
    facts = list(prune_model(pruned, windows, [1 / 3] * 5, "obd"))
    same = total = 0
    for name, layer in linear_layers(blocks_of(pruned)).items():
        same += ((layer.weight == 0) == (worth[name] <= cut)).sum().item()
        total += layer.weight.numel()
        assert not hasattr(layer.weight, "squares")
    assert same > 0.999 * total
    assert zeros(pruned) == pytest.approx(1 / 3, abs=1e-4)
    assert max(one["sparsity"] for one in facts) > 1.2 * min(one["sparsity"] for one in facts)


def test_magnitude_over_all_blocks_and_within_each(base, windows):
    weights = [layer.weight for layer in linear_layers(blocks_of(base)).values()]
    cut = torch.cat([weight.abs().flatten() for weight in weights]).kthvalue(1000).values
    count = sum(weight.numel() for weight in weights)
    model = copy.deepcopy(base)
    list(prune_model(model, windows, [1000 / count] * 5, "magnitude", within="model"))
    left = torch.cat([l.weight.flatten() for l in linear_layers(blocks_of(model)).values()])
    assert (left == 0).sum() == 1000
    assert left[left != 0].abs().min() > cut


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(algorithm="obd", swaps=3), "swaps = 3"),
        (dict(algorithm="wanda", within="model"), "within = 'model'"),
        (dict(algorithm="magnitude", within="model", swaps=3), "within = 'model'"),
        (dict(algorithm="obd", allocation="outliers"), "allocation = 'outliers'"),
        (dict(algorithm="obd", bits=4), "bits = 4"),
    ],
)
def test_what_does_not_go_with_damage_is_refused(changes, words):
    with pytest.raises(WrongInput, match=words):
        lab.run("prune", **SMALL | changes)


def test_damage_under_a_pattern_and_within_layers(base, windows):
    for pattern, within in (((2, 4), "auto"), (None, "layer")):
        model = copy.deepcopy(base)
        facts = list(prune_model(model, windows, [0.5] * 5, "obd", pattern, within=within))
        assert all(one["sparsity"] == pytest.approx(0.5, abs=1e-3) for one in facts)


def test_swaps_stay_in_attention_by_default(base, windows):
    changed = {}
    for where in ("attention", "all"):
        model, plain = copy.deepcopy(base), copy.deepcopy(base)
        (
            next(prune_model(model, windows, [0.7] * 5, "wanda", swaps=20, swap_in=where)),
            next(prune_model(plain, windows, [0.7] * 5, "wanda")),
        )
        pairs = zip(model.model.layers[0].named_parameters(), plain.model.layers[0].parameters())
        changed[where] = {name.split(".")[0] for (name, p), q in pairs if not torch.equal(p, q)}
    assert changed == {"attention": {"self_attn"}, "all": {"self_attn", "mlp"}}


def test_a_narrow_layer_has_four_blocks_of_columns(base):
    g = torch.Generator().manual_seed(0)
    for width, pattern, expected in (
        (64, None, 16),
        (160, (2, 4), 40),
        (600, None, 128),
        (24, (4, 8), 8),
    ):
        X = torch.randn(width, width, generator=g) @ torch.randn(width, 2 * width, generator=g)
        W, H = torch.randn(8, width, generator=g), X @ X.T
        assert torch.equal(
            sparsegpt(W, H, 0.5, pattern), sparsegpt(W, H, 0.5, pattern, block=expected)
        )


# Models


@pytest.mark.parametrize("algorithm", ["magnitude", "wanda", "sparsegpt"])
def test_grouped_heads_and_other_architectures(algorithm, windows):
    for kind in ("mistral", "qwen3"):
        model = grouped(kind)
        list(prune_model(model, windows, [0.5] * 3, algorithm, rows=2))
        assert abs(zeros(model) - 0.5) < 0.01


def test_batches_do_not_matter(base, windows):
    found = []
    for rows in (1, 4):
        model = copy.deepcopy(base)
        for _, block, forward, parts in walk(model, windows, rows):
            groups = read_inputs(block, forward, parts, True)
        found.append(groups)
    for one, other in zip(*found):
        assert torch.allclose(
            one.hessian, other.hessian, rtol=1e-3, atol=1e-3 * one.hessian.abs().max()
        )
        assert list(one.layers) == list(other.layers)


def test_held_zeros_stay_through_weight_decay_and_steps(base):
    model = copy.deepcopy(base)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data[:, ::2] = 0
    hold_zeros(model)
    optimizer, ids = (
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
        torch.arange(20, 60)[None],
    )
    before = weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad(), model(ids, labels=ids).loss.backward(), optimizer.step()
    assert (weight[:, ::2] == 0).all()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_a_rotation_leaves_other_architectures_as_they_are(kind, windows):
    model = grouped(kind)
    for p in model.parameters():  # norms with gains
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    expected = model(windows).logits
    folded = copy.deepcopy(model)
    Q = principal(sum(stream_covariances(folded, fold_norms(folded), windows, 2)))
    turned = rotate(folded, Q)
    assert (turned(windows).logits - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_slicing_what_is_empty_changes_nothing(kind, windows):
    model = grouped(kind)
    fold_norms(model)
    writes = [m for name, m in model.named_modules() if name.endswith(("o_proj", "down_proj"))]
    model.model.embed_tokens.weight.data[:, 36:] = 0
    for layer in writes:
        layer.weight.data[36:] = 0
    for p in (*(w.weight for w in writes), model.model.embed_tokens.weight):
        p.data *= 0.01  # so small that the eps of the norms counts
    expected, small = model(windows).logits, rotate(model, torch.eye(48)[:, :36])
    exact = (
        1e-5 if kind == "mistral" else 1e-3
    )  # the norms of heads in Qwen 3 share the configuration's one eps
    assert small.config.hidden_size == 36
    assert (small(windows).logits - expected).norm() < exact * expected.norm()


@pytest.mark.parametrize(
    "algorithm, kind", [("taylor", "mistral"), ("flap", "qwen3"), ("slicegpt", "mistral")]
)
def test_slim_models_of_other_architectures_load(algorithm, kind, windows, tmp_path):
    model = grouped(kind)
    if algorithm == "slicegpt":
        small = slice_model(model, windows, 0.25, 2)[0]
    else:
        *_, (_, sizes) = cut_widths(model, windows, algorithm, 0.34, compensate=False, rows=2)
        small = rebuild(model, **sizes)
        assert small.config.num_key_value_heads == 2
        assert small.config.num_attention_heads == 4
        assert small.config.intermediate_size == 53
    models.save_model(small, None, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert (again(windows).logits - small(windows).logits).abs().max() < 1e-5
    assert sum(p.numel() for p in again.parameters()) < sum(
        p.numel() for p in grouped(kind).parameters()
    )


def test_the_bias_makes_good_what_the_mean_loses(base, windows):
    lost = []
    for compensate in (True, False):
        model = copy.deepcopy(base)
        *blocks, _ = cut_widths(model, windows, "flap", 0.3, "neurons", compensate, rows=4)
        lost.append(blocks[0][1])
    assert lost[0] < lost[1]


# Runs


@pytest.mark.parametrize("algorithm", ["wanda", "sparsegpt"])
def test_a_run_records_its_parent_and_both_evaluations(algorithm, runs):
    first = lab.run("prune", algorithm=algorithm, sparsity=0.5, **SMALL)
    second = lab.run("slim", model=str(first.path), algorithm="depth", ratio=0.2, **SMALL)
    assert second.record["parents"] == [first.id]
    assert first.record["parents"] == []
    for when in ("before", "after"):
        assert {"perplexity", "gold_score", "size_mib", "latency_ms", "sparsity"} <= set(
            second.summary[when]
        )
    assert abs(first.summary["after"]["sparsity"] - 0.5) < 0.01
    assert second.summary["after"]["size_mib"] < 0.85 * first.summary["after"]["size_mib"]
    assert [row["step"] for row in first.lines()] == [1, 2, 3, 4, 5]
    assert first.status == "finished"


def test_same_settings_same_bits(runs):
    one, two = (
        lab.run("prune", swaps=5, algorithm="wanda", allocation="hessian", **SMALL)
        for _ in range(2)
    )
    assert (one.path / "model/model.safetensors").read_bytes() == (
        two.path / "model/model.safetensors"
    ).read_bytes()


def lines_without_seconds(run) -> list[dict]:
    "The logged lines of a run without their times."
    found = []
    for row in run.lines():
        found.append({k: v for k, v in row.items() if k != "seconds"})
    return found


@pytest.mark.parametrize(
    "name, values",
    [
        ("prune", dict(algorithm="wanda")),
        ("slim", dict(algorithm="taylor")),
        ("slim", dict(algorithm="depth")),
    ],
)
def test_a_stop_comes_after_the_block_and_a_new_start_gives_the_same_bits(
    name, values, runs, monkeypatch
):
    whole = lab.run(name, **SMALL, **values)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_requested", lambda self: self.record["step"] == 2)
        with pytest.raises(Stopped, match="after block 2"):
            lab.run(name, **SMALL, **values)
    stopped = next(run for run in all_runs(runs) if run.status == "stopped")
    assert stopped.status == "stopped"
    assert len(stopped.lines()) == 2
    assert not (stopped.path / "model").exists()
    again = lab.resume(stopped)
    assert again.status == "finished"
    assert lines_without_seconds(again) == lines_without_seconds(whole)
    assert (again.path / "model/model.safetensors").read_bytes() == (
        whole.path / "model/model.safetensors"
    ).read_bytes()


WRONG = [
    ("prune", dict(sparsity=1.0), "sparsity"),
    ("prune", dict(sparsity=-0.1), "sparsity"),
    ("prune", dict(pattern="4:2"), "N:M"),
    ("prune", dict(pattern="2:7"), "divide"),
    ("prune", dict(pattern="2:4", algorithm="sparsegpt", block=6), "divide"),
    ("prune", dict(allocation="0.5,0.5"), "allocation"),
    ("prune", dict(allocation="owl"), "allocation"),
    ("prune", dict(algorithm="sparsegpt", swaps=3), "swaps"),
    ("prune", dict(algorithm="wanda", bits=3), "bits"),
    ("slim", dict(algorithm="taylor", saliency="third"), "saliency"),
    ("prune", dict(calibration_samples=10**6), "tokens of calibration text"),
    ("slim", dict(ratio=1.5), "ratio"),
    ("slim", dict(algorithm="depth", ratio=0.05), "none of 5 blocks"),
    ("slim", dict(target="heads", ratio=0.05), "nothing is cut"),
]


@pytest.mark.parametrize("name, values, word", WRONG, ids=[f"{n}-{w}" for n, _, w in WRONG])
def test_wrong_input_is_one_line_and_leaves_no_model(name, values, word, runs):
    with pytest.raises(WrongInput) as error:
        lab.run(name, **{**SMALL, **values})
    assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(runs.glob("*/model"))


def test_calibration_text_that_is_empty_or_too_short(tmp_path, runs):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.jsonl").write_text(
        "".join(json.dumps({"text": f"word {i}"}) + "\n" for i in range(40))
    )
    for name, word in (("empty.txt", "empty"), ("short.jsonl", "tokens of calibration text")):
        for method in ("prune", "slim"):
            with pytest.raises(WrongInput, match=word) as error:
                lab.run(method, data=str(tmp_path / name), **SMALL)
            assert "\n" not in str(error.value)


def test_a_full_disk_is_said_before_anything_is_computed(runs, monkeypatch):
    import shutil

    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    with pytest.raises(WrongInput, match="MiB of disk are free"):
        lab.run("prune", **SMALL)


def test_a_weight_that_is_no_number_is_refused(base):
    model = copy.deepcopy(base)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(WrongInput, match="finite"):
        blocks_of(model)


def test_the_command_line_prunes_and_says_what_is_wrong(forked, runs):
    done = forked(
        "run",
        "prune",
        "--bare",
        "--json",
        *[w for k, v in SMALL.items() for w in ("-p", k, v)],
        "-p",
        "algorithm",
        "magnitude",
        "-p",
        "pattern",
        "2:4",
    )
    assert done.returncode == 0
    assert (
        abs(json.loads(done.stdout.splitlines()[-1])["summary"]["after"]["sparsity"] - 0.5) < 1e-6
    )
    done = forked("run", "prune", "-p", "sparsity", "2")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_patterns():
    assert parse_pattern("2:4") == (2, 4)
    assert parse_pattern("") is None
    assert Prune().algorithm == "sparsegpt"
