# SPDX-License-Identifier: Apache-2.0
"""Screening in an engine: if Inductor compiles both alike, the answers are those of an
engine without, in every bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from steering_testing import models
from steering_testing.engine import (
    DELTA,
    FULL,
    engine,
    generate,
    params,
    sae_spec,
    save_sae,
)
from steering_testing.matrix import CLAMPS, FAMILY
from steering_testing.matrix import POST as SITE
from steering_testing.reference import random_sae
from steering_testing.requests import prompt

from vllm.config import steering_screening
from vllm.engine.steering_topology import can_screen
from vllm.model_executor.layers.steering_kernels.screen import ScreenCopy, ScreenScratch

OPTIONS: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",
    "dtype": "bfloat16",
    "max_num_seqs": 16,
    "enforce_eager": False,
    "gpu_memory_utilization": 0.1,
}


@pytest.mark.skipif(not can_screen(torch.bfloat16), reason="needs Hopper's kernels")
@pytest.mark.parametrize("use_v2", ["0", "1"])
def test_screened_engines_answer_as_plain_ones(
    use_v2: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    monkeypatch.setattr(steering_screening, "AUTO_SCREENED_BYTES", 1)
    # Inductor times several forms of a norm and takes the fastest, in each engine anew.
    monkeypatch.setattr(inductor, "deterministic", True)
    screened: list[ScreenCopy] = []
    bundle = ScreenScratch.bundle

    def noted(self: ScreenScratch, copy: ScreenCopy) -> list[torch.Tensor]:
        screened.append(copy)
        return bundle(self, copy)

    monkeypatch.setattr(ScreenScratch, "bundle", noted)
    sae = random_sae(2048, models.HIDDEN, "jumprelu", 3)
    assert sae.threshold is not None
    sae.threshold += 1.0
    path = str(save_sae(tmp_path / "sae", {SITE: sae}))
    # One request, then a few, then more than 8 at once.
    rounds = []
    for count in (1, 5, 16):
        specs = [{FULL if i % 3 else DELTA: [sae_spec("m", {SITE: CLAMPS})]}
                 for i in range(count)]  # fmt: skip
        rounds.append(([prompt(7 + i, 20 + i) for i in range(count)], specs))
    answers = []
    for asked in ("off", "auto"):
        screened.clear()
        module = {"m": {"path": path, "screening": asked}}
        with engine(FAMILY, model_root, module, **OPTIONS) as llm:
            answers.append(
                [
                    generate(llm, prompts, [params(12, **spec) for spec in specs])
                    for prompts, specs in rounds
                ]
            )
            assert bool(screened) == (asked == "auto")
            assert all(bool(copy.rows.any()) for copy in screened)
    assert answers[0] == answers[1]
