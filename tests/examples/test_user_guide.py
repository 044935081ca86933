# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/features/sae_steering.md that need no server run as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vllm.distributed import cleanup_dist_env_and_memory

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "features" / "sae_steering.md"


@pytest.mark.engine
def test_the_engine_of_the_user_guide_steers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    try:
        for block in blocks[:2]:
            exec(compile(block, str(PAGE), "exec"), names)
    finally:
        if "llm" in names:
            names["llm"].llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
    said = dict(
        line.split(": ", 1)
        for line in capsys.readouterr().out.splitlines()
        if line.split(": ", 1)[0] in names["requests"]
    )
    assert list(said) == ["plain", "reconstruction", "delta", "full"]
    for steered in ("delta", "full"):
        assert re.search("bridge|golden|suspension", said[steered])
        assert said[steered] != said["plain"]
