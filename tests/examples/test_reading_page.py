# SPDX-License-Identifier: Apache-2.0
"""The Python of docs/features/reading.md runs, and prints what the page shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from steering_testing.pages import run_page

from vllm.distributed import cleanup_dist_env_and_memory

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "features" / "reading.md"
FEATURES = ROOT / "examples" / "golden_gate" / "features.json"


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    try:
        run_page(PAGE, names)
    finally:
        if "llm" in names:
            names["llm"].llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
    bridge = json.loads(FEATURES.read_text())["topics"]["bridge"]["feature"]
    assert bridge == 457
    assert bridge in [one.feature_idx for one in names["found"].features[:5]]
    assert "bridge" in names["answer"].text
    assert len(names["record"]) == 11
    assert names["output"].outputs[0].stop_reason == "sae:golden-gate:post_block.1:457"
    assert 0 < names["site"].recovered < 1
