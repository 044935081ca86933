# SPDX-License-Identifier: Apache-2.0
"""GPUs that share SAEs give the answers of Hugging Face, under CUDA graphs."""

from __future__ import annotations

from pathlib import Path

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
from steering_testing.gpus import RANK_OPTIONS
from steering_testing.observe import steps_of
from steering_testing.reference import Edit, random_sae
from steering_testing.requests import Modules, prompt, specs, vector

from vllm import LLM
from vllm.entrypoints.steering import register_module

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)

FAMILY = "qwen3"  # its tiny model has four heads
# Prompts come in chunks, and 16 requests need more blocks than there are.
SQUEEZED = {
    "max_num_batched_tokens": 24,
    "block_size": 16,
    "num_gpu_blocks_override": 14,
    "max_model_len": 128,
    "enable_prefix_caching": False,
}
SPARE = {"layer": 1, "hook": "resid_post", "width": 128, "sharding": "shard"}


def shared_modules() -> Modules:
    """Those of `matrix`, with features for four ranks."""
    saes = {}
    for kind in ("jumprelu", "topk"):
        sae = random_sae(192, models.HIDDEN, kind, 11)
        saes[kind] = {site: sae for site in matrix.SITES}
    return Modules(saes, {"vector": {matrix.POST: vector(4, norm=8.0)}})


def check_batch(llm: LLM, modules: Modules) -> None:
    """Every tier, point, phase and activation in one batch."""
    asked = matrix.requests()
    prompts = [prompt(at, 6 + at) for at in range(len(asked))]
    sampling = [params(12, **specs(*asks)) for asks in asked]
    found = generate(llm, prompts, sampling)
    for result, ids, asks in zip(found, prompts, asked, strict=True):
        edits = modules.edits(*asks)
        matrix.assert_near(result, ids, edits, 1e-2, f"{asks}", FAMILY)


def check_late_modules(llm: LLM, root: Path) -> None:
    """A sharded slot takes one module after another under captured graphs."""
    for kind in ("relu", "topk"):
        sae = random_sae(128, models.HIDDEN, kind, 3)
        path = save_sae(root / kind, {matrix.POST: sae})
        register_module(llm, "late", path, replace=kind == "topk")
        ids = prompt(7, 21)
        [found] = generate(llm, [ids], [params(8, **{FULL: [sae_spec("late")]})])
        edits = {matrix.POST: [Edit("full", sae)]}
        matrix.assert_near(found, ids, edits, 1e-2, kind, FAMILY)


@pytest.mark.parametrize("ranks", [2, 4])
def test_gpus_that_share_saes_agree(
    ranks: int, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_FLASHINFER", "0")
    modules = shared_modules()
    configured = {
        name: path
        if path.endswith(".safetensors")
        else {"path": path, "sharding": "shard"}
        for name, path in modules.save(tmp_path).items()
    }
    steering = {"spare": [SPARE], "readout": False}
    options = {**RANK_OPTIONS, **SQUEEZED, "tensor_parallel_size": ranks}
    with (
        engine(FAMILY, model_root, configured, steering, **options) as llm,
        steps_of(llm) as steps,
    ):
        check_batch(llm, modules)
        assert steps.graphs["FULL"] > 0, steps
        assert steps.chunks > 3 and steps.preempted > 0, steps
        check_late_modules(llm, tmp_path)
