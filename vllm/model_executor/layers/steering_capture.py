# SPDX-License-Identifier: Apache-2.0
"""Whether what is launched now will run again, with other data."""

from __future__ import annotations

import torch

from vllm.model_executor.layers.steering_state import ClampTable


def is_captured(device: torch.device) -> bool:
    """Whether launches on this device go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_needed(table: ClampTable, stream: torch.Tensor) -> bool:
    """Whether a table's tier has to be launched: in a graph always, whose rows are
    data, else if a request of the step holds a row that edits."""
    return table.in_use or is_captured(stream.device)
