# SPDX-License-Identifier: Apache-2.0
"""A transcoder's skip connection: `b_dec + W_skip x` of active tokens, in float32."""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from .compact import pdl_wait


@triton.jit(do_not_specialize=["base", "rows"])
def skip_kernel(
    x,
    w_skip,
    b_dec,
    count,
    out,
    base,
    rows,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Writes out [rows, D_OUT] of one chunk. Tiles do not depend on the token count."""
    pdl_wait(PDL)
    n = tl.minimum(tl.load(count) - base, rows)
    n_t = tl.cdiv(n, BT)
    for tile in range(tl.program_id(0), n_t * tl.cdiv(D_OUT, BD), tl.num_programs(0)):
        i = tile % n_t * BT + tl.arange(0, BT)
        col = tile // n_t * BD + tl.arange(0, BD)
        acc = tl.zeros([BT, BD], tl.float32)
        for k in range(0, D_IN, BK):
            at = k + tl.arange(0, BK)
            x_mask = (i < n)[:, None] & (at < D_IN)[None, :]
            x_at = i.to(tl.int64)[:, None] * D_IN + at[None, :]
            xk = tl.load(x + x_at, mask=x_mask, other=0.0)
            w_mask = (col < D_OUT)[None, :] & (at < D_IN)[:, None]
            w_at = col.to(tl.int64)[None, :] * D_IN + at[:, None]
            wk = tl.load(w_skip + w_at, mask=w_mask, other=0.0)
            acc = tl.dot(xk, wk, acc, input_precision="ieee")
        acc += tl.load(b_dec + col, mask=col < D_OUT, other=0.0)[None, :]
        at = out + i.to(tl.int64)[:, None] * D_OUT + col[None, :]
        tl.store(at, acc, mask=(i < n)[:, None] & (col < D_OUT)[None, :])
