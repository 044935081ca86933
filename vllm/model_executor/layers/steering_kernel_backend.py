# SPDX-License-Identifier: Apache-2.0
"""The tiers on a GPU: binds the kernels to a worker's step state and workspace."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm.model_executor.layers import sae_full_reconstruction_kernel as kernel
from vllm.model_executor.layers import sae_readout_kernel as readout
from vllm.model_executor.layers.steering_kernels.flags import (
    warm_up_flags,
    write_flags,
)
from vllm.model_executor.layers.steering_state import SAESlot, StepState, VectorSlot


class KernelBackend:
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
        for slot in saes:
            _refuse_transcoder(slot)
        self.step = step
        device = step.index.device
        self.workspace = kernel.SteeringWorkspace(step.max_tokens, saes, device)
        kernel.warm_up(saes, vectors, step, self.workspace, dtype)
        readout.warm_up(saes, step, self.workspace, dtype)
        warm_up_flags(step)

    def write_flags(self, token_ids: torch.Tensor) -> None:
        write_flags(self.step, token_ids)

    def full_reconstruction(
        self,
        slot: SAESlot,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        source: torch.Tensor | None = None,
    ) -> None:
        assert source is None, "the constructor refuses transcoders"
        kernel.full_reconstruction(slot, self.step, self.workspace, hidden, residual)

    def sae_clamp(
        self,
        slot: SAESlot,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        source: torch.Tensor | None = None,
    ) -> None:
        assert source is None, "the constructor refuses transcoders"
        kernel.sae_clamp(slot, self.step, self.workspace, hidden, residual)

    def read_features(
        self, slot: SAESlot, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        readout.read_features(slot, self.step, self.workspace, hidden, residual)

    def steering_vectors(
        self, slot: VectorSlot, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        kernel.steering_vectors(slot, self.step, hidden, residual)


def _refuse_transcoder(slot: SAESlot) -> None:
    weights = slot.weights
    if weights.d_in != weights.d_out or weights.W_skip is not None or slot.reads_source:
        raise ValueError(
            f"steering: found a transcoder (d_in {weights.d_in}, d_out "
            f"{weights.d_out}, skip connection: {weights.W_skip is not None}); on a "
            "GPU, only SAEs that write the point that they read are supported"
        )
