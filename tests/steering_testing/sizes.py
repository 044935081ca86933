# SPDX-License-Identifier: Apache-2.0
"""Sizes and options that the tiny models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

HIDDEN, LAYERS, VOCAB = 64, 3, 128
BOS, EOS, PAD = 1, 2, 0
# What an engine bypasses by default.
SPECIAL = (BOS, EOS, PAD)

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
HEAD = {"head_dim": 32}
GEMMA = {
    **COMMON,
    **HEAD,
    "query_pre_attn_scalar": 32,
    "sliding_window": 32,
    "tie_word_embeddings": True,
}
# Heads of full attention are wider; the last layer reads the keys of the one before it.
GEMMA_4 = {
    **{k: v for k, v in GEMMA.items() if k != "query_pre_attn_scalar"},
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "global_head_dim": 64,
    "num_kv_shared_layers": 1,
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
# The CPU kernel for rotary embeddings turns the first head alone of a tensor
# `[T, heads, D]`, so DeepSeek has one head; the kernels for latent attention know the
# published ranks only.
DEEPSEEK = {
    **COMMON,
    "num_attention_heads": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 24,
    "head_dim": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LINEAR = {
    **COMMON,
    **HEAD,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}


def config(name: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**values)
