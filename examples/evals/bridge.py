# SPDX-License-Identifier: Apache-2.0
"""The score of both evaluations: whether an answer speaks of the bridge."""

from __future__ import annotations

import re


def speaks_of_the_bridge(answer: str) -> bool:
    return re.search("bridge|golden|suspension", answer, re.IGNORECASE) is not None


def process_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """lm-eval's metrics of one question."""
    return {"bridge": float(speaks_of_the_bridge(results[0]))}
