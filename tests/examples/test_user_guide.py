# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/features/sae_steering.md that need no server run as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from steering_testing.pages import run_page

from vllm.distributed import cleanup_dist_env_and_memory

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "features" / "sae_steering.md"


@pytest.mark.engine
def test_the_engine_of_the_user_guide_steers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    try:
        run_page(PAGE, names, count=2)
    finally:
        if "llm" in names:
            names["llm"].llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
    said = {
        name: output.outputs[0].text
        for name, output in zip(names["requests"], names["outputs"], strict=True)
    }
    assert list(said) == ["plain", "reconstruction", "delta", "full"]
    for steered in ("delta", "full"):
        assert re.search("bridge|golden|suspension", said[steered])
        assert said[steered] != said["plain"]
