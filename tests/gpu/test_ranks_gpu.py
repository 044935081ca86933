# SPDX-License-Identifier: Apache-2.0
"""Two GPUs, tensor or pipeline parallel, give the answers of Hugging Face."""

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
from steering_testing.gpus import RANK_OPTIONS
from steering_testing.observe import steps_of
from steering_testing.reference import Edit, random_sae
from steering_testing.requests import prompt

from vllm import LLM
from vllm.entrypoints.steering import register_module

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)

SPARE = [{"layer": 1, "hook": "resid_post", "width": 96}]


def stats(llm: LLM) -> list[dict[str, Any]]:
    """What each rank's worker counts."""
    replies = llm.collective_rpc("change_steering_modules", args=("stats",))
    assert all(reply["ok"] for reply in replies), replies
    return [reply["stats"] for reply in replies]


def check_late_module(llm: LLM, path: Path) -> None:
    """Every rank takes a module that comes to the running engine."""
    sae = random_sae(96, models.HIDDEN, "relu", 3)
    register_module(llm, "late", save_sae(path, {matrix.POST: sae}))
    ids = prompt(7, 21)
    [found] = generate(llm, [ids], [params(8, **{FULL: [sae_spec("late")]})])
    edits = {matrix.POST: [Edit("full", sae)]}
    matrix.assert_near(found, ids, edits, 1e-2)


@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_ranks_agree(
    split: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_FLASHINFER", "0")
    options = {**RANK_OPTIONS, split: 2}
    modules = matrix.save(tmp_path)
    with (
        engine(matrix.FAMILY, model_root, modules, {"spare": SPARE}, **options) as llm,
        steps_of(llm) as steps,
    ):
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        matrix.check(llm, max_tokens=10)
        assert steps.graphs["FULL"] > 0, steps
        check_late_module(llm, tmp_path / "late")
        first, second = stats(llm)
        assert first["steered_tokens"] == second["steered_tokens"]
        assert first["modules"] == second["modules"] == [*modules, "late"]
        assert sum(first["steered_tokens"]["full"].values()) > 0
