# SPDX-License-Identifier: Apache-2.0
"""`/v1/steering/encode` without a server: what waits, what is too much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from steering_testing.specs import CONFIG

from vllm.config.steering import SteeringConfig
from vllm.config.steering_shutdown import note_shutdown
from vllm.entrypoints.serve.steering import encode as encode_module
from vllm.entrypoints.serve.steering.access import RequestRefused
from vllm.entrypoints.serve.steering.encode import (
    EncodeRequest,
    EncodeService,
    message_of,
)
from vllm.exceptions import VLLMServerError


class Words:
    """A tokenizer: one token a word."""

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[len(word) for word in text.split()])

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {token}" for token in ids)


class Engine:
    """Generates nothing until it is released; remembers who was cancelled."""

    def __init__(self) -> None:
        self.vllm_config: Any = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=100),
            additional_config={"steering": {}},
        )
        self.ends_with = "length"
        self.running = 0
        self.cancelled = 0
        self.go_on = asyncio.Event()
        self.fails = False

    def get_tokenizer(self) -> Any:
        return Words()

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str
    ) -> AsyncIterator[Any]:
        self.running += 1
        try:
            if self.fails and self.running == 2:
                raise ValueError("no")
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.ends_with == "dead":
            raise VLLMServerError("dead")
        output = SimpleNamespace(finish_reason=self.ends_with)
        yield SimpleNamespace(prompt_sae_features={}, outputs=[output])


REQUEST = EncodeRequest("one", input=["a b", "c", "d e f"])


def run(
    engine: Engine, request: EncodeRequest = REQUEST, config: SteeringConfig = CONFIG
) -> Any:
    return EncodeService(engine, ["m"]).encode(request, config)


def test_one_failing_text_ends_the_others() -> None:
    async def check() -> None:
        engine = Engine()
        engine.fails = True
        with pytest.raises(RequestRefused, match="input: no") as caught:
            await run(engine)
        assert caught.value.status == 400
        await asyncio.sleep(0)
        assert engine.cancelled == engine.running - 1 == 2

    asyncio.run(check())


def test_a_cancelled_call_ends_all_its_texts() -> None:
    async def check() -> None:
        engine = Engine()
        encoding = asyncio.create_task(run(engine))
        while engine.running < 3:
            await asyncio.sleep(0)
        encoding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await encoding
        await asyncio.sleep(0)
        assert engine.cancelled == 3

    asyncio.run(check())


def test_a_text_that_the_engine_aborts_is_not_answered_without_features() -> None:
    async def check() -> None:
        engine = Engine()
        engine.ends_with = "abort"
        engine.go_on.set()
        with pytest.raises(RequestRefused, match="shutting down or paused") as caught:
            await run(engine)
        assert caught.value.status == 503

    asyncio.run(check())


@pytest.mark.parametrize("answers", [True, False])
def test_a_call_that_waits_ends_with_the_server(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    monkeypatch.setattr(encode_module, "STOPPED_POLL_S", 0.01)

    async def check() -> None:
        engine = Engine()
        engine.ends_with = "dead"
        encoding = asyncio.create_task(run(engine))
        while engine.running < 3:
            await asyncio.sleep(0)
        note_shutdown(engine.vllm_config, has_ended=False)
        await asyncio.sleep(0.05)
        assert not encoding.done()  # what runs may still be answered
        if answers:
            engine.go_on.set()
        else:
            note_shutdown(engine.vllm_config, has_ended=True)
        with pytest.raises(RequestRefused, match="shutting down or paused") as caught:
            await asyncio.wait_for(encoding, 5)
        assert caught.value.status == 503

    asyncio.run(check())


def test_an_engine_that_dies_is_an_error_of_the_server() -> None:
    async def check() -> None:
        engine = Engine()
        engine.ends_with = "dead"
        engine.go_on.set()
        with pytest.raises(VLLMServerError):
            await run(engine)

    asyncio.run(check())


def test_every_text_is_answered_when_it_is_read() -> None:
    async def check() -> None:
        engine = Engine()
        engine.go_on.set()
        answer = await run(engine)
        assert [one["token_ids"] for one in answer["data"]] == [[1, 1], [1], [1, 1, 1]]
        assert answer["data"][0]["tokens"] == [" 1", " 1"]
        assert answer["usage"]["prompt_tokens"] == 6

    asyncio.run(check())


def test_an_answer_has_a_largest_size() -> None:
    async def check(limit: int) -> None:
        config = replace(CONFIG, max_answer_values=limit)
        engine = Engine()
        engine.go_on.set()
        await run(engine, EncodeRequest("one", input=["a b", "c"], top_k=4), config)

    asyncio.run(check(12))  # 3 tokens at one site
    with pytest.raises(RequestRefused, match="input: found 12 values") as caught:
        asyncio.run(check(11))
    assert caught.value.status == 400 and caught.value.field == "input"


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts, "name": "x"}
    joined = {"role": "user", "content": "a\nb", "name": "x"}
    assert message_of("messages[0]", message) == joined
    for bad, path in (
        ({}, r"messages\[0\]\.role: found None"),
        ({"role": "user", "content": 5}, r"messages\[0\]\.content: found 5"),
        ({"role": "user", "content": [{}]}, r"messages\[0\]\.content\[0\]: found"),
    ):
        with pytest.raises(RequestRefused, match=path):
            message_of("messages[0]", bad)
