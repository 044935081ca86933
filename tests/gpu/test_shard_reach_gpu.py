# SPDX-License-Identifier: Apache-2.0
"""Two GPUs that share SAEs: reading, transcoders, points beside the stream's,
conditions, spans and counters, under CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing.engine import engine
from steering_testing.gpus import RANK_OPTIONS
from steering_testing.observe import steps_of
from steering_testing.requests import Ask
from steering_testing.shard_engines import (
    INLINE,
    POINTS,
    POST,
    TRANSCODERS,
    WIDTH,
    Read,
    check_counters,
    check_late_modules,
    check_reading,
    check_requests,
    clamps,
    late_slot,
    save,
)

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)

OPTIONS = {**RANK_OPTIONS, "tensor_parallel_size": 2}
READS = [
    Read("topk", POST, top_k=4),
    Read("jumprelu", (2, "post_attn"), features=(0, WIDTH // 2, WIDTH - 1)),
    Read("points", POINTS[2], top_k=6),
    Read("transcoders", TRANSCODERS[0], top_k=5),
]
# TF32 attention moves activations by about this much.
LOOSE = 1e-2


@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen3", {}), ("qwen3_moe", {"enable_expert_parallel": True})],
    ids=["dense", "experts"],
)
def test_gpus_that_share_saes_read_and_transcode(
    family: str,
    options: dict[str, Any],
    model_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_FLASHINFER", "0")
    steering = {"spare": [late_slot(POST)], **INLINE}
    modules = save(tmp_path)
    with (
        engine(family, model_root, modules, steering, **{**OPTIONS, **options}) as llm,
        steps_of(llm) as steps,
    ):
        check_requests(llm, max_tokens=4, tolerance=LOOSE, family=family)
        assert steps.graphs["FULL"] > 0, steps
        print("a batch of every kind: done", flush=True)
        check_reading(llm, READS, tolerance=LOOSE, family=family)
        ask = Ask("full", "jumprelu", {POST: clamps()})
        check_reading(llm, READS, ask, tolerance=LOOSE, family=family)
        print("reading: done", flush=True)
        check_counters(llm)
        check_late_modules(llm, tmp_path, POST, LOOSE, family)
