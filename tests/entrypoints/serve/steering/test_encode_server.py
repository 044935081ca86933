# SPDX-License-Identifier: Apache-2.0
"""`/v1/steering/encode` and the search of labels, on a real server with an API key."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from steering_testing.golden_gate import EXAMPLE, MODULE, example_server
from steering_testing.server import MODEL_NAME

pytestmark = pytest.mark.server

URL = "/v1/steering/encode"
PAGE = EXAMPLE.parents[1] / "docs" / "features" / "reading.md"
LABELS = f"/v1/steering/modules/{MODULE}/features"


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encode")
    shutil.copytree(EXAMPLE / "sae", root / "sae")
    content = [
        {"index": "3", "description": "soup"},
        {"index": "4", "description": "sea"},
    ]
    file = root / "sae" / "labels.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def http(labels: Path) -> Iterator[httpx.Client]:
    root = labels.parent.parent
    options = ("--api-key", "secret", "--steering-api-key", "key")
    steering = {"modules": {MODULE: str(root / "sae")}}
    with (
        example_server(root / "log", *options, steering=steering) as server,
        httpx.Client(
            base_url=server.url,
            timeout=60,
            headers={"Authorization": "Bearer secret"},
        ) as client,
    ):
        yield client


def encode(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post(URL, json={"module_name": MODULE, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_every_token_of_every_text_is_encoded(http: httpx.Client) -> None:
    texts = ["The chef stirs the soup.", "The bridge"]
    found = encode(http, input=texts, top_k=4)
    assert found["usage"]["prompt_tokens"] == sum(
        len(entry["token_ids"]) for entry in found["data"]
    )
    for text, entry in zip(texts, found["data"], strict=True):
        assert "".join(entry["tokens"]).endswith(text.lower())
        record = entry["sae_features"]["post_block.1"]
        # Bos, which the module leaves alone, has no entry.
        assert record["positions"] == list(range(1, len(entry["token_ids"])))
        assert all(len(row) <= 4 for row in record["features"])
    (alone,) = encode(http, input=texts[0], features=[3, 1])["data"]
    record = alone["sae_features"]["post_block.1"]
    assert record["features"][0] == [1, 3]
    assert "3" not in found["labels"] or found["labels"]["3"] == "soup"
    assert encode(http, input=texts[0], features=[3, 1])["labels"] == {"3": "soup"}


def test_encoding_says_what_completions_read(http: httpx.Client) -> None:
    text = "The bridge over the bay"
    (entry,) = encode(http, input=text, top_k=3)["data"]
    body = {
        "model": MODEL_NAME,
        "prompt": text,
        "max_tokens": 1,
        "sae_readout_specs": [{"module_name": MODULE, "top_k": 3}],
    }
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert choice["prompt_sae_features"] == {MODULE: entry["sae_features"]}


def test_messages_are_rendered(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Who are you?"}]
    (entry,) = encode(http, messages=messages)["data"]
    assert "who are you" in "".join(entry["tokens"])
    assert entry["sae_features"]["post_block.1"]["positions"]
    parts = [{"type": "text", "text": "Who are"}, {"type": "text", "text": "you?"}]
    (same,) = encode(http, messages=[{"role": "user", "content": parts}])["data"]
    assert same["token_ids"] == entry["token_ids"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": "a", "messages": [{"role": "user", "content": "b"}]}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a"] * 65}, "input"),
        ({"input": "a", "top_k": 0}, "top_k"),
        ({"input": "a", "top_k": 4, "features": [1]}, None),
        ({"input": "a", "features": [1 << 30]}, "features[0]"),
        ({"input": "a", "module_name": "none"}, "module_name"),
        ({"input": "word " * 400}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"input": "a", "n": 1}, "n"),
        ({"input": "a", "sites": {"post_block": []}}, "sites.post_block"),
        ({"input": "a", "sites": {"post_block": [3]}}, "sites.post_block[0]"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages"),
    ],
)
def test_what_cannot_be_encoded_is_a_400(
    http: httpx.Client, body: dict[str, Any], field: str | None
) -> None:
    answer = http.post(URL, json={"module_name": MODULE, **body})
    assert answer.status_code == 400, answer.text
    if field is not None:
        assert answer.json()["error"]["param"] == field


def test_a_text_that_does_not_fit_is_named(http: httpx.Client) -> None:
    body = {"module_name": MODULE, "input": ["a", "b", "word " * 400]}
    error = http.post(URL, json=body).json()["error"]
    assert re.match(
        r"input\[2\]: found \d+ tokens, expected 1 to 255", error["message"]
    )


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b'{"module_name": "golden-gate", "input": "a", "input": "b"}', 400),
        (b'{"module_name": "golden-gate", "input": "\\ud800"}', 400),
        (b'{"module_name": "golden-gate", "input": "' + b"a" * (1 << 20) + b'"}', 413),
    ],
)
def test_a_body_that_is_no_request_is_refused(
    http: httpx.Client, body: bytes, status: int
) -> None:
    answer = http.post(URL, content=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_a_long_text_is_cut_into_pieces_as_a_short_one(http: httpx.Client) -> None:
    words = [f"the {word}" for word in ("bridge", "soup", "chef", "bay") * 28]
    (entry,) = encode(http, input=" ".join(words), top_k=1)["data"]
    assert len(entry["tokens"]) == len(entry["token_ids"]) > 200
    assert "".join(entry["tokens"]).endswith(" ".join(words))


def test_the_model_is_the_one_that_is_served(http: httpx.Client) -> None:
    assert encode(http, input="a", model=MODEL_NAME)["data"]
    body = {"module_name": MODULE, "input": "a", "model": "other"}
    answer = http.post(URL, json=body)
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "model"
    assert MODEL_NAME in answer.json()["error"]["message"]


def test_the_default_preset_does_not_steer_what_is_encoded(http: httpx.Client) -> None:
    key = {"X-Steering-Authorization": "Bearer key"}
    clamp = {"feature_idx": 3, "kind": "additive", "value": 9.0}
    preset = {"sae_clamp_specs": [{"module_name": MODULE, "clamps": [clamp]}]}
    plain = encode(http, input="the bridge", features=[3])

    def default(name: str | None) -> None:
        url = "/v1/steering/default_preset"
        answer = http.put(url, json={"preset": name}, headers=key)
        assert answer.status_code == 200, answer.text

    try:
        for locked in (False, True):
            url = "/v1/steering/presets/three"
            body = {**preset, "locked": locked}
            assert http.put(url, json=body, headers=key).status_code in (200, 201)
            default("three")
            found = encode(http, input="the bridge", features=[3])
            # A locked default acts on every request.
            assert (found["data"] == plain["data"]) is not locked
    finally:
        default(None)


def test_a_broken_labels_file_is_named_without_its_place(
    http: httpx.Client, labels: Path
) -> None:
    content = labels.read_text()
    try:
        labels.write_text('[{"index": "x", "description": "soup"}]')
        answer = http.get(LABELS)
        message = answer.json()["error"]["message"]
        assert answer.status_code == 409
        assert "labels.json: entry" in message and str(labels.parent) not in message
    finally:
        labels.write_text(content)


def test_the_servers_key_is_wanted(http: httpx.Client) -> None:
    body = {"module_name": MODULE, "input": "a"}
    for path in (URL, LABELS):
        answer = httpx.request(
            "POST" if path == URL else "GET",
            f"{http.base_url}".rstrip("/") + path,
            json=body,
        )
        assert answer.status_code == 401


def test_labels_are_searched(http: httpx.Client) -> None:
    soup, sea = (
        {"feature_idx": 3, "label": "soup"},
        {"feature_idx": 4, "label": "sea"},
    )
    assert http.get(LABELS).json()["features"] == [soup, sea]
    assert http.get(LABELS, params={"q": "SOU"}).json()["features"] == [soup]
    assert http.get(LABELS, params={"index": 4}).json()["features"] == [sea]
    assert http.get(LABELS, params={"index": 9}).json()["features"] == []
    assert http.get(LABELS, params={"q": "soup sea"}).json()["features"] == []
    assert http.get(LABELS, params={"limit": 1}).json()["features"] == [soup]
    for bad in ({"limit": "x"}, {"limit": 0}, {"limit": 1001}, {"index": -1}):
        answer = http.get(LABELS, params=bad)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == next(iter(bad))
    other = LABELS.replace(MODULE, "none")
    assert http.get(other).status_code == 404


def test_what_is_read_is_counted(http: httpx.Client) -> None:
    def count(name: str) -> float:
        start = f'vllm:steering_read_{name}_total{{module="{MODULE}"'
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(start))

    (entry,) = encode(http, input="the bridge", top_k=2)["data"]
    tokens = len(entry["sae_features"]["post_block.1"]["positions"])
    deadline = time.monotonic() + 30
    while count("tokens") < tokens and time.monotonic() < deadline:
        time.sleep(0.5)
    assert count("tokens") >= tokens
    # num_active, num_listed, two features and two values of four bytes.
    assert count("bytes") >= tokens * 24
    assert count("stops") == 0
    # Feature 3 is above -1 on every token, so the first generated one ends the request.
    stop = [{"feature_idx": 3, "above": -1.0}]
    spec = {"module_name": MODULE, "top_k": 1, "stop_if": stop}
    body = {"model": MODEL_NAME, "prompt": "the bridge", "sae_readout_specs": [spec]}
    answered = http.post("/v1/completions", json={**body, "ignore_eos": True})
    (choice,) = answered.json()["choices"]
    assert choice["stop_reason"] == f"sae:{MODULE}:post_block.1:3"
    deadline = time.monotonic() + 30
    while count("stops") < 1 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert count("stops") == 1


def shape(value: Any) -> Any:
    """Keys and types of JSON; lists by an element, features by `#`."""
    if isinstance(value, dict):
        return {"#" if k.isdigit() else k: shape(v) for k, v in value.items()}
    if isinstance(value, list):
        return [next((shape(one) for one in value if one != []), None)]
    return "number" if isinstance(value, (int, float)) else type(value).__name__


def test_the_json_of_the_reading_page_is_what_the_server_takes_and_gives(
    http: httpx.Client,
) -> None:
    blocks = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    request, features, to_encode, encoded = map(json.loads, blocks)
    chunks = []
    body = {**request, "model": MODEL_NAME, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                chunks.append(choice)
    found = [one for chunk in chunks if (one := chunk.get("sae_features"))]
    assert found and {json.dumps(shape(one)) for one in found} == {
        json.dumps(shape(features))
    }
    assert shape(chunks[0]["prompt_sae_features"]) == shape(features)
    answered = http.post(URL, json=to_encode)
    assert answered.status_code == 200, answered.text
    given = answered.json()
    assert isinstance(given["labels"], dict)
    # Which features are listed, hence labelled, is the model's matter.
    assert shape({**given, "labels": {"1": ""}}) == shape(encoded)
