# SPDX-License-Identifier: Apache-2.0
"""The stages of full reconstruction in CUDA C++ (csrc/steering)."""

from __future__ import annotations

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_state import SAESlot

from .extension import cuda_ops
from .plan import prefetches_decoder, sorts_ahead
from .run import Run


def takes_cuda(
    slot: SAESlot, hidden: torch.Tensor, residual: torch.Tensor | None
) -> bool:
    """Whether the extension's kernels fit: Hopper, 16-byte rows of 16-bit numbers."""
    device = hidden.device
    if device.type != "cuda":
        return False
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    streams = (hidden,) if residual is None else (hidden, residual)
    return slot.weights.W_enc.element_size() == 2 and all(
        x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
        for x in streams
    )


def compact(run: Run, base: int) -> None:
    weights, workspace = run.slot.weights, run.workspace
    cuda_ops().compact(
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
        base,
        run.gate,
    )


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
        weights.W_dec if prefetches_decoder(run.buffers.plan.rows) else None,
        base,
    )


def select(run: Run, base: int) -> None:
    workspace = run.workspace
    cuda_ops().select(
        run.index,
        run.table.packed,
        run.slot.weights.meta,
        workspace.count,
        workspace.tokens,
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
        run.index,
        run.table.packed,
        workspace.count,
        workspace.tokens,
        workspace.nnz,
        run.buffers.entries,
        run.buffers.coef,
        run.buffers.x,
        weights.W_dec,
        weights.b_dec,
        run.hidden,
        run.residual,
        base,
        run.topk,
        run.tier is Tier.DELTA,
        sorts_ahead(run.buffers.plan.rows),
    )
