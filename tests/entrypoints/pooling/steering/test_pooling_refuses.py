# SPDX-License-Identifier: Apache-2.0
"""Pooling requests cannot be steered; every route and surface says so."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from steering_testing.engine import FULL, engine

import vllm.plugins.steering as plugin
from vllm import PoolingParams
from vllm.config.sae_steering_specs import EXTRA_ARGS_KEYS
from vllm.exceptions import VLLMValidationError

plugin.install_front_end_seams()

from vllm.entrypoints.pooling.classify.api_router import router as classify  # noqa: E402
from vllm.entrypoints.pooling.embed.api_router import router as embed  # noqa: E402
from vllm.entrypoints.pooling.pooling.api_router import router as pooling  # noqa: E402
from vllm.entrypoints.pooling.scoring.api_router import router as scoring  # noqa: E402
from vllm.entrypoints.serve.exception_handling.register import (  # noqa: E402
    init_exception_handler,
)

MESSAGES = [{"role": "user", "content": "hi"}]
SPECS = [{"module_name": "m"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/pooling", {"model": "m", "input": "hi"}),
    ("/pooling", {"model": "m", "messages": MESSAGES}),
    ("/pooling", {"model": "m", "data": {"any": 1}}),
    ("/classify", {"model": "m", "input": "hi"}),
    ("/classify", {"model": "m", "messages": MESSAGES}),
    ("/v1/embeddings", {"model": "m", "input": "hi"}),
    ("/v1/embeddings", {"model": "m", "messages": MESSAGES}),
    ("/v1/embeddings", {"model": "m", "messages": [MESSAGES]}),
    ("/v1/embeddings", {"model": "m", "input": MESSAGES}),
    ("/v1/embeddings", {"model": "m", "input": [MESSAGES]}),
    ("/v2/embed", {"model": "m", "texts": ["hi"]}),
    ("/score", {"model": "m", "text_1": "a", "text_2": "b"}),
    ("/score", {"model": "m", "data_1": "a", "data_2": "b"}),
    ("/v1/score", {"model": "m", "queries": "a", "documents": "b"}),
    ("/v1/score", {"model": "m", "queries": "a", "items": "b"}),
    ("/rerank", {"model": "m", "query": "a", "documents": ["b"]}),
    ("/v1/rerank", {"model": "m", "query": "a", "documents": ["b"]}),
    ("/v2/rerank", {"model": "m", "query": "a", "documents": ["b"]}),
]


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    init_exception_handler(app)
    app.state.args = Namespace(log_error_stack=False)
    app.state.enable_server_load_tracking = False
    for router in (pooling, classify, embed, scoring):
        app.include_router(router)
    routes = {r for r, methods in app.openapi()["paths"].items() if "post" in methods}
    assert routes == {route for route, _ in BODIES}, "a pooling route is not covered"
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize("key", EXTRA_ARGS_KEYS)
@pytest.mark.parametrize(("route", "body"), BODIES)
def test_every_pooling_route_refuses_the_fields_with_400(
    client: TestClient, route: str, body: dict[str, Any], key: str
) -> None:
    response = client.post(route, json={**body, key: SPECS})
    assert response.status_code == 400, response.text
    error = response.json()["error"]["message"]
    assert key in error
    assert "does not support steering" in error


@pytest.mark.engine
def test_specs_in_pooling_parameters_are_refused(model_root: Path) -> None:
    # A pooling engine wants some tokenizer.
    tokenizer = Path(__file__).parents[4] / "examples/golden_gate/model"
    options: dict[str, Any] = {
        "runner": "pooling",
        "convert": "embed",
        "skip_tokenizer_init": False,
    }
    options["tokenizer"] = str(tokenizer)
    with engine("llama", model_root, None, **options) as llm:
        prompt, core = {"prompt_token_ids": [1, 5, 6]}, llm.llm_engine
        steered = PoolingParams(task="embed", extra_kwargs={FULL: SPECS})
        with pytest.raises(VLLMValidationError, match=f"extra_kwargs.{FULL}"):
            core.add_request("steered", prompt, steered)
        other = PoolingParams(task="embed", extra_kwargs={"mine": 1})
        core.add_request("other", prompt, other)
        [output] = core.step()
        assert output.request_id == "other"
        assert output.outputs.data.shape == (64,)
