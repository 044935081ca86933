# SPDX-License-Identifier: Apache-2.0
"""`/v1/steering/modules`: list, register, replace and remove modules."""

from __future__ import annotations

import asyncio

from fastapi import Request
from fastapi.responses import JSONResponse

from vllm.config.steering_json import Json
from vllm.entrypoints.serve.steering.access import holds_key
from vllm.entrypoints.serve.steering.answers import FeaturesAnswer
from vllm.entrypoints.serve.steering.encode import (
    ENCODE_SCHEMA,
    EncodeService,
    listed_features,
    parse_encode,
)
from vllm.entrypoints.serve.steering.evidence import of_features, parse_indices
from vllm.entrypoints.serve.steering.openapi import asks, errors, takes
from vllm.entrypoints.serve.steering.protocol import (
    MAX_QUERY,
    REGISTER_SCHEMA,
    check_features,
    check_name,
    parse_count,
    parse_flag,
    parse_register,
    parse_words,
    site_of,
)
from vllm.entrypoints.serve.steering.routing import (
    caller_left,
    modules_of,
    modules_to_change,
    read_body,
    steering_router,
    while_connected,
)

router = steering_router()
LABELS_LIMIT = 1000
PATH = "/v1/steering/modules"


@router.get(PATH, responses=errors(409))
async def list_steering_modules(request: Request) -> JSONResponse:
    """Every module with its sites, memory and requests; free slots; rows in use.

    Needs no key. Only callers with the key are told where the files are.
    """
    listed = await modules_of(request).list()
    modules = [_for_caller(request, module) for module in listed["modules"]]
    return JSONResponse({**listed, "modules": modules})


@router.get(PATH + "/{name}", responses=errors(400, 404, 409))
async def show_steering_module(name: str, request: Request) -> JSONResponse:
    """One module, as the list shows it."""
    check_name(name)
    module = await modules_of(request).get(name)
    return JSONResponse({"module": _for_caller(request, module)})


@router.post(
    PATH,
    status_code=201,
    responses=errors(400, 401, 403, 404, 408, 409, 413, 500),
    openapi_extra=takes(REGISTER_SCHEMA),
)
async def register_steering_module(request: Request) -> JSONResponse:
    """Load a module, or replace one. Needs the steering key.

    `path` is absolute, or `hf:owner/repo[/sub/path][@revision]`, and lies under one of
    the server's `module_roots`. `replace` replaces a module of that name; `drain` waits
    up to ten minutes for the requests that use it. The other fields are the options
    that modules have at start-up. Answers 201 with the module.
    """
    service = modules_to_change(request)
    asked = parse_register(await read_body(request))
    module = await service.register(asked, lambda: caller_left(request))
    return JSONResponse({"module": module}, status_code=201)


@router.get(
    PATH + "/{name}/evidence",
    responses=errors(400, 404, 409),
    openapi_extra=asks(
        index=("At most 256 feature indices, such as 3,457.", {"type": "string"}),
        site=(
            "Whose features; the module's first site if left out.",
            {"type": "string"},
        ),
    ),
)
async def steering_module_evidence(name: str, request: Request) -> JSONResponse:
    """What the module's author measured: its card, and what is known of features."""
    service = modules_of(request)
    check_name(name)
    indices = parse_indices(request.query_params.get("index"))
    module = await service.get(name)
    check_features(module, indices)
    site = site_of(module, request.query_params.get("site"))
    found = await asyncio.to_thread(of_features, module["path"], indices, site)
    return JSONResponse({"module_name": name, "site": site, **found})


@router.delete(
    PATH + "/{name}",
    responses=errors(400, 401, 403, 404, 408, 409, 500),
    openapi_extra=asks(
        drain=(
            "Wait up to ten minutes for the requests that use the module.",
            {"type": "boolean", "default": False},
        )
    ),
)
async def unregister_steering_module(name: str, request: Request) -> JSONResponse:
    """Remove a module. Needs the steering key."""
    service = modules_to_change(request)
    check_name(name)
    drain = parse_flag("drain", request.query_params.get("drain"))
    await service.unregister(name, drain, lambda: caller_left(request))
    return JSONResponse({"name": name, "deleted": True})


@router.get(
    PATH + "/{name}/features",
    responses=errors(400, 404, 409),
    openapi_extra=asks(
        q=(
            "Words, all of which a label contains.",
            {"type": "string", "maxLength": MAX_QUERY},
        ),
        index=("A feature whose label is wanted.", {"type": "integer", "minimum": 0}),
        limit=(
            "At most so many features.",
            {"type": "integer", "default": 20, "minimum": 1, "maximum": LABELS_LIMIT},
        ),
    ),
)
async def search_features(name: str, request: Request) -> JSONResponse:
    """Labelled features of a module, by words of the label or by index."""
    service = modules_of(request)
    check_name(name)
    query = request.query_params
    found = await service.search_labels(
        name,
        parse_words("q", query.get("q")),
        parse_count("index", query.get("index"), None, 2**31 - 1),
        parse_count("limit", query.get("limit"), 20, LABELS_LIMIT, least=1) or 20,
    )
    listed = [{"feature_idx": feature, "label": label} for feature, label in found]
    return JSONResponse({"module_name": name, "features": listed})


@router.post(
    "/v1/steering/encode",
    responses=errors(400, 404, 408, 409, 413),
    openapi_extra=takes(ENCODE_SCHEMA),
)
async def encode_texts(request: Request) -> JSONResponse:
    """Features by token for texts or messages; nothing is generated.

    Needs no steering key: it changes nothing. `--api-key` guards it as it does
    completions.
    """
    asked = parse_encode(await read_body(request))
    config = await modules_of(request).config()
    service: EncodeService = request.app.state.steering_encode
    answer = await while_connected(request, service.encode(asked, config))
    # An answer may have a million numbers; other streams go on meanwhile.
    listed = await asyncio.to_thread(listed_features, answer)
    answer["labels"] = await modules_of(request).labels_among(asked.module_name, listed)
    return FeaturesAnswer(answer)


def _for_caller(request: Request, module: Json) -> Json:
    """A module as the caller may see it."""
    if holds_key(request.headers, request.app.state.steering_api_key):
        return module
    return {key: value for key, value in module.items() if key != "path"}
