# SPDX-License-Identifier: Apache-2.0
"""Seams into the request models of all other generation routes, which refuse steering.

The edit a branch would make, in each class of `REFUSING`: declare the steering fields
with a validator that refuses them. Without it vLLM drops unknown fields, and a client
would take unsteered text for steered text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator

from vllm.plugins.steering.seam import BOUND, Stock, resolve, wrap

_HINT = "use /v1/completions, /v1/chat/completions or /v1/responses"
_SPEECH = "vllm.entrypoints.speech_to_text"
_GENERATE = "vllm.entrypoints.scale_out.token_in_token_out.protocol"
_BATCH = "vllm.entrypoints.launchers.run_batch"
_REALTIME = f"{_SPEECH}.realtime.connection"
_POOLING = "vllm.entrypoints.pooling"


class Refusing(NamedTuple):
    """A request model whose route cannot carry steering."""

    module: str
    model: str
    route: str
    hint: str = _HINT


REFUSING = (
    Refusing(
        "vllm.entrypoints.anthropic.protocol",
        "AnthropicMessagesRequest",
        "/v1/messages",
    ),
    Refusing(
        "vllm.entrypoints.cohere.protocol", "CohereChatV2Request", "/cohere/v2/chat"
    ),
    Refusing(
        _GENERATE,
        "GenerateRequest",
        "the top level of /inference/v1/generate",
        "put the specs into sampling_params.extra_args",
    ),
    Refusing(
        f"{_SPEECH}.transcription.protocol",
        "TranscriptionRequest",
        "/v1/audio/transcriptions",
    ),
    Refusing(
        f"{_SPEECH}.translation.protocol",
        "TranslationRequest",
        "/v1/audio/translations",
    ),
    # The batch runner defines subclasses, which may exist before the seams.
    Refusing(_BATCH, "BatchTranscriptionRequest", "/v1/audio/transcriptions"),
    Refusing(_BATCH, "BatchTranslationRequest", "/v1/audio/translations"),
    Refusing(
        "vllm.entrypoints.generate.structured_decisions.protocol",
        "StructuredDecisionRequest",
        "/v1/systemone",
    ),
    Refusing(
        "vllm.entrypoints.generate.generative_scoring.serving",
        "GenerativeScoringRequest",
        "/generative_scoring",
    ),
    *(
        Refusing(f"{_POOLING}.{module}.protocol", model, route)
        for module, route, models in (
            (
                "pooling",
                "/pooling",
                (
                    "PoolingCompletionRequest",
                    "PoolingChatRequest",
                    "IOProcessorRequest",
                ),
            ),
            (
                "classify",
                "/classify",
                ("ClassificationCompletionRequest", "ClassificationChatRequest"),
            ),
            (
                "scoring",
                "/score",
                (
                    "ScoreQueriesDocumentsRequest",
                    "ScoreQueriesItemsRequest",
                    "ScoreDataRequest",
                    "ScoreTextRequest",
                ),
            ),
            ("scoring", "/rerank", ("RerankRequest",)),
            (
                "embed",
                "/v1/embeddings",
                (
                    "EmbeddingCompletionRequest",
                    "EmbeddingChatRequest",
                    "EmbeddingBatchChatRequest",
                    "EmbeddingChatInputRequest",
                    "EmbeddingBatchChatInputRequest",
                ),
            ),
            ("embed", "/v2/embed", ("CohereEmbedRequest",)),
        )
        for model in models
    ),
)


def installers() -> list[tuple[str, Callable[[], None]]]:
    """Stock module and installer of every refusing route."""
    found: list[tuple[str, Callable[[], None]]] = []
    for module in dict.fromkeys(entry.module for entry in REFUSING):
        found.append((module, _Installer(module)))
    found.append((_GENERATE, install_generate_sampling_params))
    found.append((_REALTIME, install_realtime))
    return found


@dataclass(frozen=True)
class _Installer:
    """Refuses steering in the models of one stock module; compares by module."""

    module: str

    def __call__(self) -> None:
        from vllm.entrypoints.openai.steering.request_fields import refuse_fields

        for entry in REFUSING:
            target = f"{entry.module}:{entry.model}"
            if entry.module == self.module and target not in BOUND:
                _, _, model = resolve(target)
                refuse_fields(model, entry.route, entry.hint)
                BOUND[target] = model


def install_generate_sampling_params() -> None:
    """`/inference/v1/generate`: specs beside `extra_args` would be dropped."""
    from vllm.entrypoints.openai.steering.request_fields import (
        refuse_specs_beside_extra_args,
    )

    target = f"{_GENERATE}:GenerateRequest.model_fields"
    if target in BOUND:
        return
    _, _, model = resolve(f"{_GENERATE}:GenerateRequest")
    field = model.model_fields["sampling_params"]
    check = BeforeValidator(refuse_specs_beside_extra_args)
    model.__annotations__["sampling_params"] = Annotated[field.annotation, check]
    field.metadata.append(check)
    model.model_rebuild(force=True)
    BOUND[target] = model


def install_realtime() -> None:
    """`/v1/realtime`: refuse steering in any event."""
    wrap(
        f"{_REALTIME}:RealtimeConnection.handle_event",
        ("self", "event"),
        _make_handle_event,
    )


def _make_handle_event(stock: Stock) -> Stock:
    from vllm.entrypoints.openai.steering.request_fields import refuse_event_fields

    async def handle_event(self: object, event: object) -> None:
        refuse_event_fields(event)
        await stock(self, event)

    return handle_event
