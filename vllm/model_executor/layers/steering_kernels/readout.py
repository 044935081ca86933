# SPDX-License-Identifier: Apache-2.0
"""Reads features: the requested activations of each read token, and the largest ones.

    out[t] = [num_active, num_listed, values of the given features, top-k list]

It runs on the lists of `compact` and `encode`, which get the reading table in place of
a tier's, and of `select` for TopK. An activation and its feature form one sortable key.
The key is larger for a larger value and, at equal values, for a lower feature. A token
with more non-zeros than its list holds is encoded again in blocks of features; only the
best keys are kept. Lists are shorter in longer steps, so both ways give the same bits.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from .compact import D_SAE, RECORD_INTS, USES_TOPK, pdl_wait
from .encode import scores
from .resolve import entry_feature, entry_value
from .select import INDEX_MASK, LAST, RELU_FIELD, load_keys, sort_key

# Columns of a reading table's row: layers/steering_read_state.py.
TOP_K = tl.constexpr(2)
COUNT = tl.constexpr(3)
FEATURES = tl.constexpr(4)
HALVINGS = tl.constexpr(10)  # that find one of 512 features, the most of a row
RANKED = tl.constexpr(2)  # keys that others are compared with at a time
BLOCK = tl.constexpr(32)  # entries looked at together

# Where the extension begins the sum of a feature (csrc/steering/scheduler.cuh).
ORDER_FEATURES = tl.constexpr(256)  # that begin at the same column
ORDER_STEP = tl.constexpr(7)  # blocks of columns from these to the next


@triton.jit
def key_feature(key):
    """The feature of a key."""
    return (key & INDEX_MASK).to(tl.int32) ^ INDEX_MASK


@triton.jit
def key_bits(key):
    """The bits of a key's float32 value."""
    bits = (key >> 31).to(tl.int32)
    return tl.where(bits < 0, bits ^ (-2147483648), ~bits)


@triton.jit
def scaled_keys(f, act, scale, inside):
    """Keys of activations in the module's units; -1 where not active."""
    on = inside & (act != 0.0)
    value = act * tl.load(scale + f, mask=on, other=1.0)
    return tl.where(on, sort_key(value, f), -1)


@triton.jit
def clear_given(out, count):
    """Zeros in the places of the given features, before `put_given`."""
    for j in range(0, count, 64):
        at = j + tl.arange(0, 64)
        tl.store(out + at, tl.zeros([64], tl.int32), mask=at < count)
    tl.debug_barrier()


@triton.jit
def put_given(f, act, on, features, count, first_feature, scale, out):
    """Writes those of a block's activations whose features are given.

    A binary search in `features`, which ascend; f counts from `first_feature`.
    """
    if count > 0:
        wanted = f + first_feature
        low = tl.zeros(f.shape, tl.int32)
        high = low + count
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            between = on & (low < high)
            below = tl.load(features + middle, mask=between, other=0) < wanted
            low = tl.where(between & below, middle + 1, low)
            high = tl.where(between & ~below, middle, high)
        found = on & (low < count)
        found &= tl.load(features + low, mask=found, other=-1) == wanted
        value = act * tl.load(scale + f, mask=found, other=1.0)
        tl.store(out + low, value.to(tl.int32, bitcast=True), mask=found)


@triton.jit
def keys_from_list(own, n, features, count, first_feature, scale, out):
    """Turns a token's entries into keys in place; writes the given features."""
    for j in range(0, n, BLOCK):
        at = j + tl.arange(0, BLOCK)
        e = tl.load(own + at, mask=at < n, other=LAST)
        f = entry_feature(e)
        act = tl.where(at < n, entry_value(e), 0.0)
        put_given(f, act, act != 0.0, features, count, first_feature, scale, out)
        tl.store(own + at, scaled_keys(f, act, scale, at < n), mask=at < n)
    tl.debug_barrier()


@triton.jit
def kth_of_list(own, n, k):
    """The k-th largest of n keys in memory, by its bits from the top."""
    found = tl.zeros([], tl.int64)
    for b in range(63):
        trial = found | (tl.full([], 1, tl.int64) << (62 - b))
        total = 0
        for j in range(0, n, 1024):
            at = j + tl.arange(0, 1024)
            key = tl.load(own + at, mask=at < n, other=-1)
            total += tl.sum((key >= trial).to(tl.int32), 0)
        found = tl.where(total >= k, trial, found)
    return found


@triton.jit
def keep_best(own, n, k):
    """Moves the k largest of n keys to the front; returns how many there are."""
    bound = tl.zeros([], tl.int64)
    if n > k:
        bound = kth_of_list(own, n, k)
    kept = 0
    for j in range(0, n, 1024):
        at = j + tl.arange(0, 1024)
        key = tl.load(own + at, mask=at < n, other=-1)
        keep = (at < n) & (key >= bound)
        place = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.debug_barrier()  # places that are written have been read
        tl.store(own + place, key, mask=keep)
        tl.debug_barrier()
        kept += tl.sum(keep.to(tl.int32), 0)
    return kept


@triton.jit
def write_best(own, n, top_k, features_out, values_out, N: tl.constexpr):
    """Writes the top_k of n <= N keys, largest first."""
    i = tl.arange(0, N)
    key = tl.load(own + i, mask=i < n, other=-1)
    rank = tl.zeros([N], tl.int32)
    # Few at a time, or a long list's comparisons do not fit the registers.
    for j in range(0, n, RANKED):
        at = j + tl.arange(0, RANKED)
        o = tl.load(own + at, mask=at < n, other=-1)
        rank += tl.sum((o[None, :] > key[:, None]).to(tl.int32), 1)
    listed = (i < n) & (rank < top_k)
    tl.store(features_out + rank, key_feature(key), mask=listed)
    tl.store(values_out + rank, key_bits(key), mask=listed)


@triton.jit
def block_of_scores(scores_row, f, inside, kth, d_sae, relu):
    """Activations of a block of features of a TopK token, from its scores."""
    p = tl.load(scores_row + f, mask=inside, other=0.0)
    chosen = inside & (load_keys(scores_row, f, d_sae) >= kth)
    return tl.where(chosen & ((p > 0.0) | (relu == 0)), p, 0.0)


@triton.jit
def block_of_encoder(
    x,
    i,
    w_enc,
    b_enc,
    threshold,
    f0,
    inside,
    F,
    D: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    AFTER_CUDA: tl.constexpr,
):
    """Activations of a block of features of a threshold token, encoded here.

    A tile of the encoder with one token in it, so that a value has the bits that a list
    would hold. AFTER_CUDA: of the extension, which begins the sum elsewhere and always
    adds the bias last.
    """
    f = f0 + tl.arange(0, BF)
    begins = f0 // ORDER_FEATURES * ORDER_STEP % tl.cdiv(D, BK) * BK
    p = scores(
        x=x, w=w_enc, f0=f0, t0=i, n=i + 1, F=F, D=D, BF=BF, BT=16, BK=BK, TMA=False,
        FIRST=AFTER_CUDA, first=begins,
    )  # fmt: skip
    bias = tl.load(b_enc + f, mask=inside, other=float("-inf"))
    one = tl.arange(0, 16)[None, :] == 0
    if AFTER_CUDA:  # behind the choice of a token, where Triton cannot begin with it
        p = tl.sum(tl.where(one, p, 0.0), 1) + bias
    else:
        p = tl.sum(tl.where(one, p + bias[:, None], 0.0), 1)
    bar = tl.load(threshold + f, mask=inside, other=float("inf"))
    return tl.where(p > tl.maximum(bar, 0.0), p, 0.0)


@triton.jit
def through_memory(act, place, N: tl.constexpr):
    """`act`, by way of N free places of a list.

    For sm_100, Triton cannot compile the sum of a vector that a product leads to.
    """
    at = place + tl.arange(0, N)
    tl.debug_barrier()  # what was there has been read
    tl.store(at, act.to(tl.int32, bitcast=True).to(tl.int64))
    tl.debug_barrier()
    act = tl.load(at).to(tl.int32).to(tl.float32, bitcast=True)
    tl.debug_barrier()  # keys may be written there
    return act


@triton.jit
def keys_from_all(
    own,
    room,
    x,
    i,
    scores_row,
    kth,
    top_k,
    features,
    count,
    first_feature,
    out,
    scale,
    meta,
    w_enc,
    b_enc,
    threshold,
    F,
    D: tl.constexpr,
    TOPK: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    AFTER_CUDA: tl.constexpr,
):
    """The overflow path: keeps the best keys of all features of one token.

    Writes the given features; returns (keys kept, active features).
    """
    d_sae = tl.minimum(tl.load(meta + D_SAE), F)
    relu = tl.load(meta + RELU_FIELD)
    n = 0
    active = 0
    for f0 in range(0, d_sae, BF):
        f = f0 + tl.arange(0, BF)
        inside = f < d_sae
        if TOPK:
            act = block_of_scores(scores_row, f, inside, kth, d_sae, relu)
        else:
            act = block_of_encoder(
                x=x, i=i, w_enc=w_enc, b_enc=b_enc, threshold=threshold, f0=f0,
                inside=inside, F=F, D=D, BF=BF, BK=BK, AFTER_CUDA=AFTER_CUDA,
            )  # fmt: skip
            act = through_memory(act, own + n, BF)
        put_given(f, act, act != 0.0, features, count, first_feature, scale, out)
        key = scaled_keys(f, act, scale, inside)
        keep = key >= 0
        place = n + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(own + place, key, mask=keep)
        n += tl.sum(keep.to(tl.int32), 0)
        active += tl.sum(keep.to(tl.int32), 0)
        if n > room - BF:
            tl.debug_barrier()
            n = keep_best(own, n, top_k)
    tl.debug_barrier()
    return n, active


@triton.jit(do_not_specialize=["base", "rows", "F", "capacity", "first_feature"])
def readout_kernel(
    index,
    table,
    scale,
    out,
    meta,
    count,
    tokens,
    records,
    entries,
    kth,
    x,
    scores_of,
    w_enc,
    b_enc,
    threshold,
    table_stride,
    out_stride,
    tokens_stride,
    base,
    rows,
    F,
    capacity,
    first_feature,
    D: tl.constexpr,
    GATE: tl.constexpr,
    TOPK: tl.constexpr,
    OVERFLOW: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Writes `out` of the read tokens of one chunk.

    It reads F features, of which `first_feature` is the first, and writes their
    indices among these F; given features that are not among them are 0.
    OVERFLOW: after the extension's stages, only those whose list is too short.
    """
    pdl_wait(PDL)
    n_tokens = tl.minimum(tl.load(count) - base, rows)
    if GATE >= 0 and tl.load(meta + USES_TOPK) != GATE:
        n_tokens = 0
    for i in range(tl.program_id(0), n_tokens, tl.num_programs(0)):
        token = tl.load(tokens + i * tokens_stride)
        n = tl.load(records + i * RECORD_INTS)
        row = tl.load(index + tl.maximum(token, 0)).to(tl.int64)
        row_ptr = table + row * table_stride
        reads = (token >= 0) & (tl.load(row_ptr) != 0)
        if OVERFLOW:
            reads = reads & (n > capacity)
        if reads:
            i64 = tl.cast(i, tl.int64)
            top_k = tl.load(row_ptr + TOP_K)
            given_count = tl.load(row_ptr + COUNT)
            features = row_ptr + FEATURES
            own = entries + i64 * capacity
            to = out + token.to(tl.int64) * out_stride
            clear_given(to + 2, given_count)
            active = n
            if n <= capacity:
                keys_from_list(
                    own, n, features, given_count, first_feature, scale, to + 2
                )
            else:
                n, active = keys_from_all(
                    own=own, room=capacity, x=x, i=i, scores_row=scores_of + i64 * F,
                    kth=tl.load(kth + i), top_k=top_k, features=features, meta=meta,
                    count=given_count, first_feature=first_feature, out=to + 2, F=F,
                    scale=scale, w_enc=w_enc, b_enc=b_enc, threshold=threshold,
                    D=D, TOPK=TOPK, BF=BF, BK=BK, AFTER_CUDA=OVERFLOW,
                )  # fmt: skip
            if n > 1024:
                n = keep_best(own, n, top_k)
            tl.store(to, active)
            tl.store(to + 1, tl.minimum(active, top_k))
            first = to + 2 + given_count
            if n <= 128:
                write_best(own, n, top_k, first, first + top_k, 128)
            else:
                write_best(own, n, top_k, first, first + top_k, 1024)
