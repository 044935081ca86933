# SPDX-License-Identifier: Apache-2.0
"""Two ranks, tensor or pipeline parallel, give the answers of one rank.

In the default set, a test of shared SAEs does it for tensor parallelism, beside its own
checks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from steering_testing import copied
from steering_testing.engine import TRACED, engine

pytestmark = pytest.mark.engine
TENSOR, PIPELINE = "tensor_parallel_size", "pipeline_parallel_size"


@pytest.mark.parametrize(
    ("split", "model_impl"),
    [
        (PIPELINE, "vllm"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (PIPELINE, "transformers"),
                (TENSOR, "vllm"),
                (TENSOR, "transformers"),
            )
        ),
    ],
)
def test_two_ranks_equal_hugging_face(
    split: str,
    model_impl: str,
    model_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    options: dict[str, object] = {
        split: 2,
        "distributed_executor_backend": "mp",
        "model_impl": model_impl,
    }
    stages = 1
    if split == PIPELINE:
        stages = 2
        # vLLM's CPU runner makes the buffers between stages in its compile warm-up.
        options |= TRACED
    steering = {"inline_vectors": copied.INLINE}
    with engine(
        copied.FAMILY, model_root, copied.save(tmp_path), steering, **options
    ) as llm:
        copied.check_requests(llm)
        copied.check_reading(llm, stages)
