# SPDX-License-Identifier: Apache-2.0
"""Conditions, directions, spans, inline vectors and presets under captured graphs, on
both runners, against Hugging Face on the CPU.

Float32 throughout; for the tolerance and near ties see `test_engine_gpu.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from steering_testing import matrix
from steering_testing.asks import everything
from steering_testing.engine import engine, generate, params, runner
from steering_testing.observe import KernelWatch, steps_of
from steering_testing.requests import Ask, prompt, specs, vector
from steering_testing.tiers import FAMILY, MID, POST, save_modules, tier_modules

from vllm import LLM
from vllm.entrypoints.steering import put_preset, set_default_preset

MODULES = tier_modules()
TOLERANCE = 1e-2
TOKENS = 8
OPTIONS: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",
    "max_num_seqs": 32,
    "gpu_memory_utilization": 0.1,
    "cudagraph_metrics": True,
    "enforce_eager": False,
}
STEERING = {"inline_vectors": {"post_block.1": 2, "post_attn.2": 1}}


def inline() -> list[list[Ask]]:
    """Vectors that requests bring, of every kind."""

    def own(seed: int, site: Any = POST, **fields: Any) -> Ask:
        return Ask("additive", vector=vector(seed), site=site, **fields)

    return [
        [own(10, scale=1.5)],
        [own(10, scale=-0.75), own(12, kind="scale", scale=0.0)],
        [own(13, kind="set", value=1.5), own(15, MID, scale=0.5)],
        [own(13, kind="bound", bounds=(-0.02, 0.01), relative=True)],
        [
            own(19, scale=1.5, spans=[("prompt", -2, None)]),
            own(19, kind="scale", scale=0, spans=[("generated", 1, 3)]),
        ],
    ]


def check(llm: LLM, asked: list[list[Ask]], lengths: list[int], seed: int) -> None:
    """One batch of all, with plain requests between; every result is the oracle's."""
    prompts = [prompt(seed + at, length) for at, length in enumerate(lengths)]
    sampling = [params(TOKENS, **specs(*asks)) for asks in asked]
    found = generate(llm, prompts, sampling)
    for result, ids, asks in zip(found, prompts, asked, strict=True):
        edits = MODULES.edits(*asks)
        matrix.assert_near(result, ids, edits, TOLERANCE, f"{asks}")


def check_presets(llm: LLM) -> None:
    """A preset by name, as the default, opted out of, and gone."""
    asks = [
        Ask("additive", "v", kind="scale", scale=0.0),
        Ask("additive", vector=vector(21), scale=0.5, phase="decode"),
    ]
    put_preset(llm, "calm", specs(*asks))
    ids = prompt(3, 11)
    named, plain = params(TOKENS, steering_preset="calm"), params(TOKENS)
    out = params(TOKENS, steering_preset=None)
    for default, expected in (("calm", [asks, asks, []]), (None, [asks, [], []])):
        set_default_preset(llm, default)
        found = generate(llm, [ids] * 3, [named, plain, out])
        for result, wanted in zip(found, expected, strict=True):
            edits = MODULES.edits(*wanted)
            matrix.assert_near(result, ids, edits, TOLERANCE, f"{default}: {wanted}")


@pytest.mark.parametrize("use_v2", ["0", "1"])
def test_what_requests_say_under_captured_graphs(
    use_v2: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    asked = [*everything(), *(one for asks in inline() for one in (asks, []))]
    kernels = KernelWatch(monkeypatch)
    paths = save_modules(MODULES, tmp_path)
    with (
        engine(FAMILY, model_root, paths, STEERING, **OPTIONS) as llm,
        steps_of(llm) as steps,
    ):
        is_v2 = "worker.gpu.model_runner" in type(runner(llm)).__module__
        assert is_v2 == (use_v2 == "1")
        kernels.serving()
        lengths = [5 + at % 7 for at in range(len(asked))]
        check(llm, asked, lengths, seed=0)
        # The same graphs with other rows and prompts of several blocks.
        check(llm, asked[::-1], [30 + at % 5 for at in lengths], seed=100)
        check_presets(llm)
        runner(llm).steering.check_integrity()
        assert steps.graphs["FULL"] > 0, steps
        kernels.assert_silent()


@pytest.mark.parametrize("use_v2", ["0", "1"])
def test_chunks_preemption_and_a_warm_cache(
    use_v2: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    asked = [*everything(), *inline()]
    # Prompts of two or three blocks, of which there are eleven, grow by half a block.
    options = {
        **OPTIONS,
        "max_num_batched_tokens": 40,
        "num_gpu_blocks_override": 12,
        "max_model_len": 64,
        "block_size": 16,
    }
    paths = save_modules(MODULES, tmp_path)
    with (
        engine(FAMILY, model_root, paths, STEERING, **options) as llm,
        steps_of(llm) as steps,
    ):
        lengths = [32 + at % 4 for at in range(len(asked))]
        check(llm, asked, lengths, seed=200)
        check(llm, asked, lengths, seed=200)
        assert steps.chunks > 0, steps
        assert steps.preempted > 0, steps
        runner(llm).steering.check_integrity()
