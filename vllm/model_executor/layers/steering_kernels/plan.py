# SPDX-License-Identifier: Apache-2.0
"""Sizes of the workspace and of the launches: pure functions of shapes."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
MAX_GATHER_BYTES = 96 * MIB  # gathered activations of one chunk
MAX_ENTRY_BYTES = 128 * MIB  # non-zeros of a threshold chunk, or dense TopK scores
MAX_TOPK_BYTES = 152 * MIB  # scores and selected entries of a TopK chunk
PAGE = 4096  # for the alignment of regions
MAX_COEF_BYTES = 4 * MIB  # clamp corrections of one chunk
ENTRY_BYTES = 8  # feature index and activation, packed in one int64
LIST_MAX = 512  # non-zeros of a token that is decoded from a list; more: `dense`
LIST_ROOM = LIST_MAX + 64  # of a list: reading keeps the best and adds a tile's
DENSE_SPLITS = 7  # ranges of features whose sums the dense path adds in order
RECORD_INTS = 32  # ints of a token's record: a cache line
CHUNK_ALIGN = 256  # the widest token tile of the encoder
GUESS_LEAST = 65536  # features; for fewer, storing all scores is faster
GUESS_SAMPLE = 4096  # features whose scores a guess samples
GUESS_CAPACITY = 1024  # candidates of a guess that a list has room for
COMPACT_ENCODE_TOKENS = 256  # the longest step that one launch compacts and encodes


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n < 2)."""
    return 1 << max(n - 1, 0).bit_length()


CLAMP_THREADS = 448  # the most of a block of the clamp kernel
CLAMP_GROUP = 8  # clamps that it encodes at a time
CLAMP_RING = 9  # 16-byte parts of a thread's decoder rows
CLAMP_STATIC = 1024  # bytes of its static shared memory, at most


def clamp_shared_bytes(d_out: int, d_in: int | None, max_clamps: int) -> int:
    """Shared memory of a block of the clamp kernel (csrc/steering/clamp_rows.cuh).

    `d_in`: the width of what a transcoder reads; None for an SAE.
    """
    needed = cdiv(max(d_out, d_in or 0), 8)
    threads = cdiv(cdiv(needed, cdiv(needed, CLAMP_THREADS)), 32) * 32
    rows = [d_out, d_out, d_in or 0]  # hidden, residual, source; in whole warps
    parts = CLAMP_RING * threads + sum(32 * cdiv(row, 256) for row in rows)
    clamps = cdiv(max_clamps, CLAMP_GROUP) * CLAMP_GROUP
    return 16 * parts + 20 * clamps + CLAMP_STATIC


@dataclass(frozen=True)
class ChunkPlan:
    """How the tokens of one step pass through the workspace.

    `rows` active tokens go at a time, in `num_chunks` passes; a list has room for
    `capacity` non-zeros, at least `LIST_ROOM` of them; `dense_rows` tokens with more
    than `LIST_MAX` are reconstructed at a time (0: no token can have more).
    """

    rows: int
    num_chunks: int
    capacity: int
    dense_rows: int


@dataclass(frozen=True)
class ExchangeLimits:
    """Tokens that ranks exchange at a time: of lists and columns (`rows`), and of
    4 bytes for each feature (`scored`)."""

    rows: int
    scored: int


def dense_row_bytes(d_in: int, d_out: int, d_sae: int) -> int:
    """Scratch bytes of a dense token: x, activations of all features, partial sums."""
    size = 2 * d_in + 4 * cdiv(d_sae, 64) * 64 + 4 * DENSE_SPLITS * d_out
    return cdiv(size, 16) * 16


def dense_rows(rows: int, row_bytes: int, room: int) -> int:
    """How many of at most `rows` dense tokens fit `room` bytes, in whole tiles."""
    fit = min(rows, room // row_bytes)
    return fit - fit % 128 if 128 < fit < rows else fit


def most_rows(
    d_in: int,
    d_out: int,
    d_sae: int,
    max_clamps: int,
    itemsize: int,
    topk: bool,
    skip: bool = False,
    *,
    exchanged: ExchangeLimits | None = None,
) -> int:
    """The most active tokens that go through the workspace at a time.

    A step of more tokens is cut into equal chunks, which may have fewer.
    """
    listed = min(d_sae, LIST_ROOM)
    rows = MAX_GATHER_BYTES // (d_in * itemsize + (4 * d_out if skip else 0))
    rows = min(rows, MAX_COEF_BYTES // (4 * max(max_clamps, 1)))
    rows = min(rows, MAX_ENTRY_BYTES // (ENTRY_BYTES * listed))
    if topk:
        rows = min(rows, MAX_ENTRY_BYTES // (4 * d_sae))
        rows = min(rows, (MAX_TOPK_BYTES - PAGE) // (4 * d_sae + ENTRY_BYTES * listed))
    if exchanged is not None:
        rows = min(rows, exchanged.scored if topk else exchanged.rows)
    if rows < 1:
        raise ValueError(
            f"steering: d_in={d_in}, d_sae={d_sae}, max_clamps={max_clamps}: one "
            "token does not fit the workspace; use a narrower SAE or fewer clamps"
        )
    return rows - rows % CHUNK_ALIGN if rows > CHUNK_ALIGN else rows


def plan_chunks(
    tokens: int,
    d_in: int,
    d_out: int,
    d_sae: int,
    max_clamps: int,
    itemsize: int,
    topk: bool,
    skip: bool = False,
    *,
    exchanged: ExchangeLimits | None = None,
) -> ChunkPlan:
    """Chunking of a step of `tokens` tokens, so that every region keeps its limit.

    `skip`: the slot has a skip connection, whose float32 outputs are stored beside x.
    `exchanged`: what ranks that share the SAE can exchange at a time.
    """
    rows = most_rows(
        d_in, d_out, d_sae, max_clamps, itemsize, topk, skip, exchanged=exchanged
    )
    num_chunks = max(cdiv(tokens, rows), 1)
    if num_chunks > 1 and rows > CHUNK_ALIGN:
        rows = cdiv(cdiv(tokens, num_chunks), CHUNK_ALIGN) * CHUNK_ALIGN
    rows = min(rows, max(tokens, 1))
    room = MAX_TOPK_BYTES - PAGE - 4 * d_sae * rows if topk else MAX_ENTRY_BYTES
    capacity = min(d_sae, room // (ENTRY_BYTES * rows))
    dense = 0
    if d_sae > LIST_MAX:
        dense = dense_rows(rows, dense_row_bytes(d_in, d_out, d_sae), room)
        if exchanged is not None:
            dense = min(dense, exchanged.scored)
        if dense < 1:
            raise ValueError(
                f"steering: d_in={d_in}, d_sae={d_sae}: the activations of one token "
                "do not fit the workspace; use a narrower SAE"
            )
    return ChunkPlan(rows, num_chunks, capacity, dense)


def most_guessed(
    d_in: int, d_out: int, d_sae: int, max_clamps: int, itemsize: int
) -> int:
    """The most tokens of a chunk whose TopK is guessed, whole tiles; 0: none is."""
    if d_sae < GUESS_LEAST:
        return 0
    rows = most_rows(d_in, d_out, d_sae, max_clamps, itemsize, topk=False)
    row_bytes = 2 * GUESS_SAMPLE + 4 + ENTRY_BYTES * GUESS_CAPACITY
    rows = min(rows, (MAX_TOPK_BYTES - 3 * PAGE) // row_bytes)
    return rows - rows % CHUNK_ALIGN


def plan_guess(
    tokens: int, d_in: int, d_out: int, d_sae: int, max_clamps: int, itemsize: int
) -> ChunkPlan | None:
    """Chunking of a TopK step whose selection is guessed and verified.

    None where the scores of all tokens fit the workspace at once, which is faster, and
    for narrow SAEs.
    """
    shape = (d_in, d_out, d_sae, max_clamps, itemsize)
    most = most_guessed(*shape)
    if most == 0 or tokens <= most_rows(*shape, topk=True):
        return None
    num_chunks = cdiv(tokens, most)
    rows = cdiv(cdiv(tokens, num_chunks), CHUNK_ALIGN) * CHUNK_ALIGN
    return ChunkPlan(min(rows, tokens), num_chunks, GUESS_CAPACITY, 0)


LEAST_REDUCTION, MOST_REDUCTION = 64, 128  # columns of x that 16-bit tiles multiply


@dataclass(frozen=True)
class EncodePlan:
    """Tiles of the Triton encoder: features x tokens x reduction.

    `token_tiles` are the token widths in one compiled kernel, ascending. The device
    takes the narrowest one that holds the active tokens; if none does, it takes the
    widest several times.
    """

    block_f: int
    block_k: int
    token_tiles: tuple[int, ...]
    num_warps: int
    num_stages: int
    programs_per_sm: int


def plan_encode(tokens: int, itemsize: int, d_in: int) -> EncodePlan:
    """Tile sizes for a launch of up to `tokens` active tokens of width `d_in`.

    A width whose reduction is one block has one block at any number of tokens. Triton
    then starts the sum from the bias; with several blocks it adds the bias at the end.
    So both orders at one width would make a token's bits depend on its batch.
    """
    if itemsize == 4:  # full float32 on the plain cores: small tiles, speed aside
        return EncodePlan(32, 32, (16, 32) if tokens > 16 else (16,), 4, 2, 2)
    if tokens > 64:
        return EncodePlan(128, LEAST_REDUCTION, (16, 64, 128), 4, 3, 2)
    block_k = LEAST_REDUCTION if d_in <= MOST_REDUCTION else MOST_REDUCTION
    if tokens <= 16:
        return EncodePlan(64, block_k, (16,), 4, 4, 3)
    return EncodePlan(64, block_k, (16, 64), 4, 3, 2)


@dataclass(frozen=True)
class DensePlan:
    """Tiles of the Triton kernels for tokens that no list holds.

    They do not depend on the number of tokens, so a token's bits do not either.
    """

    tokens: int
    features: int
    columns: int
    reduction: int


def plan_dense(itemsize: int) -> DensePlan:
    """Tile sizes by the width of the weights."""
    if itemsize == 4:  # full float32 on the plain cores: small tiles, speed aside
        return DensePlan(16, 32, 32, 32)
    return DensePlan(64, 64, 64, 64)


def align(size: int) -> int:
    """`size` rounded up to what TMA and 16-byte accesses want."""
    return cdiv(size, 256) * 256


def short_lists_bytes(plan: ChunkPlan) -> int:
    """Bytes of the lists of a short step that is not read; 0 for a longer one."""
    if plan.rows > COMPACT_ENCODE_TOKENS:
        return 0
    return align(plan.rows * min(plan.capacity, LIST_MAX) * ENTRY_BYTES)


def decodes_at_once(rows: int, room: int, row_bytes: int) -> bool:
    """Whether one launch decodes a chunk, with dense scratch beside the lists.

    `room`: the bytes that the lists leave.
    """
    return rows <= COMPACT_ENCODE_TOKENS and room >= row_bytes


def sorts_ahead(rows: int) -> bool:
    """Whether the CUDA decoder sorts lists in a launch of its own.

    With few tokens, one launch with eight warps a slice is faster. With many, sorting
    again for every slice would cost more than the gather.
    """
    return rows > 512


def warm_up_lengths(max_tokens: int) -> list[int]:
    """Steps of these many tokens take every choice of launches and tiles."""
    ends = {16, 64, 128, 256, 1024}
    lengths = {1, 2, max_tokens} | ends | {end + 1 for end in ends}
    return sorted(length for length in lengths if length <= max_tokens)
