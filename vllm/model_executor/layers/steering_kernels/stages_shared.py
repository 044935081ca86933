# SPDX-License-Identifier: Apache-2.0
"""The stages of an SAE that tensor-parallel ranks share (docs/design/sharding.md).

Between the exchanges run the stages of one rank. They see the part of the encoder that
this rank holds, or its columns as a stream of their own. The exchanges have fixed
shapes, and buffers come from PyTorch's allocator, so all of it may be captured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_limits import STREAM_LIMIT
from vllm.model_executor.layers.steering_shards import Shard
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    StepState,
)
from vllm.model_executor.layers.steering_stream import encoder_input

from . import stages_triton
from .peers import Peers
from .plan import LIST_MAX, cdiv, next_power_of_2
from .run import Run, device_facts, stream_arguments
from .shared import (
    merge_kernel,
    order_dense_kernel,
    pack_kernel,
    place_kernel,
    steered_kernel,
    write_kernel,
)
from .shared_clamp import clamp_acts_kernel, clamp_columns_kernel
from .stages_triton_dense import dense, dense_acts, encode_dense
from .workspace import SteeringWorkspace, exchanges

COLUMN_BLOCK = 1024


@dataclass(frozen=True)
class ColumnsRun(Run):
    """A pipeline that decodes into `hidden [rows, D / size]`, one row a place."""

    places: torch.Tensor | None = None
    rows_of: torch.Tensor | None = None
    counter: torch.Tensor | None = None

    @property
    def tokens(self) -> torch.Tensor:
        assert self.places is not None
        return self.places

    @property
    def index(self) -> torch.Tensor:
        assert self.rows_of is not None
        return self.rows_of

    @property
    def saturated(self) -> torch.Tensor:
        """Whole tokens are counted when they are written, not their columns."""
        assert self.counter is not None
        return self.counter


def _grid(rows: int, device: torch.device) -> tuple[int]:
    return (min(rows, device_facts(device)[0] * 8),)


def pipeline(run: Run) -> None:
    """All stages, chunk after chunk."""
    plan = run.buffers.plan
    for base in range(0, plan.num_chunks * plan.rows, plan.rows):
        stages_triton.compact(run, base)
        _encode(run, base)
        columns = _columns_run(run, base)
        stages_triton.coefficients(columns, base)
        if not run.topk:
            order_dense(columns, base)
        stages_triton.combine(columns, base)
        dense(columns, _encode_dense)
        every = run.slot.weights.shard.stack(columns.hidden)
        count, tokens = run.workspace.count, run.tokens
        write_columns(run.slot, count, tokens, every, run.hidden, run.residual, base)


def _encode(run: Run, base: int) -> None:
    """Lists, or scores of TopK, of all features, as one rank has them."""
    if run.topk:
        exchange_scores(run, base)
        return
    weights, buffers, workspace = run.slot.weights, run.buffers, run.workspace
    shard, rows, device = weights.shard, buffers.plan.rows, weights.W_enc.device
    stages_triton.encode(run, base)
    packed = torch.empty(rows, 1 + LIST_MAX, dtype=torch.int64, device=device)
    shared = {
        "count": workspace.count,
        "tokens": workspace.tokens,
        "records": workspace.records,
        "entries": buffers.entries,
        "base": base,
        "rows": rows,
        "capacity": buffers.plan.capacity,
        "LIST_MAX": LIST_MAX,
        "num_warps": 4,
    }
    grid = _grid(rows, device)
    pack_kernel[grid](packed=packed, first_feature=weights.own.start, **shared)
    every = shard.stack(packed)
    merge_kernel[grid](packed=every, RANKS=shard.size, **shared)


def exchange_scores(run: Run, base: int) -> None:
    """Write a chunk's scores of all features to the workspace."""
    weights, buffers = run.slot.weights, run.buffers
    held, device = weights.W_enc.shape[0], weights.W_enc.device
    rows, peers = buffers.plan.rows, peers_of(run.slot, run.workspace)
    if peers is not None:
        own = peers.staged(rows, held, torch.float32)
        stages_triton.encode(replace(run, own_scores=own), base)
        peers.turn()
        peers.pull(own, buffers.scores, run.workspace.count, base)
        return
    own = torch.empty(rows, held, device=device)
    stages_triton.encode(replace(run, own_scores=own), base)
    _put(weights.shard.stack(own), buffers.scores)


def peers_of(slot: SAESlot, workspace: SteeringWorkspace) -> Peers | None:
    """The memory through which the ranks of a slot exchange; None: they gather."""
    return workspace.peers if exchanges(slot) else None


def _put(parts: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy `[size, n, w]` of all ranks into `[n, size * w]`."""
    whole.unflatten(1, (parts.shape[0], parts.shape[2])).copy_(parts.transpose(0, 1))


def _columns_run(run: Run, base: int) -> ColumnsRun:
    """The rest of the pipeline, on this rank's columns of the chunk's tokens."""
    weights, rows = run.slot.weights, run.buffers.plan.rows
    hidden, residual = run.hidden, run.residual
    device = hidden.device
    columns = torch.empty(rows, run.d_out, dtype=hidden.dtype, device=device)
    places, rows_of = torch.empty(2, rows, dtype=torch.int32, device=device)
    is_delta = run.tier is Tier.DELTA
    place_kernel[_grid(rows, device)](
        index=run.index,
        count=run.workspace.count,
        tokens=run.tokens,
        places=places,
        rows_of=rows_of,
        **stream_arguments(hidden, residual),
        columns=columns,
        base=base,
        rows=rows,
        first_column=weights.columns.start,
        W=run.d_out,
        FILL=is_delta,
        BLOCK=min(next_power_of_2(run.d_out), COLUMN_BLOCK),
        num_warps=4,
    )
    return ColumnsRun(
        slot=run.slot,
        step=run.step,
        workspace=run.workspace,
        buffers=run.buffers,
        hidden=columns,
        residual=None,
        tier=run.tier,
        topk=run.topk,
        gate=run.gate,
        # The delta tier adds to what the columns hold, as a transcoder's does.
        source=columns if is_delta else None,
        places=places,
        rows_of=rows_of,
        counter=torch.zeros(1, dtype=torch.int64, device=device),
    )


def order_dense(run: Run, base: int) -> None:
    """Give the dense tokens of a chunk the same places on every rank."""
    order_dense_kernel[(1,)](
        count=run.workspace.count,
        tokens=run.tokens,
        records=run.workspace.records,
        base=base,
        rows=run.buffers.plan.rows,
        LIST_MAX=LIST_MAX,
        BLOCK=1024,
        num_warps=4,
    )


def _encode_dense(run: Run, first: int, rows: int) -> None:
    """The activations of dense tokens, from those of all ranks."""
    weights = run.slot.weights
    held, device = weights.W_enc.shape[0], weights.W_enc.device
    own = torch.empty(rows, held, device=device)
    encode_dense(run, first, rows, own)
    acts = dense_acts(run)[:, : weights.d_sae_capacity]
    _put(weights.shard.stack(own), acts)


def write_columns(
    slot: SAESlot,
    count: torch.Tensor,
    tokens: torch.Tensor,
    columns: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    base: int,
) -> None:
    """Write back `count[0] - base` tokens from the columns of all ranks.

    Args:
        slot: whose counter counts saturated tokens.
        count: int32 `[1]`.
        tokens: int32 `[rows]`, which token each row is; -1: none.
        columns: `[size, rows, D / size]`, the model's dtype.
        hidden, residual: the stream.
        base: the first row's place among the `count` tokens.
    """
    size, rows, width = columns.shape
    write_kernel[_grid(rows, hidden.device)](
        count=count,
        tokens=tokens,
        columns=columns,
        **stream_arguments(hidden, residual),
        saturated=slot.saturated,
        base=base,
        rows=rows,
        limit=STREAM_LIMIT[hidden.dtype],
        W=width,
        RANKS=size,
        BLOCK=min(next_power_of_2(width), COLUMN_BLOCK),
        num_warps=4,
    )


@dataclass(frozen=True)
class Gather:
    """How the ranks gather rows: through their memory where that is possible.

    active: int32 `[1]` on the device. Where it is 0, nothing need be gathered.
    """

    shard: Shard
    peers: Peers | None
    active: torch.Tensor

    def room(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """`[rows, width]`, from which `__call__` gathers next."""
        peers = self.peers
        if peers is not None and peers.fits(rows * width * dtype.itemsize):
            return peers.staged(rows, width, dtype)
        return torch.empty(rows, width, dtype=dtype, device=self.active.device)

    def __call__(self, own: torch.Tensor, empty: int = 0) -> torch.Tensor:
        """`[size, rows, width]` of all ranks; `empty` where nothing is gathered."""
        peers = self.peers
        if peers is None or not peers.fits(own.nbytes):
            return self.shard.stack(own)
        # Copies are of 16 bytes.
        padded = cdiv(own.nbytes, 16) * 16
        every = torch.empty(
            self.shard.size, padded, dtype=torch.uint8, device=own.device
        )
        every.view(own.dtype).fill_(empty)
        peers.turn()
        peers.pull(
            peers.staged(1, padded, torch.uint8), every, self.active, stacked=True
        )
        used = every[:, : own.nbytes].contiguous()
        return used.view(own.dtype).view(self.shard.size, *own.shape)


def clamp(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    gated: bool,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None = None,
) -> None:
    """The delta tier of a threshold SAE. With `gated`, a TopK module is skipped."""
    weights, table = slot.weights, slot.delta
    tokens, device = hidden.shape[0], hidden.device
    width = weights.W_dec.shape[1]
    places = torch.empty(tokens, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    active = torch.zeros(1, dtype=torch.int32, device=device)
    gather = Gather(weights.shard, peers_of(slot, workspace), active)
    acts = gather.room(tokens, table.max_clamps, torch.float32)
    row_d = next_power_of_2(weights.d_out)
    shared = {
        "index": step.index[Tier.DELTA],
        "table": table.packed,
        "places": places,
        "table_stride": table.packed.stride(0),
        "num_warps": 4 if row_d <= 1024 else 8,
    }
    read = encoder_input(hidden, residual, source)
    reads = {
        **stream_arguments(*read),
        "D": weights.d_in,
        "BLOCK_D": min(next_power_of_2(weights.d_in), 512),
        **shared,
    }
    steered_kernel[(tokens,)](
        flags=step.flags,
        meta=weights.meta,
        norm_limit=weights.norm_limit,
        count=count,
        active=active,
        T=tokens,
        HAS_SOURCE=source is not None,
        GATED=gated,
        ROW_D=row_d,
        **reads,
    )
    clamp_acts_kernel[(tokens,)](
        w_enc=weights.W_enc,
        b_enc=weights.b_enc,
        threshold=weights.threshold,
        acts=acts,
        first_feature=weights.own.start,
        features=weights.W_enc.shape[0],
        MAX_CLAMPS=table.max_clamps,
        NC=8,
        **reads,
    )
    every = gather(acts)
    columns = gather.room(tokens, width, hidden.dtype)
    clamp_columns_kernel[(tokens,)](
        w_dec=weights.W_dec,
        acts=every,
        columns=columns,
        first_column=weights.columns.start,
        features=weights.W_enc.shape[0],
        T=tokens,
        W=width,
        MAX_CLAMPS=table.max_clamps,
        NC=8,
        ROW_W=next_power_of_2(width),
        **stream_arguments(hidden, residual),
        **shared,
    )
    write_columns(slot, count, places, gather(columns), hidden, residual, 0)
