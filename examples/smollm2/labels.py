# SPDX-License-Identifier: Apache-2.0
"""Labels of features, for `ship.py`.

A person wrote `READ` after looking at the strongest contexts, at what distinguishes
texts of a topic from others, and, for the verified ones, at answers with the feature
clamped. All other labels are made by a rule: if a feature's strongest contexts share
one word, the label is that word in quotation marks.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

SHARED = 7  # of 8 contexts
READ = {
    9: "law, rights and duties",
    224: "assignment in code (=)",
    329: "ingredients of a recipe",
    395: "technology",
    503: "instructions to the reader",
    529: "movement into or under something",
    589: "legend has it; it is said",
    619: "health and the body",
    657: "“over” spans of time or space",
    668: "French text",
    771: "music lessons and instruments",
    902: "food, drink and materials",
    919: "biology and other natural processes",
    1087: "stories and fairy tales",
    1213: "Golden Gate Bridge (the name)",
    1237: "arithmetic and numbers",
    1318: "names of invented places and people",
    1403: "names in Python code",
    1472: "cooking and recipes",
    1477: "wars and international politics",
    1612: "children at school",
    1942: "“war” in the Second World War",
    1944: "gods, scripture and religion",
    2000: "money and prices",
    2083: "theatre, music and other performances",
    2096: "magic, medicine and law",
    2122: "religion (the word)",
    2129: "closing of a letter",
    2170: "what people do with their eyes and faces",
    2343: "odd words at the start of a text",
    2530: "poetry",
    2558: "formal mathematics",
    2593: "the whole world",
    2641: "sea, ships and tides",
    2695: "weather and climate",
    2711: "Japan",
    2793: "COVID-19",
    2801: "love and compassion",
    2810: "body of a formal letter",
    2826: "opposing sides, battle",
    2884: "apologies (sorry for)",
    2976: "English of the early 19th century",
    3007: "Buddhism",
    3295: "Python data structures",
    3297: "French words",
    3345: "towns and addresses",
}


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
