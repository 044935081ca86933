# SPDX-License-Identifier: Apache-2.0
"""The tiers on a GPU: binds the kernels to a worker's step state and workspace."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm.logger import init_logger
from vllm.model_executor.layers import sae_full_reconstruction_kernel as kernel
from vllm.model_executor.layers import sae_readout_kernel as readout
from vllm.model_executor.layers.steering import SteeringBackend
from vllm.model_executor.layers.steering_capture import is_captured, is_needed
from vllm.model_executor.layers.steering_kernels.branches import (
    Branches,
    can_branch,
    fits,
)
from vllm.model_executor.layers.steering_kernels.extension import describe_kernels
from vllm.model_executor.layers.steering_kernels.flags import (
    warm_up_flags,
    write_flags,
)
from vllm.model_executor.layers.steering_read_state import encoder_input
from vllm.model_executor.layers.steering_state import SAESlot, StepState, VectorSlot

logger = init_logger(__name__)


class KernelBackend(SteeringBackend):
    """The tiers on a GPU (see `SteeringBackend`).

    Built after the modules are loaded and before memory is profiled: the workspace
    that all sites share is allocated here, and every specialisation that serving can
    need is compiled here, before any graph is captured.
    """

    def __init__(
        self,
        step: StepState,
        saes: Sequence[SAESlot],
        vectors: Sequence[VectorSlot],
        dtype: torch.dtype,
    ):
        self.step = step
        device = step.index.device
        logger.info_once("Steering kernels on %s", describe_kernels(device))
        self.workspace = kernel.SteeringWorkspace(step.max_tokens, saes, device)
        kernel.warm_up(saes, vectors, step, self.workspace, dtype)
        readout.warm_up(saes, step, self.workspace, dtype)
        warm_up_flags(step)
        self.branches = Branches(device) if can_branch(device) else None

    def write_flags(self, token_ids: torch.Tensor) -> None:
        write_flags(self.step, token_ids)

    def full_reconstruction(
        self,
        slot: SAESlot,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        source: torch.Tensor | None = None,
    ) -> None:
        if is_needed(slot.full, self.step, hidden):
            kernel.full_reconstruction(
                slot, self.step, self.workspace, hidden, residual, source
            )

    def sae_clamp(
        self,
        slot: SAESlot,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        source: torch.Tensor | None = None,
    ) -> None:
        if is_needed(slot.delta, self.step, hidden):
            kernel.sae_clamp(slot, self.step, self.workspace, hidden, residual, source)

    def read_features(
        self, slot: SAESlot, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        readout.read_features(slot, self.step, self.workspace, hidden, residual)

    def read_and_reconstruct(
        self,
        slot: SAESlot,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        source: torch.Tensor | None = None,
    ) -> None:
        if not is_needed(slot.full, self.step, hidden):
            read = encoder_input(hidden, residual, source)
            return self.read_features(slot, *read)
        readout.read_and_reconstruct(
            slot, self.step, self.workspace, hidden, residual, source
        )

    def full_tier(
        self,
        slots: Sequence[SAESlot],
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        source: torch.Tensor | None,
    ) -> None:
        """In a graph, of many modules those that have tokens."""
        whole = super().full_tier
        branches = self.branches
        branched = is_captured(hidden.device) and not self.step.idle_graph
        if branches is None or not (branched and fits(slots)):
            whole(slots, hidden, residual, source)
            return
        branches.capture(
            slots,
            self.step,
            hidden.shape[0],
            lambda some: whole(some, hidden, residual, source),
        )

    def steering_vectors(
        self, slot: VectorSlot, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        if is_needed(slot.table, self.step, hidden):
            kernel.steering_vectors(slot, self.step, hidden, residual)
