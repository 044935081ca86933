# SPDX-License-Identifier: Apache-2.0
"""A bfloat16 engine with steering beside a stock one: what must not change."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from steering_testing import matrix, models
from steering_testing.engine import engine, generate, params, runner
from steering_testing.observe import KernelWatch, piecewise_graphs, steps_of
from steering_testing.oracle import Greedy
from steering_testing.requests import Ask, prompt, specs

from vllm import LLM
from vllm.utils import jit_monitor

OPTIONS: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",
    "dtype": "bfloat16",
    "max_num_seqs": 16,
    "gpu_memory_utilization": 0.1,
    "cudagraph_metrics": True,
}
TOKENS, COUNT = 10, 8
PROMPTS = [prompt(at, 9) for at in range(COUNT)]
PLAIN = [params(TOKENS)] * COUNT
MIXED = [
    params(TOKENS, **specs(*([Ask("full", "jumprelu")] if at % 2 else [])))
    for at in range(COUNT)
]


@dataclass(frozen=True)
class Shape:
    """How an engine's model was cut and captured."""

    pieces: int
    splitting_ops: tuple[str, ...]
    mode: str
    sizes: tuple[int, ...]
    full_graphs: int


def shape_of(llm: LLM, pieces: AbstractSet[Any]) -> Shape:
    config = llm.llm_engine.vllm_config.compilation_config
    manager = runner(llm).cudagraph_manager
    return Shape(
        len(pieces),
        tuple(config.splitting_ops),
        str(manager.cudagraph_mode),
        tuple(config.cudagraph_capture_sizes),
        len(manager.graphs),
    )


def assert_close(found: Greedy, expected: Greedy, tolerance: float) -> None:
    """Equal up to a tie, and as likely up to and at the tie."""
    for at in range(TOKENS):
        assert abs(found.logprobs[at] - expected.logprobs[at]) < tolerance
        if found.tokens[at] != expected.tokens[at]:
            break


def test_eager_plain_requests_equal_a_stock_engines(
    model_root: Path, tmp_path: Path
) -> None:
    with engine(matrix.FAMILY, model_root, None, **OPTIONS) as llm:
        stock = generate(llm, PROMPTS, PLAIN)
    modules = matrix.save(tmp_path)
    with engine(matrix.FAMILY, model_root, modules, **OPTIONS) as llm:
        mixed = generate(llm, PROMPTS, MIXED)
    for at in range(0, COUNT, 2):
        assert mixed[at].tokens == stock[at].tokens
        assert mixed[at].logprobs == stock[at].logprobs
    assert any(mixed[at].tokens != stock[at].tokens for at in range(1, COUNT, 2))


def test_a_compiled_engine_is_cut_and_captured_as_stock_is(
    model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "enforce_eager": False}
    known = piecewise_graphs()
    with engine(matrix.FAMILY, model_root, None, **options) as llm:
        stock = generate(llm, PROMPTS, PLAIN)
        stock_shape = shape_of(llm, piecewise_graphs() - known)
    assert stock_shape.pieces > models.LAYERS and stock_shape.full_graphs > 0
    assert stock_shape.mode == "FULL_AND_PIECEWISE"
    known = piecewise_graphs()
    kernels = KernelWatch(monkeypatch)
    modules = matrix.save(tmp_path)
    with engine(matrix.FAMILY, model_root, modules, **options) as llm:
        assert shape_of(llm, piecewise_graphs() - known) == stock_shape
        kernels.serving()
        with steps_of(llm) as steps:
            plain = generate(llm, PROMPTS, PLAIN)
            mixed = generate(llm, PROMPTS, MIXED)
        assert steps.graphs["FULL"] > 0, steps
        matrix.serve_every_size(llm)
        kernels.assert_silent()
        assert jit_monitor.is_active()
    for at in range(COUNT):
        # Sites cut the compiler's fusions, which round in other places.
        assert_close(plain[at], stock[at], 0.2)
    for at in range(0, COUNT, 2):
        assert mixed[at] == plain[at]
    assert any(mixed[at].tokens != plain[at].tokens for at in range(1, COUNT, 2))
