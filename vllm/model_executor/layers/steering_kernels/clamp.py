# SPDX-License-Identifier: Apache-2.0
"""The delta tier of threshold SAEs, and the additive tier, in one kernel a site.

    x' = x + sum_c (g_c - f_c) W_dec[c],   f_c = act(x . W_enc[c] + b_enc[c])

The kernel reads only the clamped features' rows. An additive clamp without a condition
does not read the encoder. A steering vector is such a clamp along its own direction; if
it does more than add, f_c is the projection of x on the vector.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from .compact import SKIP_MASK, USES_TOPK, pdl_wait

ADDITIVE = tl.constexpr(1)  # layers/steering_state.py, codes of clamps
SCALE = tl.constexpr(2)
CONDITION = tl.constexpr(3)
KIND_BITS = tl.constexpr(3)
ONLY_IF_ACTIVE = tl.constexpr(4)
PROJECTION = tl.constexpr(8)
RELATIVE = tl.constexpr(16)
IF_BELOW = tl.constexpr(32)
IF_ABOVE = tl.constexpr(64)
CONDITION_SHIFT = tl.constexpr(8)
EFFECT = tl.constexpr(255)  # the bits below CONDITION_SHIFT
COEFFICIENT_LIMIT = tl.constexpr(2.0**96)  # of steering_state.py, as STREAM_LIMIT
STREAM_LIMIT = tl.constexpr(2.0**56)
STREAM_LIMIT_FLOAT16 = tl.constexpr(2.0**15)
LARGEST = tl.constexpr(3.4028234663852886e38)  # float32's maximum


@triton.jit
def reads_activation(code):
    """Whether a clamp's change depends on its feature's activation."""
    return (code & EFFECT) != ADDITIVE


@triton.jit
def holds(code, value, f):
    """Whether `f` is above or below the value of a clamp or condition that asks."""
    above = ((code & IF_ABOVE) == 0) | (f > value)
    return above & (((code & IF_BELOW) == 0) | (f < value))


@triton.jit
def limit_coefficient(delta):
    delta = tl.where(delta <= COEFFICIENT_LIMIT, delta, COEFFICIENT_LIMIT)
    return tl.where(delta >= -COEFFICIENT_LIMIT, delta, -COEFFICIENT_LIMIT)


@triton.jit
def clamp_delta(code, value, f):
    """`g - f` of a block of clamps, limited, given the activations `f`.

    The conditions of other places (`needed_condition`) are left to the caller.
    """
    kind = code & KIND_BITS
    scaled = tl.where(kind == SCALE, f * value - f, value - f)
    delta = limit_coefficient(tl.where(kind == ADDITIVE, value, scaled))
    acts = holds(code, value, f) & (kind != CONDITION)
    acts = acts & (((code & ONLY_IF_ACTIVE) == 0) | (f != 0.0))
    return tl.where(acts, delta, 0.0)


@triton.jit
def needed_condition(row_ptr, code, MAX_CLAMPS: tl.constexpr):
    """(needs one, its feature, code, value): the conditions of a block of clamps."""
    place = (code >> CONDITION_SHIFT) - 1
    needs = place >= 0
    feature = tl.load(row_ptr + 2 + place, mask=needs, other=0)
    own = tl.load(row_ptr + 2 + MAX_CLAMPS + place, mask=needs, other=0)
    bits = tl.load(row_ptr + 2 + 2 * MAX_CLAMPS + place, mask=needs, other=0)
    return needs, feature, own, bits.to(tl.float32, bitcast=True)


@triton.jit
def load_clamps(row_ptr, c, count, MAX_CLAMPS: tl.constexpr):
    """(feature, code, value) of clamps `c` of a packed table row; past `count`: no-op.

    The no-op is an additive clamp of zero.
    """
    inside = c < count
    feature = tl.load(row_ptr + 2 + c, mask=inside, other=0)
    code = tl.load(row_ptr + 2 + MAX_CLAMPS + c, mask=inside, other=1)
    bits = tl.load(row_ptr + 2 + 2 * MAX_CLAMPS + c, mask=inside, other=0)
    return feature, code, bits.to(tl.float32, bitcast=True)


@triton.jit
def read_stream(
    hidden,
    hidden_stride,
    residual,
    residual_stride,
    t,
    col,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """hidden[t] + residual[t], rounded to the model's dtype, as float32."""
    h = tl.load(hidden + t * hidden_stride + col, mask=col < D, other=0.0)
    if HAS_RESIDUAL:
        r = tl.load(residual + t * residual_stride + col, mask=col < D, other=0.0)
        h = (h.to(tl.float32) + r.to(tl.float32)).to(h.dtype)
    return h.to(tl.float32)


@triton.jit
def limited(out, mask, dtype: tl.constexpr):
    """Components limited to what may be written, and 1 where a component changed."""
    limit: tl.constexpr = STREAM_LIMIT_FLOAT16 if dtype == tl.float16 else STREAM_LIMIT
    over = (mask & ~(tl.abs(out) <= limit)).to(tl.int32)
    out = tl.where(out >= -limit, out, -limit)
    return tl.where(out <= limit, out, limit), over


@triton.jit
def write_stream(
    out,
    hidden,
    hidden_stride,
    residual,
    residual_stride,
    t,
    col,
    mask,
    HAS_RESIDUAL: tl.constexpr,
):
    """The exact write-back: residual := out, hidden := 0 (hidden := out when alone).

    Components are limited first; returns how many that changed. NaN takes the lower
    limit.
    """
    dtype = hidden.dtype.element_ty
    out, over = limited(out, mask, dtype)
    if HAS_RESIDUAL:
        tl.store(residual + t * residual_stride + col, out.to(dtype), mask=mask)
        zero = tl.zeros(out.shape, dtype)
        tl.store(hidden + t * hidden_stride + col, zero, mask=mask)
    else:
        tl.store(hidden + t * hidden_stride + col, out.to(dtype), mask=mask)
    return tl.sum(over, 0)


@triton.jit
def encode_clamps(
    feature,
    needs,
    w_enc,
    b_enc,
    threshold,
    hidden,
    hidden_stride,
    residual,
    residual_stride,
    source,
    source_stride,
    t,
    D_IN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    NC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Activations [NC] of the clamped features that need one, 0 for the others."""
    rows = feature.to(tl.int64)[:, None] * D_IN
    dot = tl.zeros([NC, BLOCK_D], tl.float32)
    for d in tl.static_range(0, D_IN, BLOCK_D):
        k = d + tl.arange(0, BLOCK_D)
        if HAS_SOURCE:
            xk = read_stream(
                source, source_stride, source, source_stride, t, k, D_IN, False
            )
        else:
            xk = read_stream(
                hidden, hidden_stride, residual, residual_stride, t, k, D_IN,
                HAS_RESIDUAL,
            )  # fmt: skip
        mask = needs[:, None] & (k < D_IN)[None, :]
        w = tl.load(w_enc + rows + k[None, :], mask=mask, other=0.0)
        dot += w.to(tl.float32) * xk[None, :]
    bias = tl.load(b_enc + feature, mask=needs, other=0.0)
    bar = tl.load(threshold + feature, mask=needs, other=0.0)
    p = tl.sum(dot, 1) + bias
    return tl.where(needs & (p > tl.maximum(bar, 0.0)), p, 0.0)


@triton.jit
def project(x, feature, projects, directions, col, D: tl.constexpr, NC: tl.constexpr):
    """(x . u [NC], ||v|| [NC]) of the directions that need a projection; u = v / ||v||.

    Both are 0 where v is 0.
    """
    place = tl.arange(0, NC)
    along = tl.zeros([NC], tl.float32)
    length = tl.zeros([NC], tl.float32)
    for j in tl.static_range(NC):
        own = (place == j) & projects
        at = tl.sum(tl.where(own, feature, 0), 0).to(tl.int64) * D
        mask = (col < D) & (tl.max(own.to(tl.int32), 0) != 0)
        v = tl.load(directions + at + col, mask=mask, other=0.0)
        along = tl.where(own, tl.sum(x * v, 0), along)
        length = tl.where(own, tl.sqrt(tl.sum(v * v, 0)), length)
    return along / tl.where(length > 0.0, length, 1.0), length


@triton.jit
def encoded_deltas(
    row_ptr,
    used,
    feature,
    code,
    value,
    w_enc,
    b_enc,
    threshold,
    hidden,
    hidden_stride,
    residual,
    residual_stride,
    source,
    source_stride,
    t,
    D_IN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    MAX_CLAMPS: tl.constexpr,
    NC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`g - f` [NC] of a group of an SAE's clamps, each under its condition."""
    f = tl.zeros([NC], tl.float32)
    needs = used & reads_activation(code)
    needs = needs & ((code & KIND_BITS) != CONDITION)
    if tl.max(needs.to(tl.int32), 0) != 0:
        f = encode_clamps(
            feature=feature, needs=needs, w_enc=w_enc, b_enc=b_enc,
            threshold=threshold, hidden=hidden, hidden_stride=hidden_stride,
            residual=residual, residual_stride=residual_stride, source=source,
            source_stride=source_stride, t=t, D_IN=D_IN, HAS_RESIDUAL=HAS_RESIDUAL,
            HAS_SOURCE=HAS_SOURCE, NC=NC, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    delta = clamp_delta(code, value, f)
    if tl.max(code, 0) >> CONDITION_SHIFT != 0:
        needs, other, kind, bar = needed_condition(row_ptr, code, MAX_CLAMPS)
        f = encode_clamps(
            feature=other, needs=needs, w_enc=w_enc, b_enc=b_enc,
            threshold=threshold, hidden=hidden, hidden_stride=hidden_stride,
            residual=residual, residual_stride=residual_stride, source=source,
            source_stride=source_stride, t=t, D_IN=D_IN, HAS_RESIDUAL=HAS_RESIDUAL,
            HAS_SOURCE=HAS_SOURCE, NC=NC, BLOCK_D=BLOCK_D,
        )  # fmt: skip
        delta = tl.where(~needs | holds(kind, bar, f), delta, 0.0)
    return delta


@triton.jit
def direction_deltas(
    x, norm, feature, code, value, directions, col, D: tl.constexpr, NC: tl.constexpr
):
    """Coefficients [NC] of a group of plain directions, for the token's stream `x`."""
    f = tl.zeros([NC], tl.float32)
    length = f
    value = tl.where((code & RELATIVE) != 0, value * norm, value)
    projects = (code & PROJECTION) != 0
    if tl.max(projects.to(tl.int32), 0) != 0:
        f, length = project(x, feature, projects, directions, col, D, NC)
    delta = clamp_delta(code, value, f)
    scaled = limit_coefficient(delta / tl.where(length > 0.0, length, 1.0))
    return tl.where(projects, tl.where(length > 0.0, scaled, 0.0), delta)


@triton.jit
def source_norm(source, source_stride, t, D_IN: tl.constexpr, BLOCK_D: tl.constexpr):
    """The L2 norm of what a transcoder reads."""
    square = tl.zeros([BLOCK_D], tl.float32)
    for d in tl.static_range(0, D_IN, BLOCK_D):
        at = d + tl.arange(0, BLOCK_D)
        read = read_stream(
            source, source_stride, source, source_stride, t, at, D_IN, False
        )
        square += read * read
    return tl.sqrt(tl.sum(square, 0))


@triton.jit
def count_vectors(row_ptr, count, saturated):
    """Adds a token to the counter of each vector of its row, once."""
    for c in range(count):
        feature = tl.load(row_ptr + 2 + c)
        seen = 0
        for before in range(c):
            seen += (tl.load(row_ptr + 2 + before) == feature).to(tl.int32)
        if seen == 0:
            tl.atomic_add(saturated + feature, 1)


@triton.jit
def clamp_kernel(
    index, flags, table, meta, norm_limit,
    w_enc, b_enc, threshold, w_dec,
    hidden, residual, source, saturated,
    hidden_stride, residual_stride, source_stride, table_stride,
    D: tl.constexpr, D_IN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_SOURCE: tl.constexpr,
    ENCODES: tl.constexpr, GATED: tl.constexpr, MAX_CLAMPS: tl.constexpr,
    NC: tl.constexpr, BLOCK_D: tl.constexpr, ROW_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token. HAS_SOURCE: the encoder reads `source [T, D_IN]`, and the
    norm is its. ENCODES: an SAE; otherwise plain directions (additive), and `saturated`
    has a counter for each direction.

    The stream is read once for the norm and the sum ([ROW_D]); directions pass in
    blocks [NC, BLOCK_D]; the updates of a group of NC clamps go to the row in memory
    only when all groups are done, so the encoder always sees the original stream.
    """
    pdl_wait(PDL)
    t = tl.program_id(0).to(tl.int64)
    row = tl.load(index + t)
    row_ptr = table + row.to(tl.int64) * table_stride
    if tl.load(row_ptr) == 0:
        return
    col = tl.arange(0, ROW_D)
    x = read_stream(
        hidden, hidden_stride, residual, residual_stride, t, col, D, HAS_RESIDUAL
    )
    if ENCODES:
        if (tl.load(flags + t) & tl.load(meta + SKIP_MASK)) != 0:
            return
        if GATED and tl.load(meta + USES_TOPK) != 0:
            return
        limit = tl.load(norm_limit)
    else:
        limit = LARGEST
    if HAS_SOURCE:
        norm = source_norm(source, source_stride, t, D_IN, BLOCK_D)
    else:
        norm = tl.sqrt(tl.sum(x * x, 0))
    if not (norm <= limit):
        return
    count = tl.load(row_ptr + 1)
    out = x
    for first in range(0, count, NC):
        c = first + tl.arange(0, NC)
        feature, code, value = load_clamps(row_ptr, c, count, MAX_CLAMPS)
        if ENCODES:
            delta = encoded_deltas(
                row_ptr=row_ptr, used=c < count, feature=feature, code=code,
                value=value, w_enc=w_enc, b_enc=b_enc, threshold=threshold,
                hidden=hidden, hidden_stride=hidden_stride, residual=residual,
                residual_stride=residual_stride, source=source,
                source_stride=source_stride, t=t, D_IN=D_IN,
                HAS_RESIDUAL=HAS_RESIDUAL, HAS_SOURCE=HAS_SOURCE,
                MAX_CLAMPS=MAX_CLAMPS, NC=NC, BLOCK_D=BLOCK_D,
            )  # fmt: skip
        else:
            delta = direction_deltas(
                x=x, norm=norm, feature=feature, code=code, value=value,
                directions=w_dec, col=col, D=D, NC=NC,
            )  # fmt: skip
        for j in tl.static_range(NC):  # unrolled, so that all rows load at once
            there = first + j < count
            at = tl.load(row_ptr + 2 + first + j, mask=there, other=0).to(tl.int64) * D
            scale = tl.sum(tl.where(tl.arange(0, NC) == j, delta, 0.0), 0)
            w = tl.load(w_dec + at + col, mask=(col < D) & there, other=0.0)
            out += scale * w.to(tl.float32)
    over = write_stream(
        out=out, hidden=hidden, hidden_stride=hidden_stride, residual=residual,
        residual_stride=residual_stride, t=t, col=col, mask=col < D,
        HAS_RESIDUAL=HAS_RESIDUAL,
    )  # fmt: skip
    if over > 0:
        if ENCODES:
            tl.atomic_add(saturated, 1)
        else:
            count_vectors(row_ptr, count, saturated)
