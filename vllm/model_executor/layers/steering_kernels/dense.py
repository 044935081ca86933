# SPDX-License-Identifier: Apache-2.0
"""Reconstructs the tokens that have more non-zeros than a list holds.

    x' = b_dec + sum_i f_i W_dec[i] + sum_c (g_c - f_c) W_dec[c]

A token is dense if it has more than `LIST_MAX` non-zeros. That depends on the token
alone, so its bits are the same in any batch. Its activations are computed again as a
dense row (TopK has them as scores) and multiplied by W_dec in tiles. If W_dec has 16
bits, an activation is the sum of two 16-bit numbers, so that the product keeps 16 bits
of it.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from .clamp import clamp_delta, holds, limited, needed_condition
from .compact import (
    D_SAE,
    DENSE,
    DENSE_COUNT,
    RECORD_INTS,
    SATURATED,
    pdl_wait,
)
from .select import RELU_FIELD, sort_key


@triton.jit
def dense_tokens(records, sync, base, rows, t0, BT: tl.constexpr):
    """(how many tokens the chunk has, which are `t0` onwards, which of them are)."""
    n = tl.minimum(tl.load(sync + DENSE_COUNT) - base, rows)
    t = t0 + tl.arange(0, BT)
    which = tl.load(records + (base + t) * RECORD_INTS + DENSE, mask=t < n, other=0)
    return n, which, t < n


@triton.jit(do_not_specialize=["base", "rows", "F"])
def encode_dense_kernel(
    x,
    w_enc,
    b_enc,
    threshold,
    records,
    sync,
    acts,
    acts_stride,
    base,
    rows,
    F,
    D: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Writes acts [rows, F] of a chunk of dense tokens of a threshold SAE."""
    pdl_wait(PDL)
    n = tl.minimum(tl.load(sync + DENSE_COUNT) - base, rows)
    n_t = tl.cdiv(n, BT)
    for tile in range(tl.program_id(0), n_t * tl.cdiv(F, BF), tl.num_programs(0)):
        t0 = tile % n_t * BT
        _, which, there = dense_tokens(records, sync, base, rows, t0, BT)
        f = tile // n_t * BF + tl.arange(0, BF)
        x_row = x + which.to(tl.int64)[:, None] * D
        w_row = w_enc + f.to(tl.int64)[None, :] * D
        acc = tl.zeros([BT, BF], tl.float32)
        for k in range(0, D, BK):
            col = k + tl.arange(0, BK)
            x_mask = there[:, None] & (col < D)[None, :]
            xk = tl.load(x_row + col[None, :], mask=x_mask, other=0.0)
            w_mask = (f < F)[None, :] & (col < D)[:, None]
            wk = tl.load(w_row + col[:, None], mask=w_mask, other=0.0)
            acc = tl.dot(xk, wk, acc, input_precision="ieee")
        p = acc + tl.load(b_enc + f, mask=f < F, other=float("-inf"))[None, :]
        bar = tl.load(threshold + f, mask=f < F, other=float("inf"))
        act = tl.where(p > tl.maximum(bar, 0.0)[None, :], p, 0.0)
        t = t0 + tl.arange(0, BT)
        at = acts + t.to(tl.int64)[:, None] * acts_stride + f[None, :]
        tl.store(at, act, mask=there[:, None] & (f < F)[None, :])


@triton.jit
def load_acts(acts_row, kth, f, there, d_sae, relu, TOPK: tl.constexpr):
    """Activations [BT, BF] of features f; rows of scores for TopK."""
    mask = there[:, None] & (f < d_sae)[None, :]
    p = tl.load(acts_row + f[None, :], mask=mask, other=0.0)
    if TOPK:
        chosen = sort_key(p, f[None, :]) >= kth[:, None]
        p = tl.where(mask & chosen & ((p > 0.0) | (relu == 0)), p, 0.0)
    return p


@triton.jit
def multiply_acts(acc, act, w):
    """acc + act W; two products of 16-bit numbers where W has 16 bits."""
    dtype: tl.constexpr = w.dtype
    if dtype == tl.float32:
        return tl.dot(act, w, acc, input_precision="ieee")
    high = act.to(dtype)
    acc = tl.dot(high, w, acc)
    return tl.dot((act - high.to(tl.float32)).to(dtype), w, acc)


@triton.jit
def add_clamps(
    out,
    index,
    table,
    table_stride,
    token,
    which,
    there,
    coef,
    acts,
    place,
    acts_stride,
    w_dec,
    col,
    D: tl.constexpr,
    MAX_CLAMPS: tl.constexpr,
    TOPK: tl.constexpr,
):
    """out [BT, BD] plus the corrections of each token's clamps, in their order."""
    row = tl.load(index + token, mask=there, other=0)
    row_ptr = table + row.to(tl.int64) * table_stride
    count = tl.load(row_ptr + 1, mask=there, other=0)
    for c in range(0, tl.max(count, 0)):
        inside = there & (c < count)
        feature = tl.load(row_ptr + 2 + c, mask=inside, other=0)
        if TOPK:
            delta = tl.load(coef + which * MAX_CLAMPS + c, mask=inside, other=0.0)
        else:
            code = tl.load(row_ptr + 2 + MAX_CLAMPS + c, mask=inside, other=1)
            bits = tl.load(row_ptr + 2 + 2 * MAX_CLAMPS + c, mask=inside, other=0)
            own = acts + place.to(tl.int64) * acts_stride + feature
            f_c = tl.load(own, mask=inside, other=0.0)
            delta = clamp_delta(code, bits.to(tl.float32, bitcast=True), f_c)
            needs, other, code, value = needed_condition(row_ptr, code, MAX_CLAMPS)
            own = acts + place.to(tl.int64) * acts_stride + other
            f_c = tl.load(own, mask=inside & needs, other=0.0)
            delta = tl.where(~needs | holds(code, value, f_c), delta, 0.0)
        w_at = feature.to(tl.int64)[:, None] * D + col[None, :]
        w_mask = inside[:, None] & (col < D)[None, :]
        w = tl.load(w_dec + w_at, mask=w_mask, other=0.0).to(tl.float32)
        out += tl.where(inside, delta, 0.0)[:, None] * w
    return out


@triton.jit
def write_dense(
    out,
    hidden,
    hidden_stride,
    residual,
    residual_stride,
    token,
    there,
    col,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """The exact write-back of a tile; returns 1 where a component was limited."""
    mask = there[:, None] & (col < D)[None, :]
    out, over = limited(out, mask, hidden.dtype.element_ty)
    t = token.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        residual_at = residual + t * residual_stride + col[None, :]
        tl.store(residual_at, out.to(residual.dtype.element_ty), mask=mask)
        out = tl.zeros(out.shape, tl.float32)
    hidden_at = hidden + t * hidden_stride + col[None, :]
    tl.store(hidden_at, out.to(hidden.dtype.element_ty), mask=mask)
    return over


@triton.jit
def count_saturated(records, which, over, saturated, BT: tl.constexpr):
    """Counts the tokens of a tile with a limited component, each once a step."""
    wide = tl.max(over, 1) > 0
    counted = records + which * RECORD_INTS + SATURATED
    old = tl.atomic_xchg(counted, tl.full([BT], 1, tl.int32), mask=wide)
    fresh = tl.sum((wide & (old == 0)).to(tl.int32), 0)
    if fresh > 0:
        tl.atomic_add(saturated, fresh)


@triton.jit(do_not_specialize=["base", "rows", "acts_stride"])
def decode_dense_kernel(
    index,
    table,
    meta,
    tokens,
    records,
    sync,
    kth,
    coef,
    acts,
    skip,
    w_dec,
    b_dec,
    hidden,
    residual,
    saturated,
    acts_stride,
    hidden_stride,
    residual_stride,
    table_stride,
    base,
    rows,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    MAX_CLAMPS: tl.constexpr,
    TOPK: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Writes hidden and residual of a chunk of dense tokens.

    `acts` are activations by place in the chunk, or for TopK scores by token.
    """
    pdl_wait(PDL)
    d_sae = tl.load(meta + D_SAE)
    relu = tl.load(meta + RELU_FIELD)
    dtype: tl.constexpr = w_dec.dtype.element_ty
    # float16's range is small, so activations are divided by 16. They may reach 1e6.
    unit: tl.constexpr = 16.0 if dtype == tl.float16 else 1.0
    n = tl.minimum(tl.load(sync + DENSE_COUNT) - base, rows)
    n_t = tl.cdiv(n, BT)
    for tile in range(tl.program_id(0), n_t * tl.cdiv(D, BD), tl.num_programs(0)):
        t0 = tile % n_t * BT
        _, which, there = dense_tokens(records, sync, base, rows, t0, BT)
        token = tl.load(tokens + which, mask=there, other=-1)
        there = there & (token >= 0)
        col = tile // n_t * BD + tl.arange(0, BD)
        bar = tl.load(kth + which, mask=there, other=0)
        place = which if TOPK else t0 + tl.arange(0, BT)
        acts_row = acts + place.to(tl.int64)[:, None] * acts_stride
        acc = tl.zeros([BT, BD], tl.float32)
        for f0 in range(0, d_sae, BF):
            f = f0 + tl.arange(0, BF)
            act = load_acts(acts_row, bar, f, there, d_sae, relu, TOPK) / unit
            w_at = f.to(tl.int64)[:, None] * D + col[None, :]
            w_mask = (f < d_sae)[:, None] & (col < D)[None, :]
            acc = multiply_acts(acc, act, tl.load(w_dec + w_at, mask=w_mask, other=0.0))
        out = acc * unit
        if HAS_SKIP:
            at = skip + which.to(tl.int64)[:, None] * D + col[None, :]
            mask = there[:, None] & (col < D)[None, :]
            out += tl.load(at, mask=mask, other=0.0)
        else:
            out += tl.load(b_dec + col, mask=col < D, other=0.0)[None, :]

        out = add_clamps(
            out=out, index=index, table=table, table_stride=table_stride, token=token,
            which=which, there=there, coef=coef, acts=acts, place=place,
            acts_stride=acts_stride, w_dec=w_dec, col=col, D=D, MAX_CLAMPS=MAX_CLAMPS,
            TOPK=TOPK,
        )  # fmt: skip
        over = write_dense(
            out=out, hidden=hidden, hidden_stride=hidden_stride, residual=residual,
            residual_stride=residual_stride, token=token, there=there, col=col, D=D,
            HAS_RESIDUAL=HAS_RESIDUAL,
        )  # fmt: skip
        count_saturated(records, which, over, saturated, BT)
