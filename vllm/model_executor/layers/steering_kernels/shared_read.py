# SPDX-License-Identifier: Apache-2.0
"""Joins what ranks that share an SAE have read of their own features.

Each rank writes rows as `readout.py` does, of its features alone. A token's row of all
features has their sum of active features, the given features of whichever rank has
them, and the largest of the ranks' lists.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from .readout import COUNT, TOP_K, write_best
from .select import sort_key


@triton.jit(do_not_specialize=["T", "held"])
def merge_reads_kernel(
    index,
    table,
    parts,
    keys,
    out,
    table_stride,
    out_stride,
    T,
    held,
    RANKS: tl.constexpr,
    MAX_READ: tl.constexpr,
    OUT_ROW: tl.constexpr,
    N: tl.constexpr,
):
    """Writes `out` of the tokens that `parts` has.

    Args:
        index: int32 `[T]`, each token's row of the reading table.
        table: int32, the reading table.
        parts: int32 `[RANKS, T, OUT_ROW]`; -1 in a row's first column: not read.
        keys: int64 `[T, RANKS * MAX_READ]`, scratch.
        out: int32 `[T, OUT_ROW]`.
        held: features of each rank.
        MAX_READ: the most values of a row, or a greater power of two.
        OUT_ROW: words of a row.
        N: `RANKS * MAX_READ`, rounded up to a power of two.
    """
    place = tl.arange(0, MAX_READ)
    for t in range(tl.program_id(0), T, tl.num_programs(0)):
        t64 = tl.cast(t, tl.int64)
        if tl.load(parts + t64 * OUT_ROW) >= 0:
            row_ptr = table + tl.load(index + t).to(tl.int64) * table_stride
            top_k = tl.load(row_ptr + TOP_K)
            count = tl.load(row_ptr + COUNT)
            wanted = place < count
            own = keys + t64 * RANKS * MAX_READ
            given = tl.zeros([MAX_READ], tl.float32)
            active = 0
            n = 0
            for rank in range(RANKS):
                part = parts + (tl.cast(rank, tl.int64) * T + t64) * OUT_ROW
                active += tl.load(part)
                listed = place < tl.load(part + 1)
                bits = tl.load(part + 2 + place, mask=wanted, other=0)
                given += bits.to(tl.float32, bitcast=True)
                first = part + 2 + count + place
                f = tl.load(first, mask=listed, other=0) + rank * held
                value = tl.load(first + top_k, mask=listed, other=0)
                key = sort_key(value.to(tl.float32, bitcast=True), f)
                tl.store(own + n + place, key, mask=listed)
                n += tl.load(part + 1)
            tl.debug_barrier()
            to = out + t64 * out_stride
            tl.store(to, active)
            tl.store(to + 1, tl.minimum(active, top_k))
            bits = given.to(tl.int32, bitcast=True)
            tl.store(to + 2 + place, bits, mask=wanted)
            best = to + 2 + count
            write_best(own, n, top_k, best, best + top_k, N)
