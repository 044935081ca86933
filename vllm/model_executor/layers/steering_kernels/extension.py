# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the CUDA C++ extension (csrc/steering), if it was built."""

from __future__ import annotations

import enum
import functools
import logging
import os
from pathlib import Path
from typing import Any

import torch

from vllm.config.steering_environment import NO_CUDA_ENV, OTHER_GPUS_ENV

logger = logging.getLogger(__name__)

HOPPER = (9, 0)
# The major compute capabilities that CMakeLists.txt compiles the clamp kernel for,
# besides Hopper's. It has not run on them, so it runs there only if this is 1.
CLAMP_MAJORS = (8, 10, 12)


class Kernels(enum.Flag):
    """Which kernels of the extension run on a device; Triton does the rest.

    CLAMPS: the delta tier of threshold SAEs, and steering vectors.
    STAGES: full reconstruction, TopK, and reading on the way.
    """

    NONE = 0
    CLAMPS = enum.auto()
    STAGES = enum.auto()
    ALL = CLAMPS | STAGES


def extension_library() -> Path | None:
    """The file `vllm/_steering_C*.so`; None with `VLLM_STEERING_NO_CUDA=1`."""
    if os.environ.get(NO_CUDA_ENV) == "1":
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
def kernels_for(device: torch.device) -> Kernels:
    """The extension's kernels that run on this device."""
    if device.type != "cuda" or torch.version.hip or not extension_is_built():
        return Kernels.NONE
    capability = torch.cuda.get_device_capability(device)
    if capability == HOPPER:
        return Kernels.ALL
    asked = os.environ.get(OTHER_GPUS_ENV) == "1"
    if not asked or capability[0] not in CLAMP_MAJORS:
        return Kernels.NONE
    # A build may leave targets out.
    with torch.cuda.device(device):
        found = cuda_ops().has_clamps(torch.empty(0, device=device))
    return Kernels.CLAMPS if found else Kernels.NONE


def describe_kernels(device: torch.device) -> str:
    """What runs where on this GPU, in one sentence."""
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    kernels = kernels_for(device)
    if kernels == Kernels.ALL:
        return f"{name}: the CUDA extension"
    if kernels == Kernels.CLAMPS:
        return (
            f"{name}: delta clamps and steering vectors in the CUDA extension, full "
            "reconstruction and reading in Triton"
        )
    why = "is not built"
    if extension_is_built():
        why = f"is for sm_90, and {OTHER_GPUS_ENV}=1 asks for what others have of it"
    elif os.environ.get(NO_CUDA_ENV) == "1":
        why = f"is turned off by {NO_CUDA_ENV}=1"
    return f"{name}: Triton; the CUDA extension {why}"


def cuda_ops() -> Any:
    """The extension's ops; call only where `extension_is_built()`."""
    return torch.ops.vllm_steering
