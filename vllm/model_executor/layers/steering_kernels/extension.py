# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the CUDA C++ extension (csrc/steering), if it was built."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


def extension_library() -> Path | None:
    """The file `vllm/_steering_C*.so`; None with `VLLM_STEERING_NO_CUDA=1`."""
    if os.environ.get("VLLM_STEERING_NO_CUDA") == "1":
        return None
    package = Path(__file__).resolve().parents[3]
    return next(iter(sorted(package.glob("_steering_C*.so"))), None)


@functools.cache
def extension_is_built() -> bool:
    """Whether `extension_library` loads, on a machine with a CUDA device."""
    library = extension_library()
    if library is None or not torch.cuda.is_available():
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        logger.warning("steering: Triton only, %s: %s", library, error.__cause__)
        return False
    return True


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether the extension's machine code is for this device: NVIDIA's sm_90."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def cuda_ops() -> Any:
    """The extension's ops; call only where `extension_is_built()`."""
    return torch.ops.vllm_steering
