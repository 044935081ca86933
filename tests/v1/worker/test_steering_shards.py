# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks that share SAEs give the answers of Hugging Face."""

from __future__ import annotations

from pathlib import Path

import pytest
from steering_testing import matrix, models, oracle
from steering_testing.engine import (
    FULL,
    assert_same,
    engine,
    generate,
    params,
    sae_spec,
    save_sae,
    squeezed,
)
from steering_testing.reference import Edit, random_sae
from steering_testing.requests import SPECIAL, Ask, prompt
from steering_testing.shard_engines import (
    INLINE,
    POINTS,
    RANKS,
    TRANSCODERS,
    WIDTH,
    Read,
    check_counters,
    check_reading,
    check_requests,
    clamps,
    save,
    shared,
    weight_bytes,
)

from vllm import LLM
from vllm.entrypoints.steering import (
    SteeringModuleError,
    list_modules,
    register_module,
    unregister_module,
)

pytestmark = pytest.mark.engine

SITE = (1, "post_block")
READS = [
    Read("topk", SITE, top_k=4),
    Read("jumprelu", (2, "post_attn"), features=(0, WIDTH // 2, WIDTH - 1)),
    Read("points", POINTS[2], top_k=6),
    Read("transcoders", TRANSCODERS[0], top_k=5),
]


@pytest.fixture(autouse=True)
def unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def check_late_modules(llm: LLM, root: Path) -> None:
    """A sharded slot takes modules of its width, and each rank its part of them."""
    before = weight_bytes(llm)
    for kind in ("jumprelu", "topk"):
        sae = random_sae(96, models.HIDDEN, kind, 3)
        sae.skip_token_ids = SPECIAL
        register_module(llm, "late", save_sae(root / kind, {SITE: sae}))
        ids = prompt(7, 21)
        [found] = generate(llm, [ids], [params(6, **{FULL: [sae_spec("late")]})])
        edits = {SITE: [Edit("full", sae)]}
        expected = oracle.greedy(models.build(matrix.FAMILY), ids, edits, 6)
        assert_same(found, expected, kind)
        unregister_module(llm, "late")
    narrow = save_sae(root / "narrow", {SITE: random_sae(64, models.HIDDEN, "relu", 3)})
    with pytest.raises(SteeringModuleError, match="no free slot fits"):
        register_module(llm, "narrow", narrow, sharding="shard")
    assert weight_bytes(llm) == before


def test_two_ranks_that_share_saes_equal_hugging_face(
    model_root: Path, tmp_path: Path
) -> None:
    spare = {"layer": 1, "hook": "resid_post", "width": 96, "sharding": "shard"}
    steering = {"spare": [spare], **INLINE}
    modules = save(tmp_path)
    with engine(
        matrix.FAMILY, model_root, modules, steering, enforce_eager=False, **RANKS
    ) as llm:
        assert all(
            len(module.sharded) == len(module.sites)
            for module in list_modules(llm).values()
            if module.kind == "sae"
        )
        matrix.check(llm, max_tokens=6, tolerance=1e-4)
        check_requests(llm)
        check_reading(llm, READS)
        check_reading(llm, READS, Ask("full", "jumprelu", {SITE: clamps()}))
        check_counters(llm)
        check_late_modules(llm, tmp_path)


@pytest.mark.slow
def test_chunks_and_preemption_do_not_change_what_ranks_share(
    model_root: Path, tmp_path: Path
) -> None:
    modules = shared(matrix.save(tmp_path))
    options = {"block_size": 32, **RANKS}
    with squeezed(matrix.FAMILY, model_root, modules, **options) as llm:
        matrix.check(llm, max_tokens=28, tolerance=1e-4)


@pytest.mark.slow
def test_ranks_hold_half_of_what_they_share(model_root: Path, tmp_path: Path) -> None:
    wide = random_sae(4096, models.HIDDEN, "jumprelu", 5)
    path = save_sae(tmp_path / "wide", {SITE: wide})
    found = {}
    for sharding in ("replicate", "shard"):
        modules = {"wide": {"path": path, "sharding": sharding}}
        with engine(matrix.FAMILY, model_root, modules, **RANKS) as llm:
            found[sharding] = weight_bytes(llm)
    matrices = 2 * 4 * 4096 * models.HIDDEN
    for copied, part in zip(found["replicate"], found["shard"], strict=True):
        # Norms of the decoder's rows are the only addition.
        assert copied - part >= matrices // 2 - 4 * 4096
