# SPDX-License-Identifier: Apache-2.0
"""Tiny models that vLLM's Transformers backend runs, and their conformance cases.

Importing this module adds the models to `models.FAMILIES`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers
from steering_testing import models
from steering_testing.cases import BACKEND, Case
from steering_testing.models import COMMON, HEAD
from steering_testing.sizes import GEMMA, MOE

# Shorter than the tests' prompts, so that the window acts.
WINDOW = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
MHA = {**COMMON, "num_key_value_heads": 2}
PARALLEL = ("post_attn",)

# family, title, configuration, decoder layer, the points that it lacks, values
_MODELS: list[tuple[str, str, str, str, tuple[str, ...], dict[str, Any]]] = [
    (
        "smollm3",
        "SmolLM3",
        "SmolLM3Config",
        "smollm3.SmolLM3DecoderLayer",
        (),
        {**COMMON, "no_rope_layers": [1, 0, 1]},
    ),
    (
        "olmo",
        "OLMo",
        "OlmoConfig",
        "olmo.OlmoDecoderLayer",
        (),
        {**COMMON, "clip_qkv": 0.8},
    ),
    (
        "olmo3",
        "OLMo-3",
        "Olmo3Config",
        "olmo3.Olmo3DecoderLayer",
        (),
        {**COMMON, **WINDOW},
    ),
    (
        "glm",
        "GLM",
        "GlmConfig",
        "glm.GlmDecoderLayer",
        (),
        {**COMMON, **HEAD, "attention_bias": True},
    ),
    (
        "glm4_backend",
        "GLM-4",
        "Glm4Config",
        "glm4.Glm4DecoderLayer",
        (),
        {**COMMON, **HEAD, "attention_bias": True},
    ),
    (
        "seed_oss",
        "Seed-OSS",
        "SeedOssConfig",
        "seed_oss.SeedOssDecoderLayer",
        (),
        {**COMMON, **HEAD, "attention_bias": True, "attention_out_bias": True},
    ),
    (
        "starcoder2",
        "StarCoder2",
        "Starcoder2Config",
        "starcoder2.Starcoder2DecoderLayer",
        (),
        {**COMMON, "use_bias": True, "sliding_window": None},
    ),
    (
        "gpt_neox_sequential",
        "GPT-NeoX, sequential",
        "GPTNeoXConfig",
        "gpt_neox.GPTNeoXLayer",
        (),
        {**MHA, "use_parallel_residual": False},
    ),
    (
        "stablelm_parallel",
        "StableLM, parallel",
        "StableLmConfig",
        "stablelm.StableLmDecoderLayer",
        PARALLEL,
        {**MHA, "use_parallel_residual": True, "use_qkv_bias": True},
    ),
    (
        "cohere_backend",
        "Command-R",
        "CohereConfig",
        "cohere.CohereDecoderLayer",
        PARALLEL,
        {**COMMON, "tie_word_embeddings": True},
    ),
    (
        "arcee",
        "Arcee (AFM)",
        "ArceeConfig",
        "arcee.ArceeDecoderLayer",
        (),
        {**COMMON, **HEAD},
    ),
    (
        "gpt_bigcode",
        "GPT-BigCode, StarCoder",
        "GPTBigCodeConfig",
        "gpt_bigcode.GPTBigCodeBlock",
        (),
        {
            **{k: COMMON[k] for k in ("vocab_size", "bos_token_id", "eos_token_id")},
            "pad_token_id": models.PAD,
            "n_embd": models.HIDDEN,
            "n_layer": models.LAYERS,
            "n_head": 2,
            "n_positions": 256,
        },
    ),
    (
        "hunyuan_v1_dense",
        "HunYuan (dense)",
        "HunYuanDenseV1Config",
        "hunyuan_v1_dense.HunYuanDenseV1DecoderLayer",
        (),
        {**COMMON, **HEAD},
    ),
    (
        "granite_backend",
        "Granite",
        "GraniteConfig",
        "granite.GraniteDecoderLayer",
        ("attn_out", "mlp_out"),
        {**COMMON, "residual_multiplier": 0.6},
    ),
    (
        "cwm",
        "Code World Model",
        "CwmConfig",
        "cwm.CwmDecoderLayer",
        (),
        {**COMMON, **HEAD, **WINDOW},
    ),
    (
        "jais2",
        "Jais-2",
        "Jais2Config",
        "jais2.Jais2DecoderLayer",
        (),
        {**COMMON, **HEAD},
    ),
    (
        "mellum",
        "Mellum",
        "MellumConfig",
        "mellum.MellumDecoderLayer",
        (),
        {**COMMON, **HEAD, **MOE, **WINDOW},
    ),
    (
        "flex_olmo",
        "FlexOlmo",
        "FlexOlmoConfig",
        "flex_olmo.FlexOlmoDecoderLayer",
        (),
        {**COMMON, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    (
        "hunyuan_v1_moe",
        "HunYuan (MoE)",
        "HunYuanMoEV1Config",
        "hunyuan_v1_moe.HunYuanMoEV1DecoderLayer",
        (),
        {**COMMON, **HEAD, "num_experts": 4, "moe_topk": 2},
    ),
    (
        "vaultgemma",
        "VaultGemma",
        "VaultGemmaConfig",
        "vaultgemma.VaultGemmaDecoderLayer",
        (),
        {**GEMMA, **WINDOW},
    ),
    (
        "apertus_backend",
        "Apertus",
        "ApertusConfig",
        "apertus.ApertusDecoderLayer",
        (),
        COMMON,
    ),
    (
        "hyperclovax_backend",
        "HyperCLOVA X",
        "HyperCLOVAXConfig",
        "hyperclovax.HyperCLOVAXDecoderLayer",
        (),
        {**COMMON, **HEAD, "use_post_norm": True},
    ),
    (
        "hyperclovax_plain_backend",
        "HyperCLOVA X without post-norms",
        "HyperCLOVAXConfig",
        "hyperclovax.HyperCLOVAXDecoderLayer",
        ("attn_out", "mlp_out"),
        {**COMMON, **HEAD, "use_post_norm": False, "residual_multiplier": 0.7},
    ),
]

for _family, _, _config, _, _, _values in _MODELS:
    models.FAMILIES[_family] = partial(getattr(transformers, _config), **_values)
models.BIASED |= {family for family, *_ in _MODELS}
BACKEND_CASES = {
    family: Case(
        f"{title}, Transformers backend",
        family,
        f"transformers.models.{layer.split('.')[0]}.modeling_{layer}",
        BACKEND,
        lacks=lacks,
    )
    for family, title, _, layer, lacks, _ in _MODELS
}
# A tiny model that vLLM's own class runs too.
BACKEND_CASES["afmoe_backend"] = Case(
    "Trinity (AfMoE), Transformers backend",
    "afmoe",
    "transformers.models.afmoe.modeling_afmoe.AfmoeDecoderLayer",
    BACKEND,
)
