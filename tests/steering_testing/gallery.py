# SPDX-License-Identifier: Apache-2.0
"""The programs of the gallery, run in this process on an engine that is there."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing.examples import example

GALLERY = Path(__file__).parents[2] / "examples" / "gallery"
sys.path.insert(0, str(GALLERY))
demo_model: Any = importlib.import_module("demo_model")

Run = Callable[[str], str]


def engine_of(demo: Any) -> Iterator[Any]:
    """The gallery's engine, shut down afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = demo_model.start(demo)
    yield engine
    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    torch._dynamo.reset()


def runner(
    llm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs a program on an engine; gives its standard output."""

    def in_process(name: str) -> str:
        program = example(GALLERY / f"{name}.py")
        monkeypatch.setattr(program, "start", lambda demo: llm)
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        capsys.readouterr()
        program.main()
        return capsys.readouterr().out

    return in_process
