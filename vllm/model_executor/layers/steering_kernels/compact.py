# SPDX-License-Identifier: Apache-2.0
"""Stage 1: lists the step's active tokens in order and gathers their activations.

    active[t] = table.active[index[t]] and not (flags[t] & skip_mask)
    tokens = [t for t in range(T) if active[t]];  x[i] = hidden[t] + residual[t]

Every program counts the active tokens before its own, so one launch is enough and the
order needs no atomics. The norm of a token is known only after its row is read. A token
past the norm limit therefore keeps its place, with -1 in `tokens`.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

D_SAE = tl.constexpr(0)  # columns of meta: layers/steering_state.py, MetaField
USES_TOPK = tl.constexpr(1)
SKIP_MASK = tl.constexpr(4)
# Ints from one token's counter to the next. Each has a cache line of its own, because
# atomics of a whole tile on a few lines would wait for each other.
RECORD_INTS = tl.constexpr(32)
SATURATED = tl.constexpr(3)  # int of a record: the token has been counted
DENSE = tl.constexpr(4)  # int of a record: index of the n-th token that comes here
DENSE_COUNT = tl.constexpr(6)  # of StepState.sync; csrc/ has counters of its own


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Let the next kernel be scheduled, then wait for the one before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def note_dense(sync, records, i):
    """Adds token i to the dense tokens, which have more non-zeros than a list holds."""
    at = tl.atomic_add(sync + DENSE_COUNT, 1)
    tl.store(records + at * RECORD_INTS + DENSE, i)


@triton.jit
def is_active(index, flags, table, table_stride, skip, t, T):
    """1 where token `t` is steered, for a block of tokens. The norm is not checked."""
    inside = t < T
    row = tl.load(index + t, mask=inside, other=0)
    on = tl.load(table + row.to(tl.int64) * table_stride, mask=inside, other=0)
    flag = tl.load(flags + t, mask=inside, other=0)
    return ((on != 0) & ((flag & skip) == 0)).to(tl.int32)


@triton.jit
def gather_row(
    hidden,
    hidden_stride,
    residual,
    residual_stride,
    x,
    t,
    i,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x[i] = hidden[t] + residual[t] in the model's dtype; returns the L2 norm."""
    square = tl.zeros([BLOCK_D], tl.float32)
    for d in tl.static_range(0, D, BLOCK_D):
        col = d + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + t * hidden_stride + col, mask=col < D, other=0.0)
        if HAS_RESIDUAL:
            r = tl.load(residual + t * residual_stride + col, mask=col < D, other=0.0)
            h = (h.to(tl.float32) + r.to(tl.float32)).to(h.dtype)
        tl.store(x + i * D + col, h, mask=col < D)
        wide = h.to(tl.float32)
        square += wide * wide
    return tl.sqrt(tl.sum(square, 0))


@triton.jit(do_not_specialize=["T", "base", "rows"])
def compact_kernel(
    index,
    flags,
    table,
    meta,
    norm_limit,
    hidden,
    residual,
    x,
    tokens,
    records,
    sync,
    count,
    hidden_stride,
    residual_stride,
    table_stride,
    T,
    base,
    rows,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Writes tokens, x [rows, D] and cleared records of one chunk, and count [1].

    GATE: -1 takes any module, 0 only threshold ones, 1 only TopK.
    """
    pdl_wait(PDL)
    pid = tl.program_id(0)
    start = pid * PER_PROGRAM
    skip = tl.load(meta + SKIP_MASK)
    limit = tl.load(norm_limit)
    if GATE >= 0 and tl.load(meta + USES_TOPK) != GATE:
        T = 0
    before = 0
    for s in range(0, tl.minimum(start, T), SCAN):
        t = s + tl.arange(0, SCAN)
        on = is_active(index, flags, table, table_stride, skip, t, tl.minimum(start, T))
        before += tl.sum(on, 0)
    own = start + tl.arange(0, PER_PROGRAM)
    on = is_active(index, flags, table, table_stride, skip, own, T)
    if pid == tl.num_programs(0) - 1:
        tl.store(sync + DENSE_COUNT, 0)
        tl.store(count, before + tl.sum(on, 0))
    tl.store(records + own * RECORD_INTS, 0, mask=own < rows)
    place = tl.cumsum(on, 0) - on
    for j in range(PER_PROGRAM):
        mine = tl.arange(0, PER_PROGRAM) == j
        if tl.sum(tl.where(mine, on, 0), 0) != 0:
            position = before + tl.sum(tl.where(mine, place, 0), 0)
            i = position - base
            if (i >= 0) & (i < rows):
                t = tl.cast(start + j, tl.int64)
                norm = gather_row(
                    hidden=hidden,
                    hidden_stride=hidden_stride,
                    residual=residual,
                    residual_stride=residual_stride,
                    x=x,
                    t=t,
                    i=tl.cast(i, tl.int64),
                    D=D,
                    HAS_RESIDUAL=HAS_RESIDUAL,
                    BLOCK_D=BLOCK_D,
                )
                tl.store(tokens + i, tl.where(norm <= limit, start + j, -1))
                tl.store(records + i * RECORD_INTS + SATURATED, 0)
