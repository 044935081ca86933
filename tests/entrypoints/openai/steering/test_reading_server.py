# SPDX-License-Identifier: Apache-2.0
"""Reading features through a real server process: every route, streamed and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from steering_testing.read_answers import client_of, joined, post, same, streamed
from steering_testing.server import MODEL_NAME, api_server

from vllm import LLM
from vllm.config.sae_features import features_json
from vllm.config.sae_steering_types import SAEReadoutSpec, SteeringSamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

pytestmark = pytest.mark.server

EXAMPLE = Path(__file__).parents[4] / "examples" / "golden_gate"
BRIDGE = json.loads((EXAMPLE / "features.json").read_text())["topics"]["bridge"]
MODULE = "golden-gate"
KEY = "the-key"
PROMPTS = ["The chef stirs the tomato soup.", "The bridge over the bay"]
MESSAGES = [{"role": "user", "content": "Who are you?"}]
TOKENS = 8
# That one answer of the server may hold.
VALUES = 201 * 64
READ = {"sae_readout_specs": [{"module_name": MODULE, "top_k": 4}]}
COMPLETION = {
    "model": MODEL_NAME,
    "prompt": PROMPTS,
    "max_tokens": TOKENS,
    "temperature": 0,
    **READ,
}
SAMPLED = {**COMPLETION, "temperature": 1}
CHAT = {
    "model": MODEL_NAME,
    "messages": MESSAGES,
    "max_tokens": TOKENS,
    "temperature": 0,
    **READ,
}
RESPONSES = {
    "model": MODEL_NAME,
    "input": "Who are you?",
    "max_output_tokens": TOKENS,
    "temperature": 0,
    **READ,
}


@pytest.fixture(scope="module")
def expected() -> list[tuple[Any, Any]]:
    """(prompt's, answer's) entries of each prompt, from an engine in this process."""
    llm = LLM(
        str(EXAMPLE / "model"),
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 27,
        additional_config={"steering": {"modules": {MODULE: str(EXAMPLE / "sae")}}},
    )
    params = SteeringSamplingParams(
        max_tokens=TOKENS,
        temperature=0,
        sae_readout_specs=[SAEReadoutSpec(MODULE, top_k=4)],
    )
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    found = [
        (features_json(o.prompt_sae_features), features_json(o.outputs[0].sae_features))
        for o in outputs
    ]
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return found


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    root = tmp_path_factory.mktemp("server")
    log, preset = root / "log", root / "preset.json"
    preset.write_text(json.dumps(READ))
    modules = ("--steering-modules", f"{MODULE}={EXAMPLE / 'sae'}")
    presets = ("--steering-presets", f"reader={preset}")
    config = {"steering": {"max_answer_values": VALUES}}
    limit = ("--additional-config", json.dumps(config))
    options = (*modules, *presets, *limit, "--enable-scale-out")
    key = ("--steering-api-key", KEY)
    environment = {"VLLM_PLUGINS": "steering"}
    arguments = (*options, *key)
    with api_server(
        EXAMPLE / "model", log, *arguments, environment=environment
    ) as server:
        yield from client_of(server)


def test_completions_carry_what_each_prompt_and_answer_read(
    http: httpx.Client, expected: list[Any]
) -> None:
    choices = post(http, "/v1/completions", COMPLETION)["choices"]
    for choice, (prompt, answer) in zip(choices, expected, strict=True):
        same(choice["prompt_sae_features"], prompt)
        same(choice["sae_features"], answer)


def test_a_stream_of_completions_carries_it_piece_by_piece(
    http: httpx.Client, expected: list[Any]
) -> None:
    chunks = streamed(http, "/v1/completions", COMPLETION)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index, (prompt, answer) in enumerate(expected):
        own = [choice for choice in choices if choice["index"] == index]
        same(own[0]["prompt_sae_features"], prompt)
        parts = [choice["sae_features"] for choice in own if "sae_features" in choice]
        # A slow reader gets several tokens in one chunk.
        assert parts
        same(joined(parts), answer)


def test_chat_whole_streamed_and_in_a_batch(http: httpx.Client) -> None:
    (choice,) = post(http, "/v1/chat/completions", CHAT)["choices"]
    record = choice["sae_features"][MODULE]["post_block.1"]
    first = choice["prompt_sae_features"][MODULE]["post_block.1"]
    assert len(record["positions"]) == TOKENS - 1
    assert record["positions"][0] > first["positions"][-1]
    chunks = streamed(http, "/v1/chat/completions", CHAT)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    parts = [part["sae_features"] for part in choices if "sae_features" in part]
    same(joined(parts), choice["sae_features"])
    (prompt,) = [
        part["prompt_sae_features"] for part in choices if "prompt_sae_features" in part
    ]
    same(prompt, choice["prompt_sae_features"])
    batch = {**CHAT, "messages": [MESSAGES, MESSAGES]}
    both = post(http, "/v1/chat/completions/batch", batch)["choices"]
    assert len(both) == 2
    for one in both:
        same(one["sae_features"], choice["sae_features"])


def test_responses_whole_and_streamed(http: httpx.Client) -> None:
    response = post(http, "/v1/responses", RESPONSES)
    record = response["sae_features"][MODULE]["post_block.1"]
    assert len(record["positions"]) == TOKENS - 1
    assert response["prompt_sae_features"][MODULE]["post_block.1"]["positions"]
    events = streamed(http, "/v1/responses", RESPONSES)
    done = events[-1]["response"]
    same(done["sae_features"], response["sae_features"])
    same(done["prompt_sae_features"], response["prompt_sae_features"])
    parts = [event["sae_features"] for event in events[:-1] if "sae_features" in event]
    assert parts  # a slow reader gets several tokens in one event


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions/batch", {**CHAT, "messages": [MESSAGES, MESSAGES]}),
        ("/v1/responses", RESPONSES),
    ],
)
def test_what_a_preset_reads_is_in_the_answer(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    own = post(http, path, body)
    plain = {key: value for key, value in body.items() if key not in READ}
    for chosen in ({"model": "reader"}, {"steering_preset": "reader"}):
        found = post(http, path, {**plain, **chosen})
        for one, other in zip(
            found.get("choices", [found]), own.get("choices", [own]), strict=True
        ):
            same(one["sae_features"], other["sae_features"])
            same(one["prompt_sae_features"], other["prompt_sae_features"])
    if not path.endswith("batch"):
        events = streamed(http, path, {**plain, "model": "reader"})
        assert "prompt_sae_features" in json.dumps(events)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", RESPONSES),
    ],
)
def test_a_preset_that_does_not_read_adds_no_field(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    clamp = {"feature_idx": BRIDGE["feature"], "kind": "absolute", "value": 9.0}
    spec = {"module_name": MODULE, "clamps": [clamp]}
    preset, key = "/v1/steering/presets/plain", {"Authorization": f"Bearer {KEY}"}
    made = http.put(preset, json={"sae_clamp_specs": [spec]}, headers=key)
    assert made.status_code == 200
    plain = {name: value for name, value in body.items() if name not in READ}
    plain["model"] = "plain"
    answers = [post(http, path, plain), *streamed(http, path, plain)]
    assert "sae_features" not in json.dumps(answers)
    assert http.delete(preset, headers=key).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_read_is_kept_if_the_preset_changes_meanwhile(
    http: httpx.Client, stream: bool
) -> None:
    preset, key = "/v1/steering/presets/brief", {"Authorization": f"Bearer {KEY}"}
    assert http.put(preset, json=READ, headers=key).status_code == 200
    plain = {name: value for name, value in COMPLETION.items() if name not in READ}
    body = {**plain, "model": "brief", "max_tokens": 230, "ignore_eos": True}

    def ask() -> list[dict[str, Any]]:
        if not stream:
            return post(http, "/v1/completions", body)["choices"]
        chunks = streamed(http, "/v1/completions", body)
        return [choice for chunk in chunks for choice in chunk["choices"]]

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        while not http.get(f"/v1/steering/modules/{MODULE}").json()["module"][
            "requests"
        ]:
            assert not asked.done()
        assert http.delete(preset, headers=key).status_code == 200
        assert not asked.done(), "the request ended before its preset went"
        choices = asked.result()
    for index in range(len(PROMPTS)):
        own = [choice for choice in choices if choice["index"] == index]
        record = joined([one["sae_features"] for one in own if "sae_features" in one])
        assert len(record[MODULE]["post_block.1"]["positions"]) == 229


@pytest.mark.parametrize("count", [2, 3])
def test_several_streamed_samples_have_one_record_of_their_prompt(
    http: httpx.Client, count: int
) -> None:
    body = {**COMPLETION, "n": count, "temperature": 1, "seed": 3}
    whole = post(http, "/v1/completions", body)["choices"]
    chunks = streamed(http, "/v1/completions", body)
    streams = [choice for chunk in chunks for choice in chunk["choices"]]
    for choice in whole:
        own = [one for one in streams if one["index"] == choice["index"]]
        parts = [one["sae_features"] for one in own if "sae_features" in one]
        same(joined(parts), choice["sae_features"])
        prompts = [
            one["prompt_sae_features"] for one in own if "prompt_sae_features" in one
        ]
        if choice["index"] % count:
            assert prompts == [] and "prompt_sae_features" not in choice
        else:
            (prompt,) = prompts
            same(prompt, choice["prompt_sae_features"])


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
    # Without a number, a choice may fill the model's length.
    named = "max_tokens" if field == "max_completion_tokens" else field
    refused(http, path, {**body, named: None}, named)
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
    assert str(VALUES) in error["message"]


def test_a_feature_ends_a_stream(http: httpx.Client) -> None:
    stop = [{"feature_idx": BRIDGE["feature"], "above": -1.0}]
    spec = {"module_name": MODULE, "top_k": 2, "stop_if": stop}
    body = {**CHAT, "sae_readout_specs": [spec]}
    reason = f"sae:{MODULE}:post_block.1:{BRIDGE['feature']}"
    (choice,) = post(http, "/v1/chat/completions", body)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)
    chunks = streamed(http, "/v1/chat/completions", body)
    last = chunks[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", reason)
    # The token that fired is a part of both answers.
    deltas = [one["choices"][0]["delta"].get("content") or "" for one in chunks]
    assert "".join(deltas) == choice["message"]["content"] != ""
    parts = [one["choices"][0].get("sae_features", {}) for one in chunks]
    same(joined(parts), choice["sae_features"])
    positions = choice["sae_features"][MODULE]["post_block.1"]["positions"]
    assert len(positions) == 1


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"module_name": MODULE}, "sae_readout_specs[0]"),
        ({"module_name": "none", "top_k": 1}, "sae_readout_specs[0].module_name"),
        ({"module_name": MODULE, "top_k": 65}, "sae_readout_specs[0].top_k"),
        (
            {"module_name": MODULE, "features": [1 << 20]},
            "sae_readout_specs[0].features[0]",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_spec_is_a_400_with_its_path(
    http: httpx.Client, spec: dict[str, Any], path: str, stream: bool
) -> None:
    body = {**COMPLETION, "sae_readout_specs": [spec], "stream": stream}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == path


def test_the_token_route_refuses_what_its_answer_cannot_carry(
    http: httpx.Client,
) -> None:
    body = {
        "model": MODEL_NAME,
        "token_ids": [5, 9],
        "sampling_params": {"max_tokens": 2, "extra_args": READ},
    }
    answer = http.post("/inference/v1/generate", json=body)
    assert answer.status_code == 400, answer.text
    assert "sae_readout_specs" in answer.json()["error"]["message"]
