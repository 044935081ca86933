# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every supported family, saved as Hugging Face checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from steering_testing.dense_models import DENSE_MODELS
from steering_testing.hybrid_models import GPU_HYBRID_MODELS, HYBRID_MODELS
from steering_testing.moe_models import MOE_MODELS
from steering_testing.sizes import (
    BOS,
    COMMON,
    DEEPSEEK,
    EOS,
    GEMMA,
    GEMMA_4,
    HEAD,
    HIDDEN,
    LAYERS,
    LINEAR,
    MOE,
    PAD,
    SPECIAL,
    VOCAB,
    config,
)

__all__ = ["BOS", "COMMON", "EOS", "HIDDEN", "LAYERS", "PAD", "SPECIAL", "VOCAB"]

FAMILIES: dict[str, Callable[[], Any]] = {
    "gemma2": config("Gemma2Config", **GEMMA),
    "gemma3": config("Gemma3TextConfig", **GEMMA),
    "gemma4": config(
        "Gemma4TextConfig",
        **GEMMA_4,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCAB,
    ),
    "gemma4_moe": config(
        "Gemma4TextConfig",
        **GEMMA_4,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=48,
    ),
    "llama": config("LlamaConfig", **COMMON, **HEAD),
    "mistral": config("MistralConfig", **COMMON, **HEAD, sliding_window=None),
    "qwen2": config("Qwen2Config", **COMMON),
    # Its attention is wider than the stream: z is [T, 128].
    "qwen3": config("Qwen3Config", **{**COMMON, **HEAD, "num_attention_heads": 4}),
    "qwen3_moe": config("Qwen3MoeConfig", **COMMON, **HEAD, **MOE),
    "phi3": config("Phi3Config", **COMMON),
    "qwen2_moe": config(
        "Qwen2MoeConfig", **COMMON, **MOE, shared_expert_intermediate_size=48
    ),
    "gpt_oss": config(
        "GptOssConfig",
        **{**COMMON, "intermediate_size": 64},
        **HEAD,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=32,
    ),
    "gpt2": config(
        "GPT2Config",
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=2,
        n_positions=256,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    ),
    "gemma": config("GemmaConfig", **COMMON, **HEAD),
    "mixtral": config(
        "MixtralConfig", **COMMON, **HEAD, num_local_experts=4, num_experts_per_tok=2
    ),
    "olmoe": config(
        "OlmoeConfig",
        **{**COMMON, **MOE, "num_key_value_heads": 2, "norm_topk_prob": False},
    ),
    "granite": config(
        "GraniteConfig",
        **COMMON,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
        embedding_multiplier=2.0,
        logits_scaling=1.5,
    ),
    "opt": config(
        "OPTConfig",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=96,
        tie_word_embeddings=False,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    ),
    "gptj": config(
        "GPTJConfig",
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=2,
        n_positions=256,
        rotary_dim=16,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    ),
    "cohere": config("CohereConfig", **{**COMMON, "tie_word_embeddings": True}),
    "exaone4": config("Exaone4Config", **COMMON, **HEAD, sliding_window=32),
    "glm4": config("Glm4Config", **COMMON, **HEAD),
    "glm4_moe": config(
        "Glm4MoeConfig",
        **COMMON,
        **HEAD,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "apertus": config("ApertusConfig", **COMMON),
    "llama4": config(
        "Llama4TextConfig",
        **COMMON,
        **HEAD,
        intermediate_size_mlp=96,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=128,
    ),
    "deepseek_v2": config("DeepseekV2Config", **DEEPSEEK),
    "deepseek_v3": config(
        "DeepseekV3Config",
        **DEEPSEEK,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
    ),
    "qwen3_next": config(
        "Qwen3NextConfig",
        **LINEAR,
        **{**MOE, "num_experts_per_tok": 4},
        shared_expert_intermediate_size=48,
    ),
    "qwen3_5": config("Qwen3_5TextConfig", **LINEAR),
    "minimax_m2": config(
        "MiniMaxM2Config",
        **COMMON,
        **HEAD,
        rotary_dim=16,
        scoring_func="sigmoid",
        use_routing_bias=True,
        num_local_experts=4,
        num_experts_per_tok=4,
    ),
    # vLLM routes by sigmoid on a GPU alone. With one expert a token both scores choose
    # the same one, with weight 1.
    "minimax_m2_softmax": config(
        "MiniMaxM2Config",
        **COMMON,
        **HEAD,
        rotary_dim=16,
        scoring_func="softmax",
        use_routing_bias=True,
        num_local_experts=4,
        num_experts_per_tok=1,
    ),
    # A stream in the first part of a tuple, and a pair.
    "stablelm": config("StableLmConfig", **{**COMMON, "num_key_value_heads": 2}),
    "nemotron": config("NemotronConfig", **COMMON, **HEAD),
    "olmo2": config("Olmo2Config", **COMMON),
    "phi": config("PhiConfig", **{**COMMON, "num_key_value_heads": 2}),
    "gpt_neox": config("GPTNeoXConfig", **{**COMMON, "num_key_value_heads": 2}),
    **MOE_MODELS,
    **DENSE_MODELS,
    **HYBRID_MODELS,
    **GPU_HYBRID_MODELS,
}


# Families that engines run in bfloat16; it holds their weights exactly. Their experts
# are all chosen: rounding would choose another where two are nearly as good.
ROUNDED = {
    "deepseek_v2",
    "deepseek_v3",
    "minimax_m2",
    "qwen3_next",
    "qwen3_5",
    *GPU_HYBRID_MODELS,
}


# Families whose linear layers get biases that are not zero, where they have any.
BIASED: set[str] = set()


def settle_xielu(module: Any, family: str) -> None:
    """Constants of an xIELU as the engine holds them.

    Whatever the model's dtype, vLLM's own class holds them in bfloat16 and computes
    their softplus in it. Under the Transformers backend they have the model's dtype, as
    in a model that Hugging Face loads. The activation itself is in float32 in both.
    """
    with torch.no_grad():
        for name in ("alpha_p", "alpha_n"):
            getattr(module, name).normal_(0.2, 0.3)
    module.to(torch.bfloat16 if family == "apertus" else torch.float32)


@cache
def build(family: str, seed: int = 0) -> Any:
    """The Hugging Face model of a family, random and in float32, ready to run."""
    torch.manual_seed(seed)
    made = FAMILIES[family]()
    auto = transformers.AutoModelForCausalLM
    if "vision_config" in made.sub_configs:
        auto = transformers.AutoModelForImageTextToText
    model = auto.from_config(made, dtype=torch.float32, attn_implementation="eager")
    # Gemma and VaultGemma multiply their embeddings by sqrt(D) and also use them as
    # their head, as LFM2 does. If they were as large as the others', no edit would
    # change an answer.
    small = family.startswith(("gemma", "vaultgemma", "lfm2"))
    embedding = 0.4 / (HIDDEN**0.5 if small else 1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.08 if "embed" not in name else embedding)
            elif "norm" in name or "ln_" in name:
                weight.add_(0.1 * torch.randn_like(weight))
            elif name.endswith("bias") and family in BIASED:
                weight.normal_(0, 0.1)
            if family in ROUNDED:
                weight.copy_(weight.bfloat16())
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.7)
    for module in model.modules():
        if isinstance(module, transformers.activations.XIELUActivation):
            settle_xielu(module, family)
    return model.eval()


def save(family: str, root: Path, seed: int = 0) -> Path:
    """Save the family's model under `root` once; the directory to serve from."""
    path = root / f"{family}-{seed}"
    if not path.exists():
        build(family, seed).save_pretrained(path)
    return path


def decoder_layers(model: Any) -> Any:
    """The decoder layers of a Hugging Face model, in order."""
    base = model.base_model
    while not (hasattr(base, "h") or hasattr(base, "layers")):
        inner = ("language_model", "model", "decoder")
        base = next(getattr(base, name) for name in inner if hasattr(base, name))
    return base.h if hasattr(base, "h") else base.layers
