# SPDX-License-Identifier: Apache-2.0
"""Thousands of odd bodies to every route of a real server, beside a good client."""

from __future__ import annotations

import asyncio
import base64
import random
import shutil
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from soak.over_http import tracebacks
from steering_testing.golden_gate import (
    DELTA,
    EXAMPLE,
    FULL,
    MESSAGES,
    MODULE,
    READOUT,
    VECTORS,
    example_server,
)
from steering_testing.mutations import mutated
from steering_testing.server import MODEL_NAME, Server

pytestmark = [pytest.mark.server, pytest.mark.slow]

CLIENTS, SECONDS = 8, 60.0
LATEST_S = 20.0  # of a good answer, on a busy machine
CLAMP = {"feature_idx": 457, "kind": "absolute", "value": 9.4}
WHEN = {**CLAMP, "when": {"feature_idx": 3, "above": 0.5}, "only_if_active": False}
VECTOR = base64.b64encode(struct.pack("<96f", *[1.0] * 96)).decode()
SPECS: dict[str, list[dict[str, Any]]] = {
    FULL: [{"module_name": MODULE, "clamps": [CLAMP], "phase": "both"}],
    DELTA: [
        {
            "module_name": MODULE,
            "clamps": {"post_block": {"1": [WHEN]}},
            "spans": [
                {"of": "generated", "start": 0, "stop": 5},
                {"of": "prompt", "start": -2},
            ],
        }
    ],
    VECTORS: [
        {"vector": VECTOR, "layer": 1, "hook": "post_block", "scale": 0.5},
    ],
    READOUT: [
        {
            "module_name": MODULE,
            "top_k": 4,
            "sites": {"post_block": [1]},
            "stop_if": [{"feature_idx": 1, "above": 1e9}],
        }
    ],
}
OPTIONS: list[dict[str, Any]] = [
    *({}, {"n": 3, "temperature": 1.0}, {"logprobs": 3}, {"prompt_logprobs": 1}),
    *({"echo": True}, {"use_beam_search": True, "n": 2}, {"stop": ["the"]}),
    *({"min_tokens": 3}, {"logit_bias": {"5": 3}}, {"bad_words": ["the"]}),
    *({"vllm_xargs": {"x": 1}}, {"cache_salt": "x"}, {"truncate_prompt_tokens": 2}),
]
GOOD = {
    "model": MODEL_NAME,
    "prompt": "the chef",
    "max_tokens": 16,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
    "steering_preset": None,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("root").resolve()
    shutil.copytree(EXAMPLE / "sae", root / "sae")
    steering = {
        "modules": {MODULE: str(root / "sae")},
        "module_roots": [str(root)],
        "inline_vectors": {"post_block.1": 2},
        "presets": {"calm": {DELTA: [{"module_name": MODULE, "clamps": [CLAMP]}]}},
    }
    options = ("--steering-api-key", "the-key", "--enable-scale-out")
    with example_server(root / "log", *options, steering=steering) as running:
        yield running
        assert tracebacks(running.log) == []


class BadClients:
    """Clients that send odd bodies, and some of which leave early.

    Attributes:
        statuses: how often each status was answered.
        failed: what was answered with an error of the server's own.
    """

    def __init__(self, url: str, seed: int):
        self.url = url
        self.rng = random.Random(seed)
        self.statuses: Counter[object] = Counter()
        self.failed: list[tuple[str, bytes, str]] = []

    def call(self) -> tuple[str, str, dict[str, Any]]:
        """Method, path and a good body."""
        rng = self.rng
        specs = {key: SPECS[key] for key in rng.sample(list(SPECS), rng.randint(1, 3))}
        steered = {"model": MODEL_NAME, **specs, **rng.choice(OPTIONS)}
        chat = {"messages": MESSAGES, "max_tokens": 4}
        only = {"model": MODEL_NAME, **specs}
        named = {"name": "hot", "path": "/x", "replace": True, "norm_guard": 2.0}
        encode = {"module_name": MODULE, "input": ["a b", "c"], "top_k": 3}
        generate = {"token_ids": [5, 9], "sampling_params": {"extra_args": specs}}
        prompt = rng.choice(["the chef", ["a", "b the"], [5, 9, 3], [[5], [9, 3]]])
        completion = {"prompt": prompt, "max_tokens": rng.choice((1, 8))}
        calls: list[tuple[str, str, dict[str, Any]]] = [
            *[("POST", "/v1/completions", {**steered, **completion})] * 4,
            *[("POST", "/v1/chat/completions", {**only, **chat})] * 2,
            ("POST", "/v1/chat/completions/batch", {**only, "messages": [MESSAGES]}),
            ("POST", "/v1/responses", {**only, "input": "a", "max_output_tokens": 4}),
            ("POST", "/v1/messages", {**only, **chat}),
            ("POST", "/inference/v1/generate", generate),
            ("POST", "/v1/steering/encode", encode),
            ("POST", "/v1/steering/modules", named),
            ("PUT", f"/v1/steering/presets/p{rng.randrange(3)}", {**specs}),
            ("PUT", "/v1/steering/default_preset", {"preset": None}),
            ("DELETE", "/v1/steering/presets/p1", {}),
            ("DELETE", "/v1/steering/modules/a%0a", {}),
        ]
        return rng.choice(calls)

    async def ask(self, client: httpx.AsyncClient) -> None:
        rng = self.rng
        method, path, body = self.call()
        streams = path in ("/v1/completions", "/v1/chat/completions", "/v1/responses")
        if streams and rng.random() < 0.35:
            body["stream"] = True
        roots = ("",) if "steering/" in path else ("sae_", "steering", "sampling")
        data = mutated(rng, body, *roots)
        lines = rng.choice((0, 1, 999))
        limit = rng.choice((0.01, 0.2)) if rng.random() < 0.1 else 60
        text = ""
        status: object = "left"
        try:
            async with client.stream(
                method,
                path,
                content=data,
                headers={
                    "Content-Type": "application/json",
                    "Authorization": "Bearer the-key",
                },
                timeout=limit,
            ) as answer:
                status = answer.status_code
                async for line in answer.aiter_lines():
                    text += line
                    lines -= 1
                    if body.get("stream") and lines < 0:
                        break
        except httpx.TransportError:
            pass
        self.statuses[status] += 1
        if status in (500, 502, 503) or "InternalServerError" in text:
            self.failed.append((path, data[:2000], text[:500]))

    async def run(self, until: float) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)

        async def one(client: httpx.AsyncClient) -> None:
            while time.monotonic() < until:
                await self.ask(client)

        async with httpx.AsyncClient(base_url=self.url, limits=limits) as client:
            await asyncio.gather(*(one(client) for _ in range(CLIENTS)))


def test_no_body_fails_the_server_or_changes_a_good_answer(server: Server) -> None:
    goods = [GOOD, *({**GOOD, key: SPECS[key]} for key in (FULL, DELTA, READOUT))]
    bad = BadClients(server.url, seed=3)
    until = time.monotonic() + SECONDS
    with httpx.Client(base_url=server.url, timeout=120) as http:

        def tokens(body: dict[str, Any]) -> list[int]:
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["token_ids"]

        expected = [tokens(body) for body in goods]
        thread = threading.Thread(target=lambda: asyncio.run(bad.run(until)))
        thread.start()
        times = []
        while thread.is_alive():
            for body, wanted in zip(goods, expected, strict=True):
                begin = time.monotonic()
                assert tokens(body) == wanted
                times.append(time.monotonic() - begin)
        thread.join()
        assert max(times) < LATEST_S
        assert bad.failed == []
        assert bad.statuses[200] > 50 and bad.statuses[400] > 200
        deadline = time.monotonic() + 30
        while sum(http.get("/v1/steering/modules").json()["rows_in_use"].values()):
            assert time.monotonic() < deadline
            time.sleep(0.2)
