# SPDX-License-Identifier: Apache-2.0
"""GPU path of reading features: which kernels run, with which sizes.

It may run under CUDA graph capture, as `sae_full_reconstruction_kernel` may. Full
reconstruction's stages find and encode the active tokens; they get the reading table
and index in place of a tier's. `steering_kernels/readout.py` is the last stage.
The extension reads where it decodes: one passage through the slot does both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers import sae_full_reconstruction_kernel as kernel
from vllm.model_executor.layers.steering_capture import is_read
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_kernels.plan import warm_up_lengths
from vllm.model_executor.layers.steering_kernels.run import Run
from vllm.model_executor.layers.steering_kernels.workspace import (
    SteeringWorkspace,
    uses_threshold,
    uses_topk,
)
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_state import SAESlot, StepState
from vllm.model_executor.layers.steering_stream import encoder_input
from vllm.triton_utils import HAS_TRITON

if HAS_TRITON:
    from vllm.model_executor.layers.steering_kernels import (
        stages_shared_read,
        stages_triton,
        stages_triton_read,
    )


@dataclass(frozen=True)
class ReadRun(Run):
    """A pipeline over the tokens that are read."""

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

    A step in which no request reads launches nothing, unless it is captured (see
    `is_read`).

    Args:
        hidden: `[T, d_in]`, the model's dtype.
        residual: `[T, d_in]`, or None where the stream is one tensor.
    """
    if not is_read(step, hidden):
        return
    launch(slot, step, workspace, hidden, residual)


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
    if kernel.reads_on_the_way(slot, hidden, residual):
        only = kernel.Passage(Tier.FULL, slot.reads, edits=False)
        kernel.full_reconstruction(
            slot, step, workspace, hidden, residual, passage=only
        )
        return
    for topk, held in ((False, uses_threshold(slot)), (True, uses_topk(slot))):
        if held:
            run = ReadRun.over(
                slot,
                step,
                workspace,
                hidden,
                residual,
                tier=Tier.FULL,
                topk=topk,
                reads=slot.reads,
            )
            _pipeline(run, slot.reads)


def read_and_reconstruct(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None = None,
) -> None:
    """`read_features`, then full reconstruction; encodes once where it can."""
    reads = slot.reads
    if not is_read(step, hidden):
        reads = None
    passage = kernel.FULL
    if reads is not None and kernel.reads_on_the_way(slot, hidden, residual):
        passage = kernel.Passage(Tier.FULL, reads)
    elif reads is not None:
        read = encoder_input(hidden, residual, source)
        launch(slot, step, workspace, *read)
    kernel.full_reconstruction(slot, step, workspace, hidden, residual, source, passage)


def _pipeline(run: ReadRun, reads: ReadBuffers) -> None:
    """The stages, chunk after chunk."""
    if not run.slot.weights.shard.is_whole:
        stages_shared_read.pipeline(run, reads)
        return
    plan = run.buffers.plan
    for base in range(0, plan.num_chunks * plan.rows, plan.rows):
        stages_triton.compact(run, base)
        stages_triton.encode(run, base)
        if run.topk:
            stages_triton.coefficients(run, base)
        stages_triton_read.read_out(run, reads, base, overflow=False)


def warm_up(
    slots: Iterable[SAESlot],
    step: StepState,
    workspace: SteeringWorkspace,
    dtype: torch.dtype,
) -> None:
    """Run every specialisation that serving can hit, before capture.

    Rows of `step` are zero at start-up, so nothing is read; kernels compile anyway.
    """
    for tokens in warm_up_lengths(workspace.max_tokens):
        for slot in slots:
            shape = (tokens, slot.weights.d_in)
            hidden = torch.zeros(shape, dtype=dtype, device=step.index.device)
            for residual in (torch.zeros_like(hidden), None):
                launch(slot, step, workspace, hidden, residual)
