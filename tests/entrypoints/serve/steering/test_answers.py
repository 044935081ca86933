# SPDX-License-Identifier: Apache-2.0
"""Answers with features are written fast, and hold what `json.dumps` would write."""

from __future__ import annotations

import asyncio
import json
import time

import numpy as np
from fastapi.responses import JSONResponse

from vllm.config.sae_features import ROWS_AT_ONCE, SAEFeatures, features_json
from vllm.entrypoints.openai.completion.protocol import (
    CompletionResponse,
    CompletionResponseChoice,
)
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.serve.steering.answers import (
    FeaturesAnswer,
    carries_features,
    json_of,
)

D_SAE = 16384


def record(tokens: int, top_k: int) -> SAEFeatures:
    rng = np.random.default_rng(tokens)
    shape = tokens, top_k
    return SAEFeatures(
        np.arange(tokens, dtype=np.int32),
        rng.integers(0, D_SAE, shape, dtype=np.int32),
        (rng.standard_cauchy(shape) * 1e3).astype(np.float32),
        rng.integers(0, top_k + 1, tokens, dtype=np.int32),
        rng.integers(0, 99, tokens, dtype=np.int32),
        D_SAE,
    )


def answer_with(features: object) -> dict:
    choice = CompletionResponseChoice(index=0, text='\u00e9 \U0001f600 " \\ \n')
    choice.sae_features = features  # type: ignore[attr-defined]
    return CompletionResponse(
        model="m", choices=[choice], usage=UsageInfo()
    ).model_dump()


def test_an_answer_is_the_json_that_json_dumps_writes() -> None:
    tokens = 2 * ROWS_AT_ONCE + 3
    made = record(tokens, 5)
    found = asyncio.run(json_of({"sea": {"post_block.1": made}}))
    assert found == features_json({"sea": {"post_block.1": made}})
    lists = found["sea"]["post_block.1"]
    assert [len(row) for row in lists["values"]] == made.counts.tolist()
    rows = zip(made.features.tolist(), made.counts.tolist(), strict=True)
    assert lists["features"] == [row[:used] for row, used in rows]
    content = answer_with(found)
    assert carries_features(content)
    assert json.loads(FeaturesAnswer(content).body) == json.loads(
        JSONResponse(content).body
    )


def test_other_answers_are_vllms_own() -> None:
    content = answer_with(None)
    del content["choices"][0]["sae_features"]
    for other in (content, {"choices": None}, {"error": {}}, ["sae_features"], None):
        assert not carries_features(other)
    assert carries_features({"object": "response", "sae_features": {}})


def test_a_thread_that_serves_others_goes_on_while_a_large_record_is_made() -> None:
    """A million values. The longest wait of the loop is a part of what it takes."""

    async def longest_wait() -> tuple[float, float]:
        large = {"sea": {"post_block.1": record(16384, 64)}}
        began = last = time.perf_counter()
        work = asyncio.create_task(json_of(large))
        worst = 0.0
        while not work.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            worst, last = max(worst, now - last), now
        return worst, time.perf_counter() - began

    waited = [asyncio.run(longest_wait()) for _ in range(3)]
    assert min(worst / took for worst, took in waited) < 0.5, waited
