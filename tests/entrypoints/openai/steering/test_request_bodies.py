# SPDX-License-Identifier: Apache-2.0
"""The body that was sent: refused with two meanings, checked in a thread if large."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from steering_testing.golden_gate import BODIES, FULL, MODES
from steering_testing.specs import CONFIG

import vllm.plugins.steering as plugin
from vllm.exceptions import VLLMValidationError

plugin.install_front_end_seams()

from vllm.entrypoints.openai.chat_completion.protocol import (  # noqa: E402
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest  # noqa: E402
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest  # noqa: E402
from vllm.entrypoints.openai.steering import (  # noqa: E402
    request_checks,
    request_fields,
)


class Sent:
    """A request over HTTP whose body was read before."""

    def __init__(self, body: bytes):
        self.sent = body

    async def body(self) -> bytes:
        return self.sent


REQUESTS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponsesRequest,
}


@pytest.mark.parametrize("route", REQUESTS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_without_steering_refuses_and_says_how_to_start_it(
    route: str, stream: bool
) -> None:
    body = {"model": "m", **BODIES[route], "stream": stream}
    plain = REQUESTS[route].model_validate(body)
    assert request_checks.check_request(plain, None) == {}
    steered = REQUESTS[route].model_validate({**body, **MODES["clamped"]})
    with pytest.raises(VLLMValidationError, match="--steering-modules") as caught:
        request_checks.check_request(steered, None)
    assert caught.value.parameter == FULL


@pytest.mark.parametrize("large", [False, True])
def test_a_large_body_is_checked_while_others_are_answered(
    monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    checking = threading.Event()
    answered = threading.Event()

    def check(request: object, config: object) -> dict[str, Any]:
        checking.set()
        # Only another thread can set this meanwhile.
        return {"others answered": answered.wait(20 if large else 0)}

    monkeypatch.setattr(request_checks, "check_request", check)
    body = b'{"prompt": "%s"}' % (b"a" * (request_checks.LARGE_BODY if large else 1))

    async def run() -> Any:
        sent: Any = Sent(body)
        request: Any = None
        task = asyncio.create_task(
            request_checks.checked_request(request, CONFIG, sent)
        )
        while not checking.is_set():
            await asyncio.sleep(0)
        answered.set()
        return await task

    assert asyncio.run(run()) == {"others answered": large}


@pytest.mark.parametrize("padding", [1, 1 << 20])
def test_both_checks_of_a_body_are_made_whatever_its_size(padding: int) -> None:
    spec = {"module_name": "a", "clamps": [{"feature_idx": 1, "kind": "absolute"}]}
    fields = {"prompt": "a" * padding, "sae_clamp_specs": [spec]}
    request = CompletionRequest.model_validate(fields)
    sent: Any = Sent(json.dumps(fields).encode())
    with pytest.raises(VLLMValidationError, match=r"sae_clamp_specs\[0\].*value"):
        asyncio.run(request_checks.checked_request(request, CONFIG, sent))
    request = CompletionRequest.model_validate({"prompt": "a"})
    sent = Sent(
        b'{"prompt": "%s", "sae_clamp_specs": [1], "sae_clamp_specs": null}'
        % (b"a" * padding)
    )
    with pytest.raises(VLLMValidationError, match="sae_clamp_specs: is given twice"):
        asyncio.run(request_checks.checked_request(request, CONFIG, sent))


@pytest.mark.parametrize("value", [[], {"extra_args": {}}, "a", 1])
def test_an_unknown_field_of_a_raw_request_is_vllms_to_drop(value: object) -> None:
    request = CompletionRequest(prompt="a", sampling_params=value)
    assert request_checks.check_request(request, CONFIG) == {}


def test_vllm_xargs_of_a_batch_is_an_object() -> None:
    fields = {"messages": [[{"role": "user", "content": "a"}]], "vllm_xargs": [1]}
    request = BatchChatCompletionRequest.model_validate(fields)
    with pytest.raises(VLLMValidationError, match="vllm_xargs: found a list") as caught:
        request_checks.check_request(request, CONFIG)
    assert caught.value.parameter == "vllm_xargs"


SPEC = b'{"module_name": "a", "clamps": [{"feature_idx": %s}]%s}'


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (
            b'{"sae_clamp_specs": [%s]}' % (SPEC % (b"-0", b"")),
            "sae_clamp_specs[0].clamps[0].feature_idx",
        ),
        (
            b'{"sae_clamp_specs": [%s]}' % (SPEC % (b"0", b', "module_name": "b"')),
            "sae_clamp_specs[0].module_name",
        ),
        (b'{"sae_clamp_specs": [], "x": 1, "sae_clamp_specs": []}', "sae_clamp_specs"),
        (b'{"sae_clamp_specs": 1, "s\\u0061e_clamp_specs": 1}', "sae_clamp_specs"),
        # After another key that is given twice.
        (
            b'{"x": 1, "x": 1, "sae_clamp_specs": 1, "sae_clamp_specs": 1}',
            "sae_clamp_specs",
        ),
        # Python reads these, and they are no JSON.
        (b'{"x": NaN, "sae_clamp_specs": [-0]}', "sae_clamp_specs[0]"),
        (b'\xef\xbb\xbf{"sae_clamp_specs": [-0]}', "sae_clamp_specs[0]"),
        ('{"sae_clamp_specs": {"a": 1, "a": 1}}'.encode("utf-16"), "sae_clamp_specs.a"),
    ],
)
def test_a_body_with_two_meanings_is_refused(body: bytes, path: str) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        request_fields.refuse_ambiguous_body(body)
    assert caught.value.parameter == path


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "-0, -0]", "sae_clamp_specs": [{"clamps": [{"value": -0.0}]}]}',
        b'{"x": {"a": 1, "a": -0}, "sae_clamp_specs": null}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "\\"sae_clamp_specs\\": -0", "sae_clamp_specs": [1]}',
        b'{"x": {"sae_clamp_specs": [-0]}, "sae_clamp_specs": [1]}',
        b"",
    ],
)
def test_the_rest_of_a_body_is_not_looked_at(body: bytes) -> None:
    request_fields.refuse_ambiguous_body(body)
