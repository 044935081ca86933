# SPDX-License-Identifier: Apache-2.0
"""What a spec does along a vector, in float32 numbers."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from vllm.config.sae_steering_specs import VectorKind

_FLOAT32 = struct.Struct("<f")


class VectorAction(msgspec.Struct, frozen=True, array_like=True):
    """What a vector module does; see `SteeringVectorSpec`.

    `value` is the scale of `add` and `scale`, and the value of `set`.
    """

    kind: VectorKind
    value: float = 0.0
    bounds: tuple[float, float] = (0.0, 0.0)
    relative: bool = False

    @property
    def feature_idx(self) -> int:
        """A vector is the only direction of its module."""
        return 0

    @property
    def sums(self) -> bool:
        """Whether several such actions on one vector add up."""
        return self.kind == "add" and not self.relative


def round_to_fp32(value: float) -> float:
    """`value` as fp32 holds it, `-0.0` as `0.0`; OverflowError beyond its range."""
    return _FLOAT32.unpack(_FLOAT32.pack(value))[0] + 0.0


def add_scales(scales: Sequence[float]) -> float:
    """Sum rounded once to fp32, so that the order of the terms cannot matter."""
    return round_to_fp32(sum(sorted(scales)))
