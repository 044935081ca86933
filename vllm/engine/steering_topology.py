# SPDX-License-Identifier: Apache-2.0
"""What an engine's ranks and devices are, as far as steering depends on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm.config.steering_sharding import Ranks
from vllm.model_executor.layers.steering_kernels.extension import extension_library
from vllm.model_executor.layers.steering_shards import peer_memory_is_on
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

# Sizes of groups that vLLM's custom all-reduce takes.
SIZES = (2, 4, 6, 8)


def ranks_store(parallel: ParallelConfig, dtype: torch.dtype) -> bool:
    """Whether the ranks will share SAEs through each other's memory.

    It takes two or four ranks, or `VLLM_STEERING_PEER_MEMORY=1`, the extension, a model
    of 16 bits, and Hopper GPUs of one host, each joined with each by NVLink, with
    vLLM's custom all-reduce. A worker looks again (`peer_allocator`): where it finds
    less, its ranks gather.
    """
    size = parallel.tensor_parallel_size
    if (
        not peer_memory_is_on(size)
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


def ranks_of(vllm_config: VllmConfig) -> Ranks:
    """The tensor-parallel group, and whether it can share SAEs."""
    parallel, dtype = vllm_config.parallel_config, vllm_config.model_config.dtype
    stores = ranks_store(parallel, dtype)
    return Ranks(
        parallel.tensor_parallel_size,
        dtype.itemsize,
        auto_copies=not (stores or current_platform.is_cpu()),
        stores=stores,
        screens=can_screen(dtype),
    )


def can_screen(dtype: torch.dtype) -> bool:
    """Whether the workers' devices screen wide SAEs: Hopper, with the extension."""
    return (
        current_platform.is_cuda()
        and current_platform.is_device_capability((9, 0))
        and dtype in (torch.bfloat16, torch.float16)
        and extension_library() is not None
    )


def first_read_layer(vllm_config: VllmConfig) -> int:
    """The first layer whose features can be read, which is the last pipeline stage's
    first.

    Only that stage's output reaches the scheduler.
    """
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages == 1:
        return 0
    from vllm.distributed.utils import get_pp_indices

    layers = vllm_config.model_config.get_total_num_hidden_layers()
    return get_pp_indices(layers, stages - 1, stages)[0]


def exact_positions(vllm_config: VllmConfig) -> bool:
    """Whether workers know where in the answer the tokens of a step are.

    A step that is scheduled before the drafts of the step before are verified counts
    all of these as accepted. Only the device learns which of them were.
    """
    drafts = vllm_config.speculative_config is not None
    return not (drafts and vllm_config.scheduler_config.async_scheduling)
