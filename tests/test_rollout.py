"""Sampling on several architectures and on odd input.

It equals `generate` where it can be compared, and the formula elsewhere.
"""

import math

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from polm_lab.models import cache as module
from polm_lab.core.knobs import WrongInput
from polm_lab.models.rollout import Stops, end_tokens, rollout
from polm_lab.models.sampling import filter_logits, sample_token, row_seeds, uniforms

hf.utils.logging.set_verbosity_error()
COMMON = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    eos_token_id=[1, 2, 3],
    bos_token_id=0,
    pad_token_id=0,
    initializer_range=0.3,
)
KINDS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    # every layer slides
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(sliding_window=8)),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        dict(  # some layers slide
            sliding_window=8, head_dim=16, num_hidden_layers=7, initializer_range=0.2
        ),
    ),
    # ALiBi: no position ids
    "bloom": ("BloomConfig", "BloomForCausalLM", dict(n_layer=2, n_head=4)),
    # layers with a state
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", dict(layer_types=["conv", "full_attention"])),
    "deepseek": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        dict(  # the cache holds latents, not keys
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            qk_nope_head_dim=16,
            moe_intermediate_size=32,
            num_key_value_heads=4,
        ),
    ),
}


def make(kind="llama", seed=0, **settings):
    config, model, extra = KINDS[kind]
    torch.manual_seed(seed)
    return getattr(hf, model)(getattr(hf, config)(**COMMON | extra | settings)).eval()


def some_prompts(seed=0, lengths=(5, 17, 30, 1)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 128, (n,), generator=generator).tolist() for n in lengths]


def generated(model, prompts, new):
    "Greedy completions of `generate`, on the left-padded batch, cut after the first end token."
    width, ends = max(map(len, prompts)), end_tokens(model)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    rows = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0
    )[:, width:].tolist()
    return [cut_after(row, ends) for row in rows]


def cut_after(row, ends):
    "A row up to its first end token."
    return row[: next((t + 1 for t, k in enumerate(row) if k in ends), len(row))]


def recomputed(model, prompt, completion, temperature):
    "Log-probs of the completion by one plain forward pass over the unpadded row."
    with torch.no_grad():
        logits = (
            model(torch.tensor([prompt + completion])).logits[0, -len(completion) - 1 : -1].float()
        )
    return (
        (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
    )


def error_of(model, out, temperature):
    return max(
        (recomputed(model, p, c, temperature) - torch.tensor(l)).abs().max().item()
        for p, c, l in zip(out.prompts, out.completions, out.logps)
    )


def byte_tokenizer(**settings):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:125]
    made = Tokenizer(
        models.BPE(
            vocab={"<pad>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(letters)}, merges=[]
        )
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", **settings
    )


@pytest.fixture
def shared_steps(monkeypatch):
    "Counts the attention calls that read a prompt shared by a group."
    calls, real = [], module.shared_attention

    def spy(m, query, key, *args, **kwargs):
        calls.append(getattr(key, "shared", None) is not None and key.shared.family is not None)
        return real(m, query, key, *args, **kwargs)

    monkeypatch.setitem(hf.AttentionInterface._global_mapping, "polm_shared", spy)
    return calls


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_generate_and_logps_equal_recomputed(kind, share, shared_steps):
    for seed in range(3 if kind in ("llama", "gpt2", "qwen2") and share else 1):
        model, prompts = make(kind, seed), some_prompts(seed)
        expected = generated(model, prompts, 16)
        for samples in (1, 3):
            out = rollout(
                model,
                None,
                prompts,
                num_generations=samples,
                max_new_tokens=16,
                temperature=0,
                share=share,
            )
            assert out.completions == [e for e in expected for _ in range(samples)]
            assert error_of(model, out, 1.0) < 1e-4
        out = rollout(
            model,
            None,
            prompts,
            num_generations=3,
            max_new_tokens=16,
            temperature=0.7,
            seeds=seed,
            share=share,
        )
        assert error_of(model, out, 0.7) < 1e-4
        assert [len(l) for l in out.logps] == [len(c) for c in out.completions]
        assert out.ended == [c[-1] in (1, 2, 3) for c in out.completions]
        assert all(e or len(c) == 16 for e, c in zip(out.ended, out.completions))
        assert not any(t in (1, 2, 3) for c in out.completions for t in c[:-1])
    assert any(shared_steps) == (share and kind in ("llama", "gpt2", "qwen2"))
    assert model.config._attn_implementation != "polm_shared"


def test_lengths_vary_in_the_cases_above():
    "Rows do leave the batch early there, whole groups too, or dropping would not be tested."
    lengths = [
        len(c)
        for seed in range(3)
        for c in rollout(
            make(seed=seed), None, some_prompts(seed), 3, 16, 0.7, seeds=seed
        ).completions
    ]
    assert len(set(lengths)) > 4
    assert min(lengths) < 8


def test_without_padding_no_mask_is_made():
    model, seen = make(), []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append("attention_mask" in kwargs), with_kwargs=True
    )
    rollout(
        model, None, some_prompts(lengths=(6, 6)), num_generations=2, max_new_tokens=4, share=False
    )
    assert not any(seen)
    rollout(
        model, None, some_prompts(lengths=(6, 5)), num_generations=2, max_new_tokens=4, share=False
    )
    assert any(seen)


def test_the_prompt_is_read_once():
    model, shapes = make(), []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rollout(model, None, some_prompts(lengths=(6, 9)), num_generations=5, max_new_tokens=4)
    assert shapes[0] == (2, 9)
    assert shapes[1][1] == 1
    assert shapes[1][0] <= 10
    assert all(a[0] >= b[0] for a, b in zip(shapes[1:], shapes[2:]))


@pytest.mark.parametrize("share", [True, False])
def test_a_row_does_not_depend_on_its_company(share):
    model, prompts, seeds = make(), some_prompts(), row_seeds(11, 12)
    whole = rollout(model, None, prompts, 3, 20, 0.8, 0.95, seeds=seeds, share=share)
    for r, prompt in enumerate(whole.prompts):
        alone = rollout(model, None, [prompt], 1, 20, 0.8, 0.95, seeds=[seeds[r]], share=share)
        assert alone.completions[0] == whole.completions[r]
        assert np.allclose(alone.logps[0], whole.logps[r], atol=1e-4)
    order = [2, 0, 3, 1]
    reordered = [seeds[3 * i + k] for i in order for k in range(3)]
    moved = rollout(
        model, None, [prompts[i] for i in order], 3, 20, 0.8, 0.95, seeds=reordered, share=share
    )
    assert moved.completions == [whole.completions[3 * i + k] for i in order for k in range(3)]
    parts = rollout(model, None, prompts, 3, 20, 0.8, 0.95, seeds=seeds, at_once=5, share=share)
    assert parts.completions == whole.completions


def test_same_call_same_bits_and_other_seed_other_tokens():
    model, prompts = make(), some_prompts()
    first, second, other = (rollout(model, None, prompts, 4, 20, seeds=s) for s in (3, 3, 4))
    assert first == second
    assert first.completions != other.completions
    assert first == rollout(model, None, prompts, 4, 20, seeds=row_seeds(3, 16))
    assert len({tuple(c) for c in first.completions[:4]}) > 1
    torch.manual_seed(0), rollout(model, None, prompts, 1, 2)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))  # the global random state is left alone


def test_tokens_follow_the_model_s_distribution():
    """Compare the first tokens of 4,000 rows of one prompt with the softmax.

    The test is chi-square over the tokens that are expected five times or more.
    """
    model = make(initializer_range=0.15)
    for temperature, top_k, top_p in [(1.0, 0, 1.0), (0.6, 7, 1.0), (1.5, 0, 0.7)]:
        out = rollout(
            model, None, [[7, 8, 9]], 4000, 1, temperature, top_p, top_k, seeds=1, at_once=4000
        )
        with torch.no_grad():
            logits = model(torch.tensor([[7, 8, 9]])).logits[:, -1] / temperature
        p = filter_logits(logits, top_k, top_p).softmax(-1)[0].double().numpy()
        counts = np.bincount([c[0] for c in out.completions], minlength=len(p))
        assert counts[p == 0].sum() == 0
        often = p * 4000 >= 5
        expected = np.append(p[often], p[~often].sum()) * 4000
        seen = np.append(counts[often], counts[~often].sum())
        keep = expected > 0
        chi, free = ((seen - expected)[keep] ** 2 / expected[keep]).sum(), keep.sum() - 1
        # five standard deviations above the mean
        assert chi < free + 5 * math.sqrt(2 * free), (chi, free)
        assert free >= 4, (chi, free)
        whole = logits.log_softmax(-1)[0]
        assert (
            max(abs(whole[c[0]].item() - l[0]) for c, l in zip(out.completions, out.logps)) < 1e-4
        )


@pytest.mark.parametrize(
    "top_k, top_p",
    [
        (1, 1.0),
        (5, 1.0),
        (500, 1.0),
        (0, 0.01),
        (0, 0.5),
        (0, 0.97),
        (0, 0.9999),
        (20, 0.8),
        (300, 0.99),
    ],
)
def test_sets_equal_the_warpers_of_transformers(top_k, top_p):
    torch.manual_seed(0)
    for spread in (0.1, 1.0, 5.0):
        x = torch.randn(16, 400) * spread
        expected = hf.TopKLogitsWarper(top_k)(None, x) if top_k else x
        expected = hf.TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
        assert torch.equal(filter_logits(x, top_k, top_p), expected)


def test_pick_at_the_edges():
    z = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    tiny, half = 2.0**-49, 0.5
    assert [
        sample_token(z, torch.tensor([u], dtype=torch.float64))[0].item()
        for u in (tiny, half - 1e-9, half, 1 - tiny)
    ] == [1, 1, 3, 3]
    token, logp = sample_token(
        torch.zeros(1, 200_000), torch.tensor([1 - tiny], dtype=torch.float64)
    )
    assert token.item() == 199_999
    assert abs(logp.item() + math.log(200_000)) < 1e-5
    numbers = uniforms(range(-50, 50), 200)
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert len(np.unique(numbers)) == numbers.size
    assert 1 - 2.0**-49 < 1
    assert (np.float64(3.7) * (1 - 2.0**-49)) < 3.7


def test_stop_strings_straddle_tokens():
    tokenizer, model = byte_tokenizer(), make()
    model.generation_config.eos_token_id = []  # no end token, not even the tokenizer's
    free = rollout(model, tokenizer, some_prompts(), 4, 40, seeds=2)
    assert not any(free.ended)
    for row in range(len(free)):
        stop = free.texts[row][6:9]  # three characters, one token each
        if "\ufffd" in stop:
            continue
        out = rollout(model, tokenizer, some_prompts(), 4, 40, seeds=2, stop=("never seen", stop))
        for text, whole, tokens, all_tokens, ended in zip(
            out.texts, free.texts, out.completions, free.completions, out.ended
        ):
            at = whole.find(stop)
            assert ended == (at >= 0)
            assert tokens == all_tokens[: len(tokens)]
            assert text == (whole if at < 0 else whole[:at])
            shown = tokenizer.decode(tokens, skip_special_tokens=True)
            assert (
                at < 0
                or stop in shown
                and stop not in tokenizer.decode(tokens[:-1], skip_special_tokens=True)
            )


def first_hit(texts, stop):
    "The number of the first text, after the empty one, that contains a stop string."
    for number, text in enumerate(texts[1:], 1):
        if any(s in text for s in stop):
            return number
    return None


def test_stop_detection_is_that_of_the_whole_text():
    """Decoding only the tail finds what decoding everything finds.

    The text has bytes of longer characters and special tokens in between.
    """
    tokenizer, rng = byte_tokenizer(), np.random.default_rng(0)
    for stop in [("ab",), ("b", "ca"), ("a<eos>",), ("abcab",)]:
        stops = Stops(tokenizer, stop)
        letters = [tokenizer.convert_tokens_to_ids(c) for c in "abc"] + [0, 1, 120]
        for _ in range(60):
            tokens = rng.choice(letters, 30).tolist()
            texts = [
                tokenizer.decode(tokens[:t], skip_special_tokens="<eos>" not in stop[0])
                for t in range(31)
            ]
            first = first_hit(texts, stop)
            assert next((t for t in range(1, 31) if stops.hit(tokens[:t])), None) == first
            assert not any(s in stops.text(tokens[:first]) for s in stop)


def test_text_of_an_end_token_that_is_an_ordinary_word():
    tokenizer, model = byte_tokenizer(), make(eos_token_id=[50, 60, 70, 80, 90])
    out = rollout(model, tokenizer, some_prompts(), 4, 30)
    assert any(out.ended)
    for text, tokens, ended in zip(out.texts, out.completions, out.ended):
        assert text == tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)


def test_end_tokens_come_from_the_generation_config_then_from_the_tokenizer():
    assert end_tokens(make()) == [1, 2, 3]
    assert end_tokens(make(eos_token_id=9)) == [9]
    assert end_tokens(make(eos_token_id=None), byte_tokenizer()) == [1]
    assert end_tokens(make(eos_token_id=None)) == []


def test_one_new_token_and_one_prompt():
    model = make()
    out = rollout(model, None, [[5]], max_new_tokens=1, temperature=0)
    assert [len(c) for c in out.completions] == [1]
    assert out.ended == [out.completions[0][0] in (1, 2, 3)]
    assert out.texts == [""]
    assert len(rollout(model, None, [])) == 0


WRONG = {
    "empty prompt": (dict(prompts=[[5], []]), "prompts:1: found no tokens"),
    "too long": (
        dict(prompts=[[5], [5], [6] * 300]),
        "prompts:2: found 300 prompt tokens + max_new_tokens 64; expected at most 256",
    ),
    "too long by the new tokens": (
        dict(prompts=[[5] * 200], max_new_tokens=57),
        "prompts:0: found 200",
    ),
    "text": (dict(prompts=["hello"]), "prompts:0: found 'h'; expected token ids from 0 to 127"),
    "id outside": (dict(prompts=[[128]]), "prompts:0: found 128"),
    "negative id": (dict(prompts=[[-1]]), "prompts:0: found -1"),
    "samples": (dict(num_generations=0), "num_generations: found 0"),
    "new tokens": (dict(max_new_tokens=0), "max_new_tokens: found 0"),
    "temperature": (dict(temperature=-1), "temperature: found -1"),
    "temperature nan": (dict(temperature=math.nan), "temperature: found nan"),
    "top_p": (dict(top_p=0), "top_p: found 0"),
    "top_k": (dict(top_k=1.5), "top_k: found 1.5"),
    "empty stop": (dict(stop=("",)), "stop: found"),
    "stop without tokenizer": (dict(stop="x"), "no tokenizer"),
    "seeds": (dict(seeds=[1, 2, 3]), "seeds: found 3 entries"),
    "no seeds": (dict(seeds=None), "seeds: found"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named_before_compute(name):
    change, text = WRONG[name]
    model = make()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(WrongInput) as error:
        rollout(**dict(model=model, tokenizer=None, prompts=[[5]]) | change)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_prompt_and_new_tokens_may_fill_the_context():
    assert (
        len(rollout(make(eos_token_id=None), None, [[5] * 200], max_new_tokens=56).completions[0])
        == 56
    )


def test_a_model_without_a_cache_is_refused():
    torch.manual_seed(0)
    model = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(WrongInput, match="MambaForCausalLM"):
        rollout(model, None, [[5]])


def test_training_state_comes_back_also_after_an_error():
    model = make("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()  # a frozen part stays frozen
    before = [m.training for m in model.modules()]
    out = rollout(model, None, some_prompts(), 2, 8)
    assert [m.training for m in model.modules()] == before
    assert out == rollout(model, None, some_prompts(), 2, 8)  # no dropout while sampling
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="prompts:.*not finite"):
        rollout(model, None, some_prompts(), 2, 8)
    assert [m.training for m in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"


def test_gradient_checkpointing_and_use_cache_off_do_not_matter():
    model, expected = make(), rollout(make(), None, some_prompts(), 2, 8)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    assert rollout(model.train(), None, some_prompts(), 2, 8) == expected


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_peft(kind):
    import peft

    common = dict(task_type="CAUSAL_LM")
    config = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **common),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=6, **common),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=6, **common),
    }[kind]()
    base = make()
    plain = rollout(base, None, some_prompts(), 2, 12, 0.7)
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.3)
    out = rollout(model, None, some_prompts(), 2, 12, 0.7)
    assert error_of(model, out, 0.7) < 1e-4
    assert out.completions != plain.completions
    for share in (True, False):
        greedy = rollout(model, None, some_prompts(), 2, 12, 0, share=share)
        assert greedy.completions[::2] == [generated(model, [p], 12)[0] for p in some_prompts()]
    with model.disable_adapter():
        assert rollout(model, None, some_prompts(), 2, 12, 0.7).completions == plain.completions
    assert rollout(model, None, some_prompts(), 2, 12, 0.7) == out
    if kind != "lora":
        with pytest.raises(WrongInput, match="6 soft"):
            rollout(model, None, [[5] * 240], max_new_tokens=11)


def test_half_precision_takes_the_plain_path(shared_steps):
    model = make().to(torch.bfloat16)
    out = rollout(model, None, some_prompts(), 2, 8)
    assert not any(shared_steps)
    assert error_of(model, out, 1.0) < 0.5


def test_a_frozen_head_is_not_copied_for_each_row():
    "The prefill of 32 prompts allocates nothing as large as a copy of the head for every row."
    from torch.profiler import profile

    rows, vocabulary, width = 32, 5000, 32
    config = hf.LlamaConfig(**COMMON | dict(vocab_size=vocabulary, hidden_size=width))
    model = hf.LlamaForCausalLM(config).requires_grad_(False).to(torch.bfloat16)
    prompts = [list(range(4, 14)) for _ in range(rows)]
    with profile(profile_memory=True) as seen:
        rollout(model, None, prompts, max_new_tokens=2, seeds=0)
    largest = max(event.self_cpu_memory_usage for event in seen.events())
    assert largest < rows * vocabulary * width * 2 / 4
