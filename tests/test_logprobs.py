"""The log-prob kernel and `Policy` against the dense path: values and gradients.

On these inputs the two would differ if one were wrong.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from polm_lab.core.knobs import WrongInput
from polm_lab.models.logprobs import Readout, dense_kl, dense_logprobs, full_kl, selected_logprobs
from polm_lab.models.policy import Policy

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "llama-bf16": LlamaConfig(**SMALL),
    "qwen2-tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gpt2-tied": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma2-softcap": Gemma2Config(
        **SMALL, head_dim=8, final_logit_softcapping=1.5, sliding_window=4
    ),
    "cohere-scale": CohereConfig(**SMALL, logit_scale=0.25),
    "granite-scale": GraniteConfig(**SMALL, logits_scaling=3.0),
    "opt": OPTConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    ),
}


def build(family, seed=0):
    torch.manual_seed(seed)
    config = copy.deepcopy(FAMILIES[family])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, 0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16 if "bf16" in family else torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # far from uniform, so that a cap, a scale or a shifted target shows
                parameter.mul_(8)
    return model.eval()


def batch(rows=3, time=9, seed=1, vocab=97):
    torch.manual_seed(seed)
    ids = torch.randint(1, vocab, (rows, time))
    lengths = torch.tensor([time, time - 3, time - 2])[:rows]
    real = (torch.arange(time) < lengths[:, None]).long()
    target = real * (torch.rand(rows, time) < 0.7).long()
    target[:, 0] = 1  # a first token has nothing before it: asking for it must give 0
    return ids * real, real, target


def plain(model, ids, real, target, temperature=1.0, entropy=False, offset=0):
    "The dense path: the model's own logits, log_softmax, gather, shift by one."
    logits = model(input_ids=ids, attention_mask=real).logits[:, offset:].float()
    logp = torch.log_softmax(logits[:, :-1] / temperature, -1)
    front = torch.zeros(len(ids), 1)
    chosen = torch.cat([front, logp.gather(-1, ids[:, 1:, None])[..., 0]], 1) * target
    spread = torch.cat([front, -(logp.exp() * logp).sum(-1)], 1) * target
    return (chosen, spread) if entropy else chosen


def close(a, b, tolerance):
    "Largest difference relative to the largest entry."
    error = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-30)
    assert error <= tolerance, f"relative difference {error:.2e} > {tolerance:.0e}"


def inputs(dtype, n=13, width=7, vocab=50, seed=0):
    torch.manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*s, dtype=dtype) * 2 for s in ((n, width), (vocab, width), (vocab,))
    )
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        bias.requires_grad_(),
        torch.randint(vocab, (n,)),
    )


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [1, 7, 50, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale,softcap", [(1.0, None), (0.3, None), (1.0, 3.0), (0.5, 5.0)])
def test_values_and_gradients_equal_dense(
    dtype, tolerance, chunk, temperature, with_bias, scale, softcap
):
    hidden, weight, bias, targets = inputs(dtype)
    bias = bias if with_bias else None
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    ours = selected_logprobs(
        hidden, weight, targets, bias, temperature, True, chunk, scale, softcap
    )
    dense = dense_logprobs(
        Readout(weight, bias, scale, softcap).logits(hidden), targets, temperature, True
    )
    for a, b in zip(ours, dense):
        close(a, b, tolerance)
    by = torch.randn(2, len(targets), dtype=dtype)
    for used in ((0,), (1,), (0, 1)):  # log-prob alone, entropy alone, both
        grads = []
        for out in (ours, dense):
            loss = sum(out[i] @ by[i] for i in used)
            grads.append(torch.autograd.grad(loss, leaves, retain_graph=True))
        mine, theirs = grads
        for a, b in zip(mine, theirs):
            close(a, b, tolerance)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunk", [7, None])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_full_kl_equals_dense(dtype, tolerance, reverse, chunk, softcap, temperature):
    hidden, weight, bias, _ = inputs(dtype)
    ref_hidden, ref_weight, ref_bias, _ = inputs(dtype, width=5, seed=3)
    ours = full_kl(
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        reverse,
        bias,
        ref_bias,
        temperature,
        chunk,
        0.5,
        softcap,
        0.7,
        softcap,
    )
    logits = Readout(weight, bias, 0.5, softcap).logits(hidden)
    ref_logits = Readout(ref_weight, ref_bias, 0.7, softcap).logits(ref_hidden)
    dense = dense_kl(logits, ref_logits, reverse, temperature)
    close(ours, dense, tolerance)
    by = torch.randn(len(hidden), dtype=dtype)
    mine, theirs = (torch.autograd.grad(kl @ by, (hidden, weight, bias)) for kl in (ours, dense))
    for a, b in zip(mine, theirs):
        close(a, b, tolerance)


def test_the_reference_of_a_kl_is_constant():
    hidden, weight, _, _ = inputs(torch.float64)
    ref_hidden, ref_weight, _, _ = inputs(torch.float64, seed=3)
    full_kl(hidden, weight, ref_hidden, ref_weight).sum().backward()
    assert hidden.grad is not None
    assert ref_hidden.grad is None
    assert ref_weight.grad is None


def test_kl_directions_differ_and_vanish_at_equality():
    hidden, weight, _, _ = inputs(torch.float64)
    other = inputs(torch.float64, seed=5)[0]
    forward, reverse = (full_kl(hidden, weight, other, weight, r) for r in (False, True))
    assert (forward > 0).all()
    assert (reverse > 0).all()
    assert not torch.allclose(forward, reverse)
    same = full_kl(hidden, weight, hidden, weight)
    assert same.abs().max() < 1e-12
    assert torch.autograd.grad(same.sum(), hidden)[0].abs().max() < 1e-12


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    hidden, weight, bias, targets = inputs(torch.float64, n=3, width=2, vocab=5)
    ref = torch.randn(3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: selected_logprobs(h, w, targets, b, 0.7, True, 2, 0.5, softcap),
        (hidden, weight, bias),
    )
    for reverse in (False, True):
        kl = lambda h, w, b: full_kl(
            h, w, ref, ref[[0, 1, 2, 0, 1]], reverse, b, None, 0.7, 2, 0.5, softcap
        )
        assert torch.autograd.gradcheck(kl, (hidden, weight, bias))


def test_large_logits_do_not_overflow():
    hidden, weight, _, targets = inputs(torch.float32)
    ours = selected_logprobs(hidden * 300, weight, targets, entropy=True, chunk=3)
    dense = dense_logprobs((hidden * 300 @ weight.T).double(), targets, entropy=True)
    close(ours[0], dense[0], 1e-5)
    assert torch.allclose(ours[1].double(), dense[1], atol=1e-5)


def test_only_what_asks_gets_a_gradient():
    hidden, weight, bias, targets = inputs(torch.float32)
    for frozen in ((1, 2), (0, 2), (0, 1)):
        leaves = [
            t.detach().requires_grad_(i not in frozen) for i, t in enumerate((hidden, weight, bias))
        ]
        logp, entropy = selected_logprobs(leaves[0], leaves[1], targets, leaves[2], entropy=True)
        (logp.sum() + entropy.sum()).backward()
        assert [t.grad is not None for t in leaves] == [i not in frozen for i in range(3)]
    with torch.no_grad():
        assert selected_logprobs(hidden, weight, targets)[0].grad_fn is None
    assert not selected_logprobs(hidden.detach(), weight.detach(), targets)[0].requires_grad


def test_backward_twice_gives_the_same():
    hidden, weight, _, targets = inputs(torch.float32)
    logp, _ = selected_logprobs(hidden, weight, targets)
    first, second = (
        torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_low_precision_keeps_fp32_statistics():
    hidden, weight, _, targets = inputs(torch.float32, n=40, width=16, vocab=300)
    low = [(t.detach() * 0.3).bfloat16().requires_grad_() for t in (hidden, weight)]
    logp, entropy = selected_logprobs(*low, targets, entropy=True)
    exact = [t.detach().float().requires_grad_() for t in low]
    want, _ = dense_logprobs(exact[0] @ exact[1].T, targets)
    assert logp.dtype == entropy.dtype == torch.float32
    close(logp, want, 1e-5)
    logp.sum().backward(), want.sum().backward()
    for a, b in zip(low, exact):
        assert a.grad.dtype == torch.bfloat16
        close(a.grad.float(), b.grad, 1e-2)


def test_products_in_bf16(monkeypatch):
    "The route that a GPU takes: bf16 products, fp32 statistics."
    import polm_lab.models.logprobs as module

    monkeypatch.setattr(module, "_product_dtype", lambda *tensors: torch.bfloat16)
    hidden, weight, bias, targets = inputs(torch.float32, n=40, width=16, vocab=300)
    leaves = [(t.detach() * 0.3).requires_grad_() for t in (hidden, weight, bias)]
    twins = [t.detach().clone().requires_grad_() for t in leaves]
    ours = selected_logprobs(
        leaves[0], leaves[1], targets, leaves[2], entropy=True, chunk=64, softcap=4.0
    )
    dense = dense_logprobs(
        Readout(twins[1], twins[2], 1.0, 4.0).logits(twins[0]), targets, entropy=True
    )
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for a, b in zip(ours, dense):
        close(a, b, 2e-2)
    for out in (ours, dense):
        (out[0].sum() + out[1].sum()).backward()
    for a, b in zip(leaves, twins):
        close(a.grad, b.grad, 3e-2)


def test_no_rows():
    hidden, weight, bias, targets = inputs(torch.float32)
    logp, entropy = selected_logprobs(hidden[:0], weight, targets[:0], bias, entropy=True)
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert weight.grad.abs().sum() == bias.grad.abs().sum() == hidden.grad.abs().sum() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_policy_equals_the_models_own_logits(family):
    model = build(family)
    policy, twin = Policy(model), copy.deepcopy(model)
    ids, real, target = batch()
    target[1] = 0
    loose = "bf16" in family
    stats = policy(ids, real, target, temperature=0.8, entropy=True)
    logp, entropy = plain(twin, ids, real, target, 0.8, True)
    assert policy._known[1] is not None, "the kernel should fit this model"
    assert torch.equal(stats.logp != 0, (target * (torch.arange(9) > 0)).bool())
    close(stats.logp, logp, 5e-2 if loose else 1e-5)
    close(stats.entropy, entropy, 5e-2 if loose else 1e-5)
    (stats.logp.sum() + 0.3 * stats.entropy.square().sum()).backward()
    (logp.sum() + 0.3 * entropy.square().sum()).backward()
    largest = max(p.grad.abs().max() for p in twin.parameters() if p.grad is not None)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and not loose:
            assert (p.grad - q.grad).abs().max() <= 2e-5 * largest, name


@pytest.mark.parametrize("family", ["llama", "gpt2-tied", "gemma2-softcap", "opt"])
def test_padding_changes_nothing(family):
    policy = Policy(build(family))
    ids, real, target = batch()
    with torch.no_grad():
        want = policy(ids, real, target, entropy=True)
        for left, right, junk in ((0, 5, 0), (4, 0, 0), (3, 2, 7)):
            pad = lambda t, value: nn.functional.pad(t, (left, right), value=value)
            # a completion_mask on padding is ignored
            got = policy(pad(ids, junk), pad(real, 0), pad(target, 1), entropy=True)
            for a, b in zip(got[:2], want[:2]):
                close(a[:, left : left + 9], b, 1e-5)
                assert a[:, :left].abs().sum() == a[:, left + 9 :].abs().sum() == 0
        alone = policy(ids[1:2, :6], None, target[1:2, :6], entropy=True)
        close(alone.logp, want.logp[1:2, :6], 1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2-tied", "gemma2-softcap", "qwen2-tied"])
def test_packed_rows_equal_separate_rows(family):
    policy = Policy(build(family))
    ids, real, target = batch()
    lengths = (9, 6, 7)

    def pack(t):
        "The beginnings of the rows of `t` in one row, with four columns of padding."
        return torch.cat([t[0, :9], t[1, :6], t[2, :7], t.new_zeros(4)])[None]

    packed, targets = pack(ids), pack(target)
    positions = torch.cat([torch.arange(n) for n in (*lengths, 4)])[None]
    mask = (torch.arange(26) < 22).long()[None]
    with torch.no_grad():
        want = policy(ids, real, target).logp
        got = policy(packed, mask, targets, positions).logp
    close(got[0, :22], torch.cat([want[i, :n] for i, n in enumerate(lengths)]), 1e-5)
    assert got[0, 9] == got[0, 15] == 0


def test_packing_is_refused_where_examples_would_see_each_other():
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(
        build("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(WrongInput, match="pack=0"):
        Policy(model)(
            torch.ones(1, 6, dtype=torch.long), None, None, torch.tensor([[0, 1, 2, 0, 1, 2]])
        )


def groups():
    "Nine shuffled rows of three prompts (5, 1 and 9 tokens) with answers of 1, 3 and 6 tokens."
    torch.manual_seed(3)
    prompts = [torch.randint(1, 97, (n,)) for n in (5, 1, 9)]
    rows = [
        (g, len(p), torch.cat([p, torch.randint(1, 97, (k,))]))
        for g, p in enumerate(prompts)
        for k in (3, 6, 1)
    ]
    rows = [rows[i] for i in (4, 0, 8, 2, 6, 1, 3, 7, 5)]
    ids, real, target = (torch.zeros(9, 15, dtype=torch.long) for _ in range(3))
    for i, (_, n, row) in enumerate(rows):
        ids[i, : len(row)], real[i, : len(row)], target[i, n : len(row)] = row, 1, 1
    return ids, real, target, torch.tensor([[g + 7, n] for g, n, _ in rows])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama-bf16"])
def test_a_common_prefix_is_read_once(family):
    policy, (ids, real, target, prefix), found = Policy(build(family)), groups(), []
    # a sliding window keeps another kind of cache
    assert policy._can_share() == (family != "gemma2-softcap")
    for given in (None, prefix):
        policy.zero_grad()
        stats = policy(ids, real, target, temperature=0.7, entropy=True, prefix=given)
        (
            (stats.logp * torch.linspace(-1, 1, 135).view(9, 15)).sum() + stats.entropy.sum()
        ).backward()
        found.append(
            (stats.logp, stats.entropy, torch.cat([p.grad.flatten() for p in policy.parameters()]))
        )
    for a, b in zip(*found):
        close(b, a, 1e-5)
    other = Policy(build(family))
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(0.9)
    apart, together = (
        policy(ids, real, target, reference=other, prefix=given).kl for given in (None, prefix)
    )
    assert apart.sum() > 0.01
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-5)
    policy.model.train().gradient_checkpointing_enable()
    assert not policy._can_share()  # nothing is kept to continue from


def test_of_a_common_prefix_no_column_is_read_for_nothing():
    policy, (ids, real, target, prefix), seen = Policy(build("llama")), groups(), []
    policy.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(tuple(args[0].shape))
    )
    policy(ids, real, target, prefix=prefix)
    # three prompts without their last tokens, then that token and all but the last of an answer
    assert seen[-2:] == [(3, 8), (9, 6)]


@pytest.mark.parametrize(
    "name", ["lora", "ia3", "lora-on-head", "prompt-tuning", "p-tuning", "prefix-tuning"]
)
def test_a_common_prefix_under_an_adapter(name):
    from peft import get_peft_model

    torch.manual_seed(0)
    policy, (ids, real, target, prefix) = (
        Policy(get_peft_model(build("llama"), adapters()[name][0])),
        groups(),
    )
    # the three kinds of tuning have keys and values of their own
    assert policy._can_share() == (not name.endswith("tuning"))
    with torch.no_grad():
        close(policy(ids, real, target, prefix=prefix).logp, policy(ids, real, target).logp, 1e-5)


def test_no_targets_at_all():
    policy = Policy(build("llama"))
    ids, real, target = batch()
    stats = policy(ids, real, target * 0, entropy=True)
    assert stats.logp.shape == ids.shape
    assert stats.logp.abs().sum() == 0
    stats.logp.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in policy.parameters())


def test_only_targets_reach_the_head(monkeypatch):
    import polm_lab.models.logprobs as module

    seen, inner = [], module._blocks
    monkeypatch.setattr(
        module, "_blocks", lambda hidden, *rest: seen.append(len(hidden)) or inner(hidden, *rest)
    )
    ids, real, target = batch()
    Policy(build("llama"))(ids, real, target)
    assert seen == [int(target[:, 1:].sum())]


def adapters():
    from peft import (
        IA3Config,
        LoraConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
    )

    causal = dict(task_type="CAUSAL_LM")
    return {
        "lora": (LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **causal), True),
        "lora-on-head": (LoraConfig(r=4, target_modules=["q_proj", "lm_head"], **causal), False),
        "head-trained": (
            LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], **causal),
            False,
        ),
        "ia3": (
            IA3Config(
                target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **causal
            ),
            True,
        ),
        "prompt-tuning": (PromptTuningConfig(num_virtual_tokens=3, **causal), True),
        "p-tuning": (
            PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **causal),
            True,
        ),
        "prefix-tuning": (PrefixTuningConfig(num_virtual_tokens=3, **causal), True),
    }


@pytest.mark.parametrize(
    "name",
    ["lora", "lora-on-head", "head-trained", "ia3", "prompt-tuning", "p-tuning", "prefix-tuning"],
)
def test_adapters(name):
    from peft import get_peft_model

    config, kernel = adapters()[name]
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), config).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.3)
            if "ia3_l" in n:
                p.mul_(1.5)
    policy, twin = Policy(model), copy.deepcopy(model)
    ids, real, target = batch()
    stats = policy(ids, real, target)
    want = plain(twin, ids, real, target, offset=3 if name in ("prompt-tuning", "p-tuning") else 0)
    assert (policy._known is not None) == kernel
    close(stats.logp, want, 1e-5)
    stats.logp.sum().backward(), want.sum().backward()
    for (n, p), q in zip(model.named_parameters(), twin.parameters()):
        assert p.requires_grad == (p.grad is not None), n
        if p.requires_grad:
            close(p.grad, q.grad, 5e-5)
    reference = Policy(model, adapter=False)
    close(reference(ids, real, target).logp, plain(build("llama"), ids, real, target), 1e-5)
    assert not reference(ids, real, target).logp.requires_grad
    with torch.no_grad():
        kl = policy(ids, real, target, reference=reference).kl
    if name != "head-trained":
        assert kl.sum() > 1e-3
    assert (kl >= -1e-5).all()
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in twin.parameters()
    ]


@pytest.mark.parametrize("reverse", [False, True])
def test_policy_kl_equals_dense(reverse):
    model, other = build("llama"), build("gemma2-softcap", seed=2)
    twin = copy.deepcopy(model)
    ids, real, target = batch()
    stats = Policy(model)(ids, real, target, reference=Policy(other), reverse=reverse)
    logits = [
        m(input_ids=ids, attention_mask=real).logits[:, :-1].flatten(0, 1) for m in (twin, other)
    ]
    want = torch.cat([torch.zeros(3, 1), dense_kl(*logits, reverse).view(3, 8)], 1) * target
    close(stats.kl, want, 1e-5)
    stats.kl.sum().backward(), want.sum().backward()
    largest = max(p.grad.abs().max() for p in twin.parameters())
    for p, q in zip(model.parameters(), twin.parameters()):
        assert (p.grad - q.grad).abs().max() <= 2e-5 * largest
    assert all(p.grad is None for p in other.parameters())


class Odd(nn.Module):
    "A causal LM that does something of its own to its logits, or hides its head."

    def __init__(self, model, twist, hide=False):
        super().__init__()
        self.inner, self.twist, self.hide = model, twist, hide

    def get_output_embeddings(self):
        return None if self.hide else self.inner.lm_head

    def forward(self, **batch):
        out = self.inner(**batch)
        out.logits = self.twist(out.logits)
        return out


TWISTS = {
    "sine": lambda z: z.sin(),
    "clamp": lambda z: z.clamp(-2, 2),
    "some tokens lowered": lambda z: torch.cat([z[..., :5] - 9, z[..., 5:]], -1),
    "vocabulary cut": lambda z: z[..., :90],
    "only negative side": lambda z: z - 0.1 * z.clamp(max=0),
    "needs the whole width": lambda z: z - 3 * (torch.arange(97) % 2),
}


@pytest.mark.parametrize("name", TWISTS)
def test_unknown_logits_fall_back(name):
    model = Odd(build("llama"), TWISTS[name])
    ids, real, target = batch(vocab=80)
    policy = Policy(model)
    close(policy(ids, real, target).logp, plain(model, ids, real, target), 1e-5)
    assert policy._known[1] is None


def test_hidden_or_hooked_head_falls_back():
    ids, real, target = batch()
    hooked = build("llama")
    hidden = Odd(build("llama"), lambda z: z, hide=True)
    normed = build("llama")
    hooked.lm_head.register_forward_hook(lambda module, args, out: out * 1.7)
    nn.utils.parametrizations.weight_norm(normed.lm_head)
    for model in (hooked, hidden, normed):
        policy = Policy(model)
        close(policy(ids, real, target).logp, plain(model, ids, real, target), 1e-5)
        # a hook may bring the weight into memory (ZeRO-3), so its head is called as it is
        assert policy._known is None


def test_first_use_leaves_no_trace():
    model = build("llama").train()
    policy = Policy(model)
    ids, real, target = batch()
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    policy(ids, real, target, torch.arange(9).expand(3, 9) % 5)
    assert torch.equal(torch.rand(3), want)
    assert all(m.training for m in model.modules())
    assert "forward" not in vars(model.lm_head)
    assert set(policy.state_dict()) == {f"model.{k}" for k in model.state_dict()}


def test_gradient_checkpointing_with_dropout():
    model = build("gpt2-tied").train()
    ids, real, target = batch()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        Policy(model)(ids, real, target).logp.sum().backward()
        found.append(model.transformer.wte.weight.grad.clone())
    close(found[1], found[0], 1e-6)


def test_autocast():
    model = build("llama")
    ids, real, target = batch()
    want = Policy(model)(ids, real, target).logp
    with torch.autocast("cpu", torch.bfloat16):
        got = Policy(model)(ids, real, target).logp
        got.sum().backward()
    assert got.dtype == torch.float32
    assert model.lm_head.weight.grad.dtype == torch.float32
    close(got, want, 0.1)


def test_an_error_in_the_model_restores_the_head():
    model = build("llama")
    policy = Policy(model)
    ids, real, target = batch()
    policy(ids, real, target)
    with pytest.raises(IndexError):
        policy(ids + 1000, real, target)
    assert "forward" not in vars(model.lm_head)
    close(policy(ids, real, target).logp, plain(model, ids, real, target), 1e-5)


def test_a_copy_is_independent():
    policy = Policy(build("llama"))
    ids, real, target = batch()
    policy(ids, real, target)
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        twin.model.lm_head.weight.mul_(0.5)
    close(twin(ids, real, target).logp, plain(twin.model, ids, real, target), 1e-5)
    close(policy(ids, real, target).logp, plain(policy.model, ids, real, target), 1e-5)


def test_wrong_input():
    policy = Policy(build("llama"))
    ids, real, target = batch()
    for call in (
        lambda: policy(ids, real, target[:, :4]),
        lambda: policy(ids, real[:2], target),
        lambda: policy(ids, real, target, temperature=0.0),
        lambda: selected_logprobs(
            torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long)
        ),
        lambda: full_kl(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 3), torch.zeros(6, 3)),
        lambda: Policy(build("llama"), adapter=False),
    ):
        with pytest.raises(WrongInput, match="expected"):
            call()
