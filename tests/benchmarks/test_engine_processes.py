# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own start side by side and are measured in turns."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import engine_processes
import engine_timing
import pytest

# Stands in for `serve`: no engine, but what it says and how long it takes.
SERVE = """
import time


def serve(pipe, root, name, deadline):
    if name == "four":
        raise SystemExit(1)
    if name == "again":
        time.sleep(600)
    (root / f"begun-{name}").touch()
    while not all((root / f"begun-{each}").exists() for each in ("stock", "one")):
        time.sleep(0.01)
    pipe.send(1.5)
    while True:
        mode, phase, batch, seed = pipe.recv()
        pipe.send(None if mode == "idle" and seed == 2 else (mode, phase, batch, seed))
"""


@pytest.fixture
def modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    (tmp_path / "stand_in.py").write_text(SERVE)
    monkeypatch.syspath_prepend(str(tmp_path))
    serve = importlib.import_module("stand_in").serve
    monkeypatch.setattr(engine_processes, "serve", serve)
    names = ("stock", "one", "four", "again")
    return engine_processes.start_engines(tmp_path, names, time.time() + 12)


def test_those_that_start_take_turns(modes: list[Any]) -> None:
    """One of the others has ended, one has not started in time."""
    assert [mode.name for mode in modes] == ["stock", "idle", "one site"]

    def window(mode: Any, seed: int) -> Any:
        return engine_processes.remote_window(mode, "decode", 8, seed)

    found = engine_timing.interleave(modes, window, 2, time.time() + 60)
    assert found["stock"] == [("stock", "decode", 8, seed) for seed in (0, 1)]
    assert found["one site"] == [("one site", "decode", 8, seed) for seed in (0, 1)]
    # What raises in a process leaves out its engine, and no other.
    found = engine_timing.interleave(modes, window, 3, time.time() + 60)
    assert len(found["stock"]) == 3 and len(found["idle"]) == 2
    for mode in modes:
        mode.engine.process.kill()
