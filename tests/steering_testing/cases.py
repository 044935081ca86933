# SPDX-License-Identifier: Apache-2.0
"""The conformance cases: one tiny model for each line of the family table.

`tools/conformance_table.py` prints them as the table in docs/features/models.md.
"""

from __future__ import annotations

from steering_testing.case import LAST, RESIDUAL, SUBLAYER, Case
from steering_testing.hybrid_cases import GPU_HYBRID_CASES, HYBRID_CASES

from vllm.model_executor.layers.steering_families import MODELS

__all__ = ["LAST", "RESIDUAL", "SUBLAYER", "Case"]
BFLOAT16 = (("dtype", "bfloat16"),)
# What the rounding of activations moves a tiny model's log-probabilities by.
BFLOAT16_TOLERANCE = 5e-2
# Every line of the family table has a case here, or a test of them fails.
CASES = {
    "gemma2": Case("Gemma-2", "gemma2", f"{MODELS}.gemma2.Gemma2DecoderLayer"),
    "gemma3": Case("Gemma-3 (text)", "gemma3", f"{MODELS}.gemma3.Gemma3DecoderLayer"),
    "gemma4": Case(
        "Gemma 4 (dense)",
        "gemma4",
        f"{MODELS}.gemma4.Gemma4DecoderLayer",
        lacks=("attn_z",),
    ),
    "gemma4_moe": Case(
        "Gemma 4 (MoE)",
        "gemma4_moe",
        f"{MODELS}.gemma4.Gemma4DecoderLayer",
        lacks=("attn_z", "mlp_in", "mlp_out"),
    ),
    "llama": Case("Llama 2, 3", "llama", f"{MODELS}.llama.LlamaDecoderLayer"),
    "phi3": Case("Phi-3, Phi-4", "phi3", f"{MODELS}.llama.LlamaDecoderLayer"),
    "mistral": Case("Mistral", "mistral", f"{MODELS}.mistral.MistralDecoderLayer"),
    "qwen2": Case("Qwen2, Qwen2.5", "qwen2", f"{MODELS}.qwen2.Qwen2DecoderLayer"),
    "qwen2_moe": Case(
        "Qwen2 MoE", "qwen2_moe", f"{MODELS}.qwen2_moe.Qwen2MoeDecoderLayer"
    ),
    "qwen3": Case("Qwen3", "qwen3", f"{MODELS}.qwen3.Qwen3DecoderLayer", z=128),
    "qwen3_moe": Case(
        "Qwen3 MoE", "qwen3_moe", f"{MODELS}.qwen3_moe.Qwen3MoeDecoderLayer"
    ),
    "gpt_oss": Case("gpt-oss", "gpt_oss", f"{MODELS}.gpt_oss.TransformerBlock"),
    "gpt2": Case("GPT-2", "gpt2", f"{MODELS}.gpt2.GPT2Block"),
    "gemma": Case("Gemma", "gemma", f"{MODELS}.gemma.GemmaDecoderLayer"),
    "mixtral": Case("Mixtral", "mixtral", f"{MODELS}.mixtral.MixtralDecoderLayer"),
    "olmoe": Case("OLMoE", "olmoe", f"{MODELS}.olmoe.OlmoeDecoderLayer"),
    "granite": Case(
        "Granite",
        "granite",
        f"{MODELS}.granite.GraniteDecoderLayer",
        lacks=("attn_out", "mlp_out"),
    ),
    "opt": Case(
        "OPT", "opt", f"{MODELS}.opt.OPTDecoderLayer", lacks=("mlp_in", "mlp_out")
    ),
    "gptj": Case("GPT-J", "gptj", f"{MODELS}.gpt_j.GPTJBlock", lacks=("post_attn",)),
    "cohere": Case(
        "Command-R",
        "cohere",
        f"{MODELS}.commandr.CohereDecoderLayer",
        lacks=("post_attn",),
    ),
    "exaone4": Case("Exaone-4", "exaone4", f"{MODELS}.exaone4.Exaone4DecoderLayer"),
    "glm4": Case("GLM-4", "glm4", f"{MODELS}.glm4.Glm4DecoderLayer"),
    "glm4_moe": Case(
        "GLM-4.5 (MoE)", "glm4_moe", f"{MODELS}.glm4_moe.Glm4MoeDecoderLayer"
    ),
    "apertus": Case("Apertus", "apertus", f"{MODELS}.apertus.ApertusDecoderLayer"),
    "deepseek_v2": Case(
        "DeepSeek-V2",
        "deepseek_v2",
        f"{MODELS}.deepseek_v2.DeepseekV2DecoderLayer",
        z=128,
        # The CPU's latent attention is not Hugging Face's, even without steering.
        environment=(("VLLM_MLA_DISABLE", "1"),),
    ),
    "deepseek_v3": Case(
        "DeepSeek-V3",
        "deepseek_v3",
        f"{MODELS}.deepseek_v2.DeepseekV2DecoderLayer",
        z=128,
        environment=(("VLLM_MLA_DISABLE", "1"),),
    ),
    "minimax_m2": Case(
        "MiniMax-M2",
        "minimax_m2_softmax",
        f"{MODELS}.minimax_m2.MiniMaxM2DecoderLayer",
    ),
    "qwen3_next": Case(
        "Qwen3-Next",
        "qwen3_next",
        f"{MODELS}.qwen3_next.Qwen3NextDecoderLayer",
        BFLOAT16,
        linear=(0, 2),
        tolerance=BFLOAT16_TOLERANCE,
    ),
    "llama4": Case("Llama 4 (text)", "llama4", f"{MODELS}.llama4.Llama4DecoderLayer"),
    "glm4_moe_lite": Case(
        "GLM-4.7-Flash",
        "glm4_moe_lite",
        f"{MODELS}.glm4_moe_lite.Glm4MoeLiteDecoderLayer",
        z=128,
        environment=(("VLLM_MLA_DISABLE", "1"),),
        read_tolerance=1e-4,
    ),
    **{
        name: Case(title, name, f"{MODELS}.{layer}", lacks=lacks)
        for title, name, layer, lacks in (
            (
                "Granite 3 MoE",
                "granitemoe",
                "granitemoe.GraniteMoeDecoderLayer",
                ("attn_out", "mlp_out"),
            ),
            (
                "Granite MoE with a shared MLP",
                "granitemoeshared",
                "granitemoeshared.GraniteMoeSharedDecoderLayer",
                ("attn_out", "mlp_in", "mlp_out"),
            ),
            (
                "Granite MoE with sliding windows",
                "granitemoe_swa",
                "granitemoeshared.GraniteMoeSharedDecoderLayer",
                ("attn_out", "mlp_in", "mlp_out"),
            ),
            (
                "Granite with sliding windows",
                "granite_swa",
                "granite.GraniteDecoderLayer",
                ("attn_out", "mlp_out"),
            ),
            (
                "Command-R7B, Command-A",
                "cohere2",
                "commandr.CohereDecoderLayer",
                ("post_attn",),
            ),
            (
                "Command-A MoE",
                "cohere2_moe",
                "cohere2_moe.Cohere2MoeDecoderLayer",
                ("post_attn",),
            ),
            (
                "Ernie 4.5 MoE",
                "ernie4_5_moe",
                "ernie45_moe.Ernie4_5_MoeDecoderLayer",
                (),
            ),
            (
                "K-Exaone (MoE)",
                "exaone_moe",
                "exaone_moe.ExaoneMoeDecoderLayer",
                (),
            ),
            ("Trinity (AfMoE)", "afmoe", "afmoe.AfmoeDecoderLayer", ()),
            ("HunYuan V3", "hy_v3", "hy_v3.HYV3DecoderLayer", ()),
            ("Nemotron, Minitron", "nemotron", "nemotron.NemotronDecoderLayer", ()),
            ("StableLM", "stablelm", "stablelm.StablelmDecoderLayer", ()),
            (
                "HyperCLOVA X",
                "hyperclovax",
                "hyperclovax.HyperCLOVAXDecoderLayer",
                (),
            ),
            ("Falcon-7B", "falcon", "falcon.FalconDecoderLayer", ("post_attn",)),
            (
                "Falcon-40B, -180B",
                "falcon_new",
                "falcon.FalconDecoderLayer",
                ("post_attn",),
            ),
            (
                "Falcon, sequential with biases",
                "falcon_sequential",
                "falcon.FalconDecoderLayer",
                ("attn_out", "mlp_out"),
            ),
        )
    },
    **HYBRID_CASES,
}
# In tests/gpu/test_families_gpu.py.
GPU_CASES = {
    **{
        name: Case(
            title,
            name,
            f"{MODELS}.{layer}",
            (*BFLOAT16, *((("gdn_prefill_backend", "triton"),) if linear else ())),
            z=z,
            linear=linear,
            tolerance=BFLOAT16_TOLERANCE,
        )
        for title, name, layer, z, linear in (
            (
                "DeepSeek-V2",
                "deepseek_v2",
                "deepseek_v2.DeepseekV2DecoderLayer",
                128,
                (),
            ),
            (
                "DeepSeek-V3",
                "deepseek_v3",
                "deepseek_v2.DeepseekV2DecoderLayer",
                128,
                (),
            ),
            ("MiniMax-M2", "minimax_m2", "minimax_m2.MiniMaxM2DecoderLayer", 64, ()),
            (
                "Qwen3-Next",
                "qwen3_next",
                "qwen3_next.Qwen3NextDecoderLayer",
                64,
                (0, 2),
            ),
            ("Qwen3.5", "qwen3_5", "qwen3_5.Qwen3_5DecoderLayer", 64, (0, 2)),
        )
    },
    **GPU_HYBRID_CASES,
}
AUTO = (("steering", {"decoder_layer": "auto"}),)
# `decoder_layer: "auto"` finds these classes to be right where the table lacks them.
AUTO_CASES = {
    "stablelm": Case(
        "StableLM", "stablelm", f"{MODELS}.stablelm.StablelmDecoderLayer", AUTO
    ),
    "nemotron": Case(
        "Nemotron", "nemotron", f"{MODELS}.nemotron.NemotronDecoderLayer", AUTO
    ),
}
# In tests/models/multimodal_cases.py, on prompts of text alone.
MULTIMODAL_CASES = {
    "gemma3_mm": Case(
        "Gemma-3 (multimodal)",
        "gemma3_mm",
        f"{MODELS}.gemma3.Gemma3DecoderLayer",
        (("limit_mm_per_prompt", {"image": 0}),),
    ),
    "gemma4_mm": Case(
        "Gemma 4 (multimodal)",
        "gemma4_mm",
        f"{MODELS}.gemma4.Gemma4DecoderLayer",
        (("limit_mm_per_prompt", {"image": 0, "video": 0, "audio": 0}),),
        lacks=("attn_z",),
    ),
    "mistral3": Case(
        "Mistral-3 (multimodal)",
        "mistral3",
        f"{MODELS}.mistral.MistralDecoderLayer",
        (("limit_mm_per_prompt", {"image": 0}),),
    ),
    "qwen2_5_vl": Case(
        "Qwen2.5-VL",
        "qwen2_5_vl",
        f"{MODELS}.qwen2.Qwen2DecoderLayer",
        (("limit_mm_per_prompt", {"image": 0, "video": 0}),),
    ),
    "llama4_mm": Case(
        "Llama 4 (multimodal)",
        "llama4_mm",
        f"{MODELS}.llama4.Llama4DecoderLayer",
        (("limit_mm_per_prompt", {"image": 0}),),
    ),
    "qwen3_5_mm": Case(
        "Qwen3.5 (multimodal)",
        "qwen3_5_mm",
        f"{MODELS}.qwen3_5.Qwen3_5DecoderLayer",
        (*BFLOAT16, ("limit_mm_per_prompt", {"image": 0, "video": 0})),
        linear=(0, 2),
        tolerance=BFLOAT16_TOLERANCE,
    ),
    "qwen3_5": Case(
        "Qwen3.5 (text)",
        "qwen3_5",
        f"{MODELS}.qwen3_5.Qwen3_5DecoderLayer",
        BFLOAT16,
        linear=(0, 2),
        tolerance=BFLOAT16_TOLERANCE,
    ),
    "qwen3_vl_moe": Case(
        "Qwen3-VL MoE",
        "qwen3_vl_moe",
        f"{MODELS}.qwen3_vl_moe.Qwen3VLMoeDecoderLayer",
        (("limit_mm_per_prompt", {"image": 0, "video": 0}),),
    ),
    "qwen3_vl": Case(
        "Qwen3-VL",
        "qwen3_vl",
        f"{MODELS}.qwen3_vl.Qwen3VLDecoderLayer",
        (("limit_mm_per_prompt", {"image": 0, "video": 0}),),
    ),
}
BACKEND = (("model_impl", "transformers"),)
TRANSFORMERS_CASES = {
    f"transformers-{family}": Case(
        f"{title}, Transformers backend",
        family,
        f"transformers.models.{family}.modeling_{family}.{layer}",
        BACKEND,
        lacks=("post_attn",) if family in ("phi", "gpt_neox") else (),
    )
    for title, family, layer in (
        ("Llama", "llama", "LlamaDecoderLayer"),
        ("Gemma-2", "gemma2", "Gemma2DecoderLayer"),
        ("OLMo-2", "olmo2", "Olmo2DecoderLayer"),
        ("Phi-1, Phi-2", "phi", "PhiDecoderLayer"),
        ("GPT-NeoX, Pythia", "gpt_neox", "GPTNeoXLayer"),
    )
}
# In tests/models/multimodal_backend_cases.py, on prompts of text and with images.
MULTIMODAL_BACKEND_CASES = {
    f"{family}_backend": Case(
        f"{title}, Transformers backend",
        family,
        f"transformers.models.{layer.split('.')[0]}.modeling_{layer}",
        BACKEND,
    )
    for title, family, layer in (
        ("Gemma-3 (multimodal)", "gemma3_mm", "gemma3.Gemma3DecoderLayer"),
        ("LLaVA", "llava", "llama.LlamaDecoderLayer"),
        ("Qwen2.5-VL", "qwen2_5_vl", "qwen2_5_vl.Qwen2_5_VLDecoderLayer"),
    )
}
