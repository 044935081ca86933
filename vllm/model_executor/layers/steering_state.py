# SPDX-License-Identifier: Apache-2.0
"""The tensors that steering works with: clamp rows, SAE weights, the step's index.

Data flows as spec -> row -> per-token index -> op. A request's specs become one *row*
of the tables below. `StepState.index` holds the row of every token of the step (0:
none). The ops of the three tiers read both on the device. All tiers use the same kind
of row: directions and their coefficients.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import nn

from vllm.config.steering import Activation, SiteInfo, Tier
from vllm.model_executor.layers.steering_bypass import BypassCounts
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_kernels.screen import ScreenCopy
from vllm.model_executor.layers.steering_limits import NO_NORM_LIMIT
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_shards import WHOLE, Shard

# Counters of the GPU kernels in `StepState.sync`.
SYNC_INTS = 8


class ClampKind(IntEnum):
    """How a clamp turns a feature's activation `f` into `g` (low bits of a code).

    absolute: `g = value`; additive: `g = f + value`; scale: `g = f * value`. A
    condition changes nothing; other clamps of the row refer to it.
    """

    ABSOLUTE = 0
    ADDITIVE = 1
    SCALE = 2
    CONDITION = 3


# Bits of a clamp code that hold its `ClampKind`.
KIND_BITS = 3
# Flag of a clamp code: the clamp acts only where the feature is active (f != 0).
ONLY_IF_ACTIVE = 4


class ClampFlag(IntEnum):
    """More flags of a clamp code."""

    # Vectors: `f` is the projection on the unit vector `u`, and the edit is along `u`.
    PROJECTION = 8
    # Vectors: `value` is in units of the stream's norm.
    RELATIVE = 16
    # The clamp acts, or the condition holds, only where `f < value`, or `f > value`.
    IF_BELOW = 32
    IF_ABOVE = 64


# From this bit on, a code holds 1 + the place of the condition in the row that the
# clamp needs (0: none).
CONDITION_SHIFT = 8


class MetaField(IntEnum):
    """Columns of `SAEWeights.meta`. Kernels read these as data, because a module may be
    replaced under a captured graph."""

    D_SAE = 0
    USES_TOPK = 1
    K = 2
    TOPK_RELU = 3
    SKIP_MASK = 4


class SAEWeights(nn.Module):
    """One canonical SAE or transcoder: `p = x W_enc^T + b_enc`, `f = act(p)`,
    `y = f W_dec + b_dec (+ W_skip x)`.

    Buffers (F is the slot's capacity; features past `d_sae` can never fire):
        W_enc: `[F, d_in]` in the model's dtype, rows are features.
        W_dec: `[F, d_out]`, likewise.
        b_enc, threshold: float32 `[F]`; `f = p` where `p > max(threshold, 0)`.
        b_dec: float32 `[d_out]`.
        W_skip: `[d_out, d_in]` in the model's dtype, or None: no skip connection.
        meta: int32, columns of `MetaField`.
        norm_limit: float32 `[1]`; a token whose `x` has a larger L2 norm is left
            untouched (`NO_NORM_LIMIT`: every finite float32 norm is allowed).
        row_norms: float32 `[F]`, L2 norms of the rows of the whole `W_dec`; None where
            this rank holds all of it.

    `screen` is a copy of `W_enc` in 10 bits or None; `refresh` makes it anew.

    A rank of a group that shares the SAE holds `shard`: with `own = shard.part(F)` and
    `columns = shard.part(d_out)`, `W_enc[own]`, `b_enc[own]`, `threshold[own]`,
    `W_dec[:, columns]`, `b_dec[columns]` and `W_skip[columns]`.

    An SAE has `d_out = d_in` and writes where it reads. TopK keeps the k largest `p`
    (ties: lowest index), clipped at zero if TOPK_RELU; its threshold is unused.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    threshold: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    W_skip: torch.Tensor | None
    meta: torch.Tensor
    norm_limit: torch.Tensor
    row_norms: torch.Tensor | None

    def __init__(
        self,
        d_sae: int,
        d_in: int,
        dtype: torch.dtype,
        device: torch.device,
        d_out: int | None = None,
        has_skip: bool = False,
        shard: Shard = WHOLE,
        screened: bool = False,
    ):
        super().__init__()
        self.d_sae_capacity = d_sae
        self.d_in = d_in
        self.d_out = d_in if d_out is None else d_out
        self.shard = shard
        self.own = shard.part(d_sae)
        self.columns = shard.part(self.d_out)
        features, columns = d_sae // shard.size, self.d_out // shard.size
        f32 = torch.float32
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "W_enc": ((features, d_in), dtype),
            "b_enc": ((features,), f32),
            "threshold": ((features,), f32),
            "W_dec": ((d_sae, columns), dtype),
            "b_dec": ((columns,), f32),
            "meta": ((len(MetaField),), torch.int32),
            "norm_limit": ((1,), f32),
        }
        if has_skip:
            shapes["W_skip"] = ((columns, d_in), dtype)
        if not shard.is_whole:
            shapes["row_norms"] = ((d_sae,), f32)
        for name in {"W_skip", "row_norms"} - set(shapes):
            self.register_buffer(name, None, persistent=False)
        for name, (shape, kind) in shapes.items():
            tensor = torch.zeros(shape, dtype=kind, device=device)
            self.register_buffer(name, tensor, persistent=False)
        self.screen = ScreenCopy(features, d_in, device) if screened else None
        self.clear()

    @classmethod
    def for_site(
        cls,
        site: SiteInfo,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard = WHOLE,
    ) -> SAEWeights:
        """Empty buffers that exactly fit a site, or this rank's part of it."""
        widths = (site.d_sae, site.d_in)
        return cls(*widths, dtype, device, site.out_width, site.has_skip, shard)

    def tensors(self) -> list[torch.Tensor]:
        """The buffers that a module's files fill."""
        filled = [self.W_enc, self.b_enc, self.threshold, self.W_dec, self.b_dec]
        optional = (self.W_skip, self.row_norms)
        return [*filled, *(tensor for tensor in optional if tensor is not None)]

    def clear(self) -> None:
        """Set all weights so that no feature can fire."""
        for tensor in (self.W_enc, self.W_dec, self.b_dec, self.meta):
            tensor.zero_()
        if self.W_skip is not None:
            self.W_skip.zero_()
        self.b_enc.fill_(float("-inf"))
        self.threshold.fill_(float("inf"))
        self.norm_limit.fill_(NO_NORM_LIMIT)

    def copy_from(self, staged: SAEWeights) -> None:
        """Take over the weights of an SAE of at most this capacity, in place.

        A shard takes the same shard of an SAE of exactly its capacity. `meta`,
        `norm_limit` and `screen` do not change.
        """
        assert (self.shard.rank, self.shard.size) == (
            staged.shard.rank,
            staged.shard.size,
        )
        if not self.shard.is_whole:
            for own, new in zip(self.tensors(), staged.tensors(), strict=True):
                own.copy_(new)
            return
        d_sae = staged.d_sae_capacity
        self.W_enc[:d_sae].copy_(staged.W_enc)
        self.W_dec[:d_sae].copy_(staged.W_dec)
        self.b_enc[:d_sae].copy_(staged.b_enc)
        self.threshold[:d_sae].copy_(staged.threshold)
        self.W_enc[d_sae:].zero_()
        self.W_dec[d_sae:].zero_()
        self.b_enc[d_sae:].fill_(float("-inf"))
        self.threshold[d_sae:].fill_(float("inf"))
        self.b_dec.copy_(staged.b_dec)
        if self.W_skip is not None:
            assert staged.W_skip is not None
            self.W_skip.copy_(staged.W_skip)

    def refresh(self) -> None:
        """Fit what is derived from `W_enc` to its content."""
        if self.screen is not None:
            self.screen.fill(self.W_enc)

    def set_meta(
        self, site: SiteInfo, skip_mask: int, norm_limit: float | None
    ) -> None:
        """Write the site's scalars, after the weights are in place."""
        meta = [0] * len(MetaField)
        meta[MetaField.D_SAE] = site.d_sae
        meta[MetaField.USES_TOPK] = int(site.activation is Activation.TOPK)
        meta[MetaField.K] = site.k or 0
        meta[MetaField.TOPK_RELU] = int(site.topk_relu)
        meta[MetaField.SKIP_MASK] = skip_mask
        self.meta.copy_(torch.tensor(meta, dtype=torch.int32))
        limit = NO_NORM_LIMIT if norm_limit is None else norm_limit
        self.norm_limit.fill_(min(limit, NO_NORM_LIMIT))


class StepState(nn.Module):
    """What the runner writes before each forward; shared by all sites of a worker.

    Attributes:
        index: int32 `[3, max_tokens]`, the row of every token per `Tier`; padded
            tokens have row 0.
        flags: int32 `[max_tokens]`, bit b set where the token's id is in skip set b.
        skip_bits: int32 `[vocab_size]`, the flag word of every token id.
        read_index: int32 `[max_tokens]`, the row of every token in the slots' reading
            tables; 0: not read.
        no_rows: int32 `[max_tokens]`, zeros: an index by which nothing is edited.
        reading: whether some token of the step is read; known on the host.
        idle_graph: whether a graph captured now runs only in steps that use no site.
        bypass: counts of the tokens that modules leave alone; read for metrics only.
        sync: int32 `[SYNC_INTS]`, counters with which blocks of a GPU kernel wait for
            one another; zero between launches. They are a buffer, so that sleeping and
            waking the model restores them.
    """

    index: torch.Tensor
    flags: torch.Tensor
    skip_bits: torch.Tensor
    read_index: torch.Tensor
    no_rows: torch.Tensor
    sync: torch.Tensor

    def __init__(self, max_tokens: int, device: torch.device, vocab_size: int = 1):
        super().__init__()
        self.max_tokens = max_tokens
        bits = torch.zeros(vocab_size, dtype=torch.int32, device=device)
        self.register_buffer("skip_bits", bits, persistent=False)
        index = torch.zeros(len(Tier), max_tokens, dtype=torch.int32, device=device)
        self.register_buffer("index", index, persistent=False)
        flags = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.register_buffer("flags", flags, persistent=False)
        for name in ("read_index", "no_rows"):
            rows = torch.zeros(max_tokens, dtype=torch.int32, device=device)
            self.register_buffer(name, rows, persistent=False)
        self.reading = False
        self.idle_graph = False
        sync = torch.zeros(SYNC_INTS, dtype=torch.int32, device=device)
        self.register_buffer("sync", sync, persistent=False)
        self.bypass = BypassCounts(device)


class SAESlot(nn.Module):
    """One SAE at one site, with its rows for the delta and full tiers.

    `activations` lists the kinds of module that the slot may ever hold. If these are
    TopK and a threshold activation, `meta` decides on the device. `reads_source` is
    true for a transcoder, whose encoder reads another point than it writes.

    `saturated`, int64 `[1]`, counts the write-backs that had a component beyond
    `STREAM_LIMIT`: one for each token and tier. It is read for metrics only.
    """

    saturated: torch.Tensor

    def __init__(
        self,
        weights: SAEWeights,
        num_rows: int,
        max_clamps: int,
        activations: frozenset[Activation],
        reads_source: bool = False,
    ):
        super().__init__()
        self.weights = weights
        self.reads_source = reads_source
        self.activations = activations
        device = weights.W_enc.device
        self.delta = ClampTable(num_rows, max_clamps, device)
        self.full = ClampTable(num_rows, max_clamps, device)
        # None if the engine reads no features.
        self.reads: ReadBuffers | None = None
        counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.register_buffer("saturated", counter, persistent=False)


class VectorSlot(nn.Module):
    """The steering vectors of one site, stacked. A row is a list of clamps on them.

    `directions` is float32 `[V, D]`, one vector module's row each. `saturated`, int64
    `[V]`, counts as that of `SAESlot`, for each vector that the token's row uses.
    """

    directions: torch.Tensor
    saturated: torch.Tensor

    def __init__(
        self,
        capacity: int,
        d_model: int,
        num_rows: int,
        max_clamps: int,
        device: torch.device,
    ):
        super().__init__()
        directions = torch.zeros(capacity, d_model, device=device)
        self.register_buffer("directions", directions, persistent=False)
        counters = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.register_buffer("saturated", counters, persistent=False)
        self.table = ClampTable(num_rows, max_clamps, device)
