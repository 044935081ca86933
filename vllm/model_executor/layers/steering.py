# SPDX-License-Identifier: Apache-2.0
"""Steering at one site of a decoder layer: `SteeringSite`, `apply_layer_steering`,
and the additive tier's op.

A layer's forward calls `apply_layer_steering(site, hidden, residual)` at each of its
sites. Every tier is one custom op, which takes the stream and the *name* of the site.
The forward context maps the name to the site, as it does for attention layers. So a
compiled or captured graph holds no weights, and modules can change without a new graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from vllm.config.steering_points import HookPoint, site_name
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.steering_limits import POINT_LIMIT
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    StepState,
    VectorSlot,
)
from vllm.model_executor.layers.steering_stream import Stream
from vllm.utils.torch_utils import direct_register_custom_op


@dataclass(frozen=True)
class SiteKey:
    """Which site: decoder layer (global index, not per pipeline rank) and points.

    `hook_out` is the point that a transcoder's site writes; if None, the site writes
    `hook`. An SAE at a point and a transcoder that reads it are two sites.
    """

    layer: int
    hook: HookPoint
    hook_out: HookPoint | None = None

    @property
    def name(self) -> str:
        """The key under which the forward context knows the site."""
        name = f"steering.{site_name(self.hook, self.layer)}"
        return name if self.hook_out is None else f"{name}.{self.hook_out.value}"


class SteeringBackend(Protocol):
    """Computes the tiers on a device. All sites of a worker share one backend.

    Each call edits the stream in place for the slot's active tokens and touches no
    other token's bits.
    """

    def write_flags(self, token_ids: torch.Tensor) -> None:
        """Before a forward: `flags[t] = skip_bits[token_ids[t]]`, 0 for unknown ids."""

    def full_reconstruction(self, slot: SAESlot, stream: Stream) -> None: ...

    def sae_clamp(self, slot: SAESlot, stream: Stream) -> None: ...

    def steering_vectors(self, slot: VectorSlot, stream: Stream) -> None: ...

    def read_features(self, slot: SAESlot, read: Stream) -> None:
        """Write the read tokens' rows to `slot.reads`; the stream does not change.

        `read` is what the encoder reads (`Stream.read`).
        """

    def read_and_reconstruct(self, slot: SAESlot, stream: Stream) -> None:
        """`read_features` of what the encoder is given, then `full_reconstruction`.

        A backend that can encode once for both has its own.
        """
        if slot.reads is not None:
            self.read_features(slot, stream.read)
        self.full_reconstruction(slot, stream)

    def full_tier(self, slots: Sequence[SAESlot], stream: Stream) -> None:
        """Reading and the full tier at a site.

        Reading sees the input of the full tier's encoders, so every other slot has read
        before the first one edits; that one does both at once. A token's row of the
        full tier names one module, so the slots may run in any order.
        """
        first, *others = slots
        for slot in others:
            if slot.reads is not None:
                self.read_features(slot, stream.read)
        self.read_and_reconstruct(first, stream)
        for slot in others:
            self.full_reconstruction(slot, stream)


class SteeringSite(nn.Module):
    """One `(layer, hook)` of the model, with the modules that may edit there.

    `saes` holds one slot per SAE module, in registration order; `vectors` the site's
    steering vectors. The traced graph leaves out a tier that has no slot here.
    """

    def __init__(
        self,
        key: SiteKey,
        saes: Iterable[SAESlot],
        vectors: VectorSlot | None,
        step: StepState,
        backend: SteeringBackend,
    ):
        super().__init__()
        self.step = step
        self.key = key
        self.name = key.name
        self.saes = nn.ModuleList(saes)
        self.vectors = vectors
        self.backend = backend

    @property
    def has_saes(self) -> bool:
        return len(self.saes) > 0

    @property
    def has_vectors(self) -> bool:
        return self.vectors is not None


def get_site(name: str) -> SteeringSite:
    """The running engine's site of this name (`SiteKey.name`)."""
    site = get_forward_context().no_compile_layers[name]
    assert isinstance(site, SteeringSite)
    return site


def apply_layer_steering(
    site: SteeringSite,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None = None,
) -> None:
    """Edit the activations at a site, in place: additive, delta, then full.

    They are `hidden + residual` (`hidden` alone where `residual` is None), both `[T,
    d_out]`. An edited token is written back exactly (`residual := x'`, `hidden := 0`);
    another token's bits do not change. `source [T, d_in]` is what the encoders of a
    transcoder's site read; if None, they read what they edit.
    """
    name = site.name
    if site.has_vectors:
        torch.ops.vllm.apply_steering_vectors(hidden, residual, name)
    if site.has_saes:
        torch.ops.vllm.apply_sae_clamp(hidden, residual, name, source)
        torch.ops.vllm.apply_sae_full_reconstruction(hidden, residual, name, source)
    limit = POINT_LIMIT.get(site.key.hook_out or site.key.hook)
    if limit is not None:
        # The limit is far beyond what models compute there, so other tokens keep their
        # bits.
        hidden.clamp_(-limit, limit)


def edits_in_place(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    site_name: str,
    source: torch.Tensor | None = None,
) -> None:
    """The fake of both SAE tiers' ops: nothing is returned, shapes do not change."""


def edits_vectors_in_place(
    hidden: torch.Tensor, residual: torch.Tensor | None, site_name: str
) -> None:
    """The fake of the additive tier's op; as `edits_in_place`."""


def apply_steering_vectors(
    hidden: torch.Tensor, residual: torch.Tensor | None, site_name: str
) -> None:
    """The additive tier at a site: `x' = x + sum_m scale_m v_m`."""
    site = get_site(site_name)
    if site.vectors is not None:
        site.backend.steering_vectors(site.vectors, Stream(hidden, residual))


direct_register_custom_op(
    op_name="apply_steering_vectors",
    op_func=apply_steering_vectors,
    mutates_args=["hidden", "residual"],
    fake_impl=edits_vectors_in_place,
)
