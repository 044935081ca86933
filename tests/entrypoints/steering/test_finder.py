# SPDX-License-Identifier: Apache-2.0
"""What the feature finder computes, without an engine."""

from __future__ import annotations

import numpy as np

from vllm.config.sae_features import SAEFeatures
from vllm.entrypoints.steering.encoded import EncodedText, EncodedTexts
from vllm.entrypoints.steering.finder import auroc, doubts

SITE = "post_block.1"


def test_what_is_doubtful_is_said() -> None:
    def encoded(num_active: list[int]) -> EncodedTexts:
        n = len(num_active)
        record = SAEFeatures(
            np.arange(n), np.zeros((n, 1), int), np.ones((n, 1)), np.ones(n, int),
            np.array(num_active), 1000,
        )  # fmt: skip
        return EncodedTexts([EncodedText([5] * n, ["a"] * n, {SITE: record})] * 3)

    ordinary = encoded([40, 40])
    assert doubts(ordinary, ordinary, SITE) == []
    (many,) = doubts(encoded([65, 70]), ordinary, SITE)
    assert many.startswith("50% of the tokens") and "fit" not in many
    *_, dense = doubts(encoded([600, 700]), ordinary, SITE)
    assert "345 of 1000 features active: does the SAE fit this site?" in dense
    (silent,) = doubts(encoded([0, 0]), encoded([0, 9]), SITE)
    assert "no active feature: does the SAE fit" in silent
    (few,) = doubts(ordinary, EncodedTexts(ordinary[:2]), SITE)
    assert "at least three" in few


def test_auroc_counts_ties_half() -> None:
    assert auroc(np.array([2.0, 3.0]), np.array([1.0])) == 1.0
    assert auroc(np.array([1.0]), np.array([1.0, 2.0])) == 0.25
