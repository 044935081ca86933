# SPDX-License-Identifier: Apache-2.0
"""How the tests of several GPUs start an engine."""

from __future__ import annotations

from typing import Any

# One rank a GPU, tiny float32 models under CUDA graphs.
RANK_OPTIONS: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",
    "max_num_seqs": 16,
    "gpu_memory_utilization": 0.1,
    "cudagraph_metrics": True,
    "enforce_eager": False,
    "distributed_executor_backend": "mp",
    # NCCL alone: other communicators may change the sums, which is not tested here.
    "disable_custom_all_reduce": True,
}
