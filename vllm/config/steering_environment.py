# SPDX-License-Identifier: Apache-2.0
"""The environment variables of steering that `vllm.envs` does not list."""

from __future__ import annotations

# The bearer key of the routes that change modules and presets; a secret.
KEY_ENV = "VLLM_STEERING_API_KEY"
# 1: ranks that share SAEs exchange through each other's memory where they can. Unset:
# two and four ranks do. 0: none do.
PEER_MEMORY_ENV = "VLLM_STEERING_PEER_MEMORY"
# 1: of the modules at a site, a CUDA graph runs those that have tokens.
BRANCHES_ENV = "VLLM_STEERING_BRANCHES"
# 1: GPUs other than Hopper's run the extension's kernels that are built for them.
OTHER_GPUS_ENV = "VLLM_STEERING_OTHER_GPUS"
# 1: Triton kernels run, even if the extension is built.
NO_CUDA_ENV = "VLLM_STEERING_NO_CUDA"
# 1: each CUDA graph has a twin without steering, for steps in which nobody steers.
IDLE_GRAPHS_ENV = "VLLM_STEERING_IDLE_GRAPHS"
# Internal: a process sets it for the processes that it starts.
DIRECTORY_ENV = "VLLM_STEERING_DIRECTORY"


def stores_unasked(ranks: int) -> bool:
    """Whether so many ranks use each other's memory if `PEER_MEMORY_ENV` is not set.

    Engines of two and of four have been compared with Hugging Face, others have not.
    """
    return ranks in (2, 4)
