# SPDX-License-Identifier: Apache-2.0
"""Labels of features, for `ship.py`.

Those of `labels_read.READ` were written by a reader of the contexts; for the features
of the demo also of answers with the feature clamped. All others are made by a rule, and
are in quotation marks: the token that nearly all of a feature's strongest contexts
share, with the token before or after it where they share that too. `-ing` is a token
that continues a word, `ass[istant]` one that always continues the same word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from data import WIDTH
from labels_read import READ, UNCLEAR

SHARED = 7  # of 8 contexts
# Marks what a token has of a character that it shares with others.
BROKEN = "\N{REPLACEMENT CHARACTER}"
HOW = (
    "A language model read the eight strongest contexts of each feature, and the eight "
    "tokens that its decoder row promotes, against a first reading of four or five "
    "contexts. No person has read them."
)
Neighbours = tuple[str, str, str]  # decoded tokens: before, the strongest, after


def make(facts: dict[str, torch.Tensor], tokenizer: Any) -> dict[str, str]:
    """Feature index (a string, as in JSON) -> label; not every feature has one."""
    labels = {}
    for feature in range(len(facts["max"])):
        label = READ.get(feature)
        if label is None and feature not in UNCLEAR:
            label = shared_token(strongest(facts, feature, tokenizer))
        if label:
            labels[str(feature)] = label
    return labels


def strongest(
    facts: dict[str, torch.Tensor], feature: int, tokenizer: Any
) -> list[Neighbours]:
    """The strongest tokens of a feature with their neighbours."""
    found = []
    values, places = facts["context_values"][feature], facts["context_places"][feature]
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        if value > 0:
            row, at = divmod(place, WIDTH)
            tokens = facts["tokens"][row]
            around = (tokens[max(0, at - 1) : at], tokens[at : at + 1])
            before, token = (tokenizer.decode(part) for part in around)
            found.append((before, token, tokenizer.decode(tokens[at + 1 : at + 2])))
    return found


def shared_token(contexts: Sequence[Neighbours]) -> str | None:
    """The token that the contexts share, in quotation marks, or None."""
    token = _shared([token for _, token, _ in contexts])
    if token is None:
        return None
    alike = [c for c in contexts if c[1].strip().lower() == token]
    before = _shared([before for before, _, _ in alike])
    after = _shared([after for _, _, after in alike])
    if all(b[-1:].isalpha() and t[:1].isalpha() for b, t, _ in alike):
        return f"“{before}[{token}]”" if before else f"“-{token}”"
    if all(t[-1:].isalpha() and a[:1].isalpha() for _, t, a in alike):
        return f"“[{token}]{after}”" if after else f"“{token}-”"
    if before:
        return f"“{token}” after “{before}”"
    return f"“{token}” before “{after}”" if after else f"“{token}”"


def _shared(tokens: Sequence[str]) -> str | None:
    """The printable token that `SHARED` of the tokens are, in lower case."""
    words = [token.strip().lower() for token in tokens]
    if not words:
        return None
    word, count = Counter(words).most_common(1)[0]
    good = word and word.isprintable() and BROKEN not in word
    return word if good and count >= SHARED else None


def summary(names: dict[str, str]) -> dict[str, int | str]:
    """How many labels were read, and how, for the card."""
    return {
        "read_with_a_label": len(READ),
        "read_without_one_meaning": len(UNCLEAR),
        "by_rule": len(names) - len(READ),
        "how_they_were_read": HOW,
    }
