# SPDX-License-Identifier: Apache-2.0
"""The conformance cases: one tiny model for each line of the family table.

`tools/conformance_table.py` prints them as the table in docs/features/models.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steering_testing import models
from steering_testing.requests import Site

from vllm.model_executor.layers.steering_families import MODELS

LAST = models.LAYERS - 1
RESIDUAL = ("pre_attn", "post_attn", "post_block")
SUBLAYER = ("attn_z", "attn_out", "mlp_in", "mlp_out")


@dataclass(frozen=True)
class Case:
    """A tiny model, and the class of the decoder layer that runs it.

    `title` names the checkpoints that the class runs. `lacks` are the points that its
    layers do not have; `z` is the width of `attn_z`.
    """

    title: str
    family: str
    layer_class: str
    options: tuple[tuple[str, Any], ...] = ()
    lacks: tuple[str, ...] = ()
    z: int = models.HIDDEN

    @property
    def hooks(self) -> list[str]:
        return [hook for hook in (*RESIDUAL, *SUBLAYER) if hook not in self.lacks]

    def sites(self) -> list[Site]:
        """Residual points of three layers, the others of two."""
        return [
            (layer, hook)
            for layer in (0, 1, LAST)
            for hook in self.hooks
            if hook in RESIDUAL or layer > 0
        ]

    def width(self, hook: str) -> int:
        return self.z if hook == "attn_z" else models.HIDDEN


# Every line of the family table has a case here, or a test below fails.
CASES = {
    "gemma2": Case("Gemma-2", "gemma2", f"{MODELS}.gemma2.Gemma2DecoderLayer"),
    "gemma3": Case("Gemma-3 (text)", "gemma3", f"{MODELS}.gemma3.Gemma3DecoderLayer"),
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
}
BACKEND = (("model_impl", "transformers"),)
TRANSFORMERS_CASES = {
    f"transformers-{family}": Case(
        f"{title}, Transformers backend",
        family,
        f"transformers.models.{family}.modeling_{family}.{layer}",
        BACKEND,
    )
    for title, family, layer in (
        ("Llama", "llama", "LlamaDecoderLayer"),
        ("Gemma-2", "gemma2", "Gemma2DecoderLayer"),
    )
}
