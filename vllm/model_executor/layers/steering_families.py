# SPDX-License-Identifier: Apache-2.0
"""Where the three hook points are in each decoder-layer class, and how to reach them.

vLLM splits the residual stream into `hidden + residual` and fuses the addition into
the next norm. So, for a layer that returns such a pair: `post_block` is the pair it
returns, `pre_attn` the pair it is given (before its input norm), and `post_attn` the
pair that enters the norm before the MLP. Single-stream layers carry one tensor.

A steered layer (and the norm of a `post_attn` site) becomes an instance of a subclass
whose forward edits the stream around the stock forward. In a branch this is one call
of `apply_layer_steering` per hook point in each layer's forward.
"""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Registers the tiers' ops that `apply_layer_steering` calls.
import vllm.model_executor.layers.sae_full_reconstruction  # noqa: F401
import vllm.model_executor.layers.sae_steering  # noqa: F401
from vllm.config.steering import HookPoint
from vllm.model_executor.layers.steering import SteeringSite, apply_layer_steering

MODELS = "vllm.model_executor.models"


@dataclass(frozen=True)
class LayerFamily:
    """The hook points of one decoder-layer class.

    Attributes:
        hidden: name of the forward parameter that carries the stream.
        residual: name of the parameter with the stream's other summand; None for a
            single-stream layer.
        mid_norms: attribute names of the norm before the MLP; the first that the
            layer has is taken.
    """

    hidden: str = "hidden_states"
    residual: str | None = "residual"
    mid_norms: tuple[str, ...] = ("post_attention_layernorm",)


GEMMA = LayerFamily(mid_norms=("pre_feedforward_layernorm",))
PAIR = LayerFamily()
# Layers that Hugging Face's own code runs, under vLLM's Transformers backend.
TRANSFORMERS = LayerFamily(
    residual=None,
    mid_norms=("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"),
)

# To add a family: find the three points in the layer's forward, add a line, and add
# the model to the conformance test (tests/models/test_steering_sites.py).
FAMILIES: dict[str, LayerFamily] = {
    f"{MODELS}.gemma2.Gemma2DecoderLayer": GEMMA,
    f"{MODELS}.gemma3.Gemma3DecoderLayer": GEMMA,
    f"{MODELS}.llama.LlamaDecoderLayer": PAIR,  # also Phi-3
    f"{MODELS}.mistral.MistralDecoderLayer": PAIR,
    f"{MODELS}.qwen2.Qwen2DecoderLayer": PAIR,
    f"{MODELS}.qwen2_moe.Qwen2MoeDecoderLayer": PAIR,
    f"{MODELS}.qwen3.Qwen3DecoderLayer": PAIR,
    f"{MODELS}.qwen3_moe.Qwen3MoeDecoderLayer": PAIR,
    f"{MODELS}.gpt_oss.TransformerBlock": PAIR,
    f"{MODELS}.gpt2.GPT2Block": LayerFamily(residual=None, mid_norms=("ln_2",)),
}


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer that this pipeline rank owns."""

    index: int
    module: nn.Module
    family: LayerFamily


def class_name(module: nn.Module) -> str:
    """`package.module.Class` of a module."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def find_decoder_layers(model: nn.Module) -> dict[int, DecoderLayer]:
    """This rank's decoder layers by global index.

    Raises:
        ValueError: the model's decoder-layer class is not in the family table.
    """
    found: dict[int, DecoderLayer] = {}
    for name, module in _layer_candidates(model):
        family = _family_of(model, module)
        if family is None:
            continue
        index = int(name.rsplit(".", 1)[1])
        if index in found:
            raise ValueError(
                f"steering: two decoder layers with index {index} in "
                f"{type(model).__name__} ({name} is the second)"
            )
        found[index] = DecoderLayer(index, module, family)
    if not found:
        raise ValueError(_unknown_family(model))
    return found


def _layer_candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that stand at a numbered place, such as `model.layers.3`."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if re.search(r"\.\d+$", name)
    ]


def _family_of(model: nn.Module, module: nn.Module) -> LayerFamily | None:
    if family := FAMILIES.get(class_name(module)):
        return family
    if f"{MODELS}.transformers." not in _lineage(model):
        return None
    is_hf = type(module).__module__.startswith("transformers.")
    has_parts = any(hasattr(module, name) for name in TRANSFORMERS.mid_norms)
    return TRANSFORMERS if is_hf and has_parts else None


def _lineage(model: nn.Module) -> str:
    return " ".join(f"{c.__module__}." for c in type(model).__mro__)


def _unknown_family(model: nn.Module) -> str:
    classes = {class_name(module) for _, module in _layer_candidates(model)}
    layers = sorted(name for name in classes if re.search(r"Layer$|Block$", name))
    known = ", ".join(sorted(FAMILIES))
    return (
        f"steering: no decoder-layer class of {type(model).__name__} is known: found "
        f"{layers or sorted(classes)}; known are {known}, and models run by the "
        "Transformers backend (--model-impl transformers). To add one, name its three "
        "hook points in vllm/model_executor/layers/steering_families.py"
    )


def attach_site(layer: DecoderLayer, site: SteeringSite) -> None:
    """Make the layer apply `site` at the site's hook point from now on."""
    hook = site.key.hook
    if hook is HookPoint.POST_ATTN:
        norm = _mid_norm(layer)
        norm.steering_post_attn = site
        stock_norm: Any = type(norm)
        norm.__class__ = _steered_norm_class(stock_norm)
        return
    module = layer.module
    if not issubclass(type(module), SteeredLayer):
        module.steering_pre_attn = None
        module.steering_post_block = None
        stock_layer: Any = type(module)
        module.__class__ = _steered_layer_class(stock_layer, layer.family)
    if hook is HookPoint.PRE_ATTN:
        module.steering_pre_attn = site
    else:
        module.steering_post_block = site


def _mid_norm(layer: DecoderLayer) -> nn.Module:
    """The norm that reads the stream after attention.

    Layers that norm what a sublayer writes (OLMo-2), or that run attention and MLP
    side by side (GPT-NeoX), have a norm of that name and no such point.
    """
    module, names = layer.module, layer.family.mid_norms
    norms_outputs = hasattr(module, "post_feedforward_layernorm") and not hasattr(
        module, "pre_feedforward_layernorm"
    )
    if not norms_outputs and not getattr(module, "use_parallel_residual", False):
        for name in names:
            norm = getattr(module, name, None)
            if norm is not None:
                return norm
    raise ValueError(
        f"steering: {class_name(module)} has none of {names} between its attention "
        f"and its MLP, so it has no post_attn site at layer {layer.index}; use "
        "pre_attn or post_block"
    )


class SteeredLayer:
    """Marks a decoder layer that applies its sites."""

    steering_pre_attn: SteeringSite | None
    steering_post_block: SteeringSite | None


class SteeredNorm:
    """Marks the norm before the MLP of a layer with a `post_attn` site."""

    steering_post_attn: SteeringSite


def _flat(stream: torch.Tensor) -> torch.Tensor:
    """`[T, D]` view of a stream that may carry a batch dimension of one."""
    return stream.view(-1, stream.shape[-1])


def _edit(
    site: SteeringSite, hidden: torch.Tensor, residual: torch.Tensor | None
) -> None:
    apply_layer_steering(
        site, _flat(hidden), None if residual is None else _flat(residual)
    )


@functools.cache
def _steered_layer_class(stock: Any, family: LayerFamily) -> type:
    """The subclass of `stock` whose forward edits its input and its output."""
    names = list(inspect.signature(stock.forward).parameters)[1:]
    hidden_at = names.index(family.hidden)
    residual_at = names.index(family.residual) if family.residual else None

    def argument(at: int, args: tuple, kwargs: dict) -> Any:
        return args[at] if at < len(args) else kwargs.get(names[at])

    class Steered(SteeredLayer, stock):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self.steering_pre_attn is not None:
                hidden = argument(hidden_at, args, kwargs)
                residual = None
                if residual_at is not None:
                    residual = argument(residual_at, args, kwargs)
                _edit(self.steering_pre_attn, hidden, residual)
            out = stock.forward(self, *args, **kwargs)
            if self.steering_post_block is not None:
                if residual_at is not None:
                    _edit(self.steering_post_block, out[0], out[1])
                else:
                    stream = out[0] if isinstance(out, tuple) else out
                    _edit(self.steering_post_block, stream, None)
            return out

    Steered.__name__ = f"Steered{stock.__name__}"
    Steered.__qualname__ = Steered.__name__
    return Steered


@functools.cache
def _steered_norm_class(stock: Any) -> type:
    """The subclass of a norm that edits the stream before it is normalised."""

    class Steered(SteeredNorm, stock):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            _edit(self.steering_post_attn, x, residual)
            if residual is None:
                return stock.forward(self, x)
            return stock.forward(self, x, residual)

    Steered.__name__ = f"Steered{stock.__name__}"
    Steered.__qualname__ = Steered.__name__
    return Steered
