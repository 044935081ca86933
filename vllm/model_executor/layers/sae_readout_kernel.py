# SPDX-License-Identifier: Apache-2.0
"""GPU path of reading features: which kernels run, with which sizes.

It may run under CUDA graph capture, as `sae_full_reconstruction_kernel` may. Full
reconstruction's stages find and encode the active tokens; they get the reading table
and index in place of a tier's. `steering_kernels/readout.py` is the last stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_kernels import stages_cuda
from vllm.model_executor.layers.steering_kernels.extension import extension_is_built
from vllm.model_executor.layers.steering_kernels.run import (
    Run,
    device_facts,
    pdl_options,
)
from vllm.model_executor.layers.steering_kernels.workspace import (
    SteeringWorkspace,
    uses_threshold,
    uses_topk,
)
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_state import ClampTable, SAESlot, StepState
from vllm.triton_utils import HAS_TRITON

if HAS_TRITON:
    from vllm.model_executor.layers.steering_kernels import stages_triton
    from vllm.model_executor.layers.steering_kernels.readout import readout_kernel

# A list that may overflow holds at least the best keys and two blocks of features.
LEAST_CAPACITY = 96


@dataclass(frozen=True)
class ReadRun(Run):
    """A pipeline over the tokens that are read."""

    @property
    def reads(self) -> ReadBuffers:
        assert self.slot.reads is not None
        return self.slot.reads

    @property
    def table(self) -> ClampTable:
        # The stages read only the columns that both kinds of table have.
        return self.reads  # type: ignore[return-value]

    @property
    def index(self) -> torch.Tensor:
        return self.step.read_index


def read_features(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """Write the rows of the step's read tokens to `slot.reads.out`.

    A step in which nobody reads launches nothing, unless it is captured.

    Args:
        hidden: `[T, d_in]`, the model's dtype.
        residual: `[T, d_in]`, or None where the stream is one tensor.
    """
    if not step.reading and not _is_captured(hidden.device):
        return
    launch(slot, step, workspace, hidden, residual)


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def launch(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """Run the stages, even if no token is read."""
    if slot.reads is None or hidden.shape[0] == 0:
        return
    if uses_threshold(slot):
        _pipeline(slot, step, workspace, hidden, residual, topk=False)
    if uses_topk(slot):
        _pipeline(slot, step, workspace, hidden, residual, topk=True)


def _pipeline(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    topk: bool,
) -> None:
    tokens = hidden.shape[0]
    if tokens > workspace.max_tokens:
        raise ValueError(
            f"steering: {tokens} tokens, workspace built for {workspace.max_tokens}"
        )
    buffers = workspace.buffers(slot, tokens, topk)
    mixed = uses_threshold(slot) and uses_topk(slot)
    run = ReadRun(
        slot=slot,
        step=step,
        workspace=workspace,
        buffers=buffers,
        hidden=hidden,
        residual=residual,
        tier=Tier.FULL,
        topk=topk,
        gate=int(topk) if mixed else -1,
    )
    cuda = extension_is_built() and stages_cuda.takes_cuda(slot, hidden, residual)
    rows = buffers.plan.rows
    for base in range(0, buffers.plan.num_chunks * rows, rows):
        if cuda:
            if stages_cuda.takes_compact_encode(run):
                stages_cuda.compact_encode(run)
            else:
                stages_cuda.compact(run, base)
                stages_cuda.encode(run, base)
            if topk:
                stages_cuda.select(run, base)
        else:
            stages_triton.compact(run, base)
            stages_triton.encode(run, base)
            if topk:
                stages_triton.coefficients(run, base)
        _read_out(run, base, cuda)


def _read_out(run: ReadRun, base: int, cuda: bool) -> None:
    """The last stage; `cuda`: the stages before it were the extension's."""
    weights, workspace, buffers = run.slot.weights, run.workspace, run.buffers
    plan, reads = buffers.plan, run.reads
    if plan.capacity < min(LEAST_CAPACITY, weights.d_sae_capacity):
        raise ValueError(
            f"steering: lists of {plan.capacity} non-zeros, reading needs "
            f"{LEAST_CAPACITY}"
        )
    device = weights.W_enc.device
    # The extension stores a token's id in its record; Triton's stages store it in
    # `tokens`.
    tokens = workspace.records[:, 1] if cuda else workspace.tokens
    readout_kernel[(min(plan.rows, device_facts(device)[0] * 8),)](
        index=run.index,
        table=reads.packed,
        scale=reads.scale,
        out=reads.out,
        meta=weights.meta,
        count=workspace.count,
        tokens=tokens,
        records=workspace.records,
        entries=buffers.entries,
        kth=workspace.kth,
        x=buffers.x,
        scores=buffers.scores,
        w_enc=weights.W_enc,
        b_enc=weights.b_enc,
        threshold=weights.threshold,
        table_stride=reads.packed.stride(0),
        out_stride=reads.out.stride(0),
        tokens_stride=tokens.stride(0),
        base=base,
        rows=plan.rows,
        F=weights.d_sae_capacity,
        capacity=plan.capacity,
        D=weights.d_in,
        GATE=run.gate,
        TOPK=run.topk,
        num_warps=4,
        **pdl_options(device),
    )


def warm_up(
    slots: Iterable[SAESlot],
    step: StepState,
    workspace: SteeringWorkspace,
    dtype: torch.dtype,
) -> None:
    """Run every specialisation that serving can hit, before capture.

    Rows of `step` are zero at start-up, so nothing is read; kernels compile anyway.
    """
    sizes = sorted({1, 2, 16, 17, 64, 65, 128, 129, 256, 257, 1024, 1025, 1 << 30})
    for tokens in sorted({min(size, workspace.max_tokens) for size in sizes}):
        for slot in slots:
            shape = (tokens, slot.weights.d_in)
            hidden = torch.zeros(shape, dtype=dtype, device=step.index.device)
            for residual in (torch.zeros_like(hidden), None):
                launch(slot, step, workspace, hidden, residual)
