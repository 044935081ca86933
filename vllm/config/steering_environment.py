# SPDX-License-Identifier: Apache-2.0
"""The environment variables of steering that `vllm.envs` does not list."""

from __future__ import annotations

# The bearer key of the routes that change modules and presets; a secret.
KEY_ENV = "VLLM_STEERING_API_KEY"
# 1: ranks that share SAEs exchange through each other's memory where they can.
PEER_MEMORY_ENV = "VLLM_STEERING_PEER_MEMORY"
# Internal: a process sets it for the processes that it starts.
DIRECTORY_ENV = "VLLM_STEERING_DIRECTORY"
