# SPDX-License-Identifier: Apache-2.0
"""Screening in an engine: the answers have the bits of an engine that does not screen.

One engine gives both, since the device decides in each step. Two engines may differ by
themselves: Inductor chooses among the forms of a kernel by timing them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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
from vllm.model_executor.layers.steering_kernels.screen import (
    SCREEN_FIELDS,
    SCREEN_TOKENS,
    STATE_MOST,
    ScreenCopy,
    ScreenScratch,
)

OPTIONS: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",
    "dtype": "bfloat16",
    "max_num_seqs": 16,
    "enforce_eager": False,
    "gpu_memory_utilization": 0.1,
}
FACTS = SCREEN_FIELDS.index("screen_facts")


class Screens:
    """The copies that the engine's steps screen with, and what they share."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copies: list[ScreenCopy] = []
        self.facts: list[torch.Tensor] = []
        bundle = ScreenScratch.bundle

        def noted(scratch: ScreenScratch, copy: ScreenCopy) -> list[torch.Tensor]:
            found = bundle(scratch, copy)
            self.copies.append(copy)
            self.facts.append(found[FACTS])
            return found

        monkeypatch.setattr(ScreenScratch, "bundle", noted)

    def limit(self, tokens: int) -> None:
        """From now on, steps of at most so many tokens are screened."""
        for copy, facts in zip(self.copies, self.facts, strict=True):
            copy.state.zero_()
            copy.state[STATE_MOST] = tokens
            facts.zero_()

    def has_screened(self) -> bool:
        """Since `limit`: the facts of the tokens have been written."""
        return any(bool(facts.any()) for facts in self.facts)


@pytest.mark.skipif(not can_screen(torch.bfloat16), reason="needs Hopper's kernels")
@pytest.mark.parametrize("use_v2", ["0", "1"])
def test_screened_steps_answer_as_plain_ones(
    use_v2: str, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
    monkeypatch.setattr(steering_screening, "AUTO_SCREENED_BYTES", 1)
    screens = Screens(monkeypatch)
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
    module = {"m": {"path": path, "screening": "auto"}}
    answers = []
    with engine(FAMILY, model_root, module, **OPTIONS) as llm:
        assert screens.copies
        assert all(bool(copy.rows.any()) for copy in screens.copies)
        for most in (0, 8, SCREEN_TOKENS, 0):
            screens.limit(most)
            llm.reset_prefix_cache()
            answers.append(
                [
                    generate(llm, prompts, [params(12, **spec) for spec in specs])
                    for prompts, specs in rounds
                ]
            )
            assert screens.has_screened() == (most > 0)
    plain, some, all_of_them, again = answers
    assert again == plain
    assert some == plain
    assert all_of_them == plain
