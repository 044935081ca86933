# SPDX-License-Identifier: Apache-2.0
"""Stage 4: directions times coefficients, one rounding, the exact write-back.

    full:  x' = b_dec + sum_i f_i W_dec[i] + sum_c (g_c - f_c) W_dec[c]
    delta: x' = x + sum_c (g_c - f_c) W_dec[c]

A program owns one token and one slice of D. Slices are the slow index of the walk, so
that at any moment the rows of W_dec being gathered are narrow enough to stay in L2.
The order of the sum depends on the token alone, never on its batch.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from .clamp import clamp_delta, load_clamps, write_stream
from .compact import D_SAE, RECORD_INTS, SATURATED, pdl_wait
from .resolve import entry_feature, entry_value
from .select import RELU_FIELD, load_keys


@triton.jit
def add_rows(acc, w_dec, feature, weight, inside, col, D: tl.constexpr):
    """acc [NB, BD] += weight [NB] * W_dec[feature [NB], col [BD]]."""
    at = feature.to(tl.int64)[:, None] * D + col[None, :]
    mask = inside[:, None] & (col < D)[None, :]
    w = tl.load(w_dec + at, mask=mask, other=0.0)
    return acc + weight[:, None] * w.to(tl.float32)


@triton.jit
def dense_token(
    x_row,
    scores_row,
    kth,
    row_ptr,
    w_enc,
    b_enc,
    threshold,
    w_dec,
    meta,
    col,
    D: tl.constexpr,
    MAX_CLAMPS: tl.constexpr,
    TOPK: tl.constexpr,
    NF: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """The overflow path: every feature of one token, correct for any number of them.

    Threshold activations are encoded again here; TopK ones are in the scores.
    """
    d_sae = tl.load(meta + D_SAE)
    relu = tl.load(meta + RELU_FIELD)
    clamps = tl.load(row_ptr + 1)
    acc = tl.zeros([BD], tl.float32)
    for f0 in range(0, d_sae, NF):
        f = f0 + tl.arange(0, NF)
        inside = f < d_sae
        if TOPK:
            p = tl.load(scores_row + f, mask=inside, other=0.0)
            chosen = inside & (load_keys(scores_row, f, d_sae) >= kth)
            act = tl.where(chosen & ((p > 0.0) | (relu == 0)), p, 0.0)
        else:
            dot = tl.zeros([NF, BK], tl.float32)
            for k in range(0, D, BK):
                at = k + tl.arange(0, BK)
                xk = tl.load(x_row + at, mask=at < D, other=0.0).to(tl.float32)
                w_at = f.to(tl.int64)[:, None] * D + at[None, :]
                mask = inside[:, None] & (at < D)[None, :]
                w = tl.load(w_enc + w_at, mask=mask, other=0.0)
                dot += w.to(tl.float32) * xk[None, :]
            p = tl.sum(dot, 1) + tl.load(b_enc + f, mask=inside, other=float("-inf"))
            bar = tl.load(threshold + f, mask=inside, other=float("inf"))
            act = tl.where(p > tl.maximum(bar, 0.0), p, 0.0)
        weight = act
        for c in range(clamps):
            feature, code, value = load_clamps(row_ptr, c, clamps, MAX_CLAMPS)
            delta = clamp_delta(code, value, act)
            weight += tl.where(f == feature, delta, 0.0)
        block = tl.zeros([NF, BD], tl.float32)
        acc += tl.sum(add_rows(block, w_dec, f, weight, inside, col, D), 0)
    return acc


@triton.jit(do_not_specialize=["base", "rows", "F", "capacity"])
def combine_kernel(
    index,
    table,
    meta,
    count,
    tokens,
    records,
    entries,
    kth,
    coef,
    x,
    scores,
    w_enc,
    b_enc,
    threshold,
    w_dec,
    b_dec,
    hidden,
    residual,
    saturated,
    hidden_stride,
    residual_stride,
    table_stride,
    base,
    rows,
    F,
    capacity,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    MAX_CLAMPS: tl.constexpr,
    DELTA: tl.constexpr,
    TOPK: tl.constexpr,
    NB: tl.constexpr,
    BD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Writes hidden and residual of every token of one chunk."""
    pdl_wait(PDL)
    n = tl.minimum(tl.load(count) - base, rows)
    slices: tl.constexpr = (D + BD - 1) // BD
    for work in range(tl.program_id(0), n * slices, tl.num_programs(0)):
        i = work % n
        token = tl.load(tokens + i)
        if token >= 0:
            col = work // n * BD + tl.arange(0, BD)
            row_ptr = table + tl.load(index + token).to(tl.int64) * table_stride
            i64 = tl.cast(i, tl.int64)
            listed = 0
            if not DELTA:
                listed = tl.load(records + i * RECORD_INTS)
            if listed <= capacity:
                acc = tl.zeros([NB, BD], tl.float32)
                own = entries + i64 * capacity
                for j in range(0, listed, NB):
                    at = j + tl.arange(0, NB)
                    e = tl.load(own + at, mask=at < listed, other=0)
                    acc = add_rows(
                        acc, w_dec, entry_feature(e), entry_value(e), at < listed,
                        col, D,
                    )  # fmt: skip
                clamps = tl.load(row_ptr + 1)
                for j in range(0, clamps, NB):
                    c = j + tl.arange(0, NB)
                    inside = c < clamps
                    feature = tl.load(row_ptr + 2 + c, mask=inside, other=0)
                    delta = tl.load(coef + i * MAX_CLAMPS + c, mask=inside, other=0.0)
                    acc = add_rows(acc, w_dec, feature, delta, inside, col, D)
                out = tl.sum(acc, 0)
            else:
                out = dense_token(
                    x_row=x + i64 * D, scores_row=scores + i64 * F,
                    kth=tl.load(kth + i), row_ptr=row_ptr,
                    w_enc=w_enc, b_enc=b_enc, threshold=threshold,
                    w_dec=w_dec, meta=meta, col=col,
                    D=D, MAX_CLAMPS=MAX_CLAMPS, TOPK=TOPK, NF=16, BD=BD, BK=128,
                )  # fmt: skip
            if DELTA:
                start = tl.load(x + i64 * D + col, mask=col < D, other=0.0)
                out += start.to(tl.float32)
            else:
                out += tl.load(b_dec + col, mask=col < D, other=0.0)
            over = write_stream(
                out=out, hidden=hidden, hidden_stride=hidden_stride,
                residual=residual, residual_stride=residual_stride,
                t=token.to(tl.int64), col=col, mask=col < D,
                HAS_RESIDUAL=HAS_RESIDUAL,
            )  # fmt: skip
            if over > 0:
                counted = records + i * RECORD_INTS + SATURATED
                if tl.atomic_xchg(counted, 1) == 0:
                    tl.atomic_add(saturated, 1)
