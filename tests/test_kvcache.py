"""Caches that round or forget: blocks, turns, each algorithm against a plain computation, sampling, wrong input."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache

import polm_lab as lab
from polm_lab.core.knobs import WrongInput
from polm_lab.efficiency.kvcache import (
    CACHES,
    KIVI,
    QAQ,
    TIME,
    WIDTH,
    H2O,
    KVCache,
    KVQuant,
    Streaming,
    WKVQuant,
    find_ranges,
    find_tables,
    in_blocks,
    kv_of,
    latent_length,
    measured,
    read_through,
    rope_of,
    shared_bits,
    to_table,
    turned,
    with_latents,
)
from polm_lab.models.cache import KeptLayerCache, keeping
from polm_lab.models.load import load_model
from polm_lab.models.rollout import rollout
from polm_lab.models.tokenizers import load_tokenizer
from polm_lab.training.layerwise import calibration


def says(call, *values, **more) -> str:
    with pytest.raises(WrongInput) as wrong:
        call(*values, **more)
    assert "\n" not in str(wrong.value)
    return str(wrong.value)


@pytest.fixture(scope="module")
def base():
    return load_model("tiny", dtype="float32", device="cpu").eval()


@pytest.fixture(scope="module")
def windows():
    return calibration(load_tokenizer("tiny"), "chat", 6, 96)


def plain(index, capacity):
    return KeptLayerCache(capacity)


def small(heads: int = 2):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=64)
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=heads, **sizes)
    return LlamaForCausalLM(config).eval()


# Numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("along", [TIME, WIDTH])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_blocks_have_few_numbers_and_keep_their_ends(along, bits):
    x = torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    found = in_blocks(x, bits, along, 8)
    for part, own in zip(found.split(8, along), x.split(8, along)):
        rows = part.movedim(along, -1).flatten(0, -2)
        assert all(len(row.unique()) <= 2**bits for row in rows)
        assert torch.allclose(part.amin(along), own.amin(along), atol=1e-5)
        assert torch.allclose(part.amax(along), own.amax(along), atol=1e-5)
        step = (own.amax(along) - own.amin(along)) / (2**bits - 1)
        assert ((part - own).abs() <= step.unsqueeze(along) / 2 + 1e-5).all()


def test_a_table_gives_the_nearest_number():
    x, table = torch.linspace(-2, 4, 50)[None], torch.tensor([0.0, 0.1, 0.6, 1.0])
    low, high = torch.tensor([[-1.0]]), torch.tensor([[3.0]])
    numbers = table * 4 - 1
    nearest = numbers[(x[0, :, None] - numbers).abs().argmin(1)]
    assert torch.allclose(to_table(x, low, high, table)[0], nearest)


def test_keys_are_turned_back_to_what_the_layer_gave(base, windows):
    given = []
    layer = base.model.layers[1].self_attn.k_proj
    hook = layer.register_forward_hook(lambda layer, args, out: given.append(out))
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        base(windows, past_key_values=cache, use_cache=True)
    hook.remove()
    keys = cache.layers[1].keys
    back = turned(keys, *rope_of(base, windows.shape[1]), back=True)
    wanted = given[0].unflatten(-1, (keys.shape[1], -1)).transpose(1, 2)
    assert torch.allclose(back, wanted, atol=1e-4)
    assert torch.allclose(turned(back, *rope_of(base, windows.shape[1])), keys, atol=1e-4)


# Attention and caches ---------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_cache_that_forgets_nothing_changes_nothing(heads):
    model, ids = small(heads), torch.randint(64, (3, 40))
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)[:, 7:-1].gather(2, ids[:, 8:, None])[..., 0]
        found = torch.stack([loss for loss, _ in read_through(model, ids, 8, plain)], 1)
    assert torch.allclose(-found, logp, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_attention_is_counted_and_sums_to_the_queries(base, windows):
    *_, (_, layers) = read_through(base, windows, 16, plain)
    for layer in layers:
        looked = layer.looked[..., : layer.length]
        assert torch.allclose(looked.sum(-1), torch.full((6, 5), float(layer.length)), rtol=1e-3)


@pytest.mark.parametrize("algorithm", ["kivi", "token", "zipcache", "kvquant", "qaq", "wkvquant"])
def test_what_left_the_window_is_rounded_once_and_the_rest_is_whole(base, windows, algorithm):
    s = KVCache(algorithm=algorithm, bits=2, window=16, group_size=8)
    steps = read_through(base, windows, 24, kv_of(base, s, windows))
    whole = read_through(base, windows, 24, plain)
    before = None
    for (_, layers), (_, plains) in zip(steps, whole):
        one, other = layers[0], plains[0]  # the first layer sees the same tokens in both
        assert one.done >= max(0, one.length - 1 - 16 - 8)
        assert one.done <= max(0, one.length - 16)
        new = slice(one.done, one.length)
        assert torch.allclose(one.keys[:, :, new], other.keys[:, :, new], atol=1e-5)
        assert torch.allclose(one.values[:, :, new], other.values[:, :, new], atol=1e-5)
        if before is not None:  # what was rounded does not change any more
            length = before.shape[2]
            assert torch.equal(one.keys[:, :, :length], before)
        before = one.keys[:, :, : one.done].clone()
    assert one.done > 60
    assert not torch.allclose(one.keys[:, :, :60], other.keys[:, :, :60], atol=1e-2)


def test_kivi_is_rounding_in_blocks(base, windows):
    s = KVCache(algorithm="kivi", bits=2, window=8, group_size=16)
    *_, (_, layers) = read_through(base, windows, 90, kv_of(base, s))
    *_, (_, plains) = read_through(base, windows, 90, plain)
    done = layers[0].done
    assert done == 80
    keys, values = plains[0].keys[:, :, :done], plains[0].values[:, :, :done]
    assert torch.allclose(layers[0].keys[:, :, :done], in_blocks(keys, 2, TIME, 16), atol=1e-4)
    assert torch.allclose(layers[0].values[:, :, :done], in_blocks(values, 2, WIDTH, 16), atol=1e-4)


def test_tokens_that_are_looked_at_have_more_bits(base, windows):
    s = KVCache(algorithm="zipcache", bits=1, window=8, group_size=16)
    made = kv_of(base, s)(0, 96)
    made.update(torch.randn(1, 1, 40, 32), torch.randn(1, 1, 40, 32))
    wanted = made.keys[:, :, :32].clone()
    made.look(torch.arange(40.0, 0, -1)[None, None] * torch.arange(40)[None, None])
    made.forget()
    error = (made.keys[:, :, :32] - wanted).square().mean((0, 1, 3))
    assert made.done == 32
    assert error[13:].max() < error[:12].min()  # six of ten, those with the highest share


def test_kvquant_keeps_outliers_and_rounds_before_the_turn(base, windows):
    facts = find_tables(base, windows, 2)
    s = KVCache(algorithm="kvquant", bits=2, window=0)
    made = KVQuant(s, facts, 0, 96)
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        base(windows, past_key_values=cache, use_cache=True)
    keys = cache.layers[0].keys
    cos, sin = rope_of(base, 96)
    found = turned(made.rounded_keys(keys, slice(0, 96)), cos, sin, back=True)
    own = turned(keys, cos, sin, back=True)
    outside = (own < facts[0]["low"]) | (own > facts[0]["high"])
    assert 0.005 < outside.float().mean() < 0.02
    assert torch.allclose(found[outside], own[outside], atol=1e-4)
    channel = found[:, 0, :, 3][~outside[:, 0, :, 3]]
    assert len(channel.mul(1e3).round().unique()) <= 4
    values = cache.layers[0].values
    rounded = made.rounded_values(values, slice(0, 96))
    assert (rounded == values).float().mean() >= 1 / 32


@pytest.mark.parametrize("mean", [1, 2, 4, 8])
def test_bits_are_shared_out_as_they_are_needed(mean):
    need = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0)) * 2
    bits = shared_bits(need, mean)
    assert (bits == bits.round()).all()
    assert bits.min() >= 1
    assert bits.max() <= 8
    assert (bits.mean(-1) <= mean).all()
    assert (bits.mean(-1) > mean - 0.2).all()
    order = need.argsort(-1)
    assert (bits.gather(-1, order).diff(dim=-1) >= 0).all()  # who needs more has no fewer


def test_qaq_keeps_what_is_far_and_gives_looked_at_tokens_a_smaller_step():
    s = KVCache(algorithm="qaq", bits=3, window=8, group_size=32)
    made = QAQ(s, None, 0, 64)
    keys = torch.randn(1, 1, 40, 32, generator=torch.Generator().manual_seed(0))
    keys[0, 0, :, 7] = 30.0  # furthest from the mean of every token
    made.update(keys.clone(), keys.clone())
    looked = torch.full((1, 1, 40), 0.01)
    looked[..., 3], looked[..., 20] = 20.0, 20.0
    made.look(looked)
    made.forget()
    assert made.done == 32
    assert torch.equal(made.keys[0, 0, :40, 7], keys[0, 0, :, 7])
    error = (made.keys[:, :, :32] - keys[:, :, :32]).square().mean((0, 1, 3))
    others = [i for i in range(32) if i not in (3, 20)]
    assert error[[3, 20]].max() < 0.1 * error[others].min()
    numbers = made.stored_bits() / (2 * 40 * 32)
    assert numbers == pytest.approx((32 * (3 + 35 / 32 + 1) + 8 * 16) / 40)


def test_wkvquant_rounds_tokens_of_channels_made_alike(base, windows):
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        base(windows, past_key_values=cache, use_cache=True)
    facts = find_ranges(base, windows)
    for name in ("keys", "values"):
        x = getattr(cache.layers[2], name)
        middle, half = facts[2][name]
        alike = (x - middle) / half
        assert torch.allclose(alike.amax((0, TIME)), torch.ones(5, 32), atol=1e-4)
        assert torch.allclose(alike.amin((0, TIME)), -torch.ones(5, 32), atol=1e-4)
    made = WKVQuant(KVCache(algorithm="wkvquant", bits=2), facts, 2, 96)
    found = made.rounded_values(x, slice(0, 96))
    assert torch.allclose(found, in_blocks(alike, 2, WIDTH, 32) * half + middle, atol=1e-5)


def test_one_large_channel_costs_other_channels_nothing_in_wkvquant():
    x = torch.randn(1, 1, 64, 32, generator=torch.Generator().manual_seed(0))
    x[..., 5] = 12 + 0.1 * x[..., 5]
    low, high = x.amin((0, TIME), keepdim=True), x.amax((0, TIME), keepdim=True)
    facts = [dict(keys=((low + high) / 2, (high - low) / 2))]
    made = WKVQuant(KVCache(algorithm="wkvquant", bits=3), facts, 0, 64)
    others = [i for i in range(32) if i != 5]
    lost = lambda y: (y - x)[..., others].square().mean()
    assert lost(made.rounded_keys(x, slice(0, 64))) < 0.3 * lost(in_blocks(x, 3, WIDTH, 32))


def test_a_latent_of_full_length_changes_nothing_and_a_short_one_is_the_best_product(base, windows):
    with torch.no_grad():
        whole = base(windows).logits
        again = with_latents(base, windows, 16)(windows).logits
        assert torch.allclose(again, whole, atol=2e-2)
        short = with_latents(base, windows, 2)
    attention, own = short.model.layers[0].self_attn, base.model.layers[0].self_attn
    joint = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
    assert torch.linalg.matrix_rank(joint, rtol=1e-4) == latent_length(320, 2) == 40
    assert not torch.equal(own.k_proj.weight, attention.k_proj.weight)  # base is as it was
    x = base.model.layers[0].input_layernorm(base.model.embed_tokens(windows)).flatten(0, 1)
    before = torch.cat([own.k_proj.weight, own.v_proj.weight]) @ x.T
    error = (joint @ x.T - before).square().sum()
    values = torch.linalg.svdvals(before)
    assert error.item() == pytest.approx(values[40:].square().sum().item(), rel=1e-2)


def test_a_latent_is_counted_alone(base, windows):
    s = KVCache(algorithm="mla", bits=2)
    found = measured(with_latents(base, windows, 2), windows, 32, kv_of(base, s))
    assert found["bits_per_weight"] == 2
    text = says(
        with_latents, GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2)), windows, 2
    )
    assert "linear layers" in text or "k_proj" in text


def test_h2o_keeps_the_new_and_the_looked_at_and_forgets_for_good():
    made = H2O(KVCache(algorithm="h2o", budget=8), None, 0, 64)
    made.update(torch.randn(1, 1, 20, 4), torch.randn(1, 1, 20, 4))
    score = torch.zeros(1, 1, 20)
    score[..., [2, 5, 9, 11]] = 1.0
    made.look(score)
    made.forget()
    kept = (~made.gone[0, 0, :20]).nonzero().flatten().tolist()
    assert kept == [2, 5, 9, 11, 16, 17, 18, 19]
    made.update(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4))
    made.look(torch.full((1, 1, 21), 5.0))
    made.forget()
    kept = (~made.gone[0, 0, :21]).nonzero().flatten().tolist()
    assert len(kept) == 8
    assert set(kept) <= {2, 5, 9, 11, 16, 17, 18, 19, 20}
    assert {17, 18, 19, 20} <= set(kept)


def test_streaming_is_a_mask(base, windows):
    s = KVCache(algorithm="streaming", budget=16)
    *_, (_, layers) = read_through(base, windows, 32, kv_of(base, s))
    kept = (~layers[0].gone[0, 0, : layers[0].length]).nonzero().flatten().tolist()
    assert kept == [0, 1, 2, 3, *range(layers[0].length - 13, layers[0].length)]
    large = Streaming(KVCache(algorithm="streaming", budget=500), None, 0, 96)
    found = measured(base, windows, 32, lambda index, capacity: copy.copy(large))
    assert found["perplexity"] == pytest.approx(measured(base, windows, 32)["perplexity"], rel=1e-4)


def test_what_is_gone_gets_no_attention(base):
    with keeping(base):
        made = KeptLayerCache(16)
        made.gone = torch.zeros(1, 5, 16, dtype=torch.bool)
        made.gone[..., 2] = True
        cache = Cache(layers=[made, *[KeptLayerCache(16) for _ in range(4)]])
        with torch.no_grad():
            base(torch.arange(5, 13)[None], past_key_values=cache, use_cache=True)
    assert made.looked[..., 2].abs().max() == 0
    assert made.looked[..., 1].min() > 0


# Sizes ------------------------------------------------------------------------------------------


def test_bits_are_counted():
    model, ids = small(), torch.randint(64, (2, 80))
    s = KVCache(algorithm="kivi", bits=2, window=16, group_size=16)
    found = measured(model, ids, 32, kv_of(model, s))
    # 79 tokens: 48 rounded at the last step, two heads of 16 numbers, two layers, keys and values
    numbers = 2 * 2 * 2 * 16
    bits = numbers * (48 * (2 + 2) + 31 * 16)
    assert found["size_mib"] == pytest.approx(bits / 2**23)
    assert found["bits_per_weight"] == pytest.approx(bits / (79 * numbers))
    whole = measured(model, ids, 32)
    assert whole["bits_per_weight"] == 16
    assert whole["size_mib"] == pytest.approx(79 * numbers * 16 / 2**23)


def test_keys_by_channel_lose_less_than_by_token(base, windows):
    value = {
        name: measured(base, windows, 32, kv_of(base, KVCache(algorithm=name, bits=1, window=0)))
        for name in ("kivi", "token")
    }
    assert value["kivi"]["perplexity"] < 0.6 * value["token"]["perplexity"]


# Sampling ---------------------------------------------------------------------------------------


def test_a_cache_that_forgets_nothing_writes_the_same(base):
    tokenizer = load_tokenizer("tiny")
    prompts = [tokenizer(text).input_ids for text in ("17+26=", "What is the capital?", "5+5=")]
    more = dict(num_generations=3, max_new_tokens=16, seeds=1)
    whole = rollout(base, tokenizer, prompts, share=False, **more)
    found = rollout(base, tokenizer, prompts, kv=plain, **more)
    assert found.completions == whole.completions
    assert base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("algorithm", CACHES)
def test_every_cache_writes(base, windows, algorithm):
    tokenizer = load_tokenizer("tiny")
    prompts = [windows[0, :40].tolist(), windows[1, :25].tolist()]
    s = KVCache(algorithm=algorithm, bits=4, window=8, budget=20, group_size=8)
    more = dict(num_generations=2, max_new_tokens=24, temperature=0.0)
    found = rollout(base, tokenizer, prompts, kv=kv_of(base, s, windows), **more)
    whole = rollout(base, tokenizer, prompts, **more)
    assert len(found.texts) == 4
    if algorithm not in ("h2o", "streaming"):  # four bits hardly change what is written
        same = sum(a == b for a, b in zip(found.completions, whole.completions))
        assert same >= 2


# Runs and wrong input ---------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", CACHES)
def test_a_run(algorithm):
    run = lab.run("kvcache", algorithm=algorithm, bits=2, eval_rows=4, max_length=96)
    before, after = run.summary["before"], run.summary["after"]
    assert before["bits_per_weight"] == 16
    assert after["size_mib"] < before["size_mib"]
    assert after["perplexity"] < 2 * before["perplexity"]
    assert after["rows"] == 4
    assert not (run.path / "model").exists()


def test_wrong_input(base, tmp_path):
    assert "prefix" in says(lab.run, "kvcache", prefix=64, max_length=64)
    assert "tokens of held-out text" in says(
        lab.run, "kvcache", data="sums#16", eval_rows=4096, max_length=4096
    )
    assert "calibration text" in says(kv_of, base, KVCache(algorithm="kvquant"))
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    text = says(rope_of, GPT2LMHeadModel(config), 8)
    assert "rotary" in text
    assert issubclass(CACHES["kivi"], KIVI)
