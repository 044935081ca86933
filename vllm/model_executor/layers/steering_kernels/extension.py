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


@functools.cache
def extension_is_built() -> bool:
    """Whether `vllm/_steering_C*.so` loads; never with `VLLM_STEERING_NO_CUDA=1`."""
    if os.environ.get("VLLM_STEERING_NO_CUDA") == "1" or not torch.cuda.is_available():
        return False
    package = Path(__file__).resolve().parents[3]
    for library in sorted(package.glob("_steering_C*.so")):
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            logger.warning("steering: Triton only, %s: %s", library, error.__cause__)
            return False
        return True
    return False


def cuda_ops() -> Any:
    """The extension's ops; call only where `extension_is_built()`."""
    return torch.ops.vllm_steering
