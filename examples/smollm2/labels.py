# SPDX-License-Identifier: Apache-2.0
"""Labels of features, for `ship.py`.

Those of `labels_read.READ` were written by a reader of the contexts; for the features
of the demo also of answers with the feature clamped. All others are made by rule: where
a feature's strongest contexts share one word, the label is that word, in quotation
marks.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from labels_read import READ, UNCLEAR

SHARED = 7  # of 8 contexts


def make(facts: dict[str, torch.Tensor], tokenizer: Any) -> dict[str, str]:
    """Feature index (a string, as in JSON) -> label; not every feature has one."""
    labels = {}
    tokens = facts["tokens"].flatten()
    for feature in range(len(facts["max"])):
        label = READ.get(feature) or _shared_word(
            facts["context_values"][feature],
            tokens[facts["context_places"][feature]],
            tokenizer,
        )
        if label:
            labels[str(feature)] = label
    return labels


def _shared_word(
    values: torch.Tensor, tokens: torch.Tensor, tokenizer: Any
) -> str | None:
    """The word that nearly all of the strongest tokens are, in quotation marks."""
    words = [
        tokenizer.decode([int(token)]).strip().lower()
        for token, value in zip(tokens, values, strict=True)
        if value > 0
    ]
    if not words:
        return None
    word, count = Counter(words).most_common(1)[0]
    return f"“{word}”" if count >= SHARED and word.isprintable() and word else None


def summary(names: dict[str, str]) -> dict[str, int]:
    """How many labels were read, for the card."""
    return {
        "read_with_a_label": len(READ),
        "read_without_one_meaning": len(UNCLEAR),
        "by_rule": len(names) - len(READ),
    }
