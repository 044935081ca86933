# SPDX-License-Identifier: Apache-2.0
"""Stage 3 of threshold SAEs: sorts a token's entries and computes clamp coefficients.

Sorting by feature makes the decoder's sum independent of the order in which tiles
appended; entries are int64, feature in the high half, so they sort as integers.
A clamp's coefficient is `g - f`, with `f` from this very list (0 when absent).
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from .clamp import (
    CONDITION_SHIFT,
    clamp_delta,
    holds,
    load_clamps,
    needed_condition,
)
from .compact import RECORD_INTS, note_dense, pdl_wait

LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def entry_feature(entry):
    """The feature index of packed entries."""
    return (entry >> 32).to(tl.int32)


@triton.jit
def entry_value(entry):
    """The activation of packed entries."""
    return (entry & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def sort_by_rank(entries, n, N: tl.constexpr):
    """Sorts n <= N entries in place: each one's rank is the count of smaller ones."""
    i = tl.arange(0, N)
    e = tl.load(entries + i, mask=i < n, other=LAST)
    key = entry_feature(e)
    rank = tl.zeros([N], tl.int32)
    for j in range(0, n, 16):
        other_at = j + tl.arange(0, 16)
        o = tl.load(entries + other_at, mask=other_at < n, other=LAST)
        rank += tl.sum((entry_feature(o)[None, :] < key[:, None]).to(tl.int32), 1)
    tl.debug_barrier()  # all threads have read what is overwritten next
    tl.store(entries + rank, e, mask=i < n)
    tl.debug_barrier()


@triton.jit
def sort_entries(entries, n, LIST_MAX: tl.constexpr):
    """Sorts n <= LIST_MAX entries in place, in a block that fits n."""
    if n <= 128:
        sort_by_rank(entries, n, 128)
    else:
        sort_by_rank(entries, n, LIST_MAX)


@triton.jit
def find_features(own, listed, feature, N: tl.constexpr):
    """Activations [N] of features in a list of `listed` entries, 0 when absent."""
    f = tl.zeros([N], tl.float32)
    for j in range(0, listed, 64):
        at = j + tl.arange(0, 64)
        e = tl.load(own + at, mask=at < listed, other=LAST)
        same = entry_feature(e)[None, :] == feature[:, None]
        f += tl.sum(tl.where(same, entry_value(e)[None, :], 0.0), 1)
    return f


@triton.jit(do_not_specialize=["base", "rows", "capacity"])
def resolve_kernel(
    index,
    table,
    count,
    tokens,
    records,
    sync,
    entries,
    coef,
    table_stride,
    base,
    rows,
    capacity,
    LIST_MAX: tl.constexpr,
    MAX_CLAMPS: tl.constexpr,
    CLAMP_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sorts entries [rows, capacity] and writes coef [rows, MAX_CLAMPS].

    Tokens with more than LIST_MAX non-zeros are listed for the dense path.
    """
    pdl_wait(PDL)
    n = tl.minimum(tl.load(count) - base, rows)
    for i in range(tl.program_id(0), n, tl.num_programs(0)):
        token = tl.load(tokens + i)
        listed = tl.load(records + i * RECORD_INTS)
        if (token >= 0) & (listed > LIST_MAX):
            note_dense(sync, records, i)
        elif token >= 0:
            own = entries + tl.cast(i, tl.int64) * capacity
            sort_entries(own, listed, LIST_MAX)
            row_ptr = table + tl.load(index + token).to(tl.int64) * table_stride
            clamps = tl.load(row_ptr + 1)
            for first in range(0, clamps, CLAMP_BLOCK):
                c = first + tl.arange(0, CLAMP_BLOCK)
                feature, code, value = load_clamps(row_ptr, c, clamps, MAX_CLAMPS)
                f = find_features(own, listed, feature, CLAMP_BLOCK)
                delta = clamp_delta(code, value, f)
                if tl.max(code, 0) >> CONDITION_SHIFT != 0:
                    needs, feature, code, value = needed_condition(
                        row_ptr, code, MAX_CLAMPS
                    )
                    f = find_features(own, listed, feature, CLAMP_BLOCK)
                    delta = tl.where(~needs | holds(code, value, f), delta, 0.0)
                tl.store(coef + i * MAX_CLAMPS + c, delta, mask=c < clamps)
