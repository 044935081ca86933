# SPDX-License-Identifier: Apache-2.0
"""The stages of full reconstruction in CUDA C++ (csrc/steering)."""

from __future__ import annotations

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_state import ClampTable, SAESlot

from .extension import cuda_ops
from .plan import FRONT_TOKENS, sorts_ahead
from .run import Run


def _fits_streams(hidden: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Whether the kernels can address the stream: Hopper, 16-byte rows."""
    device = hidden.device
    if device.type != "cuda":
        return False
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    streams = (hidden,) if residual is None else (hidden, residual)
    return all(
        x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
        for x in streams
    )


def takes_cuda(
    slot: SAESlot, hidden: torch.Tensor, residual: torch.Tensor | None
) -> bool:
    """Whether the extension's stages fit: the stream, and 16-bit weights."""
    return slot.weights.W_enc.element_size() == 2 and _fits_streams(hidden, residual)


def takes_front(run: Run) -> bool:
    """Whether one launch does the first two stages: a decoding step."""
    return run.hidden.shape[0] <= FRONT_TOKENS and run.buffers.plan.num_chunks == 1


def _gather_arguments(run: Run) -> tuple[torch.Tensor | None, ...]:
    """What the gathering of active tokens reads and writes, in the ops' order."""
    weights, workspace = run.slot.weights, run.workspace
    return (
        run.index,
        run.step.flags,
        run.table.packed,
        weights.meta,
        weights.norm_limit,
        run.hidden,
        run.residual,
        run.buffers.x,
        workspace.tokens,
        workspace.nnz,
        workspace.count,
    )


def front(run: Run) -> None:
    """`compact` and `encode` of a step of at most `FRONT_TOKENS` tokens."""
    weights, buffers = run.slot.weights, run.buffers
    cuda_ops().front(
        *_gather_arguments(run),
        weights.W_enc,
        weights.b_enc,
        weights.threshold,
        buffers.scores if run.topk else buffers.entries,
        weights.W_dec,
        run.workspace.sync,
        run.gate,
    )


def compact(run: Run, base: int) -> None:
    cuda_ops().compact(*_gather_arguments(run), base, run.gate)


def encode(run: Run, base: int) -> None:
    weights, workspace = run.slot.weights, run.workspace
    cuda_ops().encode(
        run.buffers.x,
        weights.W_enc,
        weights.b_enc,
        weights.threshold,
        workspace.count,
        workspace.nnz,
        run.buffers.scores if run.topk else run.buffers.entries,
        base,
    )


def select(run: Run, base: int) -> None:
    workspace = run.workspace
    cuda_ops().select(
        run.table.packed,
        run.slot.weights.meta,
        workspace.count,
        run.buffers.scores,
        workspace.nnz,
        run.buffers.entries,
        workspace.kth,
        run.buffers.coef,
        base,
    )


def decode(run: Run, base: int) -> None:
    weights, workspace = run.slot.weights, run.workspace
    cuda_ops().decode(
        run.table.packed,
        weights.meta,
        workspace.count,
        workspace.nnz,
        run.buffers.entries,
        run.buffers.scores if run.topk else None,
        workspace.kth,
        run.buffers.coef,
        run.buffers.x,
        weights.W_enc,
        weights.b_enc,
        weights.threshold,
        weights.W_dec,
        weights.b_dec,
        run.hidden,
        run.residual,
        base,
        run.tier is Tier.DELTA,
        sorts_ahead(run.buffers.plan.rows),
    )


def takes_clamp(
    table: ClampTable,
    slot: SAESlot | None,
    directions: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> bool:
    """Whether the clamp kernel fits: the stream, and the row in shared memory."""
    dtype = hidden.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if residual is not None and residual.dtype is not dtype:
        return False
    if hidden.shape[1] > 16384 or not 1 <= table.max_clamps <= 2048:
        return False
    if directions.dtype is not (torch.float32 if slot is None else dtype):
        return False
    rows = (directions,) if slot is None else (directions, slot.weights.W_enc)
    aligned = all(x.data_ptr() % 16 == 0 for x in rows)
    return aligned and _fits_streams(hidden, residual)


def clamp(
    table: ClampTable,
    index: torch.Tensor,
    flags: torch.Tensor,
    slot: SAESlot | None,
    gated: bool,
    directions: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """Add the row's clamped directions, in place; without a slot: the additive tier."""
    weights = None if slot is None else slot.weights
    cuda_ops().clamp(
        index,
        table.packed,
        None if weights is None else flags,
        None if weights is None else weights.meta,
        None if weights is None else weights.norm_limit,
        None if weights is None else weights.W_enc,
        None if weights is None else weights.b_enc,
        None if weights is None else weights.threshold,
        directions,
        hidden,
        residual,
        gated,
    )
