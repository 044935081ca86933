# SPDX-License-Identifier: Apache-2.0
"""The memory through which GPUs that share SAEs exchange data (csrc/steering).

Each rank has an arena of the same layout, which all ranks can address. All slots of a
worker use it, one after another; `exchange.cuh` has the protocol.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from vllm.config.steering_sharding import EXTENSION_FEATURES
from vllm.model_executor.layers.steering_shards import Shard, tensor_at

from .extension import cuda_ops
from .plan import CHUNK_ALIGN, LIST_MAX, MIB, ExchangeLimits, cdiv

MAX_RANKS = 8
COLUMN_SLICE = 256  # columns that have a flag of their own
HEADER_BYTES = 4096
EXCHANGE_ROWS = 2048  # the most active tokens of a chunk
STAGING_BYTES = 32 * MIB
SHARE_FIELDS = (
    "rank", "size", "rows", "lists", "flags", "columns", "staging", "staging_bytes",
    "packet_rows", "packets", "column_packets", "addresses",
)  # fmt: skip
PACKET_ROWS = 64  # tokens of a step that may go as packets
CLAMP_FIELDS = ("rows", "each", "slices", "rounds", "heads", "acts", "flags")
CLAMP_ACTS_BYTES = 8 * MIB  # the most that activations of clamps take
# ClampPart (csrc/steering/shared_clamp.cuh).
SEND_ACTS, SEND_COLUMNS, WRITE_TOKENS = 1, 2, 4
# Parts of a pull (csrc/steering/shared_kernels.cuh): announce, copy, await.
ANNOUNCE, COPY, AWAIT = 1, 2, 4


@dataclass(frozen=True)
class ClampRegions:
    """Where the regions of the delta tier begin, in bytes; `rows` tokens with `each`
    clamps fit them.

    rounds: int32 `[rows]`; heads: int64 `[rows, size]`; acts: int64 `[rows, each]`;
    flags: int32 `[rows, size, slices]`.
    """

    rows: int
    each: int
    slices: int
    rounds: int
    heads: int
    acts: int
    flags: int


@dataclass(frozen=True)
class ArenaLayout:
    """Where the regions of an arena begin, in bytes; `rows` tokens fit them.

    lists: int64 `[size, rows, 1 + LIST_MAX]`; flags: int32 `[rows, size, slices]`;
    columns: 16-bit numbers `[rows, D]`; staging: what peers read. packets: 16 bytes
    `[size, packet_rows, 1 + LIST_MAX]`; column_packets: 16 bytes `[packet_rows, D/4]`.
    """

    rows: int
    lists: int
    flags: int
    columns: int
    staging: int
    staging_bytes: int
    clamps: ClampRegions
    packet_rows: int
    packets: int
    column_packets: int

    @property
    def nbytes(self) -> int:
        return self.staging + self.staging_bytes


def plan_arena(
    size: int,
    rows: int,
    width: int,
    max_clamps: int,
    staging_bytes: int = STAGING_BYTES,
) -> ArenaLayout:
    """The arena of `size` ranks, for chunks of `rows` tokens of `width` columns."""
    slices = cdiv(cdiv(width, size), COLUMN_SLICE)
    lists = HEADER_BYTES
    flags = _after(lists, 8 * size * rows * (1 + LIST_MAX))
    columns = _after(flags, 4 * rows * size * slices)
    each = max(max_clamps, 1)
    clamped = min(rows, max(CLAMP_ACTS_BYTES // (8 * each), 1))
    rounds = _after(columns, 2 * rows * width)
    heads = _after(rounds, 4 * clamped)
    acts = _after(heads, 8 * clamped * size)
    clamp_flags = _after(acts, 8 * clamped * each)
    packed = min(rows, PACKET_ROWS)
    packets = _after(clamp_flags, 4 * clamped * size * slices)
    column_packets = _after(packets, 16 * size * packed * (1 + LIST_MAX))
    staging = _after(column_packets, 4 * packed * width)
    clamps = ClampRegions(clamped, each, slices, rounds, heads, acts, clamp_flags)
    return ArenaLayout(
        rows=rows,
        lists=lists,
        flags=flags,
        columns=columns,
        staging=staging,
        staging_bytes=staging_bytes,
        clamps=clamps,
        packet_rows=packed,
        packets=packets,
        column_packets=column_packets,
    )


def _after(start: int, nbytes: int) -> int:
    """Where the next region begins."""
    return start + cdiv(nbytes, 256) * 256


def can_exchange(shard: Shard, d_sae: int, d_out: int) -> bool:
    """Whether the extension's kernels can share an SAE of these widths."""
    return (
        not shard.is_whole
        and shard.allocate is not None
        and shard.size <= MAX_RANKS
        and d_sae % (shard.size * EXTENSION_FEATURES) == 0
        and d_out % (shard.size * 8) == 0
    )


def exchange_limits(features: int) -> ExchangeLimits:
    """What ranks of so many features each can exchange at a time."""
    scored = STAGING_BYTES // (4 * features)
    if scored > CHUNK_ALIGN:
        scored -= scored % CHUNK_ALIGN
    return ExchangeLimits(EXCHANGE_ROWS, scored)


class Peers:
    """One rank's arena, and where those of the others are.

    Args:
        shard: this rank, whose `allocate` all ranks call together.
        layout: the same on every rank.
        device: where this rank's arena lies.
    """

    def __init__(self, shard: Shard, layout: ArenaLayout, device: torch.device):
        assert shard.allocate is not None
        self.shard = shard
        self.layout = layout
        self.addresses = shard.allocate(layout.nbytes)
        own = tensor_at(self.addresses[shard.rank], layout.nbytes, device)
        self._staging = own[layout.staging :]
        at = layout
        # SHARE_FIELDS
        self.shared = torch.tensor(
            [
                *(shard.rank, shard.size, at.rows, at.lists, at.flags, at.columns),
                *(at.staging, at.staging_bytes, at.packet_rows, at.packets),
                *(at.column_packets, *self.addresses),
            ],
            dtype=torch.int64,
        )
        # CLAMP_FIELDS
        self.clamps = torch.tensor(astuple(layout.clamps), dtype=torch.int64)

    @property
    def apart(self) -> bool:
        """Whether a launch may only wait for what earlier turns have sent."""
        return self.shard.turn is not None

    def turn(self) -> None:
        """Let the other ranks of this device come up."""
        if self.shard.turn is not None:
            self.shard.turn()

    def fits(self, nbytes: int) -> bool:
        """Whether the staging holds so many bytes."""
        return nbytes <= self.layout.staging_bytes

    def staged(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """`[rows, width]` at the staging's begin, for a pull."""
        nbytes = rows * width * dtype.itemsize
        return self._staging[:nbytes].view(dtype).view(rows, width)

    def pull(
        self,
        own: torch.Tensor,
        out: torch.Tensor,
        count: torch.Tensor,
        base: int = 0,
        stacked: bool = False,
    ) -> None:
        """Gather `own` of all ranks, which is `staged`, in `out`.

        Args:
            own: `[rows, n]`, of 16-byte rows.
            out: `[rows, size * n]`; or with `stacked` `[size, rows, n]`.
            count: int32 `[1]` on the device. `count - base` rows move, at most `rows`;
                with `stacked` all, or none.
        """
        arguments = (own, out, self.shared, count, base, stacked, stacked)
        if not self.apart:
            cuda_ops().pull(*arguments, ANNOUNCE | COPY | AWAIT)
            return
        for part in (ANNOUNCE, COPY, AWAIT):
            cuda_ops().pull(*arguments, part)
            self.turn()
