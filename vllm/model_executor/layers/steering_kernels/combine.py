# SPDX-License-Identifier: Apache-2.0
"""Stage 4: directions times coefficients, one rounding, the exact write-back.

    full:  x' = b_dec + sum_i f_i W_dec[i] + sum_c (g_c - f_c) W_dec[c]
    delta: x' = x + sum_c (g_c - f_c) W_dec[c]

A program owns one token and one slice of D. Programs walk all tokens of one slice
before the next slice, so that the parts of W_dec in use fit L2. The order of a sum
depends only on its token, never on the batch.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from .clamp import read_stream, write_stream
from .compact import RECORD_INTS, SATURATED, pdl_wait
from .resolve import entry_feature, entry_value


@triton.jit
def add_rows(acc, w_dec, feature, weight, inside, col, D: tl.constexpr):
    """acc [NB, BD] += weight [NB] * W_dec[feature [NB], col [BD]]."""
    at = feature.to(tl.int64)[:, None] * D + col[None, :]
    mask = inside[:, None] & (col < D)[None, :]
    w = tl.load(w_dec + at, mask=mask, other=0.0)
    return acc + weight[:, None] * w.to(tl.float32)


@triton.jit
def sum_of_rows(
    own,
    listed,
    row_ptr,
    coef,
    w_dec,
    col,
    D: tl.constexpr,
    NB: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum [BD] over a token's entries, then over its clamps."""
    acc = tl.zeros([NB, BD], tl.float32)
    for j in range(0, listed, NB):
        at = j + tl.arange(0, NB)
        e = tl.load(own + at, mask=at < listed, other=0)
        acc = add_rows(
            acc, w_dec, entry_feature(e), entry_value(e), at < listed, col, D
        )
    clamps = tl.load(row_ptr + 1)
    for j in range(0, clamps, NB):
        c = j + tl.arange(0, NB)
        inside = c < clamps
        feature = tl.load(row_ptr + 2 + c, mask=inside, other=0)
        delta = tl.load(coef + c, mask=inside, other=0.0)
        acc = add_rows(acc, w_dec, feature, delta, inside, col, D)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["base", "rows", "capacity"])
def combine_kernel(
    index,
    table,
    count,
    tokens,
    records,
    entries,
    coef,
    x,
    skip,
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
    capacity,
    LIST_MAX: tl.constexpr,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    MAX_CLAMPS: tl.constexpr,
    DELTA: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    NB: tl.constexpr,
    BD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Writes hidden and residual of the tokens of one chunk that lists hold."""
    pdl_wait(PDL)
    n = tl.minimum(tl.load(count) - base, rows)
    slices: tl.constexpr = (D + BD - 1) // BD
    for work in range(tl.program_id(0), n * slices, tl.num_programs(0)):
        i = work % n
        token = tl.load(tokens + i)
        listed = 0
        if not DELTA:
            listed = tl.load(records + i * RECORD_INTS)
        if (token >= 0) & (listed <= LIST_MAX):
            col = work // n * BD + tl.arange(0, BD)
            row_ptr = table + tl.load(index + token).to(tl.int64) * table_stride
            i64 = tl.cast(i, tl.int64)
            out = sum_of_rows(
                own=entries + i64 * capacity, listed=listed, row_ptr=row_ptr,
                coef=coef + i * MAX_CLAMPS, w_dec=w_dec, col=col, D=D, NB=NB, BD=BD,
            )  # fmt: skip
            if DELTA and HAS_SOURCE:
                out += read_stream(
                    hidden, hidden_stride, residual, residual_stride,
                    token.to(tl.int64), col, D, HAS_RESIDUAL,
                )  # fmt: skip
            elif DELTA:
                start = tl.load(x + i64 * D + col, mask=col < D, other=0.0)
                out += start.to(tl.float32)
            elif HAS_SKIP:
                out += tl.load(skip + i64 * D + col, mask=col < D, other=0.0)
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
