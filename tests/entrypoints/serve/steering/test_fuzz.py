# SPDX-License-Identifier: Apache-2.0
"""No body, name or query of a client makes a route fail, or leaves anything behind."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from steering_testing.engine import DELTA, FULL, VECTORS
from steering_testing.mutations import places, replaced

from tests.entrypoints.serve.steering.conftest import URL
from vllm.entrypoints.serve.steering.access import RequestRefused
from vllm.entrypoints.serve.steering.encode import parse_encode
from vllm.entrypoints.serve.steering.protocol import (
    parse_count,
    parse_flag,
    parse_register,
)

PRESETS = "/v1/steering/presets"
DEFAULT = "/v1/steering/default_preset"
# Numbers on either side of every limit, and what JSON cannot say twice alike.
NUMBERS = st.one_of(
    st.integers(-2, 100),
    st.sampled_from(
        [2**31 - 1, 2**31, 2**63, 10**40, -(10**40), 1e308, 3.5e38, 5e-324]
    ),
    st.floats(),
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=10,
)
CLAMP = {"feature_idx": 5, "kind": "absolute", "value": 2.0}
SPEC = {"module_name": "first", "clamps": {"post_block": {"1": [CLAMP]}}}
PRESET: dict[str, Any] = {
    DELTA: [SPEC],
    FULL: [{"module_name": "first", "phase": "decode"}],
    "sampling": {"temperature": 0.5, "max_tokens": 8},
    "description": "calm",
    "locked": False,
}
ENCODE = {
    "module_name": "first",
    "input": ["a", "b"],
    "sites": {"post_block": [1]},
    "top_k": 4,
}
REGISTER = {"name": "hot", "path": "/x", "skip_token_ids": [1], "norm_guard": 2.0}
EASY = settings(max_examples=150)


@st.composite
def near(draw: st.DrawFn, document: dict[str, Any]) -> bytes:
    """A body that differs from a valid one in a few places, or in its bytes."""
    value: Any = document
    for _ in range(draw(st.integers(0, 3))):
        value = replaced(value, draw(st.sampled_from(places(value))), draw(JSON))
        if not isinstance(value, dict):
            break
        if draw(st.booleans()):
            extra = [VECTORS, "sampling", "when", "spans", "x", *document]
            value = {**value, draw(st.sampled_from(extra)): draw(JSON)}
    body = json.dumps(value).encode(errors="surrogatepass")
    cut = draw(st.integers(0, len(body))) if draw(st.integers(0, 9)) == 0 else None
    return body[:cut] + (draw(st.binary(max_size=4)) if cut is not None else b"")


@pytest.mark.engine
@EASY
@given(body=near(PRESET))
def test_any_preset_is_made_or_refused(client: TestClient, body: bytes) -> None:
    answer = client.put(f"{PRESETS}/fuzz", content=body)
    assert answer.status_code in (200, 400, 409, 413), answer.text
    if answer.status_code == 200:
        # It can be used as it was taken: a default is checked again.
        chosen = client.put(DEFAULT, json={"preset": "fuzz"})
        assert chosen.status_code == 200, (body, chosen.text)
        assert client.delete(f"{PRESETS}/fuzz").status_code == 409
        assert client.put(DEFAULT, json={"preset": None}).status_code == 200
        assert client.delete(f"{PRESETS}/fuzz").status_code == 200
    else:
        assert answer.json()["error"]["message"]
    assert not list(client.get(PRESETS).json()["presets"])


@pytest.mark.engine
@EASY
@given(body=near({"preset": "none"}) | st.binary(max_size=40), name=st.text(max_size=9))
def test_any_default_and_any_name_is_answered(
    client: TestClient, body: bytes, name: str
) -> None:
    quoted = quote(name, safe="", errors="surrogatepass")
    calls = [
        client.put(DEFAULT, content=body),
        client.put(f"{PRESETS}/{quoted}", content=body),
        client.delete(f"{PRESETS}/{quoted}"),
        client.get(f"{URL}/{quoted}"),
        client.get(f"{URL}/{quoted}/features?index={quoted}&limit={quoted}"),
        client.delete(f"{URL}/{quoted}-?drain={quoted}"),
        client.post(URL, content=body),
    ]
    assert all(answer.status_code < 500 for answer in calls)
    assert [m["name"] for m in client.get(URL).json()["modules"]] == ["first"]


@EASY
@given(body=near(ENCODE) | near(REGISTER) | st.binary(max_size=60))
def test_any_body_is_parsed_or_refused_with_a_status(body: bytes) -> None:
    for parse in (parse_encode, parse_register):
        try:
            parse(body)
        except RequestRefused as refused:
            assert 400 <= refused.status < 500
            assert refused.message


@EASY
@given(text=st.text(max_size=30))
def test_any_query_is_parsed_or_refused(text: str) -> None:
    for parse in (
        lambda: parse_flag("drain", text),
        lambda: parse_count("index", text, None, 2**31),
    ):
        try:
            assert parse() in (True, False) or 0 <= int(text) <= 2**31
        except RequestRefused as refused:
            assert refused.status == 400
