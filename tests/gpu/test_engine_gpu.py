# SPDX-License-Identifier: Apache-2.0
"""The engine on a GPU: both runners, eager, compiled and captured, say one thing.

Everything is float32, so that Hugging Face on the CPU is the oracle. vLLM's own
attention multiplies in TF32 there, which moves a plain request's log-probabilities by
about 1e-3; the tolerance is ten times that. A token must be the oracle's, or within
the tolerance of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from steering_testing import matrix
from steering_testing.engine import engine, runner
from steering_testing.observe import KernelWatch, Steps, steps_of

from vllm import LLM
from vllm.utils import jit_monitor

OPTIONS: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",
    "max_num_seqs": 16,
    "gpu_memory_utilization": 0.1,
    "cudagraph_metrics": True,
}
GRAPHS: dict[str, Any] = {"enforce_eager": False}
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2-graphs": ("1", GRAPHS),
    "v2-eager": ("1", {"enforce_eager": True}),
    "v1-graphs": ("0", GRAPHS),
}
# So large that the batch's prefills are captured too.
CAPTURED = [1, 2, 4, 8, 16, 64, 256, 512]


def assert_runner(llm: LLM, use_v2: str, is_async: bool = True) -> None:
    """The engine runs what the test asked for."""
    is_v2 = "worker.gpu.model_runner" in type(runner(llm)).__module__
    assert is_v2 == (use_v2 == "1")
    config = llm.llm_engine.vllm_config.scheduler_config
    assert config.async_scheduling == is_async


def assert_both_graphs_ran(steps: Steps) -> None:
    assert steps.graphs["FULL"] > 0, steps
    assert steps.graphs["PIECEWISE"] > 0, steps


def has_numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:  # not there, or not for this numpy
        return False
    return True


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_hugging_face(
    mode: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_v2, options = MODES[mode]
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    options = {**OPTIONS, **options}
    if not options["enforce_eager"]:
        options["compilation_config"] = {"cudagraph_capture_sizes": CAPTURED}
    kernels = KernelWatch(monkeypatch)
    with (
        engine(matrix.FAMILY, model_root, matrix.save(tmp_path), **options) as llm,
        steps_of(llm) as steps,
    ):
        assert_runner(llm, use_v2)
        kernels.serving()
        matrix.check(llm, max_tokens=10)
        # The same captured graphs with other rows, clamps and batch order.
        llm.reset_prefix_cache()
        matrix.check(llm, max_tokens=10)
        runner(llm).steering.check_integrity()
        if options["enforce_eager"]:
            assert set(steps.graphs) == {"NONE"}
        else:
            assert_both_graphs_ran(steps)
            assert jit_monitor.is_active()
        matrix.serve_every_size(llm)
        kernels.assert_silent()


def test_a_restart_from_the_compile_cache_says_the_same(
    model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    modules = matrix.save(tmp_path)
    options = {**OPTIONS, **GRAPHS}
    found = []
    for _ in range(2):
        with engine(matrix.FAMILY, model_root, modules, **options) as llm:
            found.append(matrix.check(llm, max_tokens=6))
    first, second = found
    assert [one.tokens for one in first] == [one.tokens for one in second]


@pytest.mark.parametrize("use_v2", ["0", "1"])
def test_chunks_preemption_and_graphs_together(
    use_v2: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    # Sixteen requests of up to 52 tokens want 45 blocks; there are 23.
    options = {
        **OPTIONS,
        **GRAPHS,
        "max_num_batched_tokens": 24,
        "num_gpu_blocks_override": 24,
        "max_model_len": 128,
        "block_size": 16,
    }
    with (
        engine(matrix.FAMILY, model_root, matrix.save(tmp_path), **options) as llm,
        steps_of(llm) as steps,
    ):
        assert_runner(llm, use_v2)
        matrix.check(llm, max_tokens=24)
        assert steps.chunks > 0, steps
        assert steps.preempted > 0, steps
        assert_both_graphs_ran(steps)
        runner(llm).steering.check_integrity()


@pytest.mark.parametrize(
    ("use_v2", "method"), [("1", "ngram"), ("1", "ngram_gpu"), ("0", "ngram")]
)
def test_draft_tokens_are_steered_as_the_positions_they_are(
    use_v2: str,
    method: str,
    model_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    if use_v2 == "0" and not has_numba():
        pytest.skip("runner V1 drafts with numba")
    speculation = {
        "method": method,
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    options = {**OPTIONS, **GRAPHS, "speculative_config": speculation}
    with (
        engine(matrix.FAMILY, model_root, matrix.save(tmp_path), **options) as llm,
        steps_of(llm) as steps,
    ):
        # Drafts of the host's proposer are known too late to schedule ahead.
        assert_runner(llm, use_v2, is_async=method == "ngram_gpu")
        matrix.check(llm, max_tokens=16)
        assert 0 < steps.accepted < steps.drafted, steps
        captured = "FULL" if use_v2 == "1" else "PIECEWISE"
        assert steps.graphs[captured] > 0, steps
        runner(llm).steering.check_integrity()
