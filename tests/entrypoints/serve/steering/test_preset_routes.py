# SPDX-License-Identifier: Apache-2.0
"""`/v1/steering/presets`: made, listed, chosen as the default and removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from steering_testing.engine import FULL, assert_same, generate, params, sae_spec
from steering_testing.requests import prompt

from tests.entrypoints.serve.steering.conftest import URL, Serve
from vllm import LLM

pytestmark = pytest.mark.engine

PRESETS = "/v1/steering/presets"
DEFAULT = "/v1/steering/default_preset"
GOOD = {FULL: [sae_spec("first")], "description": "plain", "locked": False}


def error(response: Any) -> dict[str, Any]:
    return response.json()["error"]


def test_a_preset_is_made_listed_used_and_removed(client: TestClient, llm: LLM) -> None:
    assert client.put(f"{PRESETS}/one", json=GOOD).status_code == 200
    listed = client.get(PRESETS).json()
    assert listed["default_preset"] is None
    (one,) = listed["presets"]
    assert (one["name"], one["error"], one["description"]) == ("one", None, "plain")
    chosen = params(3, steering_preset="one")
    named = params(3, **{FULL: [sae_spec("first")]})
    found = generate(llm, [prompt(1, 9)] * 2, [chosen, named])
    assert found[0] == found[1]
    assert client.put(DEFAULT, json={"preset": "one"}).status_code == 200
    assert client.get(PRESETS).json()["default_preset"] == "one"
    [by_default] = generate(llm, [prompt(1, 9)], [params(3)])
    assert_same(by_default, found[0])
    refused = client.delete(f"{PRESETS}/one")
    assert (refused.status_code, error(refused)["param"]) == (409, "name")
    assert client.put(DEFAULT, json={"preset": None}).status_code == 200
    assert client.delete(f"{PRESETS}/one").status_code == 200
    assert client.get(PRESETS).json()["presets"] == []


def test_a_preset_whose_module_is_gone_is_listed_with_the_reason(
    client: TestClient, root: Path
) -> None:
    body = {"name": "hot", "path": str(root / "good")}
    assert client.post(URL, json=body).status_code == 201
    preset = {FULL: [sae_spec("hot")]}
    assert client.put(f"{PRESETS}/hot", json=preset).status_code == 200
    assert client.delete(f"{URL}/hot").status_code == 200
    (listed,) = client.get(PRESETS).json()["presets"]
    assert "module_name" in listed["error"]
    assert client.delete(f"{PRESETS}/hot").status_code == 200


@pytest.mark.parametrize(
    ("name", "body", "status", "param"),
    [
        ("a b", GOOD, 400, "name"),
        ("x", {FULL: [sae_spec("none")]}, 400, f"{FULL}[0].module_name"),
        ("x", {"locked": True}, 400, "preset"),
        ("x", {**GOOD, "sampling": {"temperature": True}}, 400, "preset.sampling"),
        ("x", {**GOOD, "sampling": {"top_p": float("nan")}}, 400, "preset.sampling"),
        ("x", {**GOOD, "description": "\ud800"}, 400, "description"),
        ("x", {"\ud800": 1}, 400, "['\\ud800']"),
    ],
)
def test_a_bad_preset_is_refused(
    client: TestClient, name: str, body: Any, status: int, param: str
) -> None:
    refused = client.put(f"{PRESETS}/{name}", content=json.dumps(body))
    assert refused.status_code == status, refused.text
    assert error(refused)["param"].startswith(param)
    assert error(refused)["message"].startswith(param)
    assert client.get(PRESETS).json()["presets"] == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "body: found nothing, expected a JSON object"),
        (b"\xff", "body: found no UTF-8 at byte 0"),
        (b'{"preset": ', "body: found no JSON at character 11"),
        (b"[" * 100_000, "body: found JSON that is nested too deep"),
        (b'{"preset": ' + b"1" * 5000 + b"}", "body: found an integer of thousands"),
        (b"[]", "body: found a list, expected an object with preset"),
        (b"{}", "preset: is missing, expected the name of a preset, or null"),
        (b'{"preset": 5}', "preset: found 5, expected the name of a preset, or null"),
        (b'{"preset": "x", "preset": "y"}', "preset: is given twice, expected once"),
        (b'{"preset": null, "x": 1}', "x: unknown field, expected only preset"),
    ],
)
def test_a_bad_default_is_refused(
    client: TestClient, body: bytes, message: str
) -> None:
    refused = client.put(DEFAULT, content=body)
    assert refused.status_code == 400
    assert error(refused)["message"].startswith(message)


def test_unknown_presets_are_not_found(client: TestClient) -> None:
    assert client.delete(f"{PRESETS}/nobody").status_code == 404
    unknown = client.put(DEFAULT, json={"preset": "nobody"})
    assert unknown.status_code == 404
    assert error(unknown)["message"].startswith("preset: found 'nobody', expected a")


def test_without_the_key_nothing_changes(serve: Serve) -> None:
    with serve(sends="wrong") as stranger:
        assert stranger.put(f"{PRESETS}/one", json=GOOD).status_code == 401
        assert stranger.delete(f"{PRESETS}/one").status_code == 401
        assert stranger.put(DEFAULT, json={"preset": None}).status_code == 401
