# SPDX-License-Identifier: Apache-2.0
"""Gemma-3-270M as a Hugging Face checkpoint, from a GGUF file.

The weights are dequantised here, because transformers wants `accelerate` for that.
"""

from __future__ import annotations

from pathlib import Path

import torch

# GGUF name -> Hugging Face name, inside a layer and outside.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def read_weights(gguf: Path) -> dict[str, torch.Tensor]:
    """Weights in float32 under Hugging Face's names."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    weights = {}
    for tensor in GGUFReader(gguf).tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, kind = stem.split(".")
            name = f"model.layers.{layer}.{LAYER_NAMES[kind]}"
        else:
            name = NAMES[stem]
        # GGUF holds 1 + w of Gemma's norms.
        weights[f"{name}.weight"] = values - 1 if name.endswith("norm") else values
    return weights


def write_checkpoint(gguf: Path, out: Path) -> None:
    """Write the model in `gguf` as a checkpoint, in float32."""
    from transformers import AutoConfig, AutoTokenizer, Gemma3ForCausalLM

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.dtype = "float32"
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    missing, unexpected = model.load_state_dict(
        read_weights(gguf), strict=False, assign=True
    )
    if unexpected or missing != ["lm_head.weight"]:
        raise ValueError(f"{gguf}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
