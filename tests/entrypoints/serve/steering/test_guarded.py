# SPDX-License-Identifier: Apache-2.0
"""`--api-key` guards every route of the plugin but the page, which holds no data."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.routing import Route

from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.steering import SteeringEndpoints


def guarded_app() -> FastAPI:
    """The plugin's routes behind vLLM's own middleware, over no engine."""
    app = FastAPI(openapi_url=None)
    SteeringEndpoints().attach_router(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["the-key"])
    return app


def test_no_route_answers_without_the_key() -> None:
    app = guarded_app()
    client = TestClient(app, raise_server_exceptions=False)
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert len(routes) > 8
    for route in routes:
        path = route.path.replace("{name}", "sea")
        for method in route.methods:
            for headers in ({}, {"X-Steering-Authorization": "Bearer the-key"}):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 401, (method, path)
            # With the key the route is reached, and misses its body or its engine.
            key = {"Authorization": "Bearer the-key"}
            assert client.request(method, path, headers=key).status_code in (400, 500)


def test_only_the_page_needs_no_key() -> None:
    app = guarded_app()
    others = [r.path for r in app.routes if not isinstance(r, APIRoute | Route)]
    assert others == ["/steering"]
    assert TestClient(app).get("/steering/").status_code == 200
