# SPDX-License-Identifier: Apache-2.0
"""A server whose modules change over HTTP, and the calls that tests make to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from steering_testing import models
from steering_testing.engine import FULL, save_sae
from steering_testing.reference import random_sae
from steering_testing.server import MODEL_NAME, Server, api_server

KEY = {"Authorization": "Bearer the-key"}
MODULES = "/v1/steering/modules"


def save_modules(root: Path) -> Path:
    """The SAEs `one` and `two`, and `nan`, which no rank can load."""
    for seed, name in enumerate(("one", "two", "nan")):
        sae = random_sae(96, models.HIDDEN, "jumprelu", seed)
        if name == "nan":
            sae.W_enc[1, 2] = float("nan")
        save_sae(root / name, {(1, "post_block"): sae})
    return root


@contextmanager
def steering_server(
    model_root: Path,
    root: Path,
    log: Path,
    steering: dict[str, Any],
    *arguments: str,
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """A server that loads modules from `root` under the key of `KEY`."""
    length = 4096
    options = [
        "--max-model-len", str(length),
        "--hf-overrides", json.dumps({"max_position_embeddings": length}),
        "--max-num-seqs", "16", "--skip-tokenizer-init",
        "--steering-api-key", "the-key",
        "--additional-config",
        json.dumps({"steering": {**steering, "module_roots": [str(root)]}}),
    ]  # fmt: skip
    model = models.save("llama", model_root)
    environment = {"VLLM_PLUGINS": "steering", **(environment or {})}
    with api_server(
        model, log, *options, *arguments, environment=environment
    ) as server:
        yield server


def ask(
    url: str, module: str, max_tokens: int = 4, rank: int | None = None
) -> httpx.Response:
    """As `complete`, reconstructed with a module."""
    return complete(url, {FULL: [{"module_name": module}]}, max_tokens, rank)


def complete(
    url: str, fields: dict[str, Any], max_tokens: int = 4, rank: int | None = None
) -> httpx.Response:
    """A completion over a connection of its own.

    Args:
        url: of the server; any of its processes may get the request.
        fields: of the body, beside the usual ones.
        max_tokens: to generate.
        rank: the data-parallel rank that answers; None: any.
    """
    body: dict[str, Any] = {
        "model": MODEL_NAME,
        "prompt": [5, 6, 7, 8],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "detokenize": False,
        **fields,
    }
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=300)


def tokens(response: httpx.Response) -> list[int]:
    """The generated ids of an answer."""
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def register(url: str, root: Path, **more: Any) -> httpx.Response:
    """Register `root / "one"` as the module `hot`, with fields replaced."""
    body = {"name": "hot", "path": str(root / "one"), **more}
    return httpx.post(url + MODULES, json=body, headers=KEY, timeout=300)


def remove(url: str, query: str = "") -> httpx.Response:
    """Remove the module `hot`."""
    return httpx.delete(f"{url}{MODULES}/hot{query}", headers=KEY, timeout=300)
