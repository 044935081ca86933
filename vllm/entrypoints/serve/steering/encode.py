# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/steering/encode`: features by token for texts, with no text generated."""

from __future__ import annotations

import asyncio
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

import msgspec

from vllm.config.sae_features import FEATURES, features_json
from vllm.config.sae_readout_specs import (
    DEFAULT_TOP_K,
    Features,
    ReadSites,
    TopK,
    check_prompt_values,
)
from vllm.config.sae_steering_parser import parse_steering_request
from vllm.config.sae_steering_presets import opt_out
from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.config.steering import SteeringConfig
from vllm.config.steering_checks import ModuleChangedError, listing, shown
from vllm.config.steering_json import Json, JsonView
from vllm.config.steering_reader import Reader, expects, json_schema
from vllm.config.steering_shutdown import shutdown_has_ended
from vllm.entrypoints.serve.steering.access import RequestRefused
from vllm.entrypoints.serve.steering.protocol import read_body_as
from vllm.entrypoints.steering.pieces import token_pieces
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.outputs import RequestOutput
    from vllm.tokenizers import TokenizerLike

MAX_TEXTS = 64
STOPPED_POLL_S = 1.0
ENDED = (
    "the engine ended this call before it had read the texts: it is shutting down or "
    "paused"
)
PIECES_AT_ONCE = 128  # tokens that are decoded before others have their turn

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
    sites: ReadSites | None = None
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

    vllm_config: VllmConfig

    def generate(
        self, prompt: TokensPrompt, sampling_params: SamplingParams, request_id: str
    ) -> AsyncIterator[RequestOutput]: ...

    def get_tokenizer(self) -> TokenizerLike | None: ...


@dataclass
class EncodeService:
    """Reads features of texts on the server's engine.

    Attributes:
        names: those that the server's model goes by; an adapter cannot be read.
    """

    engine: GeneratingEngine
    names: Sequence[str]

    async def encode(self, request: EncodeRequest, config: SteeringConfig) -> Json:
        """The answer's body.

        Args:
            config: of the engine.

        Raises:
            RequestRefused: 400 for a bad spec, or a text that the model cannot read;
                404 for another model; 409 without a tokenizer; 503 when the engine
                ends the request.
        """
        if request.model is not None and request.model not in self.names:
            accepted = listing(self.names)
            raise RequestRefused(
                404,
                f"model: found {shown(request.model)}, expected the model that this "
                f"server serves: {accepted}",
                "model",
            )
        tokenizer = self.engine.get_tokenizer()
        if tokenizer is None:
            raise RequestRefused(
                409,
                "this server has no tokenizer, expected one that was started without "
                "--skip-tokenizer-init",
            )
        # Not under the server's default preset, unless that is locked.
        specs = {**opt_out(config), READOUT_KEY: [request.spec]}
        prompts = _prompts(request, tokenizer)
        reads: list[asyncio.Task[RequestOutput]] = []
        try:
            self._check(request, prompts, specs, config)
            reads += [asyncio.create_task(self._read(ids, specs)) for ids in prompts]
            outputs = await self._unless_stopped(reads)
        except VLLMServerError:
            if shutdown_has_ended(self.engine.vllm_config) is None:
                raise
            raise RequestRefused(503, ENDED) from None
        except VLLMValidationError as error:
            raise _refused(error) from None
        except ValueError as error:
            raise RequestRefused(400, f"input: {error}", "input") from None
        finally:
            # Ends what is left in the engine after an error, or without a caller.
            for read in reads:
                read.cancel()
        return await _answer(request, prompts, outputs, tokenizer)

    def _check(
        self,
        request: EncodeRequest,
        prompts: Sequence[list[int]],
        specs: Json,
        config: SteeringConfig,
    ) -> None:
        """Refuse what the engine would refuse, and answers that are too long."""
        parsed = parse_steering_request(specs, config)
        reads = () if parsed is None else parsed.reads
        # One token is generated, because vLLM always generates.
        most = self.engine.vllm_config.model_config.max_model_len - 1
        single = request.messages is not None or isinstance(request.input, str)
        field = "input" if request.messages is None else "messages"
        for at, ids in enumerate(prompts):
            if not 1 <= len(ids) <= most:
                path = field if single else f"{field}[{at}]"
                raise RequestRefused(
                    400,
                    f"{path}: found {len(ids)} tokens, expected 1 to {most}, which is "
                    "max_model_len - 1",
                    field,
                )
        try:
            check_prompt_values(
                field, map(len, prompts), reads, config.max_answer_values
            )
        except VLLMValidationError as error:
            raise RequestRefused(400, error.args[0], field) from None

    async def _read(self, ids: Sequence[int], specs: JsonView) -> RequestOutput:
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            extra_args=dict(specs),
        )
        last = None
        request_id = f"steering-encode-{uuid.uuid4().hex}"
        prompt = TokensPrompt(prompt_token_ids=list(ids))
        async for output in self.engine.generate(prompt, params, request_id):
            last = output
        assert last is not None, "the engine gave no output"
        if last.outputs[0].finish_reason == "abort":
            raise RequestRefused(503, ENDED)
        return last

    async def _unless_stopped(
        self, reads: Sequence[asyncio.Task[RequestOutput]]
    ) -> list[RequestOutput]:
        """The outputs. vLLM never answers some requests of an engine that it stops."""
        waits: set[asyncio.Task[RequestOutput]] = set(reads)
        while waits:
            done, waits = await asyncio.wait(
                waits,
                timeout=STOPPED_POLL_S,
                return_when=asyncio.FIRST_EXCEPTION,
            )
            for read in done:
                read.result()  # raises
            if waits and shutdown_has_ended(self.engine.vllm_config):
                raise RequestRefused(503, ENDED)
        return [read.result() for read in reads]


def served_names(args: Namespace) -> list[str]:
    """The names of the model of a server that was started with these arguments."""
    given = vars(args)
    names = given.get("served_model_name") or given.get("model") or []
    return [names] if isinstance(names, str) else list(names)


def listed_features(answer: JsonView) -> list[int]:
    """The features that an answer lists, each once, ascending."""
    return sorted(
        {
            feature
            for entry in answer["data"]
            for record in entry[FEATURES].values()
            for features in record["features"]
            for feature in features
        }
    )


def _refused(error: VLLMValidationError) -> RequestRefused:
    """The engine's refusal, with the path of the field in this route's body."""
    inside = f"{READOUT_KEY}[0]"
    path, message = error.parameter or "", error.args[0]
    if isinstance(error, ModuleChangedError):
        return RequestRefused(409, message.replace(f"{inside}.", ""), "module_name")
    if not path.startswith(inside):
        return RequestRefused(400, f"input: {message}", "input")
    path = path.removeprefix(inside).lstrip(".") or "top_k"
    message = message.replace(f"{inside}.", "").removeprefix(f"{inside}: ")
    return RequestRefused(400, message, path)


def _prompts(request: EncodeRequest, tokenizer: TokenizerLike) -> list[list[int]]:
    """The token ids of each text, with the tokenizer's own special tokens."""
    if request.messages is not None:
        messages = [
            message_of(f"messages[{at}]", one)
            for at, one in enumerate(request.messages)
        ]
        try:
            ids = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=False
            )
        except Exception as error:  # a template may raise any error
            raise RequestRefused(400, f"messages: {error}", "messages") from None
        return [list(ids)]
    texts = [request.input] if isinstance(request.input, str) else request.input
    return [list(tokenizer(text).input_ids) for text in texts or ()]


def message_of(path: str, message: Json) -> Json:
    """A chat message as templates take it: its text parts are joined, as vLLM does.

    Raises:
        RequestRefused: 400, it has no role, or content that is no text.
    """
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise _no_message(f"{path}.role", role, "a string")
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise _no_message(f"{path}.content", content, "a text or a list of text parts")
    texts = []
    for at, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            where = f"{path}.content[{at}]"
            raise _no_message(
                where, part, 'a part such as {"type": "text", "text": ""}'
            )
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


def _no_message(path: str, value: object, accepted: str) -> RequestRefused:
    message = f"{path}: found {shown(value)}, expected {accepted}"
    return RequestRefused(400, message, "messages")


async def _pieces(tokenizer: TokenizerLike, ids: Sequence[int]) -> list[str]:
    """`token_pieces` of a text. Other requests get their turn meanwhile."""
    found: list[str] = []
    for at in range(0, len(ids), PIECES_AT_ONCE):
        # A piece depends on the token before it.
        first = max(at - 1, 0)
        part = token_pieces(tokenizer, ids[first : at + PIECES_AT_ONCE])
        found += part[at - first :]
        await asyncio.sleep(0)
    return found


async def _answer(
    request: EncodeRequest,
    prompts: Sequence[list[int]],
    outputs: Sequence[RequestOutput],
    tokenizer: TokenizerLike,
) -> Json:
    data = []
    for index, (ids, output) in enumerate(zip(prompts, outputs, strict=True)):
        found = output.prompt_sae_features or {}
        made = await asyncio.to_thread(features_json, found)
        data.append(
            {
                "index": index,
                "token_ids": ids,
                "tokens": await _pieces(tokenizer, ids),
                FEATURES: made.get(request.module_name, {}),
            }
        )
    total = sum(map(len, prompts))
    return {
        "object": "list",
        "module_name": request.module_name,
        "data": data,
        "usage": {"prompt_tokens": total, "total_tokens": total},
    }
