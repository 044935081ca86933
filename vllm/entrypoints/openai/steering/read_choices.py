# SPDX-License-Identifier: Apache-2.0
"""What requests have read, in the answers of the OpenAI routes.

A stream is annotated from outside. `StreamedChoices` notes the results that enter
vLLM's generator and adds what they have read to the next chunk of the same choice.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING

from vllm.config.sae_features import ReadFeatures, features_json, merge
from vllm.config.sae_steering_specs import PRESET_KEY, READOUT_KEY
from vllm.config.steering import SteeringConfig

if TYPE_CHECKING:
    from pydantic import BaseModel

    from vllm.entrypoints.openai.responses.protocol import StreamingResponsesResponse
    from vllm.outputs import RequestOutput

FEATURES = "sae_features"
PROMPT_FEATURES = "prompt_sae_features"
_DATA = "data: {"
_TEXT_DELTAS = ("response.output_text.delta", "response.reasoning_text.delta")


def asks_to_read(request: BaseModel, config: SteeringConfig | None) -> bool:
    """Whether a request of an OpenAI route reads features, itself or by its preset."""
    fields = dict(request)
    xargs = fields.get("vllm_xargs") or {}
    if fields.get(READOUT_KEY) or xargs.get(READOUT_KEY):
        return True
    if config is None:
        return False
    name = xargs.get(PRESET_KEY, config.default_preset)
    if PRESET_KEY in request.model_fields_set:
        name = fields[PRESET_KEY]
    return name is not None and bool(config.presets.get(name, {}).get(READOUT_KEY))


def put(target: object, features: ReadFeatures, prompt: ReadFeatures | None) -> None:
    """Add what was read to a choice, an event or a response."""
    setattr(target, FEATURES, features_json(features))
    if prompt is not None:
        setattr(target, PROMPT_FEATURES, features_json(prompt))


class StreamedChoices:
    """What a stream's choices have read and no chunk has carried yet.

    Args:
        n: choices of each prompt.
    """

    def __init__(self, n: int):
        self.n = n
        self._features: dict[int, ReadFeatures] = {}
        self._prompt: dict[int, ReadFeatures] = {}

    def take(self, prompt: int, result: RequestOutput) -> None:
        """Note a result of the prompt of this index."""
        for output in result.outputs:
            index = prompt * self.n + output.index
            if output.sae_features:
                found = merge(self._features.get(index), output.sae_features)
                self._features[index] = found or {}
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
            yield self._annotated(chunk)

    def _annotated(self, chunk: str) -> str:
        if not (self._features or self._prompt) or not chunk.startswith(_DATA):
            return chunk
        content = json.loads(chunk.removeprefix("data: "))
        for choice in content.get("choices") or ():
            index = choice.get("index")
            prompt = self._prompt.pop(index, None)
            if prompt is not None:
                choice[PROMPT_FEATURES] = features_json(prompt)
            features = self._features.pop(index, None)
            if features is not None:
                choice[FEATURES] = features_json(features)
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def fill_choices(choices: Iterable[object], results: Iterable[RequestOutput]) -> None:
    """Add what was read to the choices of a whole answer.

    Args:
        choices: those of the first result, then of the next one.
        results: one for each prompt.
    """
    outputs = ((result, output) for result in results for output in result.outputs)
    for choice, (result, output) in zip(choices, outputs, strict=False):
        prompt = result.prompt_sae_features if output is result.outputs[0] else None
        put(choice, output.sae_features or {}, prompt)


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
    """What one Responses API request has read, over all its turns."""

    def __init__(self) -> None:
        self.features: ReadFeatures = {}
        self.prompt: ReadFeatures = {}
        self.fresh: ReadFeatures = {}

    def take(self, result: RequestOutput) -> None:
        """Note a result: a delta, or a whole turn."""
        features = result.outputs[0].sae_features
        self.features = merge(self.features, features) or {}
        self.fresh = merge(self.fresh, features) or {}
        self.prompt = merge(self.prompt, result.prompt_sae_features) or {}

    async def annotate(
        self, events: AsyncIterator[StreamingResponsesResponse]
    ) -> AsyncIterator[StreamingResponsesResponse]:
        """A stream's events, text deltas with what has been read since the last."""
        async for event in events:
            if event.type in _TEXT_DELTAS and self.fresh:
                setattr(event, FEATURES, features_json(self.fresh))
                self.fresh = {}
            yield event

    def finish(self, response: object) -> None:
        """Add all that was read to the response."""
        put(response, self.features, self.prompt)
