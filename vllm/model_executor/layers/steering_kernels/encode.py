# SPDX-License-Identifier: Apache-2.0
"""Stage 2: encodes the active tokens and writes only their non-zeros to memory.

    p = x W_enc^T + b_enc;   emit (i, p_i) where p_i > max(threshold_i, 0)

Features are the rows of the matrix product and tokens its columns. Few tokens then need
only a narrow tile, and W_enc is read once at full bandwidth. Entries of a token are
appended in any order; stage 3 sorts them, which keeps the sum deterministic. For TopK
the scores themselves are stored, since selection needs all of them.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from .compact import RECORD_INTS, pdl_wait


@triton.jit
def scores(
    x,
    w,
    f0,
    t0,
    n,
    F,
    D: tl.constexpr,
    BF: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    FIRST: tl.constexpr = False,
    first=0,
):
    """float32 [BF, BT] tile of W_enc x^T; rows past F and tokens past n are junk.

    FIRST, without TMA: the sum begins at column `first`, a multiple of BK, and ends
    with the columns before it.
    """
    acc = tl.zeros([BF, BT], tl.float32)
    if TMA:
        for k in range(0, D, BK):
            wk = w.load([f0, k])
            xk = x.load([t0, k])
            acc = tl.dot(wk, xk.T, acc, input_precision="ieee")
    else:
        f = f0 + tl.arange(0, BF)
        t = t0 + tl.arange(0, BT)
        w_row = w + f.to(tl.int64)[:, None] * D
        x_row = x + t.to(tl.int64)[None, :] * D
        for k in range(0, D, BK):
            at = k
            if FIRST:
                at = (first + k) % (tl.cdiv(D, BK) * BK)
            col = at + tl.arange(0, BK)
            w_mask = (f[:, None] < F) & (col[None, :] < D)
            wk = tl.load(w_row + col[None, :], mask=w_mask, other=0.0)
            x_mask = (t[None, :] < n) & (col[:, None] < D)
            xk = tl.load(x_row + col[:, None], mask=x_mask, other=0.0)
            acc = tl.dot(wk, xk, acc, input_precision="ieee")
    return acc


@triton.jit
def emit(
    acc,
    b_enc,
    threshold,
    records,
    out,
    f0,
    t0,
    n,
    F,
    capacity,
    BF: tl.constexpr,
    BT: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Bias and activation of one tile; appends its non-zeros, or stores it if DENSE."""
    f = f0 + tl.arange(0, BF)
    t = t0 + tl.arange(0, BT)
    p = acc + tl.load(b_enc + f, mask=f < F, other=float("-inf"))[:, None]
    if DENSE:
        at = out + t.to(tl.int64)[None, :] * F + f[:, None]
        tl.store(at, p, mask=(f[:, None] < F) & (t[None, :] < n))
    else:
        bar = tl.load(threshold + f, mask=f < F, other=float("inf"))
        fires = (p > tl.maximum(bar, 0.0)[:, None]) & (t[None, :] < n)
        counter = records + t[None, :] * RECORD_INTS + tl.zeros([BF, BT], tl.int32)
        slot = tl.atomic_add(counter, 1, mask=fires, sem="relaxed")
        bits = p.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        entry = (f.to(tl.int64)[:, None] << 32) | bits
        at = out + t.to(tl.int64)[None, :] * capacity + slot
        tl.store(at, entry, mask=fires & (slot < capacity))


@triton.jit
def encode_walk(
    x,
    w,
    b_enc,
    threshold,
    records,
    out,
    n,
    F,
    capacity,
    D: tl.constexpr,
    BF: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Computes all tiles of this program, in an order that keeps a group of tokens in
    L2."""
    n_f = tl.cdiv(F, BF)
    n_t = tl.cdiv(n, BT)
    for tile in range(tl.program_id(0), n_f * n_t, tl.num_programs(0)):
        first = tile // (GROUP * n_f) * GROUP
        width = tl.minimum(n_t - first, GROUP)
        rest = tile % (GROUP * n_f)
        t0 = (first + rest % width) * BT
        f0 = rest // width * BF
        acc = scores(
            x=x, w=w, f0=f0, t0=t0, n=n, F=F, D=D, BF=BF, BT=BT, BK=BK, TMA=TMA
        )
        emit(
            acc=acc, b_enc=b_enc, threshold=threshold, records=records, out=out,
            f0=f0, t0=t0, n=n, F=F, capacity=capacity, BF=BF, BT=BT, DENSE=DENSE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["base", "rows", "F", "capacity"])
def encode_kernel(
    x_narrow,
    x_middle,
    x_wide,
    w,
    b_enc,
    threshold,
    count,
    records,
    out,
    base,
    rows,
    F,
    capacity,
    D: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    BT_NARROW: tl.constexpr,
    BT_MIDDLE: tl.constexpr,
    BT_WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    DENSE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Encodes one chunk; `out` is int64 entries [rows, capacity] or float32 [rows, F].

    The device chooses the token tile by the number of active tokens. If 5 of the 256
    tokens of a captured step are active, the step costs as much as one of 5 tokens.
    """
    pdl_wait(PDL)
    n = tl.minimum(tl.load(count) - base, rows)
    if n <= 0:
        return
    if n <= BT_NARROW or BT_WIDE == BT_NARROW:
        encode_walk(
            x=x_narrow, w=w, b_enc=b_enc, threshold=threshold, records=records,
            out=out, n=n, F=F, capacity=capacity, D=D, BF=BF, BT=BT_NARROW,
            BK=BK, GROUP=GROUP, TMA=TMA, DENSE=DENSE,
        )  # fmt: skip
    elif n <= BT_MIDDLE or BT_WIDE == BT_MIDDLE:
        if BT_MIDDLE != BT_NARROW:
            encode_walk(
                x=x_middle, w=w, b_enc=b_enc, threshold=threshold, records=records,
                out=out, n=n, F=F, capacity=capacity, D=D, BF=BF, BT=BT_MIDDLE,
                BK=BK, GROUP=GROUP, TMA=TMA, DENSE=DENSE,
            )  # fmt: skip
    elif BT_WIDE != BT_MIDDLE:
        encode_walk(
            x=x_wide, w=w, b_enc=b_enc, threshold=threshold, records=records,
            out=out, n=n, F=F, capacity=capacity, D=D, BF=BF, BT=BT_WIDE,
            BK=BK, GROUP=GROUP, TMA=TMA, DENSE=DENSE,
        )  # fmt: skip
