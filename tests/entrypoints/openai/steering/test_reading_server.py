# SPDX-License-Identifier: Apache-2.0
"""Reading features through a real server process: every route, streamed and whole."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from steering_testing.golden_gate import (
    BRIDGE,
    KEY,
    MESSAGES,
    MODULE,
    READ,
    example_engine,
)
from steering_testing.server import MODEL_NAME

from vllm.config.sae_features import features_json
from vllm.config.sae_steering_types import SAEReadoutSpec, SteeringSamplingParams

pytestmark = pytest.mark.server

PROMPTS = ["The chef stirs the tomato soup.", "The bridge over the bay"]
TOKENS = 8
COMPLETION = {
    "model": MODEL_NAME,
    "prompt": PROMPTS,
    "max_tokens": TOKENS,
    "temperature": 0,
    **READ,
}
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
    params = SteeringSamplingParams(
        max_tokens=TOKENS,
        temperature=0,
        sae_readout_specs=[SAEReadoutSpec(MODULE, top_k=4)],
    )
    with example_engine() as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [
        (features_json(o.prompt_sae_features), features_json(o.outputs[0].sae_features))
        for o in outputs
    ]


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
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
    plain = {name: value for name, value in COMPLETION.items() if name not in READ}
    body = {**plain, "model": "brief", "max_tokens": 230, "ignore_eos": True}

    def ask() -> list[dict[str, Any]]:
        if not stream:
            return post(http, "/v1/completions", body)["choices"]
        chunks = streamed(http, "/v1/completions", body)
        return [choice for chunk in chunks for choice in chunk["choices"]]

    def asked_while_the_preset_goes(pool: ThreadPoolExecutor) -> Any:
        """What was asked; None if the answer was there before the preset went."""
        assert http.put(preset, json=READ, headers=key).status_code == 200
        asked = pool.submit(ask)
        held = f"/v1/steering/modules/{MODULE}"
        while not http.get(held).json()["module"]["requests"]:
            if asked.done():
                break
        assert http.delete(preset, headers=key).status_code == 200
        under_way = not asked.done()
        choices = asked.result()
        return choices if under_way else None

    with ThreadPoolExecutor(1) as pool:
        tries = (asked_while_the_preset_goes(pool) for _ in range(8))
        choices = next((found for found in tries if found is not None), None)
    assert choices is not None, "every answer was there before its preset went"
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
