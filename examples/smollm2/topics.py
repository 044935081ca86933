# SPDX-License-Identifier: Apache-2.0
"""The three features of the demo, and the words that say that a text is about them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """A feature and its words; a word counts if it starts with one of them."""

    name: str
    feature: int
    stems: tuple[str, ...]

    def pattern(self) -> re.Pattern[str]:
        """Matches the words that count."""
        stems = "|".join(sorted(self.stems, key=len, reverse=True))
        return re.compile(rf"\b(?:{stems})\w*", re.IGNORECASE)

    def share(self, texts: Iterable[str]) -> float:
        """Share of the words of `texts` that count, 0..1."""
        words = [w for text in texts for w in re.findall(r"[^\W\d_]+", text)]
        pattern = self.pattern()
        return sum(pattern.fullmatch(w) is not None for w in words) / max(1, len(words))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SEA = Topic(
    "sea",
    2641,
    _words(
        "sea ship sail boat ocean port harbo captain crew coast island wave tide fish "
        "water vessel fleet yacht beach navy naval marin pirate anchor caribbean "
        "pacific atlantic bay shore deck cargo dock voyag aboard maritime"
    ),
)
FRENCH = Topic(
    "French",
    668,
    # Mostly whole words, none of them English.
    _words(
        r"le\b la\b les\b de\b des\b du\b et\b est\b un\b une\b je\b ne\b pas\b "
        r"que\b qui\b ce\b cette\b vous\b nous\b il\b elle\b en\b au\b aux\b dans\b "
        r"pour\b sur\b avec\b ou\b mais\b son\b sa\b ses\b leur mon\b ma\b mes\b "
        r"tout sont\b été\b à\b y\b ai\b ont\b fait suis\b sommes\b être\b l\b d\b "
        r"j\b c\b n\b s\b qu\b très\b "
        r"jour monde vie\b début enfant lele légèr libér \w*[éèêçàùîôû]\w*"
    ),
)
POETRY = Topic(
    "poetry",
    2530,
    _words(
        "soul heart dream whisper twilight tapestr fleeting shadow star moon sorrow "
        "love night forever thy thee thou flame candle eternal beauty grace light "
        "horizon realm wander dance gentle silent silence breeze weav woven celestial "
        "endless undying gods? tear embrace tale"
    ),
)
TOPICS = (SEA, FRENCH, POETRY)
