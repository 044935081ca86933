# SPDX-License-Identifier: Apache-2.0
"""Stage 3 of TopK SAEs: the k largest scores of each token, ties to the lowest index.

A score and its feature make one sortable 63-bit key, larger for a larger score and, at
equal scores, for a lower feature; a feature is selected if its key is at least the k-th
largest. The k-th largest of the maxima of many groups is a lower bound of that key, so
two passes over the scores suffice unless very many scores tie.
"""

from __future__ import annotations

from vllm.triton_utils import tl, triton

from .clamp import clamp_delta, holds, load_clamps, needed_condition
from .compact import D_SAE, RECORD_INTS, note_dense, pdl_wait

K_FIELD = tl.constexpr(2)  # columns of meta: layers/steering_state.py, MetaField
RELU_FIELD = tl.constexpr(3)
INDEX_MASK = tl.constexpr(0x7FFFFFFF)
LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def order_bits(p):
    """Non-negative int64 that orders as the float32 scores do; -0.0 equals 0.0."""
    bits = (p + 0.0).to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits ^ (-2147483648))
    return flipped.to(tl.int64) & 0xFFFFFFFF


@triton.jit
def sort_key(p, f):
    """(score, feature) as one int64: score bits high, inverted feature low."""
    return (order_bits(p) << 31) | (f ^ INDEX_MASK).to(tl.int64)


@triton.jit
def load_keys(scores, f, d_sae):
    """Keys of the scores of features `f`; past d_sae -1, which is below every key."""
    p = tl.load(scores + f, mask=f < d_sae, other=0.0)
    return tl.where(f < d_sae, sort_key(p, f), -1)


@triton.jit
def bound_of_block(keys, k):
    """At most the k-th largest of the keys in registers: its upper 16 score bits."""
    found = tl.zeros([], tl.int64)
    for b in range(16):
        trial = found | (tl.full([], 1, tl.int64) << (62 - b))
        enough = tl.sum((keys >= trial).to(tl.int32), 0) >= k
        found = tl.where(enough, trial, found)
    return found


@triton.jit
def kth_of_scores(scores, d_sae, k, BLOCK: tl.constexpr):
    """The k-th largest key of all, four bits at a time from the top.

    Used for tokens where very many scores tie, and for k above 1000.
    """
    digit = tl.arange(0, 16)
    found = tl.zeros([], tl.int64)
    left = k
    for b in range(16):
        shift = 60 - 4 * b
        counts = tl.zeros([16], tl.int32)
        for s in range(0, d_sae, BLOCK):
            keys = load_keys(scores, s + tl.arange(0, BLOCK), d_sae) >> shift
            agrees = (keys >> 4) == ((found >> shift) >> 4)
            same = (keys & 15).to(tl.int32)[:, None] == digit[None, :]
            counts += tl.sum((agrees[:, None] & same).to(tl.int32), 0)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # in higher digits
        mine = (above < left) & (above + counts >= left)
        found |= tl.sum(tl.where(mine, digit, 0), 0).to(tl.int64) << shift
        left -= tl.sum(tl.where(mine, above, 0), 0)
    return found


@triton.jit
def lower_bound(scores, d_sae, k, BLOCK: tl.constexpr):
    """At most the k-th largest of BLOCK group maxima (-1 for fewer groups than k)."""
    top = tl.full([BLOCK], -1, tl.int64)
    for s in range(0, d_sae, BLOCK):
        top = tl.maximum(top, load_keys(scores, s + tl.arange(0, BLOCK), d_sae))
    bound = tl.full([], -1, tl.int64)
    if k <= BLOCK:
        bound = bound_of_block(top, k)
    return bound


@triton.jit
def pick_from_list(own, n, k, relu, N: tl.constexpr):
    """Selects among n <= N candidate keys, leaves entries sorted by feature in place.

    Returns (k-th key, number of entries). Keys become entries here: the score is
    recovered from the key's high half.
    """
    i = tl.arange(0, N)
    key = tl.load(own + i, mask=i < n, other=-1)
    above = tl.zeros([N], tl.int32)
    for j in range(0, n, 16):
        at = j + tl.arange(0, 16)
        o = tl.load(own + at, mask=at < n, other=-1)
        above += tl.sum((o[None, :] > key[:, None]).to(tl.int32), 1)
    kth = tl.min(tl.where((i < n) & (above < k), key, LAST), 0)
    bits = (key >> 31).to(tl.int32)
    raw = tl.where(bits < 0, bits ^ (-2147483648), ~bits)
    p = raw.to(tl.float32, bitcast=True)
    feature = (key & INDEX_MASK).to(tl.int32) ^ INDEX_MASK
    keep = (key >= kth) & (i < n) & ((p > 0.0) | ((relu == 0) & (p != 0.0)))
    rank = tl.zeros([N], tl.int32)
    for j in range(0, n, 16):
        at = j + tl.arange(0, 16)
        o = tl.load(own + at, mask=at < n, other=-1)
        o_bits = (o >> 31).to(tl.int32)
        o_p = tl.where(o_bits < 0, o_bits ^ (-2147483648), ~o_bits)
        o_p = o_p.to(tl.float32, bitcast=True)
        o_keep = (o >= kth) & (at < n) & ((o_p > 0.0) | ((relu == 0) & (o_p != 0.0)))
        before = ((o & INDEX_MASK).to(tl.int32) ^ INDEX_MASK)[None, :]
        rank += tl.sum((o_keep[None, :] & (before < feature[:, None])).to(tl.int32), 1)
    tl.debug_barrier()  # every thread has read what is overwritten next
    entry = (feature.to(tl.int64) << 32) | (raw.to(tl.int64) & 0xFFFFFFFF)
    tl.store(own + rank, entry, mask=keep)
    return kth, tl.sum(keep.to(tl.int32), 0)


@triton.jit
def collect(scores, own, counter, bound, d_sae, capacity, BLOCK: tl.constexpr):
    """Appends the keys of all scores at or above `bound`, in any order."""
    for s in range(0, d_sae, BLOCK):
        keys = load_keys(scores, s + tl.arange(0, BLOCK), d_sae)
        keep = (keys >= bound) & (keys >= 0)
        place = counter + tl.zeros([BLOCK], tl.int32)
        slot = tl.atomic_add(place, 1, mask=keep, sem="relaxed")
        tl.store(own + slot, keys, mask=keep & (slot < capacity))
    tl.debug_barrier()


@triton.jit
def collect_selected(scores, own, kth, d_sae, relu, capacity, BLOCK: tl.constexpr):
    """Entries of all scores at or above the k-th key, in order; returns their count."""
    total = 0
    for s in range(0, d_sae, BLOCK):
        f = s + tl.arange(0, BLOCK)
        p = tl.load(scores + f, mask=f < d_sae, other=0.0)
        keep = (load_keys(scores, f, d_sae) >= kth) & (f < d_sae)
        keep = keep & ((p > 0.0) | ((relu == 0) & (p != 0.0)))
        place = total + tl.cumsum(keep.to(tl.int32), 0) - 1
        bits = p.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        entry = (f.to(tl.int64) << 32) | bits
        tl.store(own + place, entry, mask=keep & (place < capacity))
        total += tl.sum(keep.to(tl.int32), 0)
    return total


@triton.jit
def selected(own_scores, feature, threshold, d_sae, relu):
    """Activations of a block of features of one token, whose k-th key is given."""
    p = tl.load(own_scores + feature)
    chosen = load_keys(own_scores, feature, d_sae) >= threshold
    return tl.where(chosen & ((p > 0.0) | (relu == 0)), p, 0.0)


@triton.jit(do_not_specialize=["base", "rows", "F", "capacity"])
def select_kernel(
    index,
    table,
    meta,
    count,
    tokens,
    scores,
    records,
    sync,
    entries,
    kth,
    coef,
    table_stride,
    base,
    rows,
    F,
    capacity,
    LIST_MAX: tl.constexpr,
    MAX_CLAMPS: tl.constexpr,
    CLAMP_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """From scores [rows, F]: sorted entries and their count, the k-th keys, coef.

    Tokens with more than LIST_MAX entries are listed for the dense path, which reads
    the scores again and selects with `kth`.
    """
    pdl_wait(PDL)
    n = tl.minimum(tl.load(count) - base, rows)
    d_sae = tl.load(meta + D_SAE)
    k = tl.minimum(tl.load(meta + K_FIELD), d_sae)
    relu = tl.load(meta + RELU_FIELD)
    for i in range(tl.program_id(0), n, tl.num_programs(0)):
        token = tl.load(tokens + i)
        if (token >= 0) & (k > 0):
            own_scores = scores + tl.cast(i, tl.int64) * F
            own = entries + tl.cast(i, tl.int64) * capacity
            bound = lower_bound(own_scores, d_sae, k, BLOCK)
            counter = records + i * RECORD_INTS
            collect(own_scores, own, counter, bound, d_sae, capacity, BLOCK)
            listed = tl.load(counter, volatile=True)
            tl.debug_barrier()
            threshold = tl.zeros([], tl.int64)
            if listed <= tl.minimum(capacity, 128):
                threshold, listed = pick_from_list(own, listed, k, relu, 128)
            elif listed <= tl.minimum(capacity, 1024):
                threshold, listed = pick_from_list(own, listed, k, relu, 1024)
            else:
                threshold = kth_of_scores(own_scores, d_sae, k, 256)
                listed = collect_selected(
                    own_scores, own, threshold, d_sae, relu, capacity, BLOCK
                )
            tl.store(counter, listed)
            if listed > LIST_MAX:
                note_dense(sync, records, i)
            tl.store(kth + i, threshold)
            row_ptr = table + tl.load(index + token).to(tl.int64) * table_stride
            clamps = tl.load(row_ptr + 1)
            for first in range(0, clamps, CLAMP_BLOCK):
                c = first + tl.arange(0, CLAMP_BLOCK)
                feature, code, value = load_clamps(row_ptr, c, clamps, MAX_CLAMPS)
                f = selected(own_scores, feature, threshold, d_sae, relu)
                delta = clamp_delta(code, value, f)
                needs, other, kind, bar = needed_condition(row_ptr, code, MAX_CLAMPS)
                f = selected(own_scores, other, threshold, d_sae, relu)
                delta = tl.where(~needs | holds(kind, bar, f), delta, 0.0)
                tl.store(coef + i * MAX_CLAMPS + c, delta, mask=c < clamps)
