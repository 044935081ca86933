# SPDX-License-Identifier: Apache-2.0
"""An answer that may hold too many values is refused before it is made."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from steering_testing.golden_gate import (
    BRIDGE,
    MAX_ANSWER_VALUES,
    MESSAGES,
    MODULE,
    READ,
)
from steering_testing.server import MODEL_NAME

pytestmark = pytest.mark.server

FIRST = {"model": MODEL_NAME, "temperature": 0, **READ}
COMPLETION = {**FIRST, "prompt": "the chef", "max_tokens": 8}
SAMPLED = {**COMPLETION, "temperature": 1}
CHAT = {**FIRST, "messages": MESSAGES, "max_tokens": 8}
RESPONSES = {**FIRST, "input": "Who are you?", "max_output_tokens": 8}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {**COMPLETION, "prompt": [[5] * 240]}, "prompt"),
        (
            "/v1/completions",
            {**COMPLETION, "prompt": [[5] * 240], "stream": True},
            "prompt",
        ),
        (
            "/v1/chat/completions/batch",
            {**CHAT, "messages": [[{"role": "user", "content": "a " * 100}]] * 3},
            "messages",
        ),
        ("/v1/responses", {**RESPONSES, "input": "a " * 205}, "input"),
    ],
)
def test_an_answer_with_too_many_values_of_prompts_is_refused(
    http: httpx.Client, path: str, body: dict[str, Any], field: str
) -> None:
    spec = {**READ["sae_readout_specs"][0], "top_k": 64}
    refused(http, path, {**body, "sae_readout_specs": [spec]}, field)
    # Reading only what is generated holds nothing of the prompts.
    decode = {**spec, "phase": "decode"}
    few = {**body, "sae_readout_specs": [decode], "max_tokens": 1}
    assert http.post(path, json=few).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "field", "most"),
    [
        # The prompts have one token each.
        ("/v1/completions", {**SAMPLED, "prompt": [[5]] * 2, "n": 4}, "", 25),
        ("/v1/completions", {**COMPLETION, "prompt": [[5]], "echo": True}, "", 201),
        ("/v1/chat/completions", {**CHAT, "temperature": 1, "n": 2}, "", 100),
        ("/v1/chat/completions", CHAT, "max_completion_tokens", 201),
        ("/v1/chat/completions/batch", {**CHAT, "messages": [MESSAGES] * 2}, "", 100),
        ("/v1/responses", RESPONSES, "max_output_tokens", 201),
    ],
)
def test_an_answer_that_may_hold_too_many_generated_values_is_refused(
    http: httpx.Client, path: str, body: dict[str, Any], field: str, most: int
) -> None:
    """The server allows 201 tokens of 64 values, over all prompts and choices."""
    field = field or "max_tokens"
    # Every choice ends with its first token.
    stop = [{"feature_idx": BRIDGE["feature"], "above": -1.0}]
    spec = {"module_name": MODULE, "top_k": 63, "phase": "decode", "stop_if": stop}
    body = {**body, "sae_readout_specs": [spec]}
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        body.pop(name, None)
    refused(http, path, {**body, field: most + 1}, field)
    assert http.post(path, json={**body, field: most}).status_code == 200
    if path != "/v1/completions":  # where vLLM's default is 16 tokens
        # Without the field, a choice may fill the model's length.
        named = "max_tokens" if field == "max_completion_tokens" else field
        refused(http, path, body, named)
    streams = {**body, field: most + 1, "stream": True}
    if path == "/v1/responses":
        # The last event has all that was read.
        refused(http, path, streams, field)
    elif not path.endswith("batch"):
        assert http.post(path, json=streams).status_code == 200


def refused(http: httpx.Client, path: str, body: dict[str, Any], field: str) -> None:
    """The request has a field that may lead to too many values."""
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: found ")
    assert str(MAX_ANSWER_VALUES) in error["message"]
