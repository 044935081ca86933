# SPDX-License-Identifier: Apache-2.0
"""Whether an engine's tensor-parallel ranks can store into each other's memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm.model_executor.layers.steering_kernels.extension import extension_library
from vllm.model_executor.layers.steering_shards import PEER_MEMORY_ENV
from vllm.platforms import current_platform

if TYPE_CHECKING:
    import torch

    from vllm.config import ParallelConfig

# Sizes of groups that vLLM's custom all-reduce takes.
SIZES = (2, 4, 6, 8)


def ranks_store(parallel: ParallelConfig, dtype: torch.dtype) -> bool:
    """Whether the ranks will share SAEs through each other's memory.

    It takes `VLLM_STEERING_PEER_MEMORY=1`, the extension, a model of 16 bits, and
    Hopper GPUs of one host, each joined with each by NVLink, with vLLM's custom
    all-reduce. A worker looks again (`peer_allocator`): where it finds less, its ranks
    gather.
    """
    size = parallel.tensor_parallel_size
    if (
        os.environ.get(PEER_MEMORY_ENV) != "1"
        or not current_platform.is_cuda()
        or not current_platform.is_device_capability((9, 0))
        or extension_library() is None
        or dtype.itemsize != 2
        or parallel.disable_custom_all_reduce
        or parallel.nnodes > 1
        or size not in SIZES
        or size > current_platform.device_count()
    ):
        return False
    ids = [current_platform.device_id_to_physical_device_id(i) for i in range(size)]
    return current_platform.is_fully_connected(ids)
