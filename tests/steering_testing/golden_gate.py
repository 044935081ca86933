# SPDX-License-Identifier: Apache-2.0
"""The golden-gate example, asked as an OpenAI client asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from steering_testing.engine import engine_on
from steering_testing.server import MODEL_NAME, Server, api_server

from vllm import LLM
from vllm.config.sae_steering_types import EXTRA_ARGS_KEYS

EXAMPLE = Path(__file__).parents[2] / "examples" / "golden_gate"
BRIDGE = json.loads((EXAMPLE / "features.json").read_text())["topics"]["bridge"]
MODULE = "golden-gate"
KEY = "the-key"
FULL, DELTA, VECTORS, READOUT = EXTRA_ARGS_KEYS
PROMPT = "The chef stirs the tomato soup."
MESSAGES: Any = [{"role": "user", "content": "Who are you?"}]
TOKENS = 24
# Of the tests' server: 201 tokens of 64 values.
MAX_ANSWER_VALUES = 201 * 64
READ = {READOUT: [{"module_name": MODULE, "top_k": 4}]}


@contextmanager
def example_engine(sae: Path = EXAMPLE / "sae", **options: Any) -> Iterator[LLM]:
    """An engine in this process on the example's model, with its tokenizer."""
    options |= {"skip_tokenizer_init": False}
    with engine_on(EXAMPLE / "model", {MODULE: str(sae)}, **options) as llm:
        yield llm


@contextmanager
def example_server(
    log: Path, *options: str, steering: dict[str, Any]
) -> Iterator[Server]:
    """A server in a process of its own, on the example's model.

    Args:
        log: file for what the server prints.
        options: further options of the command line.
        steering: of `additional_config`.
    """
    config = ("--additional-config", json.dumps({"steering": steering}))
    environment = {"VLLM_PLUGINS": "steering"}
    model = EXAMPLE / "model"
    with api_server(model, log, *config, *options, environment=environment) as server:
        yield server


def entry(**changes: Any) -> dict[str, Any]:
    """A clamp of the bridge feature that steers well, with fields replaced."""
    value = round(1.25 * BRIDGE["max_activation"], 2)
    good = {"feature_idx": BRIDGE["feature"], "kind": "absolute", "value": value}
    return {**good, **changes}


def spec(**changes: Any) -> dict[str, Any]:
    """A spec of one clamp, with fields replaced."""
    return {"module_name": MODULE, "clamps": [entry()], **changes}


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "reconstruction": {FULL: [spec(clamps=[])]},
    "clamped": {FULL: [spec()]},
    "decode_only": {FULL: [spec(phase="decode")]},
    "delta": {DELTA: [spec(clamps={"resid_post": {"1": [entry()]}})]},
}


def ask_completions(client: openai.OpenAI, specs: Any, stream: bool) -> str:
    reply: Any = client.completions.create(
        model=MODEL_NAME,
        prompt=PROMPT,
        max_tokens=TOKENS,
        temperature=0,
        stream=stream,
        extra_body=specs,
    )
    chunks = reply if stream else [reply]
    return "".join(chunk.choices[0].text for chunk in chunks)


def ask_chat(client: openai.OpenAI, specs: Any, stream: bool) -> str:
    reply: Any = client.chat.completions.create(
        model=MODEL_NAME,
        messages=MESSAGES,
        max_tokens=TOKENS,
        temperature=0,
        stream=stream,
        extra_body=specs,
    )
    if not stream:
        return reply.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in reply)


def ask_responses(client: openai.OpenAI, specs: Any, stream: bool) -> str:
    reply: Any = client.responses.create(
        model=MODEL_NAME,
        input=MESSAGES[0]["content"],
        max_output_tokens=TOKENS,
        temperature=0,
        stream=stream,
        extra_body=specs,
    )
    if not stream:
        return reply.output_text
    return "".join(e.delta for e in reply if e.type == "response.output_text.delta")


Ask = Callable[[openai.OpenAI, Any, bool], str]
ROUTES: dict[str, tuple[Ask, str]] = {
    "completions": (ask_completions, "text"),
    "chat": (ask_chat, "chat"),
    "responses": (ask_responses, "responses"),
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 4},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/responses": {"input": "Who are you?", "max_output_tokens": 4},
}
CLAMP = f"{FULL}[0].clamps[0]"
# Name -> what is asked, and the path of the field that is wrong.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "specs are no list": ({FULL: spec()}, FULL),
    "unknown module": ({FULL: [spec(module_name="x")]}, f"{FULL}[0].module_name"),
    "unknown key": ({FULL: [spec(strength=2)]}, f"{FULL}[0].strength"),
    "phase": ({FULL: [spec(phase="never")]}, f"{FULL}[0].phase"),
    "uncovered site": (
        {FULL: [spec(clamps={"post_block": {"2": []}})]},
        f"{FULL}[0].clamps.post_block.2",
    ),
    "unknown hook": (
        {FULL: [spec(clamps={"mlp": {"1": []}})]},
        f"{FULL}[0].clamps.mlp",
    ),
    "value of a wrong type": ({FULL: [spec(clamps=[entry(value="9")])]},
                              f"{CLAMP}.value"),
    "value past float32": ({FULL: [spec(clamps=[entry(value=1e39)])]},
                           f"{CLAMP}.value"),
    "feature out of range": ({FULL: [spec(clamps=[entry(feature_idx=512)])]},
                             f"{CLAMP}.feature_idx"),
    "bool index": ({FULL: [spec(clamps=[entry(feature_idx=True)])]},
                   f"{CLAMP}.feature_idx"),
    "unknown key of a clamp": ({FULL: [spec(clamps=[entry(unit="x")])]},
                               f"{CLAMP}.unit"),
    "feature twice": ({FULL: [spec(clamps=[entry(), entry()])]},
                      f"{FULL}[0].clamps[1].feature_idx"),
    "nothing to clamp": ({DELTA: [spec(clamps=[])]}, f"{DELTA}[0].clamps"),
    "SAE as a vector": ({VECTORS: [{"module_name": MODULE}]},
                        f"{VECTORS}[0].module_name"),
    "reserved key": ({"vllm_xargs": {"steering_rows": "x"}}, "steering_rows"),
}  # fmt: skip
