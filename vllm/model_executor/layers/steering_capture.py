# SPDX-License-Identifier: Apache-2.0
"""Whether what is launched now will run again, with other data."""

from __future__ import annotations

import torch


def is_captured(device: torch.device) -> bool:
    """Whether launches on this device go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
