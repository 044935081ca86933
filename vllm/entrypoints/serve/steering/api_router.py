# SPDX-License-Identifier: Apache-2.0
"""`/v1/steering/modules`: list, register, replace and remove modules."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from vllm.entrypoints.serve.steering.access import RequestRefused
from vllm.entrypoints.serve.steering.encode import ENCODE_SCHEMA, parse_encode
from vllm.entrypoints.serve.steering.evidence import of_features, parse_indices
from vllm.entrypoints.serve.steering.http import PATH_PREFIX, body, refused, service
from vllm.entrypoints.serve.steering.protocol import (
    REGISTER_SCHEMA,
    check_name,
    parse_count,
    parse_flag,
    parse_register,
)

router = APIRouter(tags=["steering"])
LABELS_LIMIT = 1000
PATH = f"{PATH_PREFIX}/modules"


@router.get(PATH)
async def list_steering_modules(request: Request) -> JSONResponse:
    """Every module with its sites, memory and requests; free slots; rows in use."""
    try:
        return JSONResponse(await service(request, mutation=False).list())
    except RequestRefused as error:
        return refused(error)


@router.post(
    PATH,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": REGISTER_SCHEMA}},
        }
    },
)
async def register_steering_module(request: Request) -> JSONResponse:
    """Load a module, or replace one.

    Body: `name`, `path`, and optionally `feature_units`, `skip_token_ids`,
    `norm_guard`, `sites`, `replace`, `drain`. Answers 201 with the module.
    """
    try:
        modules = service(request, mutation=True)
        asked = parse_register(await body(request))
        module = await modules.register(asked, request.is_disconnected)
    except RequestRefused as error:
        return refused(error)
    return JSONResponse({"module": module}, status_code=201)


@router.get(PATH + "/{name}/evidence")
async def steering_module_evidence(name: str, request: Request) -> JSONResponse:
    """What the module's author measured: its card, and the features in `?index=3,7`."""
    try:
        modules = service(request, mutation=False)
        check_name(name)
        indices = parse_indices(request.query_params.get("index"))
        path = await modules.path_of(name)
        found = await asyncio.to_thread(of_features, path, indices)
    except RequestRefused as error:
        return refused(error)
    return JSONResponse({"module_name": name, **found})


@router.delete(PATH + "/{name}")
async def unregister_steering_module(name: str, request: Request) -> JSONResponse:
    """Remove a module; `?drain=true` waits for the requests that name it."""
    try:
        modules = service(request, mutation=True)
        check_name(name)
        drain = parse_flag("drain", request.query_params.get("drain"))
        await modules.unregister(name, drain, request.is_disconnected)
    except RequestRefused as error:
        return refused(error)
    return JSONResponse({"name": name, "deleted": True})


@router.get(PATH + "/{name}/features")
async def search_features(name: str, request: Request) -> JSONResponse:
    """Labelled features of a module: `?q=` words of the label, or `?index=`.

    At most `limit` (20) of them.
    """
    try:
        modules = service(request, mutation=False)
        check_name(name)
        query = request.query_params
        found = await modules.search_labels(
            name,
            query.get("q", ""),
            parse_count("index", query.get("index"), None, 2**31),
            parse_count("limit", query.get("limit"), 20, LABELS_LIMIT) or 20,
        )
    except RequestRefused as error:
        return refused(error)
    listed = [{"feature_idx": feature, "label": label} for feature, label in found]
    return JSONResponse({"module_name": name, "features": listed})


@router.post(
    "/v1/steering/encode",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ENCODE_SCHEMA}},
        }
    },
)
async def encode_texts(request: Request) -> JSONResponse:
    """Features by token for texts or messages; nothing is generated.

    Needs no steering key: it changes nothing. `--api-key` guards it as it does
    completions.
    """
    try:
        asked = parse_encode(await body(request))
        return JSONResponse(await request.app.state.steering_encode.encode(asked))
    except RequestRefused as error:
        return refused(error)
