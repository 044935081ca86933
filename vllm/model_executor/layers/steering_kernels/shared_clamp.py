# SPDX-License-Identifier: Apache-2.0
"""The delta tier of a threshold SAE that ranks share, in two kernels.

    x' = x + sum_c (g_c - f_c) W_dec[c],   f_c = act(x . W_enc[c] + b_enc[c])

Each rank computes the activations of its own features among a token's clamps and
conditions. After they have been exchanged, each computes its own columns. Both do it as
`clamp.py` does, so the bits are the same.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from .clamp import (
    CONDITION_SHIFT,
    clamp_delta,
    encode_clamps,
    holds,
    load_clamps,
    needed_condition,
    read_stream,
    reads_activation,
    write_stream,
)


@triton.jit(do_not_specialize=["first_feature", "features"])
def clamp_acts_kernel(
    index, table, places, w_enc, b_enc, threshold, hidden, residual, acts,
    hidden_stride, residual_stride, table_stride, first_feature, features,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, MAX_CLAMPS: tl.constexpr,
    NC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """acts [T, MAX_CLAMPS]: f of each clamp and condition whose feature is this rank's.

    One program a token. Places of other ranks' features are 0.
    """
    t = tl.program_id(0).to(tl.int64)
    if tl.load(places + t) >= 0:
        row_ptr = table + tl.load(index + t).to(tl.int64) * table_stride
        count = tl.load(row_ptr + 1)
        for first in range(0, count, NC):
            c = first + tl.arange(0, NC)
            feature, code, _ = load_clamps(row_ptr, c, count, MAX_CLAMPS)
            local = feature - first_feature
            needs = (c < count) & reads_activation(code)
            needs = needs & (local >= 0) & (local < features)
            f = tl.zeros([NC], tl.float32)
            if tl.max(needs.to(tl.int32), 0) != 0:
                f = encode_clamps(
                    feature=local, needs=needs, w_enc=w_enc, b_enc=b_enc,
                    threshold=threshold, hidden=hidden, hidden_stride=hidden_stride,
                    residual=residual, residual_stride=residual_stride, source=hidden,
                    source_stride=0, t=t, D_IN=D, HAS_RESIDUAL=HAS_RESIDUAL,
                    HAS_SOURCE=False, NC=NC, BLOCK_D=BLOCK_D,
                )  # fmt: skip
            tl.store(acts + t * MAX_CLAMPS + c, f, mask=c < count)


@triton.jit
def exchanged(acts, feature, place, mask, features, step):
    """f [NC] of features, from the ranks that own them; 0 outside the mask."""
    owner = (feature // features).to(tl.int64)
    return tl.load(acts + owner * step + place, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["first_column", "features", "T"])
def clamp_columns_kernel(
    index, table, places, w_dec, hidden, residual, acts, columns,
    hidden_stride, residual_stride, table_stride, first_column, features, T,
    W: tl.constexpr, HAS_RESIDUAL: tl.constexpr, MAX_CLAMPS: tl.constexpr,
    NC: tl.constexpr, ROW_W: tl.constexpr,
):  # fmt: skip
    """columns [T, W]: this rank's columns of each edited token, limited and rounded.

    `acts` is [ranks, T, MAX_CLAMPS], of `clamp_acts_kernel` on each rank.
    """
    t = tl.program_id(0).to(tl.int64)
    if tl.load(places + t) >= 0:
        row_ptr = table + tl.load(index + t).to(tl.int64) * table_stride
        count = tl.load(row_ptr + 1)
        col = tl.arange(0, ROW_W)
        out = read_stream(
            hidden + first_column, hidden_stride, residual + first_column,
            residual_stride, t, col, W, HAS_RESIDUAL,
        )  # fmt: skip
        own = acts + t * MAX_CLAMPS
        step = tl.cast(T, tl.int64) * MAX_CLAMPS
        for first in range(0, count, NC):
            c = first + tl.arange(0, NC)
            feature, code, value = load_clamps(row_ptr, c, count, MAX_CLAMPS)
            used = (c < count) & reads_activation(code)
            f = exchanged(own, feature, c, used, features, step)
            delta = clamp_delta(code, value, f)
            if tl.max(code, 0) >> CONDITION_SHIFT != 0:
                needs, other, kind, bar = needed_condition(row_ptr, code, MAX_CLAMPS)
                place = (code >> CONDITION_SHIFT) - 1
                f = exchanged(own, other, place, needs, features, step)
                delta = tl.where(~needs | holds(kind, bar, f), delta, 0.0)
            for j in tl.static_range(NC):  # unrolled, so that all rows load at once
                there = first + j < count
                at = tl.load(row_ptr + 2 + first + j, mask=there, other=0)
                scale = tl.sum(tl.where(tl.arange(0, NC) == j, delta, 0.0), 0)
                from_row = w_dec + at.to(tl.int64) * W + col
                w = tl.load(from_row, mask=(col < W) & there, other=0.0)
                out += scale * w.to(tl.float32)
        write_stream(
            out=out, hidden=columns, hidden_stride=W, residual=columns,
            residual_stride=W, t=t, col=col, mask=col < W, HAS_RESIDUAL=False,
        )  # fmt: skip
