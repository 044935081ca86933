# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel ranks that share SAEs give the answers of Hugging Face."""

from __future__ import annotations

from pathlib import Path

import pytest
from steering_testing import copied, matrix, models
from steering_testing.engine import engine, save_sae, squeezed
from steering_testing.reference import random_sae
from steering_testing.requests import Ask
from steering_testing.shard_engines import (
    INLINE,
    POINTS,
    POST,
    RANKS,
    TRANSCODERS,
    UNIT,
    WIDTH,
    Read,
    check_counters,
    check_late_modules,
    check_reading,
    check_requests,
    clamps,
    late_slot,
    save,
    weight_bytes,
)

from vllm.entrypoints.steering import list_modules

pytestmark = pytest.mark.engine

READS = [
    Read("topk", POST, top_k=4),
    Read("jumprelu", (2, "post_attn"), features=(0, WIDTH // 2, WIDTH - 1)),
    Read("points", POINTS[2], top_k=6),
    Read("transcoders", TRANSCODERS[0], top_k=5),
]


@pytest.fixture(autouse=True)
def unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def test_two_ranks_that_share_saes_equal_hugging_face(
    model_root: Path, tmp_path: Path
) -> None:
    steering = {
        "spare": [late_slot(POST)],
        "inline_vectors": {**INLINE["inline_vectors"], **copied.INLINE},
    }
    modules = {**save(tmp_path), **copied.save(tmp_path)}
    with engine(
        matrix.FAMILY, model_root, modules, steering, enforce_eager=False, **RANKS
    ) as llm:
        for module in list_modules(llm).values():
            is_shared = module.kind == "sae" and module.name != copied.NAME
            assert len(module.sharded) == is_shared * len(module.sites)
        check_requests(llm)
        check_reading(llm, READS)
        check_reading(llm, READS, Ask("full", "jumprelu", {POST: clamps()}))
        check_reading(llm, [Read(UNIT, POST, top_k=4)])
        check_counters(llm)
        check_late_modules(llm, tmp_path, POST)
        copied.check_requests(llm)
        copied.check_reading(llm)


@pytest.mark.slow
def test_chunks_and_preemption_do_not_change_what_ranks_share(
    model_root: Path, tmp_path: Path
) -> None:
    options = {"block_size": 32, **RANKS}
    with squeezed(matrix.FAMILY, model_root, save(tmp_path), INLINE, **options) as llm:
        check_requests(llm, max_tokens=28)


@pytest.mark.slow
def test_ranks_hold_half_of_what_they_share(model_root: Path, tmp_path: Path) -> None:
    wide = random_sae(4096, models.HIDDEN, "jumprelu", 5)
    path = save_sae(tmp_path / "wide", {POST: wide})
    found = {}
    for sharding in ("replicate", "shard"):
        modules = {"wide": {"path": path, "sharding": sharding}}
        with engine(matrix.FAMILY, model_root, modules, **RANKS) as llm:
            found[sharding] = weight_bytes(llm)
    matrices = 2 * 4 * 4096 * models.HIDDEN
    for whole, part in zip(found["replicate"], found["shard"], strict=True):
        # Norms of the decoder's rows are the only addition.
        assert whole - part >= matrices // 2 - 4 * 4096
