# SPDX-License-Identifier: Apache-2.0
"""What requests have read, in the answers of the OpenAI routes.

A stream is annotated from outside. `StreamedChoices` notes the results that enter
vLLM's generator and adds what they have read to the next chunk of the same choice.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from vllm.config.sae_features import (
    FEATURES,
    PROMPT_FEATURES,
    ReadFeatures,
    features_json,
    merge_all,
)
from vllm.config.sae_steering_specs import PRESET_KEY, READOUT_KEY
from vllm.config.steering import SteeringConfig
from vllm.config.steering_json import Json
from vllm.entrypoints.serve.steering.answers import json_of

if TYPE_CHECKING:
    from pydantic import BaseModel

    from vllm.entrypoints.openai.responses.protocol import StreamingResponsesResponse
    from vllm.outputs import RequestOutput

_DATA = "data: {"
_TEXT_DELTAS = ("response.output_text.delta", "response.reasoning_text.delta")


def may_read(request: BaseModel, config: SteeringConfig | None) -> bool:
    """Whether a request of an OpenAI route may read features.

    It does so by itself, or by its preset. What the preset says may change before the
    request reaches the engine, and while the request runs. So this is true under any
    preset, and only the results tell whether the request has read.
    """
    fields = dict(request)
    xargs = fields.get("vllm_xargs") or {}
    if fields.get(READOUT_KEY) or xargs.get(READOUT_KEY):
        return True
    if config is None:
        return False
    if PRESET_KEY in request.model_fields_set:
        return fields[PRESET_KEY] is not None
    return xargs.get(PRESET_KEY, config.default_preset) is not None


async def put(
    target: object, features: ReadFeatures, prompt: ReadFeatures | None
) -> None:
    """Add what was read to a choice, an event or a response."""
    of_prompt = None if prompt is None else await json_of(prompt)
    _set(target, await json_of(features), of_prompt)


def _set(target: object, features: Json, prompt: Json | None) -> None:
    setattr(target, FEATURES, features)
    if prompt is not None:
        setattr(target, PROMPT_FEATURES, prompt)


class StreamedChoices:
    """What a stream's choices have read and no chunk has carried yet.

    Args:
        n: choices of each prompt.
    """

    def __init__(self, n: int):
        self.n = n
        # In pieces: a parser may hold back the chunks of many tokens.
        self._features: dict[int, list[ReadFeatures]] = {}
        self._prompt: dict[int, ReadFeatures] = {}

    def take(self, prompt: int, result: RequestOutput) -> None:
        """Note a result of the prompt of this index."""
        for output in result.outputs:
            index = prompt * self.n + output.index
            if output.sae_features:
                self._features.setdefault(index, []).append(output.sae_features)
            if output.index == 0 and result.prompt_sae_features:
                self._prompt[index] = result.prompt_sae_features

    async def of_prompts(
        self, results: AsyncIterator[tuple[int, RequestOutput]]
    ) -> AsyncIterator[tuple[int, RequestOutput]]:
        """The results of several prompts, noted as they pass."""
        async for prompt, result in results:
            self.take(prompt, result)
            yield prompt, result

    async def of_one(
        self, results: AsyncIterator[RequestOutput]
    ) -> AsyncIterator[RequestOutput]:
        """The results of one prompt, noted as they pass."""
        async for result in results:
            self.take(0, result)
            yield result

    async def annotate(self, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
        """The stream's chunks, with what their choices have read."""
        async for chunk in chunks:
            yield await self._annotated(chunk)

    async def _annotated(self, chunk: str) -> str:
        if not (self._features or self._prompt) or not chunk.startswith(_DATA):
            return chunk
        content = json.loads(chunk.removeprefix("data: "))
        for choice in content.get("choices") or ():
            index = choice.get("index")
            prompt = self._prompt.pop(index, None)
            if prompt is not None:
                choice[PROMPT_FEATURES] = await json_of(prompt)
            features = self._features.pop(index, None)
            if features is not None:
                choice[FEATURES] = await json_of(merge_all(features))
        return f"data: {msgspec.json.encode(content).decode()}\n\n"


async def fill_choices(
    choices: Iterable[object], results: Iterable[RequestOutput]
) -> None:
    """Add what was read to the choices of a whole answer, if anything was asked for.

    Args:
        choices: those of the first result, then of the next one.
        results: one for each prompt.
    """
    for choice, features, prompt in _that_read(choices, results):
        await put(choice, features, prompt)


def fill_choices_at_once(
    choices: Iterable[object], results: Iterable[RequestOutput]
) -> None:
    """As `fill_choices`, for a caller that cannot wait."""
    for choice, features, prompt in _that_read(choices, results):
        of_prompt = None if prompt is None else features_json(prompt)
        _set(choice, features_json(features), of_prompt)


def _that_read(
    choices: Iterable[object], results: Iterable[RequestOutput]
) -> Iterator[tuple[object, ReadFeatures, ReadFeatures | None]]:
    """Choices that read, with what they read of the answer and of the prompt."""
    outputs = ((result, output) for result in results for output in result.outputs)
    for choice, (result, output) in zip(choices, outputs, strict=False):
        if output.sae_features is not None:
            is_first = output is result.outputs[0]
            prompt = result.prompt_sae_features if is_first else None
            yield choice, output.sae_features, prompt


class LastResult:
    """Passes results on and keeps the last one."""

    def __init__(self) -> None:
        self.result: RequestOutput | None = None

    async def watch(
        self, results: AsyncIterator[RequestOutput]
    ) -> AsyncIterator[RequestOutput]:
        async for result in results:
            self.result = result
            yield result


class ResponseReading:
    """What one Responses API request has read, over all its turns.

    Attributes:
        has_read: whether the request reads at all; its results tell.
    """

    def __init__(self) -> None:
        self.has_read = False
        self.features: list[ReadFeatures] = []
        self.prompt: list[ReadFeatures] = []
        self.fresh: list[ReadFeatures] = []

    def take(self, result: RequestOutput) -> None:
        """Note a result of a request that reads: a delta, or a whole turn."""
        self.has_read = True
        if features := result.outputs[0].sae_features:
            self.features.append(features)
            self.fresh.append(features)
        if prompt := result.prompt_sae_features:
            self.prompt.append(prompt)

    async def annotate(
        self, events: AsyncIterator[StreamingResponsesResponse]
    ) -> AsyncIterator[StreamingResponsesResponse]:
        """A stream's events, text deltas with what has been read since the last."""
        async for event in events:
            if event.type in _TEXT_DELTAS and self.fresh:
                fresh, self.fresh = self.fresh, []
                setattr(event, FEATURES, await json_of(merge_all(fresh)))
            yield event

    async def finish(self, response: object) -> None:
        """Add all that was read to the response, if the request reads."""
        if self.has_read:
            await put(response, merge_all(self.features), merge_all(self.prompt))
