# SPDX-License-Identifier: Apache-2.0
"""Two GPUs that share SAEs give the answers of Hugging Face, under CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import matrix, models
from steering_testing.engine import (
    FULL,
    engine,
    generate,
    params,
    sae_spec,
    save_sae,
)
from steering_testing.observe import steps_of
from steering_testing.reference import Edit, random_sae
from steering_testing.requests import SPECIAL, prompt

from vllm.entrypoints.steering import register_module

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)

OPTIONS: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",
    "max_num_seqs": 16,
    "gpu_memory_utilization": 0.3,
    "cudagraph_metrics": True,
    "enforce_eager": False,
    "distributed_executor_backend": "mp",
    "tensor_parallel_size": 2,
    # NCCL alone: other communicators may change the sums, which is not tested here.
    "disable_custom_all_reduce": True,
}
SPARE = {"layer": 1, "hook": "resid_post", "width": 96, "sharding": "shard"}


def test_gpus_that_share_saes_agree(
    model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_FLASHINFER", "0")
    modules = {
        name: path
        if path.endswith(".safetensors")
        else {"path": path, "sharding": "shard"}
        for name, path in matrix.save(tmp_path).items()
    }
    steering = {"spare": [SPARE], "readout": False}
    with (
        engine(matrix.FAMILY, model_root, modules, steering, **OPTIONS) as llm,
        steps_of(llm) as steps,
    ):
        matrix.check(llm, max_tokens=10)
        assert steps.graphs["FULL"] > 0, steps
        for kind in ("relu", "topk"):
            sae = random_sae(96, models.HIDDEN, kind, 3)
            sae.skip_token_ids = SPECIAL
            path = save_sae(tmp_path / kind, {matrix.POST: sae})
            register_module(llm, "late", path, replace=kind == "topk")
            ids = prompt(7, 21)
            [found] = generate(llm, [ids], [params(8, **{FULL: [sae_spec("late")]})])
            edits = {matrix.POST: [Edit("full", sae)]}
            matrix.assert_near(found, ids, edits, 1e-2, kind)
