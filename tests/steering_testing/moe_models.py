# SPDX-License-Identifier: Apache-2.0
"""Tiny mixtures of experts, and Granite's variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steering_testing.sizes import COMMON, DEEPSEEK, HEAD, config

# Every factor differs from 1, so that one that is left out changes an answer.
GRANITE: dict[str, Any] = {
    **COMMON,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 2.0,
    "logits_scaling": 1.5,
}
SLIDING: dict[str, Any] = {
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
# What published configurations have, and vLLM asks for.
ROUTER: dict[str, Any] = {
    "score_func": "sigmoid",
    "route_norm": True,
    "n_group": 1,
    "topk_group": 1,
}

MOE_MODELS: dict[str, Callable[[], Any]] = {
    # vLLM's CPU build chooses experts without the learned bias. Here all are chosen.
    "ernie4_5_moe": config(
        "Ernie4_5_MoeConfig",
        **COMMON,
        moe_num_experts=4,
        moe_k=4,
        moe_intermediate_size=48,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "granite_swa": config("GraniteSWAConfig", **GRANITE, **SLIDING),
    "granitemoe": config("GraniteMoeConfig", **GRANITE, **LOCAL),
    "granitemoeshared": config(
        "GraniteMoeSharedConfig", **GRANITE, **LOCAL, shared_intermediate_size=48
    ),
    "granitemoe_swa": config(
        "GraniteMoeSWAConfig",
        **GRANITE,
        **LOCAL,
        **SLIDING,
        shared_intermediate_size=48,
    ),
    "exaone_moe": config(
        "ExaoneMoeConfig", **COMMON, **HEAD, **EXPERTS, sliding_window=32
    ),
    "cohere2": config(
        "Cohere2Config",
        **{**COMMON, **HEAD, "tie_word_embeddings": True},
        sliding_window=32,
    ),
    "cohere2_moe": config(
        "Cohere2MoeConfig",
        **{**COMMON, **HEAD, **EXPERTS, "tie_word_embeddings": True},
        sliding_window=32,
    ),
    "afmoe": config(
        "AfmoeConfig",
        **COMMON,
        **HEAD,
        **EXPERTS,
        **ROUTER,
        sliding_window=32,
        global_attn_every_n_layers=2,
        num_shared_experts=1,
    ),
    "hy_v3": config(
        "HYV3Config",
        **COMMON,
        **HEAD,
        **EXPERTS,
        **ROUTER,
        mlp_layer_types=["dense", "sparse", "sparse"],
        first_k_dense_replace=1,
        expert_hidden_dim=48,
        qk_norm=True,
        router_scaling_factor=1.5,
    ),
    "glm4_moe_lite": config("Glm4MoeLiteConfig", **DEEPSEEK),
}
