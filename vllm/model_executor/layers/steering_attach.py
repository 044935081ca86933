# SPDX-License-Identifier: Apache-2.0
"""Makes the modules of a decoder layer apply the sites at its points.

A steered module becomes an instance of a subclass. Its forward calls the stock forward
and edits the input or the output. A vLLM branch would instead call
`apply_layer_steering` at each point in each layer's forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TypeAlias, cast

import torch
from torch import nn

# Registers the tiers' ops that `apply_layer_steering` calls.
import vllm.model_executor.layers.sae_full_reconstruction
import vllm.model_executor.layers.sae_steering  # noqa: F401
from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers.steering import (
    SiteKey,
    SteeringSite,
    apply_layer_steering,
)
from vllm.model_executor.layers.steering_families import (
    DecoderLayer,
    LayerFamily,
    LayerParts,
    parts_of,
    require_point,
)

# What a layer, a norm or a sublayer returns: the stream, alone or first in a tuple.
Output: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
Forward = Callable[..., Output]


def check_site(layer: DecoderLayer, key: SiteKey) -> None:
    """Raise ValueError unless a site can be attached to the layer."""
    require_point(layer, key.hook)
    if key.hook_out is None:
        return
    require_point(layer, key.hook_out)
    if (key.hook, key.hook_out) != (HookPoint.MLP_IN, HookPoint.MLP_OUT):
        raise ValueError(
            f"steering: found a transcoder from {key.hook.value} to "
            f"{key.hook_out.value} at layer {layer.index}, expected one from mlp_in to "
            "mlp_out"
        )


def attach_site(layer: DecoderLayer, site: SteeringSite) -> None:
    """Make the layer apply `site` at the site's points from now on.

    Raises:
        ValueError: the layer lacks a point.
    """
    check_site(layer, site.key)
    hook, parts, family = site.key.hook, parts_of(layer), layer.family
    if hook in (HookPoint.PRE_ATTN, HookPoint.POST_BLOCK):
        block = _steered_layer(layer.module, family)
        if hook is HookPoint.PRE_ATTN:
            block.steering_pre_attn = site
        else:
            block.steering_post_block = site
    elif hook is HookPoint.POST_ATTN and parts.mid_norm is not None:
        _steered_norm(parts.mid_norm).steering_post_attn = site
    elif hook is HookPoint.POST_ATTN:
        _steered_mlp(parts, family).steering_stream = site
    elif hook is HookPoint.ATTN_Z:
        _steered_sublayer(_need(parts.projection), None).steering_in = site
    elif hook is HookPoint.ATTN_OUT:
        attention = _steered_sublayer(_need(parts.attention), parts.attention_norm)
        attention.steering_out = site
    elif site.key.hook_out is not None:
        _steered_mlp(parts, family).steering_transcoder = site
    elif hook is HookPoint.MLP_IN:
        _steered_mlp(parts, family).steering_in = site
    else:
        _steered_mlp(parts, family).steering_out = site


class SteeredLayer:
    """Marks a decoder layer that applies its `pre_attn` and `post_block` sites."""

    steering_pre_attn: SteeringSite | None
    steering_post_block: SteeringSite | None


class SteeredNorm:
    """Marks the norm before the MLP of a layer with a `post_attn` site."""

    steering_post_attn: SteeringSite


class SteeredSublayer:
    """Marks an attention module, an output projection or an MLP with sites.

    Attributes:
        steering_stream: edits the input in place, which is the stream itself.
        steering_in: edits the module's input, but not for other readers of the same
            tensor.
        steering_transcoder: edits the output; its encoder reads what the module read.
        steering_out: edits the output, last.
        steering_shares_input: the input is the stream itself.
        steering_norm: the norm that reads the output, if any. It is applied here, and
            at its own place it returns its input. It is in a tuple, so that torch does
            not register the norm as a child of this module.
    """

    steering_stream: SteeringSite | None
    steering_in: SteeringSite | None
    steering_transcoder: SteeringSite | None
    steering_out: SteeringSite | None
    steering_shares_input: bool
    steering_norm: tuple[Callable[[torch.Tensor], torch.Tensor], ...]


def _need(part: nn.Module | None) -> nn.Module:
    assert part is not None, "check_site has seen it"
    return part


def _steered_layer(module: nn.Module, family: LayerFamily) -> SteeredLayer:
    if not isinstance(module, SteeredLayer):
        module.steering_pre_attn = None
        module.steering_post_block = None
        stock, forward = _take_forward(module)
        module.__class__ = _steered_layer_class(stock, forward, family)
    return cast(SteeredLayer, module)


def _steered_norm(module: nn.Module) -> SteeredNorm:
    if not isinstance(module, SteeredNorm):
        module.__class__ = _steered_norm_class(*_take_forward(module))
    return cast(SteeredNorm, module)


def _steered_mlp(parts: LayerParts, family: LayerFamily) -> SteeredSublayer:
    mlp = _steered_sublayer(_need(parts.mlp), parts.mlp_norm)
    mlp.steering_shares_input = family.mlp_reads_stream
    return mlp


def _steered_sublayer(module: nn.Module, norm: nn.Module | None) -> SteeredSublayer:
    if not isinstance(module, SteeredSublayer):
        module.steering_stream = None
        module.steering_in = None
        module.steering_transcoder = None
        module.steering_out = None
        module.steering_shares_input = False
        module.steering_norm = ()
        if norm is not None:
            stock, forward = _take_forward(norm)
            module.steering_norm = (functools.partial(forward, norm),)
            norm.__class__ = _pass_through_class(stock)
        module.__class__ = _steered_sublayer_class(*_take_forward(module))
    return cast(SteeredSublayer, module)


def _take_forward(module: nn.Module) -> tuple[type, Forward]:
    """A module's class, and the forward that a steered subclass is to call.

    vLLM's Transformers backend binds rewritten forwards to modules. Such a forward is
    taken off its module, or the subclass's forward would never run.
    """
    stock = type(module)
    bound = vars(module).pop("forward", None)
    return stock, stock.forward if bound is None else bound.__func__


def _named(steered: type, stock: type) -> type:
    steered.__name__ = steered.__qualname__ = f"Steered{stock.__name__}"
    return steered


def _flat(stream: torch.Tensor) -> torch.Tensor:
    """`[T, D]` view of activations that may carry a batch dimension of one."""
    return stream.view(-1, stream.shape[-1])


def _edit(
    site: SteeringSite,
    hidden: torch.Tensor,
    residual: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
) -> None:
    apply_layer_steering(
        site,
        _flat(hidden),
        None if residual is None else _flat(residual),
        None if source is None else _flat(source),
    )


@functools.cache
def _steered_layer_class(stock: type, forward: Forward, family: LayerFamily) -> type:
    """The subclass of `stock` whose forward edits its input and its output."""
    stock_forward = forward
    names = list(inspect.signature(forward).parameters)[1:]
    hidden_at = names.index(family.hidden)
    residual_at = names.index(family.residual) if family.residual else None

    def argument(at: int, args: tuple, kwargs: dict) -> torch.Tensor:
        return args[at] if at < len(args) else kwargs.get(names[at])

    class Steered(SteeredLayer, stock):  # type: ignore[misc, valid-type]
        def forward(self, *args: object, **kwargs: object) -> Output:
            if self.steering_pre_attn is not None:
                hidden = argument(hidden_at, args, kwargs)
                residual = None
                if residual_at is not None:
                    residual = argument(residual_at, args, kwargs)
                _edit(self.steering_pre_attn, hidden, residual)
            out = stock_forward(self, *args, **kwargs)
            if self.steering_post_block is not None:
                if residual_at is not None:
                    _edit(self.steering_post_block, out[0], out[1])
                else:
                    stream = out[0] if isinstance(out, tuple) else out
                    _edit(self.steering_post_block, stream)
            return out

    return _named(Steered, stock)


@functools.cache
def _steered_norm_class(stock: type, forward: Forward) -> type:
    """The subclass of a norm that edits the stream before it is normalised."""
    stock_forward = forward

    class Steered(SteeredNorm, stock):  # type: ignore[misc, valid-type]
        def forward(
            self, x: torch.Tensor, residual: torch.Tensor | None = None
        ) -> Output:
            _edit(self.steering_post_attn, x, residual)
            if residual is None:
                return stock_forward(self, x)
            return stock_forward(self, x, residual)

    return _named(Steered, stock)


@functools.cache
def _pass_through_class(stock: type) -> type:
    """The subclass of a norm that a steered sublayer applies in its place."""

    class PassesThrough(stock):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    return _named(PassesThrough, stock)


@functools.cache
def _steered_sublayer_class(stock: type, forward: Forward) -> type:
    """The subclass of `stock` that edits its first argument and its first result."""
    stock_forward = forward
    first = list(inspect.signature(forward).parameters)[1]

    def first_argument(args: tuple, kwargs: dict) -> torch.Tensor:
        return args[0] if args else kwargs[first]

    class Steered(SteeredSublayer, stock):  # type: ignore[misc, valid-type]
        def forward(self, *args: object, **kwargs: object) -> Output:
            x = first_argument(args, kwargs)
            if self.steering_stream is not None:
                _edit(self.steering_stream, x)
            if self.steering_in is not None:
                if self.steering_shares_input:
                    x = x.clone()
                _edit(self.steering_in, x)
            if args:
                out = stock_forward(self, x, *args[1:], **kwargs)
            else:
                out = stock_forward(self, **{**kwargs, first: x})
            return self._steered_output(x, out)

        def _steered_output(self, x: torch.Tensor, out: Output) -> Output:
            written = out[0] if isinstance(out, tuple) else out
            for norm in self.steering_norm:
                written = norm(written)
            if self.steering_transcoder is not None:
                _edit(self.steering_transcoder, written, None, x)
            if self.steering_out is not None:
                _edit(self.steering_out, written)
            return (written, *out[1:]) if isinstance(out, tuple) else written

    return _named(Steered, stock)
