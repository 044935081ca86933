# SPDX-License-Identifier: Apache-2.0
"""Answers that carry features: they may have a million numbers."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi.responses import JSONResponse

from vllm.config.sae_features import FEATURES, ReadFeatures, features_json
from vllm.config.steering_json import Json

# Fewer values become JSON types at once.
LARGE = 4096


class FeaturesAnswer(JSONResponse):
    """A JSON answer. It is written in a tenth of the time that `json.dumps` takes, in
    which a server serves nobody else."""

    def render(self, content: object) -> bytes:
        return msgspec.json.encode(content)


def carries_features(content: object) -> bool:
    """Whether the body of an OpenAI route's answer has what its request has read."""
    if not isinstance(content, dict):
        return False
    choices = content.get("choices")
    parts = choices if isinstance(choices, list) else ()
    return FEATURES in content or any(
        isinstance(choice, dict) and FEATURES in choice for choice in parts
    )


async def json_of(features: ReadFeatures) -> Json:
    """`features_json`; other requests get their turn while it makes many numbers."""
    records = (record for sites in features.values() for record in sites.values())
    if sum(record.values.size for record in records) < LARGE:
        return features_json(features)
    return await asyncio.to_thread(features_json, features)
