# SPDX-License-Identifier: Apache-2.0
"""Recognises decoder-layer classes that the table lacks, and checks them by numbers.

`decoder_layer: "auto"` lets an engine start with such a class. Its parameters and its
modules must have the names that decoder layers usually have. Then one forward of the
whole model, on made-up values, must show that each layer does what the names say. A
class that fails is not used.

In that forward, every layer is given a stream of small integers, and the attention
module and the MLP return small integers too. Sums of these are exact in every dtype, so
results are compared bit for bit. A factor, another norm or another branch changes the
result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from vllm.model_executor.layers.steering_families import (
    DecoderLayer,
    LayerFamily,
    LayerParts,
    class_name,
    decoder_layer_candidates,
    parts_of,
    trust_family,
)

HIDDEN = ("hidden_states", "x")
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
MLPS = ("mlp", "feed_forward", "block_sparse_moe")
# The first that a layer has; each stands before the MLP where it is right.
MID_NORMS = (
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "ffn_norm",
    "ln_2",
)
# Tokens of the forward.
TOKENS = 8

Forward = Callable[[], torch.Tensor]


def recognise(module: nn.Module) -> LayerFamily | None:
    """The points that a layer's names suggest, or None if it is no decoder layer."""
    parts = {name for name, _ in module.named_children()}
    parameters = inspect.signature(type(module).forward).parameters
    hidden = next((name for name in HIDDEN if name in parameters), None)
    mlp = next((name for name in MLPS if name in parts), None)
    attention = tuple(name for name in ATTENTIONS if name in parts)
    if hidden is None or mlp is None or not attention:
        return None
    return LayerFamily(
        hidden=hidden,
        residual="residual" if "residual" in parameters else None,
        mid_norm=next((name for name in MID_NORMS if name in parts), None),
        attention=attention[:1],
        projection=PROJECTIONS,
        mlp=mlp,
    )


def trust_unknown_layers(model: nn.Module, forward: Forward) -> LayerFamily | None:
    """Recognise the model's decoder layers, check them, and let steering use them.

    Args:
        model: a language model none of whose layers is in the table.
        forward: runs the whole model eagerly on `TOKENS` tokens, without a KV cache,
            and returns its last hidden states `[TOKENS, D]`.

    Returns:
        what was recognised, or None.

    Raises:
        ValueError: a layer does not do what its names say.
    """
    layers = []
    for name, module in decoder_layer_candidates(model):
        family = recognise(module)
        if family is not None:
            index = int(name.rsplit(".", 1)[1])
            layers.append(DecoderLayer(index, module, family))
    if not layers:
        return None
    kinds = {class_name(layer.module) for layer in layers}
    if len(kinds) > 1 or len({layer.index for layer in layers}) < len(layers):
        raise ValueError(
            f"steering: decoder_layer auto: found decoder layers of {sorted(kinds)} in "
            f"{type(model).__name__}, expected one class and one layer at each index"
        )
    check_layers(layers, forward)
    (kind,), family = kinds, layers[0].family
    trust_family(model, kind, family)
    return family


@dataclass
class _Seen:
    """The inputs and outputs of one layer and of its parts."""

    arrived: torch.Tensor
    given: torch.Tensor
    attention: torch.Tensor | None = None
    mlp: torch.Tensor | None = None
    at_norm: torch.Tensor | None = None
    after_norm: torch.Tensor | None = None
    read_by_mlp: torch.Tensor | None = None
    projected: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    returned: torch.Tensor | None = None


@dataclass
class _Run:
    """The hooks of one forward.

    Attributes:
        rewritten: write streams as steering does: `residual := x`, `hidden := 0`; what
            a single-stream layer returns beside its stream becomes something else.
    """

    layers: list[DecoderLayer]
    rewritten: bool
    seen: dict[int, _Seen] = field(default_factory=dict)
    hooks: ExitStack = field(default_factory=ExitStack)
    random: torch.Generator = field(default_factory=torch.Generator)

    def integers(self, like: torch.Tensor) -> torch.Tensor:
        """Integers of -8 to 8 with the shape, dtype and device of a tensor."""
        drawn = torch.randint(-8, 9, tuple(like.shape), generator=self.random)
        return drawn.to(like)

    def install(self) -> None:
        """Hook every layer and its parts."""
        for layer in self.layers:
            parts = parts_of(layer)
            keep = self.hooks.callback
            pre, post = self._layer_hooks(layer)
            keep(layer.module.register_forward_pre_hook(pre, with_kwargs=True).remove)
            keep(layer.module.register_forward_hook(post).remove)
            for hook in self._part_hooks(layer.index, parts):
                keep(hook)

    def _layer_hooks(self, layer: DecoderLayer) -> tuple[Callable, Callable]:
        family = layer.family
        names = list(inspect.signature(type(layer.module).forward).parameters)[1:]

        def pre(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            bound = {**dict(zip(names, args, strict=False)), **kwargs}
            hidden, residual = bound[family.hidden], None
            if family.residual is not None:
                residual = bound.get(family.residual)
            arrived = hidden.clone() if residual is None else hidden + residual
            hidden.copy_(self.integers(hidden))
            given = hidden.clone()
            if residual is not None:
                residual.copy_(self.integers(residual))
                given = hidden + residual
                if self.rewritten:
                    residual.copy_(given)
                    hidden.zero_()
            self.seen[layer.index] = _Seen(arrived, given)
            return (), bound

        def post(module: nn.Module, args: tuple, out: object) -> object:
            seen = self.seen[layer.index]
            parts = out if isinstance(out, tuple) else (out,)
            tensors = [part for part in parts if isinstance(part, torch.Tensor)]
            if family.residual is None:
                seen.returned = tensors[0].clone()
                if self.rewritten:
                    for other in tensors[1:]:
                        other.add_(1)
            elif len(tensors) > 1:
                seen.returned = tensors[0] + tensors[1]
                if self.rewritten:
                    tensors[1].copy_(seen.returned)
                    tensors[0].zero_()
            return out

        return pre, post

    def _part_hooks(self, index: int, parts: LayerParts) -> list[Callable[[], None]]:
        def project(module: nn.Module, args: tuple) -> tuple:
            return (self.integers(args[0]), *args[1:])

        def projected(module: nn.Module, args: tuple, out: object) -> None:
            self.seen[index].projected = _first(out).clone()

        def attended(module: nn.Module, args: tuple, out: object) -> object:
            stock = _first(out)
            made = self.integers(stock)
            self.seen[index].attended, self.seen[index].attention = stock, made
            return _with_first(out, made)

        def at_norm(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = [x for x in (*args, *kwargs.values()) if x is not None]
            self.seen[index].at_norm = torch.stack(given).sum(0)

        def after_norm(module: nn.Module, args: tuple, out: object) -> None:
            self.seen[index].after_norm = _first(out).clone()

        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self.seen[index].read_by_mlp = x.clone()

        def wrote(module: nn.Module, args: tuple, out: object) -> object:
            stock = _first(out)
            made = self.integers(stock)
            self.seen[index].mlp = made
            return _with_first(out, made)

        assert parts.attention is not None and parts.mlp is not None  # recognised so
        handles = [
            parts.attention.register_forward_hook(attended),
            parts.mlp.register_forward_pre_hook(read, with_kwargs=True),
            parts.mlp.register_forward_hook(wrote),
        ]
        if parts.projection is not None:
            handles.append(parts.projection.register_forward_pre_hook(project))
            handles.append(parts.projection.register_forward_hook(projected))
        if (norm := parts.mid_norm) is not None:
            handles.append(norm.register_forward_pre_hook(at_norm, with_kwargs=True))
            handles.append(norm.register_forward_hook(after_norm))
        return [handle.remove for handle in handles]


def _with_first(out: object, made: torch.Tensor) -> object:
    """The same result with another first tensor."""
    copy = made.clone()  # layers may add to it in place
    return (copy, *out[1:]) if isinstance(out, tuple) else copy


def _first(out: object) -> torch.Tensor:
    """The tensor that a module returns, alone or first in a tuple."""
    first = out[0] if isinstance(out, tuple) else out
    assert isinstance(first, torch.Tensor)
    return first


def _forward(layers: list[DecoderLayer], forward: Forward, rewritten: bool) -> _Forward:
    run = _Run(layers, rewritten)
    with run.hooks:
        run.install()
        last = forward().clone()
    return _Forward(run.seen, last)


@dataclass
class _Forward:
    """What one forward showed, and the model's last hidden states."""

    seen: dict[int, _Seen]
    last: torch.Tensor


def check_layers(layers: list[DecoderLayer], forward: Forward) -> None:
    """Raise ValueError unless every layer does what its names say."""
    plain = _forward(layers, forward, rewritten=False)
    again = _forward(layers, forward, rewritten=True)
    before: _Seen | None = None
    for layer in layers:
        seen = plain.seen.get(layer.index)
        wrong = "the model's forward did not run it"
        if seen is not None:
            wrong = _wrong(layer, seen, before)
        if wrong:
            raise _refusal(layer, wrong)
        before = seen
    if not torch.equal(plain.last, again.last):
        raise _refusal(
            layers[-1], "what it returns is not read as the sum of its parts"
        )


def _wrong(layer: DecoderLayer, seen: _Seen, before: _Seen | None) -> str:
    """What the layer does that its names do not say; empty if nothing."""
    if seen.attention is None or seen.mlp is None or seen.returned is None:
        return "attention or the MLP did not run, or it returned no stream"
    parts, middle = parts_of(layer), seen.given + seen.attention
    facts = {
        "the stream does not reach it as the layer before returned it": (
            before is None or _equal(before.returned, seen.arrived)
        ),
        "the stream that it returns is not the one it was given plus what attention "
        "and the MLP wrote": _equal(seen.returned, middle + seen.mlp),
        "the norm before the MLP does not read the stream after attention": (
            parts.mid_norm is None or _equal(seen.at_norm, middle)
        ),
        "the MLP does not read what the norm before it writes": (
            parts.mid_norm is None or _equal(seen.read_by_mlp, seen.after_norm)
        ),
        "attention does not return what its output projection does": (
            parts.projection is None or _equal(seen.attended, seen.projected)
        ),
    }
    return next((wrong for wrong, holds in facts.items() if not holds), "")


def _equal(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    return (
        found is not None
        and expected is not None
        and torch.equal(found.flatten(), expected.flatten())
    )


def _refusal(layer: DecoderLayer, wrong: str) -> ValueError:
    family = layer.family
    stream = family.hidden
    if family.residual is not None:
        stream = f"{family.hidden} + {family.residual}"
    return ValueError(
        f"steering: decoder_layer auto: {class_name(layer.module)} was taken for a "
        f"layer whose stream is {stream}, and at layer {layer.index} {wrong}; its "
        "points must be named in vllm/model_executor/layers/steering_family_table.py"
    )
