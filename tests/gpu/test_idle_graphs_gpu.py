# SPDX-License-Identifier: Apache-2.0
"""Graphs without steering on a GPU: the same answers, and no kernel in an idle step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import matrix, models
from steering_testing.engine import engine, generate, params, runner, save_sae
from steering_testing.observe import KernelWatch, steps_of
from steering_testing.oracle import Greedy
from steering_testing.reference import Edit, random_sae
from steering_testing.requests import Ask, prompt, specs

from vllm import LLM
from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.config.steering_environment import IDLE_GRAPHS_ENV
from vllm.entrypoints.steering import register_module

OPTIONS: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",
    "max_num_seqs": 16,
    "gpu_memory_utilization": 0.1,
    "cudagraph_metrics": True,
    "enforce_eager": False,
    # So large that the batch's prefills are captured too.
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 64, 256]},
}
# Runner and graphs -> environment.
MODES: dict[str, dict[str, str]] = {
    "v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    "v2": {"VLLM_USE_V2_MODEL_RUNNER": "1"},
    "v2, breakable": {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_USE_BREAKABLE_CUDAGRAPH": "1",
    },
}
TOKENS, COUNT, TOLERANCE = 8, 6, 1e-2
PROMPTS = [prompt(at, 9 + at) for at in range(COUNT)]
PLAIN = [params(TOKENS)] * COUNT
STEERED = params(TOKENS, **specs(Ask("full", "jumprelu")))
READS = params(TOKENS, **{READOUT_KEY: [{"module_name": "topk", "top_k": 4}]})
LATE = specs(
    Ask("full", "jumprelu", {matrix.POST: matrix.CLAMPS}, spans=[("generated", 3, 5)])
)
BATCHES = {
    "idle": PLAIN,
    "one of them steered": [*PLAIN[1:], STEERED],
    "one of them reads": [*PLAIN[1:], READS],
    "steered for two steps": [*PLAIN[1:], params(TOKENS, **LATE)],
    "idle again": PLAIN,
}


def answers(llm: LLM) -> dict[str, list[Greedy]]:
    """Batches one after another, on the same graphs."""
    found = {}
    for name, sampling in BATCHES.items():
        llm.reset_prefix_cache()
        found[name] = generate(llm, PROMPTS, sampling)
    return found


def own_kernels(run: Callable[[], Any]) -> set[str]:
    """The kernels of this project that ran, those of replayed graphs among them."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    triton = {kernel.fn.__name__ for kernel in KernelWatch._kernels().values()}
    return {name for name in names if "vllm_steering" in name or name in triton}


def kernels_of(llm: LLM) -> dict[str, set[str]]:
    """What a plain request and a steered one launch while they decode and prefill."""
    found = {}
    for name, sampling in (("idle", params(3)), ("steered", STEERED)):
        llm.reset_prefix_cache()
        found[name] = own_kernels(lambda s=sampling: generate(llm, PROMPTS[:1], [s]))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_idle_steps_hold_no_kernel_and_answers_stay(
    mode: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in MODES[mode].items():
        monkeypatch.setenv(name, value)
    modules = matrix.save(tmp_path)
    said, kernels, graphs = {}, {}, {}
    for used in ("0", "1"):
        monkeypatch.setenv(IDLE_GRAPHS_ENV, used)
        with (
            engine(matrix.FAMILY, model_root, modules, **OPTIONS) as llm,
            steps_of(llm) as steps,
        ):
            assert (runner(llm).steering.idle_graphs is not None) == (used == "1")
            said[used] = answers(llm)
            kernels[used] = kernels_of(llm)
            graphs[used] = dict(steps.graphs)
            runner(llm).steering.check_integrity()
    assert graphs["0"] == graphs["1"]
    assert graphs["1"]["FULL"] > 0 and graphs["1"]["PIECEWISE"] > 0
    for batch, expected in said["0"].items():
        for one, other in zip(said["1"][batch], expected, strict=True):
            assert one.tokens == other.tokens, batch
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4), batch
    assert kernels["0"]["idle"], "the test does not see the kernels of a graph"
    assert kernels["1"] == {"idle": set(), "steered": kernels["0"]["steered"]}


@pytest.mark.parametrize("mode", MODES)
def test_a_module_that_comes_later_is_in_the_graphs(
    mode: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**MODES[mode], IDLE_GRAPHS_ENV: "1"}.items():
        monkeypatch.setenv(name, value)
    sae = random_sae(160, models.HIDDEN, "jumprelu", 3)
    path = save_sae(tmp_path / "sae", {matrix.POST: sae})
    spare = [{"layer": 1, "hook": "resid_post", "width": 192}]
    edits = {matrix.POST: [Edit("full", sae, matrix.CLAMPS)]}
    asked = specs(Ask("full", "new", {matrix.POST: matrix.CLAMPS}))
    with engine(matrix.FAMILY, model_root, {}, {"spare": spare}, **OPTIONS) as llm:
        generate(llm, PROMPTS, PLAIN)
        register_module(llm, "new", path)
        for _ in range(2):
            steered = params(TOKENS, **asked)
            found = generate(llm, PROMPTS[:2], [steered, PLAIN[0]])
            matrix.assert_near(found[0], PROMPTS[0], edits, TOLERANCE, "steered")
            matrix.assert_near(found[1], PROMPTS[1], {}, TOLERANCE, "plain")
            generate(llm, PROMPTS, PLAIN)
