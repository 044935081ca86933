# SPDX-License-Identifier: Apache-2.0
"""The three tiers in plain PyTorch: the definition, and what runs on a CPU.

Everything is computed for the active tokens of a step only, in float32 (float64
where the caller passes float64 weights, as the oracle does), and rounded once to the
model's dtype. Weights are read in slices, so that no full-width float32 copy of a
half-precision weight ever exists.

Whatever a request asks for, the written values are finite. Every backend does the same:

1. *Input.* If the float32 norm `||x||_2` of a token's stream is not finite, no tier
   edits the token, and it is not counted. A NaN or infinite component makes the norm
   NaN or infinite, and the square of a component beyond 2^64 overflows.
2. *Coefficients.* The change `g_c - f_c` of a clamp is computed in float32 and limited
   to `+-COEFFICIENT_LIMIT`. A steering vector's scale is such a change.
3. *Output.* The sum `x'` is limited to `+-STREAM_LIMIT` of the model's dtype,
   component by component, before its one rounding. A component that is NaN (partial
   sums overflowed both ways) becomes `-STREAM_LIMIT`, as `fmin(fmax(x', -limit),
   limit)` makes it.

A slot's `saturated` counts the tokens of a call that rule 3 has changed. Rule 2 alone
is not counted, because a limited coefficient leads to rule 3, except where the
direction's component is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from vllm.config.steering import LARGE_NORM, Tier
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_limits import (
    COEFFICIENT_LIMIT,
    NO_NORM_LIMIT,
    STREAM_LIMIT,
)
from vllm.model_executor.layers.steering_state import (
    CONDITION_SHIFT,
    KIND_BITS,
    ONLY_IF_ACTIVE,
    ClampFlag,
    ClampKind,
    MetaField,
    SAESlot,
    SAEWeights,
    StepState,
    VectorSlot,
)
from vllm.model_executor.layers.steering_stream import Stream

FEATURE_SLICE = 8192
TOKEN_SLICE = 512


def _compute_dtype(weights: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weights.dtype, torch.float32)


def encode(weights: SAEWeights, x: torch.Tensor) -> torch.Tensor:
    """Feature activations `f [n, F]` of `x [n, D]`: `act(x W_enc^T + b_enc)`.

    Ranks that share the SAE each compute their own features, and exchange them.
    """
    dtype = _compute_dtype(weights.W_enc)
    n, features = x.shape[0], weights.W_enc.shape[0]
    pre = torch.empty(n, features, dtype=dtype, device=x.device)
    for start in range(0, features, FEATURE_SLICE):
        part = slice(start, start + FEATURE_SLICE)
        pre[:, part] = x @ weights.W_enc[part].to(dtype).T + weights.b_enc[part]
    if int(weights.meta[MetaField.USES_TOPK]):
        return _top_k(weights, weights.shard.gather(pre))
    acts = torch.where(pre > weights.threshold.clamp(min=0), pre, 0.0)
    return weights.shard.gather(acts)


def _top_k(weights: SAEWeights, pre: torch.Tensor) -> torch.Tensor:
    """Keep the k largest of each row, ties to the lowest index."""
    k = int(weights.meta[MetaField.K])
    best = pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = pre.gather(1, best)
    if int(weights.meta[MetaField.TOPK_RELU]):
        kept = kept.clamp(min=0)
    return torch.zeros_like(pre).scatter_(1, best, kept)


def encode_features(
    weights: SAEWeights, x: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """`f [n, U]` of the given features only; threshold activations."""
    W, b, threshold = encoder_rows(weights, features)
    pre = x @ W.to(_compute_dtype(W)).T + b
    return torch.where(pre > threshold.clamp(min=0), pre, 0.0)


def encoder_rows(
    weights: SAEWeights, features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`W_enc [U, D]`, `b_enc [U]` and `threshold [U]` of the given features.

    Ranks that share the SAE exchange the rows. Then all of them multiply the same
    matrix that one rank would.
    """
    shard, held = weights.shard, weights.W_enc.shape[0]
    if shard.is_whole:
        W, b, threshold = weights.W_enc, weights.b_enc, weights.threshold
        return W[features], b[features], threshold[features]
    dtype = _compute_dtype(weights.W_enc)
    local = (features - weights.own.start).clamp(0, held - 1)
    columns = [weights.W_enc, weights.b_enc[:, None], weights.threshold[:, None]]
    rows = torch.cat([column[local].to(dtype) for column in columns], dim=1)
    every = shard.gather(rows).view(features.shape[0], shard.size, -1)
    found = every[torch.arange(features.shape[0]), features // held]
    return found[:, :-2].contiguous(), found[:, -2], found[:, -1]


def clamp_changes(
    table: ClampTable,
    rows: torch.Tensor,
    active: torch.Tensor,
    norms: torch.Tensor | None = None,
) -> torch.Tensor:
    """`g_c - f_c` of every clamp of every token, limited; zero past the row's count.

    Args:
        rows: int64 `[n]`, each token's row.
        active: `[n, K]`, activation `f_c` of each clamp's feature.
        norms: `[n, 1]`, the stream's norm, for relative values.
    """
    code, value = table.code[rows], table.value[rows].to(active.dtype)
    if norms is not None:
        value = torch.where((code & ClampFlag.RELATIVE) != 0, value * norms, value)
    kind = code & KIND_BITS
    change = torch.where(kind == ClampKind.ABSOLUTE, value - active, value)
    change = torch.where(kind == ClampKind.SCALE, active * value - active, change)
    change = change.clamp(-COEFFICIENT_LIMIT, COEFFICIENT_LIMIT)
    above = ((code & ClampFlag.IF_ABOVE) == 0) | (active > value)
    below = ((code & ClampFlag.IF_BELOW) == 0) | (active < value)
    holds = above & below
    place = code >> CONDITION_SHIFT
    if place.any():
        needed = holds.gather(1, (place.long() - 1).clamp(min=0))
        holds &= (place == 0) | needed
    holds &= ((code & ONLY_IF_ACTIVE) == 0) | (active != 0)
    holds &= (kind != ClampKind.CONDITION) & _used(table, rows)
    return torch.where(holds, change, 0.0)


def _used(table: ClampTable, rows: torch.Tensor) -> torch.Tensor:
    """bool `[n, K]`: places of the clamp table that the rows fill."""
    place = torch.arange(table.max_clamps, device=rows.device)
    return place < table.count[rows].unsqueeze(1)


def clamp_activations(
    weights: SAEWeights, table: ClampTable, rows: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """`f_c [n, K]` of the clamps, for tokens with a clamp that depends on `f_c`.

    Zero for tokens that have only additive clamps without conditions; the encoder is
    not read for them. A threshold activation reads only the clamped features' encoder
    rows; TopK needs every pre-activation.
    """
    features = table.feature[rows].long()
    acts = torch.zeros(features.shape, dtype=x.dtype, device=x.device)
    reads = _used(table, rows) & (table.code[rows] != ClampKind.ADDITIVE)
    tokens = reads.any(dim=1).nonzero().squeeze(1)
    if not tokens.numel():
        return acts
    if int(weights.meta[MetaField.USES_TOPK]):
        acts[tokens] = encode(weights, x[tokens]).gather(1, features[tokens])
    else:
        used, place = features[tokens].unique(return_inverse=True)
        acts[tokens] = encode_features(weights, x[tokens], used).gather(1, place)
    return acts


def select_tokens(
    table: ClampTable,
    index: torch.Tensor,
    step: StepState,
    weights: SAEWeights | None = None,
) -> torch.Tensor:
    """int64 ids of the tokens that the table's tier edits here, bypassed ones not."""
    active = table.active[index.long()] != 0
    if weights is not None:
        mask = weights.meta[MetaField.SKIP_MASK]
        active &= (step.flags[: index.shape[0]] & mask) == 0
    return active.nonzero().squeeze(1)


def within_norm(
    x: torch.Tensor, limit: torch.Tensor | float = NO_NORM_LIMIT
) -> torch.Tensor:
    """bool `[n]`: whether the norm of `x [n, D]` is finite and within the limit."""
    return x.norm(dim=1).float() <= limit


def large_norms(norms: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The median of `norms [n]`, and which are far above it, bool `[n]`.

    Tokens with such a norm are attention sinks: few, and with a stream that looks like
    no other, so they decide every mean over squares.
    """
    median = norms.median()
    return float(median), norms > LARGE_NORM * median


def write_stream(
    tokens: torch.Tensor,
    x: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Limit the edited stream, round it once and write it back exactly.

    `keep` bool `[n]` leaves out tokens; None: none.

    Returns:
        int64 `[m]`, the places of those that were limited among the written tokens.
    """
    if keep is not None and not keep.all():
        tokens, x = tokens[keep], x[keep]
    limit = STREAM_LIMIT[hidden.dtype]
    limited = (~(x.abs() <= limit).all(dim=1)).nonzero().squeeze(1)
    if limited.numel():
        x = x.nan_to_num(-limit, limit, -limit).clamp(-limit, limit)
    if residual is None:
        hidden[tokens] = x.to(hidden.dtype)
        return limited
    residual[tokens] = x.to(residual.dtype)
    hidden[tokens] = 0
    return limited


class TokenSlice(NamedTuple):
    """Tokens that an SAE tier edits, where their norm allows it.

    tokens, rows: int64 `[n]`. x: `[n, d_in]`, what the encoder reads. keep: bool `[n]`,
    whether the norm allows it.
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    x: torch.Tensor
    keep: torch.Tensor


def _sae_tokens(
    slot: SAESlot,
    table: ClampTable,
    tier: Tier,
    step: StepState,
    stream: Stream,
) -> Iterator[TokenSlice]:
    """What an SAE tier edits, in slices.

    Norms do not decide how many tokens a slice has: ranks that share an SAE exchange
    tensors of that size.
    """
    index = step.index[tier, : stream.hidden.shape[0]]
    tokens = select_tokens(table, index, step, slot.weights)
    dtype = _compute_dtype(slot.weights.W_enc)
    for part in tokens.split(TOKEN_SLICE):
        if not part.numel():
            continue
        x = stream.read.gather(part).to(dtype)
        keep = within_norm(x, slot.weights.norm_limit)
        yield TokenSlice(part, index[part].long(), x, keep)


def full_reconstruction(
    slot: SAESlot,
    step: StepState,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None = None,
) -> None:
    """`x' = b_dec + sum_i f_i W_dec[i] + sum_c (g_c - f_c) W_dec[c]`, in place.

    A transcoder's `f` comes from `source`, and `W_skip source` is added.
    """
    weights, table = slot.weights, slot.full
    dtype = _compute_dtype(weights.W_dec)
    for tokens, rows, x, keep in _sae_tokens(
        slot, table, Tier.FULL, step, Stream(hidden, residual, source)
    ):
        acts = encode(weights, x)
        features = table.feature[rows].long()
        changes = clamp_changes(table, rows, acts.gather(1, features))
        acts.scatter_add_(1, features, changes)
        out = weights.b_dec.to(dtype).repeat(x.shape[0], 1)
        if weights.W_skip is not None:
            out += x @ weights.W_skip.to(dtype).T
        for start in range(0, weights.d_sae_capacity, FEATURE_SLICE):
            part = slice(start, start + FEATURE_SLICE)
            out += acts[:, part] @ weights.W_dec[part].to(dtype)
        out = weights.shard.gather(out)
        slot.saturated += len(write_stream(tokens, out, hidden, residual, keep))


def sae_clamp(
    slot: SAESlot,
    step: StepState,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None = None,
) -> None:
    """`x' = x + sum_c (g_c - f_c) W_dec[c]`, in place; `f` of `source` if given.

    `clamp_activations` says which rows of the encoder are read.
    """
    weights, table = slot.weights, slot.delta
    dtype = _compute_dtype(weights.W_dec)
    stream = Stream(hidden, residual, source)
    for tokens, rows, x, keep in _sae_tokens(slot, table, Tier.DELTA, step, stream):
        changes = clamp_changes(table, rows, clamp_activations(weights, table, rows, x))
        used, place = table.feature[rows].long().unique(return_inverse=True)
        coefficients = x.new_zeros(x.shape[0], used.numel())
        coefficients.scatter_add_(1, place, changes)
        if source is not None:
            x = stream.gather(tokens).to(dtype)
        out = x + weights.shard.gather(coefficients @ weights.W_dec[used].to(dtype))
        slot.saturated += len(write_stream(tokens, out, hidden, residual, keep))


def steering_vectors(
    slot: VectorSlot,
    step: StepState,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """`x' = x + sum_m scale_m v_m`, in place.

    A clamp with `PROJECTION` acts on the unit vector `u_m` instead: it changes the
    projection `x . u_m` as any clamp changes an activation. All read the same `x`.
    """
    table = slot.table
    index = step.index[Tier.ADDITIVE, : hidden.shape[0]]
    tokens = select_tokens(table, index, step)
    x = Stream(hidden, residual).gather(tokens).to(slot.directions.dtype)
    keep = within_norm(x)
    tokens, x = tokens[keep], x[keep]
    if not tokens.numel():
        return
    rows = index[tokens].long()
    # A stack may have room for many vectors: only those that are used are read.
    used, features = table.feature[rows].long().unique(return_inverse=True)
    directions = slot.directions[used]
    projects = (table.code[rows] & ClampFlag.PROJECTION) != 0
    # Only a projection needs the vector's norm. A zero vector has no direction.
    lengths = directions.norm(dim=1)[features]
    along = (x @ directions.T).gather(1, features) / lengths
    active = torch.where(projects & (lengths > 0), along, 0.0)
    changes = clamp_changes(table, rows, active, x.norm(dim=1, keepdim=True))
    changes = torch.where(projects, changes / lengths, changes).nan_to_num(0.0)
    changes = changes.clamp(-COEFFICIENT_LIMIT, COEFFICIENT_LIMIT)
    coefficients = x.new_zeros(x.shape[0], used.numel())
    coefficients.scatter_add_(1, features, changes)
    out = x + coefficients @ directions
    limited = write_stream(tokens, out, hidden, residual)
    if limited.numel():
        _count_vectors(slot, rows[limited])


def _count_vectors(slot: VectorSlot, rows: torch.Tensor) -> None:
    """Count the tokens with these rows for each vector that their row uses."""
    used = _used(slot.table, rows)
    shape = (len(rows), len(slot.saturated))
    users = torch.zeros(shape, dtype=torch.int64, device=rows.device)
    users.scatter_add_(1, slot.table.feature[rows].long(), used.long())
    slot.saturated += (users > 0).sum(dim=0)
