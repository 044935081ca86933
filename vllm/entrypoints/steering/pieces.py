# SPDX-License-Identifier: Apache-2.0
"""The text of single tokens, as it appears in their sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decodes(Protocol):
    """A tokenizer, as far as it turns token ids into text."""

    def decode(self, token_ids: list[int], /) -> str: ...


def token_pieces(tokenizer: Decodes, ids: Sequence[int]) -> list[str]:
    """The part of the text that each token adds, leading spaces kept.

    A token alone is often decoded without its space, so each is decoded behind the
    one before it.
    """
    pieces = []
    for at, token in enumerate(ids):
        if at == 0:
            pieces.append(tokenizer.decode([token]))
            continue
        before = tokenizer.decode([ids[at - 1]])
        both = tokenizer.decode([ids[at - 1], token])
        alone = both[len(before) :] if both.startswith(before) else None
        pieces.append(tokenizer.decode([token]) if alone is None else alone)
    return pieces
