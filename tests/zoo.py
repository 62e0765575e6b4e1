"""Tiny random models of many families.

Their gains, biases and embeddings differ from the initial ones, so that a wrong assumption shows.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=128,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.08,
)
OLD = dict(num_key_value_heads=None)  # one key a head

FAMILIES = {
    "llama": {},
    "llama tied": dict(tie_word_embeddings=True),
    "llama biases": dict(attention_bias=True, mlp_bias=True),
    "mistral": dict(sliding_window=5),
    "qwen2": dict(use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": dict(head_dim=8),
    "gemma": dict(head_dim=8),
    "gemma2": dict(head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
    "gemma3_text": dict(
        head_dim=8,
        sliding_window=5,
        query_pre_attn_scalar=8,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
    "phi": OLD,
    "phi3": {},
    "gpt2": OLD,
    "opt": OLD | dict(ffn_dim=80, word_embed_proj_dim=48),
    "gpt_neox": OLD,
    "gptj": OLD | dict(rotary_dim=4),
    "gpt_neo": OLD | dict(attention_types=[[["global", "local"], 2]], window_size=5),
    "stablelm": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "cohere": {},
    "cohere2": dict(sliding_window=5),
    "granite": dict(
        embedding_multiplier=3.0,
        residual_multiplier=0.3,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    "smollm3": dict(no_rope_layers=[1, 0, 1, 1]),
    "falcon": OLD | dict(new_decoder_architecture=False, multi_query=False, alibi=False),
    "mixtral": dict(num_local_experts=2),
    "qwen3_moe": dict(
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        head_dim=8,
        mlp_only_layers=[1],
    ),
    "glm": dict(head_dim=8),
    "glm4": dict(head_dim=8),
    "starcoder2": {},
    "mpt": dict(d_model=48, n_heads=6, n_layers=4, max_seq_len=128),
    "bloom": OLD,
    "codegen": OLD | dict(num_attention_heads=4, rotary_dim=4),
    "gpt_bigcode": OLD,
    "helium": dict(head_dim=8),
    "nemotron": {},
    "persimmon": OLD,
    "exaone4": dict(sliding_window=5, sliding_window_pattern=2),
    "ernie4_5": {},
    "seed_oss": dict(head_dim=8),
    "hunyuan_v1_dense": dict(head_dim=8),
    "arcee": {},
    "apertus": {},
    "ministral": dict(sliding_window=5, head_dim=8),
    "gpt_oss": dict(num_local_experts=2, head_dim=8, num_experts_per_tok=1),
    "mamba": OLD | dict(state_size=4),
    "deepseek_v3": OLD
    | dict(
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=4,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
    ),
}


def make(family: str, seed: int = 0, **more):
    """Make a tiny model of `family` with every weight moved by a random number.

    Those with one dimension (gains, biases) are moved by up to a half.
    """
    sizes = {
        name: value
        for name, value in (SIZES | FAMILIES[family] | more).items()
        if value is not None or name == "pad_token_id"
    }
    config = AutoConfig.for_model(family.split()[0], **sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.rand_like(p) - 0.5 if p.dim() == 1 else torch.randn_like(p) * 0.02)
    return model


def ids(rows: int = 2, time: int = 16, seed: int = 1):
    "Random token ids [rows, time]."
    return torch.randint(3, 96, (rows, time), generator=torch.Generator().manual_seed(seed))


def gap(found, expected) -> float:
    "The largest difference of two tensors of logits, as a share of the largest logit."
    return ((found - expected).abs().max() / expected.abs().max()).item()
