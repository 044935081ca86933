# SPDX-License-Identifier: Apache-2.0
"""The answers of a server as those of an engine, whole or chunk after chunk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from soak.pool import D_SAE, Answer

from vllm.config.sae_features import SAEFeatures

# What an answer needs to have of a request's body.
ASKED = {
    "logprobs": 0,
    "return_tokens_as_token_ids": True,
    "return_token_ids": True,
    "detokenize": False,
}
PROMPT, GENERATED = "prompt_sae_features", "sae_features"
Record = dict[str, list]


class Choice:
    """One choice of an answer: all that it has said so far."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.scores: list[float] = []
        # By field, and then by module and site.
        self.reads: dict[str, dict[tuple[str, str], Record]] = {}

    def add(self, said: dict[str, Any]) -> None:
        """Take a choice of a whole answer, or of a chunk of a stream."""
        self.tokens += said.get("token_ids") or ()
        self.scores += (said.get("logprobs") or {}).get("token_logprobs") or ()
        for field in (PROMPT, GENERATED):
            for module, sites in (said.get(field) or {}).items():
                for site, record in sites.items():
                    records = self.reads.setdefault(field, {})
                    kept = records.setdefault((module, site), {})
                    for key, values in record.items():
                        kept.setdefault(key, []).extend(values)

    def answer(self, prompt: dict[tuple[str, str], Record]) -> Answer:
        """As the engine says it; every sample has read the same prompt."""
        records = [
            features_of(record)
            for reads in (prompt, self.reads.get(GENERATED, {}))
            for _, record in sorted(reads.items())
        ]
        return Answer(self.tokens, self.scores, records)


def features_of(record: Record) -> SAEFeatures:
    """The record of `SAEFeatures.to_json`."""
    counts = np.array([len(row) for row in record["features"]], dtype=np.int32)
    width = int(counts.max(initial=0))
    features = np.full((len(counts), width), -1, dtype=np.int32)
    values: np.ndarray = np.zeros((len(counts), width), dtype=np.float32)
    for at, count in enumerate(counts):
        features[at, :count] = record["features"][at]
        values[at, :count] = record["values"][at]
    positions = np.array(record["positions"], dtype=np.int32)
    active = np.array(record["num_active"], dtype=np.int32)
    return SAEFeatures(positions, features, values, counts, active, D_SAE)


def answers_of_choices(said: Iterable[dict[str, Any]]) -> list[Answer]:
    """The answers of all choices of a whole answer or of a stream's chunks."""
    choices: dict[int, Choice] = {}
    for one in said:
        choices.setdefault(one["index"], Choice()).add(one)
    first = choices.get(0, Choice()).reads.get(PROMPT, {})
    return [choices[index].answer(first) for index in sorted(choices)]
