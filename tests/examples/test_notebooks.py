# SPDX-License-Identifier: Apache-2.0
"""The notebook runs on the demo model and shows what is stored in it."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm.distributed import cleanup_dist_env_and_memory

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebooks" / "find_and_steer.ipynb"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def words(output: dict[str, Any]) -> list[str]:
    """What an output shows without its numbers, which differ between machines."""
    text = output.get("text") or output["data"].get("text/html", [])
    return NUMBER.sub("#", "".join(text)).split()


def test_the_notebook_runs_and_shows_what_it_stores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from run_notebook import run

    stored = json.loads(NOTEBOOK.read_text())
    notebook = copy.deepcopy(stored)
    names: dict[str, Any] = {}
    try:
        names = run(notebook, NOTEBOOK.name)
    finally:
        sys.modules.pop("run_notebook", None)
        if "llm" in names:
            names["llm"].llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
    assert names["feature"] == 457 and names["best"].auroc == 1.0
    assert "bridge" in names["answer"].text
    stop_reason = names["output"].outputs[0].stop_reason
    assert stop_reason == "sae:golden-gate:post_block.1:457"
    for was, now in zip(stored["cells"], notebook["cells"], strict=True):
        if was["cell_type"] == "code":
            assert was["execution_count"] == now["execution_count"]
            kept = [words(output) for output in was["outputs"]]
            assert kept == [words(output) for output in now["outputs"]]
    assert NOTEBOOK.stat().st_size < 50_000
