# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/steering/encode`: features by token for texts, with no text generated."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

import msgspec

from vllm.config.sae_features import features_json
from vllm.config.sae_readout_specs import DEFAULT_TOP_K, Features, ReadLayers, TopK
from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.config.steering_json import Json, JsonView
from vllm.config.steering_reader import Reader, expects, json_schema
from vllm.entrypoints.serve.steering.access import RequestRefused
from vllm.entrypoints.serve.steering.protocol import read_body_as
from vllm.entrypoints.steering.pieces import token_pieces
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.tokenizers import TokenizerLike

MAX_TEXTS = 64

Text = Annotated[str, expects("a text", min_length=1)]
Texts = Annotated[
    list[Text],
    expects(f"1 to {MAX_TEXTS} texts", min_length=1, max_length=MAX_TEXTS),
]
Messages = Annotated[
    list[Json],
    expects("null or a list of chat messages", min_length=1, max_length=1024),
]


class EncodeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to read: one of `input` and `messages`, and how, as in a readout spec."""

    module_name: str
    input: Text | Texts | None = None
    messages: Messages | None = None
    sites: dict[str, ReadLayers] | None = None
    top_k: TopK | None = None
    features: Features | None = None
    model: str | None = None

    @property
    def spec(self) -> Json:
        """The readout spec of the request."""
        top_k = self.top_k
        if top_k is None and self.features is None:
            top_k = DEFAULT_TOP_K
        return {
            "module_name": self.module_name,
            "sites": self.sites,
            "top_k": top_k,
            "features": self.features,
            "phase": "prefill",
        }


_READER = Reader(EncodeRequest)
ENCODE_SCHEMA = json_schema(EncodeRequest)


def parse_encode(body: bytes) -> EncodeRequest:
    """Parse a body.

    Raises:
        RequestRefused: 400, naming the field, what was found and what is accepted.
    """
    request = read_body_as(_READER, body)
    if (request.input is None) == (request.messages is None):
        has = "neither" if request.input is None else "both"
        raise RequestRefused(
            400, f"input: found {has} of input and messages, expected one", "input"
        )
    return request


class GeneratingEngine(Protocol):
    """The part of `EngineClient` that is used."""

    def generate(
        self, prompt: TokensPrompt, sampling_params: SamplingParams, request_id: str
    ) -> AsyncIterator[RequestOutput]: ...

    def get_tokenizer(self) -> TokenizerLike | None: ...


@dataclass
class EncodeService:
    """Reads features of texts on the server's engine."""

    engine: GeneratingEngine

    async def encode(self, request: EncodeRequest) -> Json:
        """The answer's body.

        Raises:
            RequestRefused: 400 for a bad spec, or a text that the model cannot read.
        """
        tokenizer = self.engine.get_tokenizer()
        if tokenizer is None:
            raise RequestRefused(409, "this server has no tokenizer")
        prompts = _prompts(request, tokenizer)
        reads = [asyncio.create_task(self._read(ids, request.spec)) for ids in prompts]
        try:
            outputs = await asyncio.gather(*reads)
        except VLLMValidationError as error:
            raise _refused(error) from None
        except ValueError as error:
            raise RequestRefused(400, f"input: {error}", "input") from None
        finally:
            # Ends what is left in the engine after an error, or without a caller.
            for read in reads:
                read.cancel()
        total = sum(map(len, prompts))
        return {
            "object": "list",
            "module_name": request.module_name,
            "data": [
                _entry(index, ids, output, request.module_name, tokenizer)
                for index, (ids, output) in enumerate(
                    zip(prompts, outputs, strict=True)
                )
            ],
            "usage": {"prompt_tokens": total, "total_tokens": total},
        }

    async def _read(self, ids: Sequence[int], spec: JsonView) -> RequestOutput:
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            extra_args={READOUT_KEY: [dict(spec)]},
        )
        last = None
        request_id = f"steering-encode-{uuid.uuid4().hex}"
        prompt = TokensPrompt(prompt_token_ids=list(ids))
        async for output in self.engine.generate(prompt, params, request_id):
            last = output
        assert last is not None, "the engine gave no output"
        return last


def listed_features(answer: JsonView) -> list[int]:
    """The features that an answer lists, each once, ascending."""
    return sorted(
        {
            feature
            for entry in answer["data"]
            for record in entry["sae_features"].values()
            for features in record["features"]
            for feature in features
        }
    )


def _refused(error: VLLMValidationError) -> RequestRefused:
    """The engine's refusal, with the path of the field in this route's body."""
    inside = f"{READOUT_KEY}[0]"
    path, message = error.parameter or "", error.args[0]
    if not path.startswith(inside):
        return RequestRefused(400, f"input: {message}", "input")
    path = path.removeprefix(inside).lstrip(".") or "top_k"
    message = message.replace(f"{inside}.", "").removeprefix(f"{inside}: ")
    return RequestRefused(400, message, path)


def _prompts(request: EncodeRequest, tokenizer: TokenizerLike) -> list[list[int]]:
    """The token ids of each text, with the tokenizer's own special tokens."""
    if request.messages is not None:
        try:
            ids = tokenizer.apply_chat_template(
                request.messages, tokenize=True, return_dict=False
            )
        except Exception as error:  # a template may raise any error
            raise RequestRefused(400, f"messages: {error}", "messages") from None
        return [list(ids)]
    texts = [request.input] if isinstance(request.input, str) else request.input
    return [list(tokenizer(text).input_ids) for text in texts or ()]


def _entry(
    index: int,
    ids: list[int],
    output: RequestOutput,
    module: str,
    tokenizer: TokenizerLike,
) -> Json:
    found = features_json(output.prompt_sae_features or {})
    return {
        "index": index,
        "token_ids": ids,
        "tokens": token_pieces(tokenizer, ids),
        "sae_features": found.get(module, {}),
    }
