# SPDX-License-Identifier: Apache-2.0
"""What ranks that share an SAE do around an exchange: pack, merge, write.

A packed row is `[1 + LIST_MAX]` int64: how many features of the rank fire, then their
entries in ascending order. If more than LIST_MAX fire, only the number counts, because
the token is then dense on every rank. Rank r holds features `r F/size ..`, so its
entries follow those of the ranks before it, and the merged list is that of one rank.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from .clamp import read_stream, source_norm
from .compact import DENSE, RECORD_INTS, SKIP_MASK, USES_TOPK
from .resolve import sort_entries


@triton.jit(do_not_specialize=["base", "rows", "capacity", "first_feature"])
def pack_kernel(
    count,
    tokens,
    records,
    entries,
    packed,
    base,
    rows,
    capacity,
    first_feature,
    LIST_MAX: tl.constexpr,
):
    """Writes packed [rows, 1 + LIST_MAX] of one chunk from this rank's entries."""
    n = tl.minimum(tl.load(count) - base, rows)
    at = tl.arange(0, LIST_MAX)
    for i in range(tl.program_id(0), n, tl.num_programs(0)):
        listed = tl.load(records + i * RECORD_INTS)
        to = packed + tl.cast(i, tl.int64) * (1 + LIST_MAX)
        there = (tl.load(tokens + i) >= 0) & (listed <= LIST_MAX)
        tl.store(to, listed.to(tl.int64))
        if there:
            own = entries + tl.cast(i, tl.int64) * capacity
            sort_entries(own, listed, LIST_MAX)
            entry = tl.load(own + at, mask=at < listed, other=0)
            entry += tl.cast(first_feature, tl.int64) << 32
            tl.store(to + 1 + at, entry, mask=at < listed)


@triton.jit(do_not_specialize=["base", "rows", "capacity"])
def merge_kernel(
    count,
    tokens,
    records,
    entries,
    packed,
    base,
    rows,
    capacity,
    RANKS: tl.constexpr,
    LIST_MAX: tl.constexpr,
):
    """Writes entries [rows, capacity] and their number, from packed rows of all ranks.

    `packed` is [RANKS, rows, 1 + LIST_MAX].
    """
    n = tl.minimum(tl.load(count) - base, rows)
    at = tl.arange(0, LIST_MAX)
    step = tl.cast(rows, tl.int64) * (1 + LIST_MAX)
    for i in range(tl.program_id(0), n, tl.num_programs(0)):
        own = packed + tl.cast(i, tl.int64) * (1 + LIST_MAX)
        total = tl.zeros([], tl.int64)
        for r in range(RANKS):
            total += tl.load(own + r * step)
        tl.store(records + i * RECORD_INTS, total.to(tl.int32))
        if (tl.load(tokens + i) >= 0) & (total <= LIST_MAX):
            to = entries + tl.cast(i, tl.int64) * capacity
            for r in range(RANKS):
                listed = tl.load(own + r * step)
                entry = tl.load(own + r * step + 1 + at, mask=at < listed, other=0)
                tl.store(to + at, entry, mask=at < listed)
                to += listed


@triton.jit(do_not_specialize=["base", "rows"])
def order_dense_kernel(
    count,
    tokens,
    records,
    base,
    rows,
    LIST_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lists the dense tokens of a chunk again, in their order. One program.

    `note_dense` lists them in the order in which programs come, which differs from rank
    to rank. The ranks exchange activations by the place in this list.
    """
    n = tl.minimum(tl.load(count) - base, rows)
    total = 0
    for s in range(0, n, BLOCK):
        i = s + tl.arange(0, BLOCK)
        token = tl.load(tokens + i, mask=i < n, other=-1)
        listed = tl.load(records + i * RECORD_INTS, mask=i < n, other=0)
        dense = ((token >= 0) & (listed > LIST_MAX)).to(tl.int32)
        place = total + tl.cumsum(dense, 0) - dense
        tl.store(records + place * RECORD_INTS + DENSE, i, mask=dense != 0)
        total += tl.sum(dense, 0)


@triton.jit(do_not_specialize=["base", "rows", "first_column"])
def place_kernel(
    index,
    count,
    tokens,
    places,
    rows_of,
    hidden,
    residual,
    columns,
    hidden_stride,
    residual_stride,
    base,
    rows,
    first_column,
    W: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FILL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each active token of a chunk: its place (-1: bypassed) and its row.

    FILL: also its own columns of the stream, columns [rows, W].
    """
    n = tl.minimum(tl.load(count) - base, rows)
    for i in range(tl.program_id(0), n, tl.num_programs(0)):
        token = tl.load(tokens + i)
        tl.store(places + i, tl.where(token >= 0, i, -1))
        tl.store(rows_of + i, tl.load(index + tl.maximum(token, 0)))
        if FILL:
            t = tl.maximum(token, 0).to(tl.int64)
            for d in range(0, W, BLOCK):
                col = d + tl.arange(0, BLOCK)
                x = read_stream(
                    hidden + first_column, hidden_stride, residual + first_column,
                    residual_stride, t, col, W, HAS_RESIDUAL,
                )  # fmt: skip
                to = columns + tl.cast(i, tl.int64) * W + col
                tl.store(to, x.to(columns.dtype.element_ty), mask=col < W)


@triton.jit(do_not_specialize=["base", "rows"])
def write_kernel(
    count,
    tokens,
    columns,
    hidden,
    residual,
    saturated,
    hidden_stride,
    residual_stride,
    base,
    rows,
    limit,
    W: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes back the tokens of a chunk from columns [RANKS, rows, W] of all ranks.

    Components are limited already; a token that has one at the limit is counted.
    """
    n = tl.minimum(tl.load(count) - base, rows)
    for i in range(tl.program_id(0), n, tl.num_programs(0)):
        t = tl.load(tokens + i).to(tl.int64)
        if t >= 0:
            wide = tl.zeros([BLOCK], tl.int32)
            for part in range(RANKS):
                own = columns + (tl.cast(part, tl.int64) * rows + i) * W
                for d in range(0, W, BLOCK):
                    col = d + tl.arange(0, BLOCK)
                    x = tl.load(own + col, mask=col < W, other=0.0)
                    wide |= (tl.abs(x.to(tl.float32)) >= limit).to(tl.int32)
                    at = t * hidden_stride + part * W + col
                    if HAS_RESIDUAL:
                        to = residual + t * residual_stride + part * W + col
                        tl.store(to, x, mask=col < W)
                        zero = tl.zeros([BLOCK], hidden.dtype.element_ty)
                        tl.store(hidden + at, zero, mask=col < W)
                    else:
                        tl.store(hidden + at, x, mask=col < W)
            if tl.max(wide, 0) > 0:
                tl.atomic_add(saturated, 1)


@triton.jit(do_not_specialize=["T"])
def steered_kernel(
    index,
    flags,
    table,
    meta,
    norm_limit,
    hidden,
    residual,
    places,
    count,
    active,
    hidden_stride,
    residual_stride,
    table_stride,
    T,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    GATED: tl.constexpr,
    ROW_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """places[t]: t where the delta tier edits the token, else -1; and count [1] = T.

    active [1] becomes 1 if there is a token to edit, its norm aside: that depends on
    integers alone, so it is the same on all ranks. `hidden` is what the encoder reads.
    The norm is computed as the clamp kernel does, so both decide the same; HAS_SOURCE:
    as of what a transcoder reads.
    """
    t = tl.program_id(0).to(tl.int64)
    if t == 0:
        tl.store(count, T)
    row = tl.load(index + t)
    on = tl.load(table + row.to(tl.int64) * table_stride) != 0
    on = on & ((tl.load(flags + t) & tl.load(meta + SKIP_MASK)) == 0)
    if GATED:
        on = on & (tl.load(meta + USES_TOPK) == 0)
    place = -1
    if on:
        tl.store(active, 1)
        if HAS_SOURCE:
            norm = source_norm(hidden, hidden_stride, t, D, BLOCK_D)
        else:
            col = tl.arange(0, ROW_D)
            x = read_stream(
                hidden, hidden_stride, residual, residual_stride, t, col, D,
                HAS_RESIDUAL,
            )  # fmt: skip
            norm = tl.sqrt(tl.sum(x * x, 0))
        if norm <= tl.load(norm_limit):
            place = t.to(tl.int32)
    tl.store(places + t, place)
