# SPDX-License-Identifier: Apache-2.0
"""Models that vLLM's Transformers backend runs are steered as Hugging Face has it."""

from __future__ import annotations

from pathlib import Path

import pytest
from steering_testing.backend_cases import BACKEND_CASES
from steering_testing.conformance import conforms

pytestmark = pytest.mark.engine

# One with layers that have no rotary embedding; one with norms of outputs.
IN_DEFAULT_SET = {"smollm3", "glm4_backend"}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in IN_DEFAULT_SET else pytest.mark.slow)
        for name in BACKEND_CASES
    ],
)
def test_every_tier_at_every_point_equals_hugging_face(
    family: str, model_root: Path, tmp_path: Path
) -> None:
    conforms(BACKEND_CASES[family], model_root, tmp_path)
