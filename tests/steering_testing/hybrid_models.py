# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose layers differ: Mamba, attention, MLPs, or several of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steering_testing.moe_models import GRANITE, LOCAL
from steering_testing.sizes import (
    BOS,
    COMMON,
    EOS,
    HEAD,
    HIDDEN,
    LAYERS,
    PAD,
    VOCAB,
    config,
)

MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 64,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}
GRANITE_HYBRID: dict[str, Any] = {
    **GRANITE,
    **MAMBA,
    "shared_intermediate_size": 48,
    "layer_types": ["mamba", "attention", "mamba"],
}
NEMOTRON_H: dict[str, Any] = {
    **COMMON,
    **HEAD,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 64,
    "n_groups": 1,
}
# Each token goes to every expert, so rounding cannot choose another one.
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 4}
MAMBA_1: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "state_size": 16,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
# vLLM reads the sizes of blocks under the names that the published models have.
# It always reads the embeddings as the head. One head of attention: see DEEPSEEK.
LFM2: dict[str, Any] = {
    **COMMON,
    "num_attention_heads": 1,
    "tie_word_embeddings": True,
    "layer_types": ["conv", "full_attention", "conv"],
    "block_dim": HIDDEN,
    "conv_dim": HIDDEN,
}
# In tests/gpu: vLLM's build for CPUs lacks their kernels.
GPU_HYBRID_MODELS: dict[str, Callable[[], Any]] = {
    "mamba": config("MambaConfig", **MAMBA_1),
    "falcon_mamba": config("FalconMambaConfig", **MAMBA_1),
    "jamba": config(
        "JambaConfig",
        **COMMON,
        **EXPERTS,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
    ),
    "nemotron3": config(
        "NemotronHConfig",
        **NEMOTRON_H,
        layers_block_type=["mamba", "moe", "attention"],
        n_routed_experts=4,
        num_experts_per_tok=4,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=48,
        routed_scaling_factor=2.5,
    ),
}
HYBRID_MODELS: dict[str, Callable[[], Any]] = {
    "lfm2": config("Lfm2Config", **LFM2, block_auto_adjust_ff_dim=False),
    "lfm2_moe": config(
        "Lfm2MoeConfig",
        **LFM2,
        **EXPERTS,
        moe_intermediate_size=48,
        num_dense_layers=1,
    ),
    "granitemoehybrid": config("GraniteMoeHybridConfig", **GRANITE_HYBRID, **LOCAL),
    "granite_hybrid": config(
        "GraniteMoeHybridConfig",
        **GRANITE_HYBRID,
        num_local_experts=0,
        num_experts_per_tok=0,
        position_embedding_type="rope",
    ),
    "nemotron_h": config(
        "NemotronHConfig",
        **NEMOTRON_H,
        layers_block_type=["mamba", "attention", "mlp"],
    ),
    "mamba2": config(
        "Mamba2Config",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        state_size=64,
        num_heads=4,
        head_dim=32,
        expand=2,
        n_groups=1,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    ),
    # Multipliers other than 1, as in the published models.
    "falcon_h1": config(
        "FalconH1Config",
        **COMMON,
        **HEAD,
        **MAMBA,
        mamba_d_ssm=128,
        attention_in_multiplier=0.8,
        attention_out_multiplier=0.7,
        ssm_in_multiplier=0.9,
        ssm_out_multiplier=0.6,
        mlp_multipliers=[0.9, 0.5],
        key_multiplier=0.8,
        ssm_multipliers=[0.9, 0.8, 0.7, 0.6, 0.5],
        embedding_multiplier=1.5,
        lm_head_multiplier=0.8,
    ),
}
