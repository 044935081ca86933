# SPDX-License-Identifier: Apache-2.0
"""The routes on an app of their own, over an engine in this process."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from steering_testing import models
from steering_testing.engine import TRACED, engine, save_sae
from steering_testing.reference import random_sae

from vllm import LLM
from vllm.entrypoints.serve.steering import SteeringEndpoints

KEY = "a-key-for-tests"
SITE = (1, "post_block")
SPARE = [{"layer": 1, "hook": "resid_post", "width": 96}]
URL = "/v1/steering/modules"


class InProcessEngine:
    """An `LLM` as the asynchronous client that the routes talk to."""

    def __init__(self, llm: LLM):
        self.llm = llm
        self.vllm_config = llm.llm_engine.vllm_config

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> Any:
        return self.llm.collective_rpc(method, timeout, args, kwargs)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module root with the SAEs `good`, `other`, `wide` and the broken `nan`."""
    root = tmp_path_factory.mktemp("root").resolve()
    for seed, (name, width) in enumerate((("good", 96), ("other", 64), ("wide", 200))):
        sae = random_sae(width, models.HIDDEN, "jumprelu", seed)
        save_sae(root / name, {SITE: sae})
    bad = random_sae(64, models.HIDDEN, "jumprelu", 3)
    bad.W_enc[1, 2] = float("nan")
    save_sae(root / "nan", {SITE: bad})
    return root


@pytest.fixture(scope="module")
def llm(model_root: Path, root: Path) -> Iterator[LLM]:
    steering = {"spare": SPARE, "module_roots": [str(root)]}
    modules = {"first": str(root / "other")}
    with engine("llama", model_root, modules, steering, **TRACED) as llm:
        yield llm


Serve = Callable[..., TestClient]


@pytest.fixture(scope="module")
def serve(llm: LLM) -> Serve:
    """Make a client of an app with the routes; `key=None` configures no key."""

    def make(key: str | None = KEY, sends: str | None = KEY) -> TestClient:
        endpoints = SteeringEndpoints()

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            args = Namespace(steering_api_key=key)
            await endpoints.init_state(InProcessEngine(llm), app.state, args)
            yield

        app = FastAPI(lifespan=lifespan)
        endpoints.attach_router(app)
        headers = {} if sends is None else {"Authorization": f"Bearer {sends}"}
        return TestClient(app, headers=headers, raise_server_exceptions=True)

    return make


@pytest.fixture(scope="module")
def client(serve: Serve) -> Iterator[TestClient]:
    """A client that holds the key."""
    with serve() as client:
        yield client
