# SPDX-License-Identifier: Apache-2.0
"""The places that hold modules: slots and the tables of their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering import SiteKey, SteeringBackend
from vllm.model_executor.layers.steering_state import SAESlot, StepState, VectorSlot
from vllm.v1.worker.steering_tables import BoundTable


@dataclass
class SAEPlace:
    """A slot for an SAE and the tables of its tiers."""

    key: SiteKey
    slot: SAESlot
    tables: dict[Tier, BoundTable]


@dataclass
class VectorPlace:
    """One slot for a vector: a row in the stack of vectors of its site."""

    key: SiteKey
    slot: VectorSlot
    table: BoundTable
    row: int


Place = SAEPlace | VectorPlace


def make_backend(
    step: StepState, places: dict[int, Place], dtype: torch.dtype
) -> SteeringBackend:
    """The backend that computes the tiers on the step's device."""
    if step.index.device.type == "cpu":
        from vllm.model_executor.layers.steering_reference_backend import (
            ReferenceBackend,
        )

        return ReferenceBackend(step)
    from vllm.model_executor.layers.steering_kernel_backend import KernelBackend

    saes = [p.slot for p in places.values() if isinstance(p, SAEPlace)]
    stacks = {id(p.slot): p.slot for p in places.values() if isinstance(p, VectorPlace)}
    return KernelBackend(step, saes, list(stacks.values()), dtype)
