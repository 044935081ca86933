# SPDX-License-Identifier: Apache-2.0
"""The points of Hugging Face's own decoder layers, which vLLM's Transformers backend
runs, by the names of their parts."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from vllm.model_executor.layers.steering_family_table import LayerFamily

HF_ATTENTIONS = ("self_attn", "attention", "attn", "linear_attn")
HF_PROJECTIONS = ("o_proj", "dense", "out_proj", "c_proj")
# Factors for what sublayers write: Granite, MiniCPM, MiniMax, ESM-C.
HF_SCALES = (
    "residual_multiplier",
    "residual_scale",
    "attn_beta_factor",
    "scaling_factor",
)
# Their norms have the names of Llama's. They norm what sublayers write, or the sum.
MISNAMED = {
    "transformers.models.chameleon.modeling_chameleon.ChameleonSwinDecoderLayer",
    "transformers.models.openai.modeling_openai.Block",
}
# What Gemma 4 has beside attention, the MLP and their norms.
BESIDE = {
    "act_fn",
    "experts",
    "router",
    "per_layer_input_gate",
    "per_layer_projection",
    "post_per_layer_input_norm",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_1",
    "post_feedforward_layernorm_2",
}


class Norms(NamedTuple):
    """The norm that reads the stream between attention and MLP, and the norms that
    read what attention and the MLP write."""

    mid: str | None = None
    attention: str | None = None
    mlp: str | None = None


INPUT, ATTENTION = "input_layernorm", "post_attention_layernorm"
PRE_FF, POST_FF = "pre_feedforward_layernorm", "post_feedforward_layernorm"
POST_SELF, POST_MLP = "post_self_attn_layernorm", "post_mlp_layernorm"
PRE_MLP, POST_1, POST_2 = "pre_mlp_layernorm", "post_norm1", "post_norm2"
# By all norms that a layer has. A model of each line is compared with Hugging Face in
# tests/models/test_transformers_backend.py or test_steering_sites.py.
NORMS = {
    frozenset({INPUT, ATTENTION}): Norms(ATTENTION),
    frozenset({"ln_1", "ln_2"}): Norms("ln_2"),
    # A parallel block.
    frozenset({INPUT}): Norms(),
    # OLMo-2
    frozenset({ATTENTION, POST_FF}): Norms(None, ATTENTION, POST_FF),
    # Gemma-2
    frozenset({INPUT, ATTENTION, PRE_FF, POST_FF}): Norms(PRE_FF, ATTENTION, POST_FF),
    # GLM-4
    frozenset({INPUT, ATTENTION, POST_SELF, POST_MLP}): Norms(
        ATTENTION, POST_SELF, POST_MLP
    ),
    # VaultGemma, Apertus
    frozenset({INPUT, PRE_FF}): Norms(PRE_FF),
    frozenset({"attention_layernorm", "feedforward_layernorm"}): Norms(
        "feedforward_layernorm"
    ),
    # AfMoE
    frozenset({INPUT, ATTENTION, PRE_MLP, POST_MLP}): Norms(
        PRE_MLP, ATTENTION, POST_MLP
    ),
    # HyperCLOVA X
    frozenset({INPUT, ATTENTION, POST_1, POST_2}): Norms(ATTENTION, POST_1, POST_2),
}


def norms_of(layer: nn.Module) -> Norms | None:
    """The norms of a layer with an attention module and an `mlp`; None if it has other
    parts or parameters of its own, which may do anything to the stream."""
    parts = _parts(layer)
    if _own_code(layer) or "mlp" not in parts or not parts & set(HF_ATTENTIONS):
        return None
    if next(layer.parameters(recurse=False), None) is not None:
        return None
    return NORMS.get(frozenset(parts - {"mlp", *HF_ATTENTIONS} - BESIDE))


def _parts(layer: nn.Module) -> set[str]:
    """The names of a layer's modules, without dropouts."""
    children = layer.named_children()
    return {name for name, part in children if not isinstance(part, nn.Dropout)}


def _own_code(layer: nn.Module) -> bool:
    """Whether the names of the layer's parts say nothing of what its forward does."""
    module = type(layer).__module__
    name = f"{module}.{type(layer).__qualname__}"
    return name in MISNAMED or not module.startswith("transformers.")


def why_unknown(layer: nn.Module) -> str:
    """What is not known of a layer for which `hugging_face_family` has no points."""
    parts = _parts(layer)
    if _own_code(layer):
        return "whose code may do something else than the names of its parts say"
    if "mlp" not in parts or not parts & set(HF_ATTENTIONS):
        return (
            f"with the parts {sorted(parts)}, expected an `mlp` and one of "
            f"{', '.join(HF_ATTENTIONS)}"
        )
    own = [name for name, _ in layer.named_parameters(recurse=False)]
    if own:
        return f"with parameters of their own, {own}, expected them in the parts alone"
    beside = sorted(parts - {"mlp", *HF_ATTENTIONS} - BESIDE)
    sets = "; ".join(", ".join(sorted(norms)) for norms in NORMS)
    return (
        f"with {', '.join(beside)} beside attention and the MLP, expected norms that "
        f"are called as in one of: {sets}"
    )


def hugging_face_family(module: nn.Module) -> LayerFamily | None:
    """The points of a layer that Hugging Face's own code runs, under vLLM's
    Transformers backend; None for a module that is no decoder layer, and for a layer
    with parts of its own, which may do anything to the stream."""
    norms = norms_of(module)
    if norms is None:
        return None
    parallel = vars(module).get("use_parallel_residual", False)
    return LayerFamily(
        residual=None,
        mid_norm=None if parallel else norms.mid,
        mlp_reads_stream=norms.mid is None and norms.mlp is not None,
        attention=HF_ATTENTIONS,
        projection=HF_PROJECTIONS,
        # Gemma 4's experts stand beside the MLP and write with it.
        mlp=None if "experts" in dict(module.named_children()) else "mlp",
        attention_norm=norms.attention,
        mlp_norm=norms.mlp,
        scale=next((name for name in HF_SCALES if name in vars(module)), None),
        gate="per_layer_input_gate",
    )


def decoder_lists(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules in lists of a Hugging Face model's text decoder, by name."""
    decoder = model.get_decoder()
    return [
        (f"{name}.{at}", module)
        for name, part in decoder.named_children()
        if isinstance(part, nn.ModuleList)
        for at, module in enumerate(part)
    ]
