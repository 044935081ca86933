# SPDX-License-Identifier: Apache-2.0
"""The tiers and reading on a CPU: binds the definitions to a worker's step state."""

from __future__ import annotations

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers import steering_reference as reference
from vllm.model_executor.layers.steering import SteeringBackend
from vllm.model_executor.layers.steering_capture import is_needed, is_read
from vllm.model_executor.layers.steering_readout import read_features
from vllm.model_executor.layers.steering_state import SAESlot, StepState, VectorSlot
from vllm.model_executor.layers.steering_stream import Stream


class ReferenceBackend(SteeringBackend):
    """The tiers and reading on a CPU (see `SteeringBackend`)."""

    def __init__(self, step: StepState):
        self.step = step

    def write_flags(self, token_ids: torch.Tensor) -> None:
        step, n = self.step, token_ids.shape[0]
        # NumPy has less to do than PyTorch around each of these small operations.
        ids, bits = token_ids.numpy(), step.skip_bits.numpy()
        known = (ids >= 0) & (ids < len(bits))
        flags = bits.take(ids, mode="clip") * known
        step.flags[:n].numpy()[:] = flags
        if flags.any():
            rows = step.index[:, :n]
            step.bypass.count(step.flags[:n], rows[Tier.DELTA], rows[Tier.FULL])

    def full_reconstruction(self, slot: SAESlot, stream: Stream) -> None:
        if is_needed(slot.full, self.step, stream.hidden):
            reference.full_reconstruction(slot, self.step, *stream)

    def sae_clamp(self, slot: SAESlot, stream: Stream) -> None:
        if is_needed(slot.delta, self.step, stream.hidden):
            reference.sae_clamp(slot, self.step, *stream)

    def steering_vectors(self, slot: VectorSlot, stream: Stream) -> None:
        if is_needed(slot.table, self.step, stream.hidden):
            reference.steering_vectors(slot, self.step, *stream[:2])

    def read_features(self, slot: SAESlot, read: Stream) -> None:
        if is_read(self.step, read.hidden):
            read_features(slot, self.step, *read[:2])
