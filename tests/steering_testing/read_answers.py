# SPDX-License-Identifier: Apache-2.0
"""Answers over HTTP with what their requests have read, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from steering_testing.server import Server


def client_of(server: Server) -> Iterator[httpx.Client]:
    """A client of the server, until the caller goes on."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, which must be 200."""
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> list[dict[str, Any]]:
    """The events of a stream."""
    with http.stream("POST", path, json={**body, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Entries of several chunks, one after the other."""
    whole: dict[str, Any] = {}
    for part in parts:
        for module, sites in part.items():
            for site, record in sites.items():
                own = whole.setdefault(module, {}).setdefault(site, {})
                for key, values in record.items():
                    own.setdefault(key, []).extend(values)
    return whole


def same(found: Any, wanted: Any) -> None:
    """Equal up to the rounding of another batch."""
    for module, sites in wanted.items():
        for site, record in sites.items():
            own = found[module][site]
            assert own["positions"] == record["positions"]
            assert own["features"] == record["features"]
            assert own["num_active"] == record["num_active"]
            for a, b in zip(own["values"], record["values"], strict=True):
                assert a == pytest.approx(b, rel=1e-4)
