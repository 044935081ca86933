# SPDX-License-Identifier: Apache-2.0
"""What has to be launched: in a step that runs now, and in a graph that runs again."""

from __future__ import annotations

import os

import torch

from vllm.config.steering_environment import IDLE_GRAPHS_ENV
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_state import StepState


def idle_graphs_are_on() -> bool:
    """Whether each CUDA graph gets a twin without steering (`IDLE_GRAPHS_ENV=1`)."""
    return os.environ.get(IDLE_GRAPHS_ENV) == "1"


def is_captured(device: torch.device) -> bool:
    """Whether launches on this device go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_needed(table: ClampTable, step: StepState, stream: torch.Tensor) -> bool:
    """Whether a table's tier has to be launched: in a graph always, whose rows are
    data, else if a request of the step holds a row that edits."""
    return _is_launched(table.in_use, step, stream)


def is_read(step: StepState, stream: torch.Tensor) -> bool:
    """Whether reading has to be launched: in a graph always, else if some token of the
    step is read."""
    return _is_launched(step.reading, step, stream)


def _is_launched(is_used: bool, step: StepState, stream: torch.Tensor) -> bool:
    """Whether what this step uses, or does not use, is launched. A graph for idle steps
    holds no launch."""
    if step.idle_graph and is_captured(stream.device):
        return False
    return is_used or is_captured(stream.device)
