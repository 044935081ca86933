# SPDX-License-Identifier: Apache-2.0
"""Finds the decoder layers of a model, and says which points each of them has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vllm.config.steering_points import HookPoint
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.steering_family_table import (
    FAMILIES,
    MODELS,
    UNFIT,
    LayerFamily,
)
from vllm.model_executor.layers.steering_hugging_face import (
    decoder_lists,
    hugging_face_family,
    why_unknown,
)
from vllm.model_executor.models.interfaces import supports_multimodal


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
        ValueError: the model's decoder-layer class is not in the family table, or is
            known to be unfit.
    """
    found: dict[int, DecoderLayer] = {}
    refuse_unfit_layers(model)
    if supports_multimodal(model) and not is_hugging_face(model):
        # Vision and audio towers have layers too.
        model = model.get_language_model()
    tp_size = get_tensor_model_parallel_world_size()
    for name, module in decoder_layer_candidates(model):
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


def refuse_unfit_layers(model: nn.Module) -> None:
    """Raise ValueError if one of vLLM's layers in the model is known to be unfit."""
    for _, module in decoder_layer_candidates(model):
        why = UNFIT.get(type(module).__name__)
        if why is not None and not type(module).__module__.startswith("transformers."):
            raise ValueError(
                f"steering: {type(model).__name__} cannot be steered: found decoder "
                f"layers of {class_name(module)}; {why}. docs/features/models.md lists "
                "the models that can be steered"
            )


# Families that `decoder_layer: "auto"` has checked, by the model.
_trusted: WeakKeyDictionary[nn.Module, dict[str, LayerFamily]] = WeakKeyDictionary()


def trust_family(model: nn.Module, layer_class: str, family: LayerFamily) -> None:
    """Allow steering of a layer class that the table lacks, in this model."""
    _trusted[model] = {layer_class: family}


def decoder_layer_candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules whose name ends in a number, such as `model.layers.3`."""
    if supports_multimodal(model) and is_hugging_face(model):
        # Its towers have layers of the same kinds, at any place in the model.
        return decoder_lists(model.model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if re.search(r"\.\d+$", name)
    ]


def _family_of(model: nn.Module, module: nn.Module) -> LayerFamily | None:
    name = class_name(module)
    if family := FAMILIES.get(name) or _trusted.get(model, {}).get(name):
        return family
    return hugging_face_family(module) if is_hugging_face(model) else None


def is_hugging_face(model: nn.Module) -> bool:
    """Whether vLLM's Transformers backend runs the model."""
    backend = f"{MODELS}.transformers."
    return any(f"{c.__module__}.".startswith(backend) for c in type(model).__mro__)


def _unknown_family(model: nn.Module) -> str:
    found = {
        class_name(module): module for _, module in decoder_layer_candidates(model)
    }
    layers = {name: found[name] for name in found if re.search(r"Layer$|Block$", name)}
    found = dict(sorted((layers or found).items()))
    if is_hugging_face(model):
        return _unknown_to_backend(model, found)
    known = ", ".join(sorted(FAMILIES))
    return (
        f"steering: no decoder-layer class of {type(model).__name__} is known: found "
        f"{list(found)}; known are {known}, and models run by the "
        "Transformers backend (--model-impl transformers). With "
        "--steering-decoder-layer auto, others are tried and checked. To add one, name "
        "its points in vllm/model_executor/layers/steering_family_table.py"
    )


def _unknown_to_backend(model: nn.Module, found: dict[str, nn.Module]) -> str:
    seen = [f"{name} {why_unknown(layer)}" for name, layer in found.items()]
    message = (
        f"steering: {type(model).__name__}, vLLM's Transformers backend, runs a model "
        f"that cannot be steered: found decoder layers {'; '.join(seen)}. "
        "docs/features/models.md says which layers are known there."
    )
    if supports_multimodal(model):
        return message
    return f"{message} With --steering-decoder-layer auto, others are tried and checked"


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
        found = next((children[name] for name in names if name in children), None)
        # It stands where other layers of the class have a norm.
        return None if isinstance(found, nn.Identity) else found

    attention = first(layer.module, *family.attention)
    flags = vars(layer.module)
    has_norm = family.mid_norm_if is None or flags[family.mid_norm_if]
    beside = family.mlp_unless
    has_mlp = not (flags.get(beside or "") or first(layer.module, beside))
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
        part = parts.attention if hook is HookPoint.ATTN_OUT else parts.mlp
        if part is not None and _leaves_its_bias(part):
            return "the layer adds a bias to what the module writes"
        if family.reduces_late and layer.tp_size > 1:
            return "under tensor parallelism the ranks add it up after the block"
    if hook is HookPoint.ATTN_OUT:
        if family.attention_beside is not None:
            return f"{family.attention_beside} writes to the stream beside attention"
        return None if parts.attention else "no known attention module"
    if hook in (HookPoint.MLP_IN, HookPoint.MLP_OUT):
        return None if parts.mlp else "no module of its own is the whole MLP"
    return None


def _leaves_its_bias(module: nn.Module) -> bool:
    """Whether a linear layer in the module returns its bias for others to add."""
    return any(
        vars(part).get("skip_bias_add", False) and part.bias is not None
        for part in module.modules()
    )


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
