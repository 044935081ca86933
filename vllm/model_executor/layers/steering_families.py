# SPDX-License-Identifier: Apache-2.0
"""Where the points are in each decoder-layer class.

vLLM splits the residual stream into `hidden + residual` and fuses the addition into the
next norm. For a layer that returns such a pair, `post_block` is the returned pair,
`pre_attn` is the pair that the layer gets (before its input norm), and `post_attn` is
the pair that enters the norm before the MLP. Single-stream layers pass one tensor. The
other points are inputs and outputs of the layer's attention and MLP modules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vllm.config.steering_points import HookPoint
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.steering_hugging_face import (
    HF_ATTENTIONS,
    HF_PROJECTIONS,
    HF_SCALES,
    norms_of,
)
from vllm.model_executor.models.interfaces import supports_multimodal

MODELS = "vllm.model_executor.models"


@dataclass(frozen=True)
class LayerFamily:
    """The points of one decoder-layer class. All strings are attribute names.

    Attributes:
        hidden: the forward parameter that carries the stream.
        residual: the parameter with the stream's other summand; None for a
            single-stream layer, which may still return a tuple.
        mid_norm: the norm between attention and MLP; None where there is none.
        mid_norm_if: a flag of the layer. If it is false, the norm is at another place.
        mlp_reads_stream: the MLP reads the stream without a norm, so its input is the
            `post_attn` point.
        attention: the attention module; the first of these that the layer has.
        projection: attention's output projection; the first that attention has.
        mlp: the MLP module; None where it is not a module of its own.
        mlp_unless: a flag of the layer. If it is true, something beside the MLP writes
            with it, so the MLP is not the whole sublayer.
        attention_norm, mlp_norm: the norm that reads what the sublayer writes, before
            it is added to the stream.
        scale: the layer's factor for what a sublayer writes, or a flag that there is
            one. A layer whose factor is not 1 has no `attn_out` and no `mlp_out`.
        gate: a linear layer that reads the stream without a norm, if the layer has one.
        scales_float16: in float16 the layer keeps a multiple of the stream, so it has
            none of the points.
        reduces_late: under tensor parallelism, the layer adds up the sublayers' outputs
            before it reduces over ranks, so no rank ever has `attn_out` or `mlp_out`.
    """

    hidden: str = "hidden_states"
    residual: str | None = "residual"
    mid_norm: str | None = "post_attention_layernorm"
    mid_norm_if: str | None = None
    mlp_reads_stream: bool = False
    attention: tuple[str, ...] = ("self_attn",)
    projection: tuple[str, ...] = ("o_proj",)
    mlp: str | None = "mlp"
    mlp_unless: str | None = None
    attention_norm: str | None = None
    mlp_norm: str | None = None
    scale: str | None = None
    gate: str | None = None
    scales_float16: bool = False
    reduces_late: bool = False


PAIR = LayerFamily()
GEMMA = LayerFamily(
    mid_norm="pre_feedforward_layernorm",
    attention_norm="post_attention_layernorm",
    mlp_norm="post_feedforward_layernorm",
)

QWEN3_NEXT = LayerFamily(attention=("self_attn", "linear_attn"), scale="layer_scale")

# To add a family: find the points in the layer's forward, add a line, and add the
# model to the conformance tests (tests/models/test_steering_sites.py).
FAMILIES: dict[str, LayerFamily] = {
    f"{MODELS}.gemma2.Gemma2DecoderLayer": GEMMA,
    f"{MODELS}.gemma3.Gemma3DecoderLayer": GEMMA,
    f"{MODELS}.gemma4.Gemma4DecoderLayer": LayerFamily(
        residual=None,
        mid_norm="pre_feedforward_layernorm",
        projection=(),  # its width differs between the layers
        mlp_unless="enable_moe_block",
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        gate="per_layer_input_gate",
    ),
    f"{MODELS}.llama.LlamaDecoderLayer": PAIR,  # also Phi-3
    f"{MODELS}.mistral.MistralDecoderLayer": PAIR,
    f"{MODELS}.qwen2.Qwen2DecoderLayer": PAIR,
    f"{MODELS}.qwen2_moe.Qwen2MoeDecoderLayer": PAIR,
    f"{MODELS}.qwen3.Qwen3DecoderLayer": PAIR,
    f"{MODELS}.qwen3_moe.Qwen3MoeDecoderLayer": PAIR,
    f"{MODELS}.qwen3_vl.Qwen3VLDecoderLayer": PAIR,
    f"{MODELS}.qwen3_vl_moe.Qwen3VLMoeDecoderLayer": PAIR,
    f"{MODELS}.gpt_oss.TransformerBlock": LayerFamily(attention=("attn",)),
    f"{MODELS}.gpt2.GPT2Block": LayerFamily(
        residual=None, mid_norm="ln_2", attention=("attn",), projection=("c_proj",)
    ),
    f"{MODELS}.gemma.GemmaDecoderLayer": PAIR,
    f"{MODELS}.mixtral.MixtralDecoderLayer": LayerFamily(mlp="block_sparse_moe"),
    f"{MODELS}.minimax_m2.MiniMaxM2DecoderLayer": LayerFamily(mlp="block_sparse_moe"),
    f"{MODELS}.olmoe.OlmoeDecoderLayer": PAIR,
    f"{MODELS}.granite.GraniteDecoderLayer": LayerFamily(
        residual=None, scale="residual_multiplier"
    ),
    f"{MODELS}.opt.OPTDecoderLayer": LayerFamily(
        residual=None,
        mid_norm="final_layer_norm",
        mid_norm_if="do_layer_norm_before",
        projection=("out_proj",),
        mlp=None,
    ),
    f"{MODELS}.gpt_j.GPTJBlock": LayerFamily(
        residual=None, mid_norm=None, attention=("attn",), projection=("out_proj",)
    ),
    # Returns a pair whose second part the next layer does not read.
    f"{MODELS}.commandr.CohereDecoderLayer": LayerFamily(
        residual=None, mid_norm=None, reduces_late=True
    ),
    f"{MODELS}.exaone4.Exaone4DecoderLayer": LayerFamily(
        residual=None,
        mid_norm=None,
        mlp_reads_stream=True,
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
    ),
    f"{MODELS}.glm4.Glm4DecoderLayer": LayerFamily(
        attention_norm="post_self_attn_layernorm", mlp_norm="post_mlp_layernorm"
    ),
    f"{MODELS}.glm4_moe.Glm4MoeDecoderLayer": PAIR,
    f"{MODELS}.apertus.ApertusDecoderLayer": LayerFamily(
        mid_norm="feedforward_layernorm"
    ),
    f"{MODELS}.qwen3_next.Qwen3NextDecoderLayer": QWEN3_NEXT,
    f"{MODELS}.qwen3_5.Qwen3_5DecoderLayer": QWEN3_NEXT,
    f"{MODELS}.deepseek_v2.DeepseekV2DecoderLayer": LayerFamily(scales_float16=True),
    f"{MODELS}.llama4.Llama4DecoderLayer": LayerFamily(mlp="feed_forward"),
}


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer that this pipeline rank owns."""

    index: int
    module: nn.Module
    family: LayerFamily
    tp_size: int = 1


def class_name(module: nn.Module) -> str:
    """`package.module.Class` of a module."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def has_known_layers(model: nn.Module) -> bool:
    """Whether `find_decoder_layers` finds any."""
    return any(
        _family_of(model, module) for _, module in decoder_layer_candidates(model)
    )


def find_decoder_layers(model: nn.Module) -> dict[int, DecoderLayer]:
    """This rank's decoder layers by global index.

    Raises:
        ValueError: the model's decoder-layer class is not in the family table.
    """
    found: dict[int, DecoderLayer] = {}
    searched = model
    if supports_multimodal(model):
        # Vision and audio towers have layers too.
        searched = (
            model.model.get_decoder()
            if _is_hugging_face(model)
            else model.get_language_model()
        )
    tp_size = get_tensor_model_parallel_world_size()
    for name, module in decoder_layer_candidates(searched):
        family = _family_of(model, module)
        if family is None:
            continue
        index = int(name.rsplit(".", 1)[1])
        if index in found:
            raise ValueError(
                f"steering: two decoder layers with index {index} in "
                f"{type(model).__name__} ({name} is the second)"
            )
        found[index] = DecoderLayer(index, module, family, tp_size)
    if not found:
        raise ValueError(_unknown_family(model))
    return found


# Families that `decoder_layer: "auto"` has checked, by the model.
_trusted: WeakKeyDictionary[nn.Module, dict[str, LayerFamily]] = WeakKeyDictionary()


def trust_family(model: nn.Module, layer_class: str, family: LayerFamily) -> None:
    """Allow steering of a layer class that the table lacks, in this model."""
    _trusted[model] = {layer_class: family}


def decoder_layer_candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules whose name ends in a number, such as `model.layers.3`."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if re.search(r"\.\d+$", name)
    ]


def _family_of(model: nn.Module, module: nn.Module) -> LayerFamily | None:
    name = class_name(module)
    if family := FAMILIES.get(name) or _trusted.get(model, {}).get(name):
        return family
    if not _is_hugging_face(model):
        return None
    is_hf = type(module).__module__.startswith("transformers.")
    return hugging_face_family(module) if is_hf else None


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


def _is_hugging_face(model: nn.Module) -> bool:
    """Whether vLLM's Transformers backend runs the model."""
    backend = f"{MODELS}.transformers."
    return any(f"{c.__module__}.".startswith(backend) for c in type(model).__mro__)


def _unknown_family(model: nn.Module) -> str:
    classes = {class_name(module) for _, module in decoder_layer_candidates(model)}
    layers = sorted(name for name in classes if re.search(r"Layer$|Block$", name))
    known = ", ".join(sorted(FAMILIES))
    return (
        f"steering: no decoder-layer class of {type(model).__name__} is known: found "
        f"{layers or sorted(classes)}; known are {known}, and models run by the "
        "Transformers backend (--model-impl transformers). With "
        "--steering-decoder-layer auto, others are tried and checked. To add one, name "
        "its points in vllm/model_executor/layers/steering_families.py"
    )


@dataclass(frozen=True)
class LayerParts:
    """The modules of one layer at which its points are; None for modules it lacks."""

    mid_norm: nn.Module | None
    attention: nn.Module | None
    projection: nn.Module | None
    mlp: nn.Module | None
    attention_norm: nn.Module | None
    mlp_norm: nn.Module | None


def parts_of(layer: DecoderLayer) -> LayerParts:
    """Look a layer's modules up by the names of its family."""
    family = layer.family

    def first(owner: nn.Module | None, *names: str | None) -> nn.Module | None:
        children = {} if owner is None else dict(owner.named_children())
        return next((children[name] for name in names if name in children), None)

    attention = first(layer.module, *family.attention)
    flags = vars(layer.module)
    has_norm = family.mid_norm_if is None or flags[family.mid_norm_if]
    has_mlp = family.mlp_unless is None or not flags[family.mlp_unless]
    return LayerParts(
        mid_norm=first(layer.module, family.mid_norm) if has_norm else None,
        attention=attention,
        # Linear attention has a width of its own there, and no heads' z.
        projection=None
        if attention is first(layer.module, "linear_attn")
        else first(attention, *family.projection),
        mlp=first(layer.module, family.mlp) if has_mlp else None,
        attention_norm=first(layer.module, family.attention_norm),
        mlp_norm=first(layer.module, family.mlp_norm),
    )


def raw_reader(layer: DecoderLayer) -> str | None:
    """What linear layer reads the stream itself, as in post-norm models; None: none."""
    family = layer.family
    flag = family.mid_norm_if
    norms_after = flag is not None and not vars(layer.module)[flag]
    if family.mlp_reads_stream or norms_after:
        return "attention"
    return family.gate if family.gate in dict(layer.module.named_children()) else None


def missing_point(layer: DecoderLayer, hook: HookPoint) -> str | None:
    """Why the layer lacks a point, or None if it has the point."""
    family, parts = layer.family, parts_of(layer)
    if _is_float16(layer.module):
        if family.scales_float16:
            return "in float16 the layer keeps a multiple of the stream"
        if reader := raw_reader(layer):
            return (
                f"its {reader} reads the stream without a norm, where large values "
                "overflow float16 (bfloat16 and float32 are supported)"
            )
    if hook is HookPoint.POST_ATTN:
        reads = parts.mid_norm is not None or family.mlp_reads_stream
        return None if reads else "no norm reads the stream between attention and MLP"
    if hook is HookPoint.ATTN_Z:
        if layer.tp_size > 1:
            return "tensor parallelism splits it by heads over the ranks"
        return None if parts.projection else "no known output projection of attention"
    if hook in (HookPoint.ATTN_OUT, HookPoint.MLP_OUT):
        factor = vars(layer.module).get(family.scale or "", False)
        if factor is True or factor not in (False, 1.0):
            return f"the layer scales what its sublayers write ({family.scale})"
        if family.reduces_late and layer.tp_size > 1:
            return "under tensor parallelism the ranks add it up after the block"
    if hook is HookPoint.ATTN_OUT:
        return None if parts.attention else "no known attention module"
    if hook in (HookPoint.MLP_IN, HookPoint.MLP_OUT):
        return None if parts.mlp else "no module of its own is the whole MLP"
    return None


def _is_float16(module: nn.Module) -> bool:
    # A norm has the stream's dtype. Quantised layers also hold integers and float32
    # scales.
    return any(weight.dtype is torch.float16 for weight in module.parameters())


def points_of(layer: DecoderLayer) -> list[HookPoint]:
    """The points that a layer has."""
    return [hook for hook in HookPoint if missing_point(layer, hook) is None]


def require_point(layer: DecoderLayer, hook: HookPoint) -> None:
    """Raise ValueError unless the layer has the point."""
    if why := missing_point(layer, hook):
        have = ", ".join(hook.value for hook in points_of(layer))
        raise ValueError(
            f"steering: {class_name(layer.module)} has no {hook.value} point at layer "
            f"{layer.index}: {why}; its points are {have}"
        )


def refuse_output_norm(layer: DecoderLayer, hook: HookPoint) -> None:
    """Raise ValueError if the layer norms what a sublayer writes at this point."""
    parts = parts_of(layer)
    norm = parts.attention_norm if hook is HookPoint.ATTN_OUT else parts.mlp_norm
    if norm is not None:
        raise ValueError(
            f"steering: found an SAE of the output of a module of "
            f"{class_name(layer.module)} at layer {layer.index}; the layer norms this "
            f"output, expected one of {hook.value}, which is after the norm"
        )
