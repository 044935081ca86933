# SPDX-License-Identifier: Apache-2.0
"""Models with quantised linear layers are steered as any."""

from __future__ import annotations

from pathlib import Path

import pytest
from steering_testing.cases import TRANSFORMERS_CASES
from steering_testing.quantised import KINDS, check_quantised

pytestmark = pytest.mark.engine

# vLLM has no kernel for it on a CPU; tests/gpu/test_families_gpu.py runs it.
ON_GPU = {"fp8"}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind == "int8" else [pytest.mark.slow])
        for kind in sorted(KINDS)
        if kind not in ON_GPU
    ],
)
def test_every_point_of_quantised_layers_equals_hugging_face(
    kind: str, tmp_path: Path
) -> None:
    check_quantised(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(KINDS) - ON_GPU))
def test_every_point_of_quantised_layers_of_the_transformers_backend(
    kind: str, tmp_path: Path
) -> None:
    check_quantised(kind, tmp_path, TRANSFORMERS_CASES["transformers-llama"])
