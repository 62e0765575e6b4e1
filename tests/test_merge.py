"""Check merging: each formula by hand and against a plain version, the stream against the formula.

Also refused input, vocabularies, the run and its parents.
"""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.core.settings import knobs
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.models.sources import model_path
from polm_lab.models.save import save_model
from polm_lab.models.transform import each_block
from polm_lab.models.weights import Weights
from polm_lab.integration import fuse as page
from polm_lab.integration.fuse import (
    ensemble,
    fisher_information,
    fisher_mean,
    greedy_soup,
    input_grams,
    merged_state,
    regmean,
)
from polm_lab.integration.merge import merge_models
from polm_lab.integration.merging.experts import examine
from polm_lab.integration.merging.algorithms import ALGORITHMS, Merging
from polm_lab.integration.merging.task_vectors import Trim, add_up, dare, della, della_density
from polm_lab.integration.merging.task_vectors import disjoint_mean, kth_largest, linear
from polm_lab.integration.merging.task_vectors import metagpt_weights, slerp, ties, trim
from polm_lab.integration.merging.vocabulary import vocabulary
from polm_lab.integration.merging.weighting import weight_rules


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "`tiny` and two tunes of it, made by noise: folders `a` and `b`."
    place, start = (
        tmp_path_factory.mktemp("models"),
        load_file(model_path("tiny") / "model.safetensors"),
    )
    for seed, name in enumerate("ab", 1):
        shutil.copytree(model_path("tiny"), place / name)
        g = torch.Generator().manual_seed(seed)
        save_file(
            {n: v + 0.02 * torch.randn(v.shape, generator=g) for n, v in start.items()},
            place / name / "model.safetensors",
            {"format": "pt"},
        )
    return place


def values(path):
    return load_file((path / "model.safetensors"))


def float_values(folder) -> dict:
    "All tensors of a model's folder in float32."
    return {name: value.float() for name, value in values(folder).items()}


def three(models):
    return values(model_path("tiny")), values(models / "a"), values(models / "b")


def pair(models):
    return [str(models / "a"), str(models / "b")]


# Formulas ---------------------------------------------------------------------------------------


def plain_ties(base, tunes, density):
    "TIES by the paper's words, with a sort."
    kept = []
    for tune in tunes:
        delta = (tune - base).flatten()
        keep = delta.abs().argsort(descending=True, stable=True)[
            : max(1, int(density * len(delta)))
        ]
        kept.append(torch.zeros_like(delta).index_copy(0, keep, delta[keep]))
    stacked = torch.stack(kept)
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = stacked.sign() == sign
    return (base.flatten() + (stacked * agree).sum(0) / agree.sum(0).clamp_min(1)).view_as(base)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999, 1.0])
def test_ties_is_the_papers(density):
    torch.manual_seed(0)
    base, tunes = torch.randn(40, 30), [torch.randn(40, 30) for _ in range(3)]
    assert torch.allclose(
        ties(base, tunes, [1, 1, 1], density, 1.0), plain_ties(base, tunes, density), atol=1e-6
    )
    coarse = [base + (tune * 2).round() for tune in tunes]  # many ties
    assert torch.allclose(
        ties(base, coarse, [1, 1, 1], density, 1.0), plain_ties(base, coarse, density), atol=1e-6
    )


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "tiny", "huge", "spread"])
@pytest.mark.parametrize("k", [1, 7, 250, 499, 500])
def test_the_kth_largest_is_exact(kind, k):
    torch.manual_seed(k)
    x = torch.randn(500).abs()
    x = {
        "normal": x,
        "ties": (x * 3).round(),
        "zeros": x * (x > 1),
        "tiny": x * 1e-40,
        "huge": x * 1e38,
        "spread": torch.exp(torch.randn(500) * 30).clamp(max=3e38),
    }[kind]
    value, quota = kth_largest(lambda: x.split(64), k)
    order = x.sort(descending=True).values
    assert value == order[k - 1].item()
    assert quota == (order[:k] == value).sum()


def test_trim_by_pieces_is_trim_of_the_whole():
    x = (torch.randn(64, 10, generator=torch.Generator().manual_seed(1)) * 4).round()
    for density in (0.0, 0.1, 0.33, 1.0):
        cut = Trim(lambda: x.split(7), x.numel(), density)
        pieces = torch.cat([cut(piece) for piece in x.split(7)])
        assert torch.equal(pieces, trim(x, density))
        if density:
            assert (trim(x.where(x != 0, torch.ones(()) * 0.1), density) != 0).sum() == max(
                1, int(density * x.numel())
            )


def test_ties_of_bf16_models_trims_equals_as_a_stable_sort_does(models, tmp_path):
    """The stream keeps the first of the changes that equal the threshold, whatever its blocks.

    Changes of bf16 weights lie on few values: several per cent of them equal the threshold.
    """
    names, folders, base = (
        ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"],
        [],
        values(model_path("tiny")),
    )
    for path in (model_path("tiny"), models / "a", models / "b"):
        half = tmp_path / path.name
        shutil.copytree(path, half)
        save_file(
            {n: (base[n] + (v - base[n]) / 20).bfloat16() for n, v in values(path).items()},
            half / "model.safetensors",
            {"format": "pt"},
        )
        folders.append(half)
    done = values(
        merge_models(
            str(folders[0]),
            [str(f) for f in folders[1:]],
            tmp_path / "o",
            "ties",
            "0.6,0.4",
            scaling=1.0,
            density=0.3,
            dtype=torch.float32,
        )
    )
    start, a, b = map(float_values, folders)
    for name in names:
        deltas, equal = [t[name] - start[name] for t in (a, b)], 0
        for delta in deltas:
            size, keep = delta.abs().flatten(), max(1, int(0.3 * delta.numel()))
            equal += (size == size.sort(descending=True).values[keep - 1]).float().mean().item() / 2
            gone = size.argsort(descending=True, stable=True)[keep:]
            delta.view(-1)[gone] = 0
        weighted = torch.stack([0.6 * deltas[0], 0.4 * deltas[1]])
        agrees = weighted.sign() == torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
        share = (torch.tensor([0.6, 0.4]).view(2, *[1] * deltas[0].ndim) * agrees).sum(0)
        expected = (weighted * agrees).sum(0) / share.where(share > 0, 1.0)
        found = done[name] - start[name]
        assert torch.equal(found == 0, expected == 0), name
        assert torch.allclose(found, expected, atol=1e-6), name
        assert equal > 0.005 or delta.ndim == 1, f"{name}: too few ties for this to tell"


def test_arcs():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.allclose(slerp(a, b, 0.0), a)
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    assert torch.allclose(slerp(a, b, 0.5), torch.tensor([3.0, 1.0]) * math.sqrt(0.5))
    assert torch.equal(slerp(a, torch.zeros(2), 0.5), a / 2)
    assert torch.equal(slerp(a, -a, 0.5), torch.zeros(2))  # no angle, no arc
    unit = torch.nn.functional.normalize(
        torch.randn(2, 50, generator=torch.Generator().manual_seed(0)), dim=1
    )
    assert all(abs(slerp(*unit, s).norm() - 1) < 1e-6 for s in (0.1, 0.5, 0.8))


def test_means_and_negation():
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])]
    assert torch.equal(linear(parts, [3, 1]), torch.tensor([1.5, 1.0]))
    assert torch.equal(parts[0], torch.tensor([1.0, 2.0]))
    assert metagpt_weights([9.0, 16.0]) == [0.36, 0.64]
    assert metagpt_weights([0.0, 0.0]) == [0.5, 0.5]
    assert torch.equal(
        disjoint_mean([torch.tensor([2.0, -4.0])], [-1.0]), torch.tensor([-2.0, 4.0])
    )
    assert torch.equal(
        disjoint_mean([torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0])], [1.0, 1.0]),
        torch.tensor([2.0, 0.0]),
    )  # a sum of 0 elects plus
    assert torch.allclose(
        disjoint_mean([torch.tensor([2.0]), torch.tensor([1.0])], [3.0, 1.0]), torch.tensor([7 / 4])
    )


def test_drops_are_right_in_the_mean():
    g, vector = torch.Generator().manual_seed(0), torch.linspace(-1, 1, 20)[None]
    for draw in (lambda: dare(vector, 0.25, g), lambda: della(vector, 0.25, 0.3, g)):
        many = torch.stack([draw() for _ in range(6000)])
        assert (many.mean(0) - vector).abs().max() < 0.12
        assert abs((many != 0).float().mean() - 0.25) < 0.01
    assert torch.equal(dare(vector, 1.0, g), vector)
    assert not dare(vector, 0.0, g).any()
    assert torch.equal(della(vector, 1.0, 0.0, g), vector)
    chance = della_density(torch.tensor([[3.0, -1.0, 2.0], [0.1, 0.3, -0.2]]), 0.5, 0.4)
    assert torch.allclose(chance, torch.tensor([[0.7, 0.3, 0.5], [0.3, 0.7, 0.5]]))


# The stream -------------------------------------------------------------------------------------


def test_the_stream_is_the_formula(models, tmp_path):
    start, a, b = three(models)
    formulas = {
        "linear": lambda n: linear([a[n], b[n]], [3, 1]),
        "slerp": lambda n: slerp(a[n], b[n], 0.25),
        "task_arithmetic": lambda n: start[n] + 0.5 * (3 * (a[n] - start[n]) + b[n] - start[n]),
        "ties": lambda n: ties(start[n], [a[n], b[n]], [3, 1], 0.2, 0.5),
    }
    for algorithm, formula in formulas.items():
        done = values(
            merge_models("tiny", pair(models), tmp_path / algorithm, algorithm, "3,1", scaling=0.5)
        )
        assert max((done[n] - formula(n)).abs().max() for n in done) < 1e-6, algorithm
    squares = []
    for t in (a, b):
        squares.append(sum((t[n] - start[n]).double().square().sum().item() for n in start))
    done = values(merge_models("tiny", pair(models), tmp_path / "metagpt", "metagpt"))
    shares = [s / sum(squares) for s in squares]
    assert (
        max(
            (done[n] - start[n] - shares[0] * (a[n] - start[n]) - shares[1] * (b[n] - start[n]))
            .abs()
            .max()
            for n in done
        )
        < 1e-6
    )


def test_ties_is_pefts(models, tmp_path):
    from peft.utils.merge_utils import ties as theirs

    start, a, b = three(models)
    done = values(
        merge_models("tiny", pair(models), tmp_path / "o", "ties", scaling=1.0, density=0.2)
    )
    for name in list(start)[:6]:
        expected = theirs(
            [a[name] - start[name], b[name] - start[name]], torch.tensor([1.0, 1.0]), density=0.2
        )
        assert torch.allclose(done[name] - start[name], expected, atol=1e-6), name


@pytest.mark.parametrize("algorithm", ["dare", "dare_ties", "della"])
def test_random_drops_depend_on_the_seed_alone(models, tmp_path, algorithm):
    one, two, other = (
        merge_models(
            "tiny", pair(models), tmp_path / f"{i}", algorithm, seed=s, threads=t, scaling=0.5
        )
        for i, (s, t) in enumerate([(0, 1), (0, 3), (1, 1)])
    )
    read = [(path / "model.safetensors").read_bytes() for path in (one, two, other)]
    assert read[0] == read[1] != read[2]
    start = values(model_path("tiny"))["model.layers.2.mlp.up_proj.weight"]
    moved = (values(one)["model.layers.2.mlp.up_proj.weight"] != start).float().mean()
    assert abs(moved - (1 - 0.8**2)) < 0.01  # kept in one tune or the other


DROPS = {"dare": add_up, "dare_ties": disjoint_mean, "della": disjoint_mean}


def test_what_is_dropped_is_added_up_or_elected(models):
    opened = tuple(Weights(spec) for spec in ("tiny", *pair(models)))
    knobs_of_all = dict(models=opened, scaling=0.5, density=0.4, epsilon=0.3, seed=3)
    name = "model.layers.2.mlp.up_proj.weight"
    for block in each_block(list(opened), name):
        start, *tunes = block.parts()
        deltas = [tune - start for tune in tunes]
        for algorithm, together in DROPS.items():
            at = Merging(algorithm, lambda _: [2.0, 1.0], **knobs_of_all)
            drawn = zip(deltas, at.draws(block))
            if algorithm == "della":
                sparse = [della(delta, 0.4, 0.3, draw) for delta, draw in drawn]
            else:
                sparse = [dare(delta, 0.4, draw) for delta, draw in drawn]
            made = ALGORITHMS[algorithm].make(at, name)(block)
            assert torch.equal(made, start + 0.5 * together(sparse, [2.0, 1.0])), algorithm


def test_full_density_drops_nothing(models, tmp_path):
    dense = values(
        merge_models("tiny", pair(models), tmp_path / "sum", "task_arithmetic", scaling=0.5)
    )
    for algorithm, more in (
        ("dare", {}),
        ("dare_ties", {}),
        ("ties", {}),
        ("della", dict(epsilon=0.0)),
    ):
        done = values(
            merge_models(
                "tiny",
                pair(models)[:1],
                tmp_path / algorithm,
                algorithm,
                density=1.0,
                scaling=0.5,
                **more,
            )
        )
        one = values(
            merge_models(
                "tiny",
                pair(models)[:1],
                tmp_path / f"{algorithm}-sum",
                "task_arithmetic",
                scaling=0.5,
            )
        )
        assert max((done[n] - one[n]).abs().max() for n in dense) < 1e-6


def test_weights_by_pattern_and_dtype(models, tmp_path):
    start, a, b = three(models)
    rule = r"1,0; mlp=0,1; model.layers.1.mlp.up_proj.weight=0,0"
    done = values(
        merge_models(
            "tiny", pair(models), tmp_path / "o", "task_arithmetic", rule, dtype=torch.bfloat16
        )
    )
    expect = {
        "model.layers.1.mlp.up_proj.weight": start,
        "model.layers.2.mlp.up_proj.weight": b,
        "model.norm.weight": a,
    }
    for name, source in expect.items():
        gap = (done[name].float() - source[name]).abs().max()
        assert done[name].dtype == torch.bfloat16, name
        assert gap <= source[name].abs().max() * 2**-8, name
    assert json.loads((tmp_path / "o" / "config.json").read_text())["dtype"] == "bfloat16"


def test_models_of_other_types_meet_in_fp32(models, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(models / "b", half)
    save_file(
        {n: v.half() for n, v in values(models / "b").items()},
        half / "model.safetensors",
        {"format": "pt"},
    )
    done, (_, a, b) = (
        values(merge_models("tiny", [str(models / "a"), str(half)], tmp_path / "o", "linear")),
        three(models),
    )
    assert max((done[n] - (a[n] + b[n].half().float()) / 2).abs().max() for n in done) < 1e-6
    assert all(v.dtype == torch.float32 for v in done.values())


# What is refused --------------------------------------------------------------------------------


def refused(words, models, out, algorithm="ties", **more):
    with pytest.raises(WrongInput) as error:
        merge_models("tiny", models, out, algorithm, **more)
    text = str(error.value)
    assert "\n" not in text, text
    assert all(word in text for word in words), text
    assert not out.exists()
    assert not (out.parent / f".{out.name}.new").exists()


def test_knobs_that_cannot_be(models, tmp_path):
    two = pair(models)
    for words, more in [
        (["density", "1.2"], dict(density=1.2)),
        (["density", "-0.1"], dict(density=-0.1)),
        (["weights", "1 weights", "2"], dict(weights="1")),
        (["weights", "x"], dict(weights="x,1")),
        (["weights", "(=1,1"], dict(weights="(=1,1")),
        (["weights", "finite"], dict(weights="nan,1")),
        (["tie", "did you mean"], dict(algorithm="tie")),
        (["add up to 0"], dict(algorithm="linear", weights="1,-1")),
        (["epsilon", "density"], dict(algorithm="della", density=0.9, epsilon=0.3)),
        (["exactly 2"], dict(algorithm="slerp", models=two[:1])),
        (["at least one"], dict(models=[])),
    ]:
        refused(
            words, more.pop("models", two), tmp_path / "o", more.pop("algorithm", "ties"), **more
        )
    with pytest.raises(WrongInput, match="this is an input"):
        merge_models("tiny", two, two[1])


def damaged(models, tmp_path, change=None, config=None, vocabulary=None):
    path = tmp_path / "odd"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(models / "b", path)
    if change:
        tensors = values(path)
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if config:
        (path / "config.json").write_text(
            json.dumps(json.loads((path / "config.json").read_text()) | config)
        )
    if vocabulary:
        read = json.loads((path / "tokenizer.json").read_text())
        vocabulary(read)
        (path / "tokenizer.json").write_text(json.dumps(read))
    return [str(models / "a"), str(path)]


def test_models_that_do_not_belong_together(models, tmp_path):
    name = "model.layers.3.mlp.up_proj.weight"
    before = {p: p.read_bytes() for p in models.rglob("*.safetensors")}

    def nan(t):
        t[name][5, 6] = math.nan

    for words, more in [
        (["odd", "model_type is gpt2, not llama"], dict(config={"model_type": "gpt2"})),
        (["num_hidden_layers is 6, not 5"], dict(config={"num_hidden_layers": 6})),
        (["lacks", name], dict(change=lambda t: t.pop(name))),
        (
            ["has in excess lm_head.weight"],
            dict(change=lambda t: t.update({"lm_head.weight": torch.ones(2)})),
        ),
        (
            [name, "[2, 2], not [432, 160]"],
            dict(change=lambda t: t.update({name: torch.ones(2, 2)})),
        ),
        ([f"{name}[5, 6] is nan"], dict(change=nan)),
        ([name, "int32, not float32"], dict(change=lambda t: t.update({name: t[name].int()}))),
        (["embeddings, not 1024"], dict(config={"vocab_size": 1030})),
        (
            ["another vocabulary", "1025 tokens, not 1024"],
            dict(
                vocabulary=lambda r: r["added_tokens"].append(
                    dict(r["added_tokens"][0], id=1024, content="<new>")
                )
            ),
        ),
        (["tokenizer.json", "cannot be read"], dict(vocabulary=lambda r: r.pop("model"))),
    ]:
        refused(words, damaged(models, tmp_path, **more), tmp_path / "o")
    assert before == {p: p.read_bytes() for p in models.rglob("*.safetensors")}


# Vocabularies -----------------------------------------------------------------------------------


@pytest.fixture
def enlarged(models, tmp_path):
    "`b` with a new token in the middle of its ids: rows behind it are shifted by one."
    path, tensors = tmp_path / "enlarged", values(models / "b")
    shutil.copytree(models / "b", path)
    old = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat(
        [old[:1000], torch.full((1, 160), 7.0), old[1000:]]
    )
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    read = json.loads((path / "tokenizer.json").read_text())
    read["model"]["vocab"] = {w: i + (i >= 1000) for w, i in read["model"]["vocab"].items()} | {
        "zyzzyva": 1000
    }
    (path / "tokenizer.json").write_text(json.dumps(read))
    (path / "config.json").write_text(
        json.dumps(json.loads((path / "config.json").read_text()) | {"vocab_size": 1025})
    )
    assert vocabulary(path)["zyzzyva"] == 1000
    return path


def test_another_vocabulary_is_refused_or_resolved(models, enlarged, tmp_path):
    two = [str(models / "a"), str(enlarged)]
    refused(["another vocabulary", "zyzzyva"], two, tmp_path / "o")
    expected = values(merge_models("tiny", pair(models), tmp_path / "plain", scaling=0.5))
    base = values(merge_models("tiny", two, tmp_path / "base", scaling=0.5, tokenizer="base"))
    assert all(torch.equal(base[n], expected[n]) for n in expected)
    union = merge_models("tiny", two, tmp_path / "union", scaling=0.5, tokenizer="union")
    united, name = values(union), "model.embed_tokens.weight"
    assert torch.equal(united[name][:1024], expected[name])
    assert torch.equal(united[name][1024], torch.full((160,), 7.0))
    tokenizer = load_tokenizer(union)
    assert tokenizer.convert_tokens_to_ids("zyzzyva") == 1024
    assert len(tokenizer) == 1025 == Weights(union).config["vocab_size"]


# With data --------------------------------------------------------------------------------------


def test_regmean_is_least_squares():
    torch.manual_seed(0)
    w, x = (
        [torch.randn(4, 6) for _ in range(2)],
        [torch.randn(30, 6) @ torch.randn(6, 6) for _ in range(2)],
    )
    found = regmean(w, [a.T @ a for a in x])
    exact = torch.linalg.lstsq(torch.cat(x), torch.cat([a @ b.T for a, b in zip(x, w)])).solution.T
    assert torch.allclose(found, exact, atol=1e-3)
    assert torch.allclose(regmean([w[0], w[0]], [a.T @ a for a in x], 0.9), w[0], atol=1e-3)


def test_grams_fishers_and_coefficients_are_what_they_say():
    from polm_lab.models.policy import Policy
    from polm_lab.models.load import load_model

    policy, words = Policy(load_model("tiny", "float32", "cpu")), load_tokenizer("tiny")
    rows = [
        {"input_ids": [5, 9, 33, 2], "completion_mask": [0, 0, 1, 1]},
        {"input_ids": [7, 8, 9, 10, 11, 2], "completion_mask": [0, 1, 1, 1, 1, 1]},
    ]
    grams, kept = input_grams(policy, rows, words.pad_token_id), []
    layer = policy.model.model.layers[2].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda m, args: kept.append(args[0][0].detach()))
    with torch.no_grad():
        for row in rows:
            policy.model(torch.tensor([row["input_ids"]]))
    hook.remove()
    seen = torch.cat(kept)
    assert torch.allclose(grams["model.layers.2.mlp.down_proj.weight"], seen.T @ seen, atol=1e-4)
    assert not any("lm_head" in n for n in grams)
    fisher = fisher_information(policy, rows, words.pad_token_id)
    name, p = "model.norm.weight", policy.model.model.norm.weight
    by_hand = 0
    for row in rows:
        logp = torch.log_softmax(policy.model(torch.tensor([row["input_ids"]])).logits[0], -1)
        total = sum(
            logp[t - 1, row["input_ids"][t]]
            for t in range(1, len(row["input_ids"]))
            if row["completion_mask"][t]
        )
        by_hand = by_hand + torch.autograd.grad(total, p)[0].square() / 2
    assert torch.allclose(fisher[name], by_hand, rtol=1e-3, atol=1e-6)
    start = {n: q.detach() for n, q in policy.model.named_parameters()}
    vectors = [
        {n: torch.ones_like(q) for n, q in start.items()},
        {n: 2 * torch.ones_like(q) for n, q in start.items()},
    ]
    coefficients = {page.layer_of(n): torch.tensor([0.5, 0.25]) for n in start}
    assert all(
        torch.allclose(v, start[n] + 1.0)
        for n, v in merged_state(start, vectors, coefficients).items()
    )
    row = rows[1]
    entropy = page.prediction_entropy(policy, start, row["input_ids"])
    logp = torch.log_softmax(policy.model(torch.tensor([row["input_ids"]])).logits[0, -1], -1)
    assert torch.allclose(entropy, -(logp.exp() * logp).sum(), atol=1e-5)


def test_soups_means_and_ensembles():
    soup, chosen = greedy_soup(
        [{"x": torch.tensor(v)} for v in (3.0, -1.0, 0.5)], lambda s: abs(s["x"].item())
    )
    assert chosen == [2, 1]
    assert soup["x"] == -0.25
    assert torch.allclose(
        fisher_mean(
            [torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])],
            [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])],
        ),
        torch.tensor([1.5, 2.0]),
    )
    logp = [torch.log_softmax(torch.randn(5, 7), -1) for _ in range(2)]
    assert torch.allclose(
        ensemble(logp, [1, 3]).exp(), 0.25 * logp[0].exp() + 0.75 * logp[1].exp(), atol=1e-6
    )
    for bad in ([-1, 2], [0, 0]):
        with pytest.raises(WrongInput):
            ensemble(logp, bad)


# Runs -------------------------------------------------------------------------------------------


def test_a_merge_is_a_run_with_its_parents(models, runs, tmp_path):
    run = lab.run(
        "merge",
        models="sums," + str(models / "b"),
        tasks="sums",
        eval_rows=4,
        expert_steps=1,
        algorithm="ties",
    )
    expert = run.read()["stages"]["sums"]
    assert run.status == "finished"
    assert run.read()["parents"] == [expert]
    assert set(run.summary["after"]) == {"perplexity/sums", "accuracy/sums", "rows"}
    again = lab.run("merge", models=f"{expert},{run.id}", tasks="")
    assert sorted(again.read()["parents"]) == sorted([expert, run.id])
    assert not again.summary
    for algorithm in ("greedy", "fisher", "regmean", "adamerging"):
        done = lab.run(
            "fuse",
            models=f"{expert},{models / 'b'}",
            data="sums,chat",
            calibration_samples=2,
            steps=1,
            tasks="",
            algorithm=algorithm,
        )
        assert done.status == "finished"
        assert all(v.isfinite().all() for v in values(done.path / "model").values())
        assert done.read()["parents"] == [expert]
    with pytest.raises(WrongInput, match="1 sources for 2 models"):
        lab.run("fuse", models=f"{expert},{models / 'b'}", data="sums", tasks="")


def test_a_stopped_merge_leaves_no_model(models, runs):
    run = lab.launch("merge", notebook=False, models=f"{models / 'a'},{models / 'b'}", tasks="sums")
    run.request_stop()
    run = lab.wait(run)
    assert run.status == "stopped"
    assert not (run.path / "model").exists()


SLOW = """
import sys, time
from polm_lab.training.chain import create, execute
from polm_lab.integration.merging import algorithms as page
plain = page.add_up
def slow(*words):
    print("block", flush=True); time.sleep(0.1)
    return plain(*words)
page.add_up = slow
execute(create("merge", dict(models=sys.argv[1], tasks="")))
"""


def test_a_killed_merge_leaves_no_model_and_is_resumed(models, runs, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, ",".join(pair(models))], stdout=subprocess.PIPE, text=True
    )
    assert [process.stdout.readline() for _ in range(5)] == ["block\n"] * 5
    process.kill(), process.wait()
    (run,) = lab.core.run.all_runs(runs)
    assert not (run.path / "model").exists()
    assert (run.path / ".model.new").is_dir()
    assert not (run.path / ".model.new" / "config.json").exists()
    with pytest.raises(WrongInput):
        load_tokenizer(run.id)
    run = lab.resume(run)
    expected = values(merge_models("tiny", pair(models), tmp_path / "expected", scaling=0.6))
    assert run.status == "finished"
    assert not (run.path / ".model.new").exists()
    assert all(torch.equal(v, expected[n]) for n, v in values(run.path / "model").items())


FILLED = """
mount -t tmpfs -o size=9m tmpfs {disk} && head -c 4M /dev/zero > {disk}/other
{python} - <<'END'
import shutil
from polm_lab.training.chain import create, execute
from polm_lab.core.run import all_runs
free = shutil.disk_usage
# there was room when the run began; somebody else took it
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)
few = dict(calibration_samples=2)
merged = dict(models="{models}", tasks="")
for name, values in (
    ("merge", merged),
    ("prune", few | dict(algorithm="magnitude", eval_rows=2)),
    ("fuse", few | merged | dict(data="sums,chat", algorithm="regmean")),
):
    try:
        execute(create(name, values, out="{disk}/runs"))
    except Exception as error:
        print(name, type(error).__name__, str(error).replace(chr(10), " / "))
for run in all_runs("{disk}/runs"):
    models = sorted(p.name for p in run.path.iterdir() if "model" in p.name)
    print(run.method, run.status, (run.path / "model").exists(), models)
END
"""


def test_a_disk_that_fills_half_way_ends_the_run_and_leaves_no_model(models, tmp_path):
    before = {p: p.read_bytes() for p in models.rglob("*.safetensors")}
    (tmp_path / "disk").mkdir()
    script = FILLED.format(
        disk=tmp_path / "disk", python=sys.executable, models=",".join(pair(models))
    )
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-e", "-c", script], capture_output=True, text=True, timeout=200
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    printed = done.stdout.strip().splitlines()
    assert [line.split()[0] for line in printed[:3]] == ["merge", "prune", "fuse"], (
        done.stdout + done.stderr
    )
    assert all("No space left" in line for line in printed[:3]), done.stdout + done.stderr
    assert sorted(printed[3:]) == [
        "fuse failed False []",
        "merge failed False []",
        "prune failed False []",
    ], done.stdout
    assert before == {p: p.read_bytes() for p in models.rglob("*.safetensors")}


def test_fusing_refuses_what_merging_refuses(models, runs, tmp_path):
    name = "model.layers.3.mlp.up_proj.weight"
    (tmp_path / "empty.jsonl").write_text("")
    for words, more, tunes in [
        (["empty.jsonl"], dict(data=f"sums,{tmp_path / 'empty.jsonl'}"), pair(models)),
        (["lacks", name], {}, damaged(models, tmp_path / "less", lambda t: t.pop(name))),
        (
            ["num_hidden_layers is 6, not 5"],
            {},
            damaged(models, tmp_path / "deep", config={"num_hidden_layers": 6}),
        ),
        (
            ["finite"],
            {},
            damaged(models, tmp_path / "nan", lambda t: t[name].view(-1).__setitem__(3, math.nan)),
        ),
        (["shrink", "1.5"], dict(shrink=1.5), pair(models)),
    ]:
        with pytest.raises(WrongInput) as error:
            lab.run(
                "fuse",
                models=",".join(tunes),
                tasks="",
                calibration_samples=2,
                **{"data": "sums,chat"} | more,
            )
        assert "\n" not in str(error.value), error.value
        assert all(word in str(error.value) for word in words), error.value
    assert not list(runs.glob("*/model"))


def test_every_algorithm_is_described_and_rules_are_read():
    known = {"linear", "slerp", "task_arithmetic", "metagpt", "ties", "dare", "dare_ties", "della"}
    assert set(ALGORITHMS) == known
    assert callable(examine)
    assert callable(save_model)
    assert all(how.meaning for how in ALGORITHMS.values())
    choices = {k.name: k.choices for k in knobs(page.Fuse)}
    assert set(page.ALGORITHMS) == set(choices["algorithm"])
    rule = weight_rules("2,1; up_proj=0,1;", 2)
    assert rule("x.up_proj.weight") == [0, 1]
    assert rule("x") == [2, 1]
    assert weight_rules("", 3)("x") == [1, 1, 1]
