# SPDX-License-Identifier: Apache-2.0
"""`/v1/steering/modules`: list, register, replace and remove modules."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from vllm.config.steering_json import Json
from vllm.entrypoints.serve.steering.access import (
    RequestRefused,
    check_key,
    holds_key,
)
from vllm.entrypoints.serve.steering.encode import (
    ENCODE_SCHEMA,
    listed_features,
    parse_encode,
)
from vllm.entrypoints.serve.steering.evidence import of_features, parse_indices
from vllm.entrypoints.serve.steering.protocol import (
    MAX_BODY_BYTES,
    REGISTER_SCHEMA,
    check_name,
    parse_count,
    parse_flag,
    parse_register,
)
from vllm.entrypoints.serve.steering.service import SteeringModulesService

router = APIRouter(tags=["steering"])
LABELS_LIMIT = 1000
PATH = "/v1/steering/modules"


@router.get(PATH)
async def list_steering_modules(request: Request) -> JSONResponse:
    """Every module with its sites, memory and requests; free slots; rows in use.

    Needs no key. Only callers with the key are told where the files are.
    """
    try:
        listed = await modules_of(request).list()
    except RequestRefused as error:
        return refused(error)
    modules = [_for_caller(request, module) for module in listed["modules"]]
    return JSONResponse({**listed, "modules": modules})


@router.get(PATH + "/{name}")
async def show_steering_module(name: str, request: Request) -> JSONResponse:
    """One module, as the list shows it."""
    try:
        check_name(name)
        module = await modules_of(request).get(name)
    except RequestRefused as error:
        return refused(error)
    return JSONResponse({"module": _for_caller(request, module)})


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
    `norm_guard`, `sites`, `sharding`, `screening`, `replace`, `drain`. Answers 201
    with the module.
    """
    try:
        service = modules_to_change(request)
        asked = parse_register(await read_body(request))
        module = await service.register(asked, request.is_disconnected)
    except RequestRefused as error:
        return refused(error)
    return JSONResponse({"module": module}, status_code=201)


@router.get(PATH + "/{name}/evidence")
async def steering_module_evidence(name: str, request: Request) -> JSONResponse:
    """What the module's author measured: its card, and the features in `?index=3,7`."""
    try:
        service = modules_of(request)
        check_name(name)
        indices = parse_indices(request.query_params.get("index"))
        path = await service.path_of(name)
        found = await asyncio.to_thread(of_features, path, indices)
    except RequestRefused as error:
        return refused(error)
    return JSONResponse({"module_name": name, **found})


@router.delete(PATH + "/{name}")
async def unregister_steering_module(name: str, request: Request) -> JSONResponse:
    """Remove a module; `?drain=true` waits for the requests that name it."""
    try:
        service = modules_to_change(request)
        check_name(name)
        drain = parse_flag("drain", request.query_params.get("drain"))
        await service.unregister(name, drain, request.is_disconnected)
    except RequestRefused as error:
        return refused(error)
    return JSONResponse({"name": name, "deleted": True})


@router.get(PATH + "/{name}/features")
async def search_features(name: str, request: Request) -> JSONResponse:
    """Labelled features of a module: `?q=` words of the label, or `?index=`.

    At most `limit` (20) of them.
    """
    try:
        service = modules_of(request)
        check_name(name)
        query = request.query_params
        found = await service.search_labels(
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
        asked = parse_encode(await read_body(request))
        answer = await request.app.state.steering_encode.encode(asked)
        answer["labels"] = await modules_of(request).labels_among(
            asked.module_name, listed_features(answer)
        )
        return JSONResponse(answer)
    except RequestRefused as error:
        return refused(error)


def modules_of(request: Request) -> SteeringModulesService:
    return request.app.state.steering_modules


def modules_to_change(request: Request) -> SteeringModulesService:
    check_key(request.headers, request.app.state.steering_api_key)
    return modules_of(request)


def _for_caller(request: Request, module: Json) -> Json:
    """A module as the caller may see it."""
    if holds_key(request.headers, request.app.state.steering_api_key):
        return module
    return {key: value for key, value in module.items() if key != "path"}


async def read_body(request: Request) -> bytes:
    """The request's body, read no further than its limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestRefused(
                413, f"body: expected at most {MAX_BODY_BYTES} bytes, found more"
            )
    return bytes(body)


def refused(error: RequestRefused) -> JSONResponse:
    """OpenAI's form of an error."""
    content: Json = {
        "message": error.message,
        "type": "SteeringModuleError",
        "param": error.field,
        "code": error.status,
    }
    if error.in_use is not None:
        content["in_use"] = error.in_use
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse({"error": content}, error.status, headers)
