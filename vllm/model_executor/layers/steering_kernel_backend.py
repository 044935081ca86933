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
from vllm.model_executor.layers.steering_state import SAESlot, StepState, VectorSlot
from vllm.model_executor.layers.steering_stream import Stream

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

    def full_reconstruction(self, slot: SAESlot, stream: Stream) -> None:
        if is_needed(slot.full, self.step, stream.hidden):
            kernel.full_reconstruction(slot, self.step, self.workspace, *stream)

    def sae_clamp(self, slot: SAESlot, stream: Stream) -> None:
        if is_needed(slot.delta, self.step, stream.hidden):
            kernel.sae_clamp(slot, self.step, self.workspace, *stream)

    def read_features(self, slot: SAESlot, read: Stream) -> None:
        readout.read_features(slot, self.step, self.workspace, *read[:2])

    def read_and_reconstruct(self, slot: SAESlot, stream: Stream) -> None:
        if not is_needed(slot.full, self.step, stream.hidden):
            return self.read_features(slot, stream.read)
        readout.read_and_reconstruct(slot, self.step, self.workspace, *stream)

    def full_tier(self, slots: Sequence[SAESlot], stream: Stream) -> None:
        """In a graph, of many modules those that have tokens."""
        whole = super().full_tier
        branches = self.branches
        branched = is_captured(stream.hidden.device) and not self.step.idle_graph
        if branches is None or not (branched and fits(slots)):
            whole(slots, stream)
            return
        tokens = stream.hidden.shape[0]
        branches.capture(slots, self.step, tokens, lambda some: whole(some, stream))

    def steering_vectors(self, slot: VectorSlot, stream: Stream) -> None:
        if is_needed(slot.table, self.step, stream.hidden):
            kernel.steering_vectors(slot, self.step, *stream[:2])
