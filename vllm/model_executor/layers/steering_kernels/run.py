# SPDX-License-Identifier: Apache-2.0
"""What the stages of one pipeline share, and what the device can do."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from vllm.config.steering import Tier
from vllm.config.steering_json import Json
from vllm.model_executor.layers.steering_state import ClampTable, SAESlot, StepState

from .workspace import StageBuffers, SteeringWorkspace


@functools.cache
def device_facts(device: torch.device) -> tuple[int, bool, bool]:
    """(multiprocessors, has TMA, can overlap dependent launches) of a device."""
    if device.type != "cuda":
        return 4, False, False
    properties = torch.cuda.get_device_properties(device)
    hopper = properties.major >= 9
    return properties.multi_processor_count, hopper, hopper


def pdl_options(device: torch.device) -> Json:
    """Launch options that let a kernel's prologue overlap its predecessor's end."""
    on = device_facts(device)[2]
    return {"PDL": True, "launch_pdl": True} if on else {"PDL": False}


@dataclass(frozen=True)
class Run:
    """What the stages of one pipeline share."""

    slot: SAESlot
    step: StepState
    workspace: SteeringWorkspace
    buffers: StageBuffers
    hidden: torch.Tensor
    residual: torch.Tensor | None
    tier: Tier
    topk: bool
    gate: int

    @property
    def table(self) -> ClampTable:
        return self.slot.full if self.tier is Tier.FULL else self.slot.delta

    @property
    def index(self) -> torch.Tensor:
        return self.step.index[self.tier]
