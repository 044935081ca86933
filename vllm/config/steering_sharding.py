# SPDX-License-Identifier: Apache-2.0
"""Which SAEs the ranks of a tensor-parallel group share instead of copying.

A sharded SAE has F / tp features of its encoder and D / tp columns of its decoder on
each of tp ranks (docs/design/sharding.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sharding = Literal["auto", "replicate", "shard"]

# A rank's features, and its columns, are a multiple of this. Matrix products of fewer
# columns may add in another order.
SHARD_UNIT = 16
# Where the extension's kernels share an SAE, a rank's features are a multiple of this.
EXTENSION_FEATURES = 256
# `auto` shards an SAE if each rank then reads so many bytes less of its encoder in a
# step. Below, the exchanges of a step take longer than the bytes that they save.
AUTO_SAVED_BYTES = 256 << 20


def exchange_bytes(
    size: int, width: int, rows: int = 2048, max_clamps: int = 64
) -> int:
    """Bytes through which `size` ranks exchange, on each of them, once an engine.

    Args:
        width: columns of the widest SAE.
        rows: tokens of a step, at most 2048.
        max_clamps: of a row.
    """
    few, slices = min(rows, 64), -(-width // size // 256)
    clamped = min(rows, max((1 << 20) // max(max_clamps, 1), 1))
    lists = (1 + 512) * size * (8 * rows + 16 * few)
    columns = 2 * rows * width + 4 * few * width
    flags = 4 * size * slices * (rows + clamped)
    clamps = clamped * (4 + 8 * size + 8 * max(max_clamps, 1))
    return lists + columns + flags + clamps + (32 << 20)


@dataclass(frozen=True)
class Ranks:
    """An engine's tensor-parallel group, and the bytes of an element of a matrix.

    `auto_copies`: `auto` shares nothing. `stores`: the ranks store into each other's
    memory, and `auto` shares what they can share so. `screens`: whether their devices
    can screen wide SAEs.
    """

    size: int = 1
    item_bytes: int = 4
    auto_copies: bool = False
    stores: bool = False
    screens: bool = False

    @property
    def unit(self) -> int:
        """What a sharded SAE's features, and its columns, are a multiple of."""
        return SHARD_UNIT * self.size

    @property
    def auto_unit(self) -> int:
        """What the features of an SAE that `auto` shares are a multiple of."""
        return EXTENSION_FEATURES * self.size if self.stores else self.unit

    def can_shard(self, d_sae: int, d_out: int) -> bool:
        """Whether the ranks get equal parts of whole units; a single one always."""
        if self.size == 1:
            return True
        return d_sae % self.unit == 0 and d_out % self.unit == 0

    def shards(
        self,
        asked: Sharding,
        d_sae: int,
        d_in: int,
        d_out: int,
        has_skip: bool = False,
    ) -> bool:
        """Whether an SAE of these widths is sharded. `shard` needs `can_shard`."""
        if self.size == 1 or asked == "replicate":
            return False
        if asked == "shard":
            return True
        if self.auto_copies or d_sae % self.auto_unit or (self.stores and has_skip):
            return False
        encoder = d_sae * d_in * self.item_bytes
        saved = encoder - encoder // self.size
        return saved >= AUTO_SAVED_BYTES and self.can_shard(d_sae, d_out)

    def encoded(self, d_sae: int, sharded: bool) -> int:
        """Features that a rank's extension kernels encode; 0: others do it."""
        if not sharded:
            return d_sae
        return 0 if d_sae % (self.size * EXTENSION_FEATURES) else d_sae // self.size

    def whole_bytes(self, d_sae: int, d_in: int, d_out: int, has_skip: bool) -> int:
        """Bytes of a replicated SAE's weights on each rank."""
        elements = d_sae * (d_in + d_out) + (d_in * d_out if has_skip else 0)
        return elements * self.item_bytes + 4 * (2 * d_sae + d_out)

    def shard_bytes(self, d_sae: int, d_in: int, d_out: int, has_skip: bool) -> int:
        """Bytes of a sharded SAE's weights on each rank."""
        elements = d_sae * (d_in + d_out) + (d_in * d_out if has_skip else 0)
        # b_enc, threshold and b_dec in float32, and the norms of all decoder rows.
        small = 4 * (2 * d_sae + d_out) // self.size + 4 * d_sae
        return elements * self.item_bytes // self.size + small
