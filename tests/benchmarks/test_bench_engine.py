# SPDX-License-Identifier: Apache-2.0
"""How `benchmarks/bench_engine.py` runs its stages and keeps what they measure."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import bench_engine
import pytest

# Waits for `engines` if it is `eager`, so it ends only where both run.
STAGE = """
import json, pathlib, sys, time
options = dict(zip(sys.argv[1:-1:2], sys.argv[2::2]))
root, stage = pathlib.Path(options["--root"]), options["--stage"]
(root / f"begun-{stage}").touch()
until = time.time() + 20
while stage == "eager" and not (root / "begun-engines").exists():
    if time.time() > until:
        sys.exit(3)
    time.sleep(0.01)
if stage == "slow":
    time.sleep(60)
mode = "stock" if stage == "engines" else stage
row = {"mode": mode, "phase": "decode", "batch": 1, "tokens_per_s": 10.0}
environment = {"gpu": "some card", "hurry": "--hurry" in sys.argv}
text = json.dumps({"rows": [row], "environment": environment})
(root / f"{stage}.json").write_text(text)
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    script = tmp_path / "stage.py"
    script.write_text(STAGE)
    monkeypatch.setattr(bench_engine, "__file__", str(script))
    out = tmp_path / "out.json"
    return bench_engine.Bench(tmp_path, out, 60, ("stock",), ("1",), hurry=True)


def test_stages_side_by_side_are_merged(bench: Any) -> None:
    bench.run_together({"eager": bench.end, "engines": bench.end})
    assert [stage["ended"] for stage in bench.stages.values()] == ["exit 0"] * 2
    content = json.loads(bench.out.read_text())
    assert [row["mode"] for row in content["engine"]] == ["eager", "stock"]
    assert content["engine"][0]["ratio"] == 1.0  # of stock, which came later
    assert content["engine_environment"]["hurry"]


def test_a_stage_without_time_does_not_start(bench: Any) -> None:
    bench.run("engines", time.time() + 5)
    assert bench.stages["engines"]["ended"] == "no time left"
    assert not (bench.root / "begun-engines").exists()


def test_a_stage_that_does_not_end_is_killed(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_engine, "GRACE_SECONDS", -15.0)
    bench.run("slow", time.time() + 16)
    assert bench.stages["slow"]["ended"] == "timeout"
    assert bench.rows == []
