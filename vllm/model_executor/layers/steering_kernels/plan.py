# SPDX-License-Identifier: Apache-2.0
"""Sizes of the workspace and of the launches: pure functions of shapes."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
MAX_GATHER_BYTES = 96 * MIB  # gathered activations of one chunk
MAX_ENTRY_BYTES = 128 * MIB  # non-zeros of a threshold chunk, or dense TopK scores
MAX_TOPK_BYTES = 152 * MIB  # scores and selected entries of a TopK chunk
MAX_COEF_BYTES = 4 * MIB  # clamp corrections of one chunk
ENTRY_BYTES = 8  # feature index and activation, packed in one int64
RECORD_INTS = 32  # ints of a token's record: a cache line
CHUNK_ALIGN = 256  # the widest token tile of the encoder
COMPACT_ENCODE_TOKENS = 256  # the longest step that one launch compacts and encodes


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n < 2)."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class ChunkPlan:
    """How the tokens of one step pass through the workspace.

    `rows` active tokens go at a time, in `num_chunks` passes; `capacity` is the number
    of non-zeros that a token may list before its overflow path is taken.
    """

    rows: int
    num_chunks: int
    capacity: int


def plan_chunks(
    tokens: int, d_model: int, d_sae: int, max_clamps: int, itemsize: int, topk: bool
) -> ChunkPlan:
    """Chunking of a step of `tokens` tokens, so that every region keeps its limit.

    Decoding steps get a capacity of `d_sae`, so nothing overflows there; a long
    prefill trades capacity for rows.
    """
    rows = MAX_GATHER_BYTES // (d_model * itemsize)
    rows = min(rows, MAX_COEF_BYTES // (4 * max(max_clamps, 1)))
    if topk:
        rows = min(rows, MAX_ENTRY_BYTES // (4 * d_sae))
    if rows < 1:
        raise ValueError(
            f"steering: d_model={d_model}, d_sae={d_sae}, max_clamps={max_clamps}: one "
            "token does not fit the workspace; use a narrower SAE or fewer clamps"
        )
    if rows > CHUNK_ALIGN:
        rows -= rows % CHUNK_ALIGN
    num_chunks = max(cdiv(tokens, rows), 1)
    if num_chunks > 1 and rows > CHUNK_ALIGN:
        rows = cdiv(cdiv(tokens, num_chunks), CHUNK_ALIGN) * CHUNK_ALIGN
    rows = min(rows, max(tokens, 1))
    # Less a page for the alignment of the two regions.
    room = MAX_TOPK_BYTES - 4096 - 4 * d_sae * rows if topk else MAX_ENTRY_BYTES
    capacity = min(d_sae, room // (ENTRY_BYTES * rows))
    return ChunkPlan(rows, num_chunks, capacity)


@dataclass(frozen=True)
class EncodePlan:
    """Tiles of the Triton encoder: features x tokens x reduction.

    `token_tiles` are the token widths compiled into one kernel, ascending; the device
    takes the narrowest one that holds the active tokens, and walks with the widest.
    """

    block_f: int
    block_k: int
    token_tiles: tuple[int, ...]
    num_warps: int
    num_stages: int
    programs_per_sm: int


def plan_encode(tokens: int, itemsize: int) -> EncodePlan:
    """Tile sizes for a launch of up to `tokens` active tokens."""
    if itemsize == 4:  # full float32 on the plain cores: small tiles, speed aside
        return EncodePlan(32, 32, (16, 32) if tokens > 16 else (16,), 4, 2, 2)
    if tokens <= 16:
        return EncodePlan(64, 128, (16,), 4, 4, 3)
    if tokens <= 64:
        return EncodePlan(64, 128, (16, 64), 4, 3, 2)
    return EncodePlan(128, 64, (16, 64, 128), 4, 3, 2)


def sorts_ahead(rows: int) -> bool:
    """Whether the CUDA decoder sorts lists in a launch of its own.

    Few tokens want one launch and eight warps a slice; with many, sorting again for
    every slice costs more than the gather.
    """
    return rows > 512
