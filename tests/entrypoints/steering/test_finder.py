# SPDX-License-Identifier: Apache-2.0
"""What the feature finder computes, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from vllm.config.sae_features import SAEFeatures
from vllm.entrypoints.steering.encoded import EncodedText, EncodedTexts
from vllm.entrypoints.steering.finder import (
    _columns,
    _completed,
    _examples,
    auroc,
    doubts,
)
from vllm.entrypoints.steering.reading import Text

SITE = "post_block.1"


def test_what_is_doubtful_is_said() -> None:
    def encoded(num_active: list[int], first: float = 1.0) -> EncodedTexts:
        n = len(num_active)
        values = np.ones((n, 64))
        values[0] = first
        record = SAEFeatures(
            np.arange(n), np.zeros((n, 64), int), values,
            np.minimum(num_active, 64), np.array(num_active), 1000,
        )  # fmt: skip
        return EncodedTexts([EncodedText([5] * n, ["a"] * n, {SITE: record})] * 3)

    ordinary, with_a_sink = encoded([40, 40]), encoded([40, 40], first=90.0)
    assert doubts(ordinary, ordinary, SITE) == []
    (many,) = doubts(encoded([65, 70]), ordinary, SITE)
    assert many.startswith("50% of the tokens") and "fit" not in many
    *_, dense = doubts(encoded([600, 700]), ordinary, SITE)
    assert "345 of 1000 features active: does the SAE fit this site?" in dense
    (silent,) = doubts(encoded([0, 0]), encoded([0, 9]), SITE)
    assert "no active feature: does the SAE fit" in silent
    (sink,) = doubts(with_a_sink, ordinary, SITE)
    assert sink.startswith("3 of 12 tokens have activations above 10 times")
    (few,) = doubts(ordinary, EncodedTexts(ordinary[:2]), SITE)
    assert "at least three" in few


def test_auroc_counts_ties_half() -> None:
    assert auroc(np.array([2.0, 3.0]), np.array([1.0])) == 1.0
    assert auroc(np.array([1.0]), np.array([1.0, 2.0])) == 0.25


def of(values: dict[int, float], num_active: int, ids: list[int]) -> EncodedText:
    """A text that has these features on each of its tokens."""
    n, k = len(ids), len(values)
    record = SAEFeatures(
        np.arange(n),
        np.tile(np.array(list(values), np.int32), (n, 1)),
        np.tile(np.array(list(values.values()), np.float32), (n, 1)),
        np.full(n, k),
        np.full(n, num_active),
        100,
    )
    return EncodedText(ids, [f" {token}" for token in ids], {SITE: record})


@pytest.mark.parametrize("wrong", [-1, 1000, 2.5, "2", None, True])
def test_activations_of_no_feature_are_refused(wrong: object) -> None:
    text = of({3: 2.0}, 1, [5, 5])
    d_sae = text.site().d_sae
    assert text.activations(3).tolist() == [2.0, 2.0]
    assert text.activations(np.int32(3)).tolist() == [2.0, 2.0]  # type: ignore[arg-type]
    assert text.activations(d_sae - 1).tolist() == [0.0, 0.0]
    expected = f"^feature: found .*, expected an integer in 0..{d_sae - 1}$"
    with pytest.raises(ValueError, match=expected):
        text.activations(d_sae if wrong == 1000 else wrong)  # type: ignore[arg-type]


def test_only_texts_of_which_a_feature_was_left_out_are_read_again() -> None:
    complete, cut = of({9: 3.0, 4: 1.0}, 2, [5, 6]), of({9: 3.0, 4: 1.0}, 3, [7])
    skipped = EncodedText([1], ["<bos>"], {})
    asked: list[list[Text]] = []

    def read(texts: Sequence[Text]) -> EncodedTexts:
        asked.append(list(texts))
        return EncodedTexts([of({2: 0.5, 4: 1.0, 9: 3.0}, 3, [7]) for _ in texts])

    found = _completed(EncodedTexts([complete, skipped, cut]), SITE, read)
    assert asked == [[[7]]]
    assert found[0] is complete and found[1] is skipped
    # In the order of the candidates; a feature that is not listed is not active.
    assert _columns(found[0].site(), [9, 2, 4]).tolist() == [[3.0, 0.0, 1.0]] * 2
    assert _columns(found[2].site(), [9, 2, 4]).tolist() == [[3.0, 0.5, 1.0]]
    asked.clear()
    assert _completed(EncodedTexts([complete]), SITE, read) == [complete]
    assert asked == [[]]


def test_examples_of_a_feature_are_different_contexts() -> None:
    texts = EncodedTexts([of({9: 3.0}, 1, [5, end]) for end in (6, 7, 8)])
    other = of({9: 2.0}, 1, [7, 7])
    examples = _examples(9, EncodedTexts([*texts, other]), SITE)
    assert [(one.token, one.value) for one in examples] == [(" 5", 3.0), (" 7", 2.0)]
