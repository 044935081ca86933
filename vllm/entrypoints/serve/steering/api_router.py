# SPDX-License-Identifier: Apache-2.0
"""`/v1/steering/modules`: list, register, replace and remove modules."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from vllm.config.steering_json import Json
from vllm.entrypoints.serve.steering.access import (
    RequestRefused,
    check_key,
    holds_key,
)
from vllm.entrypoints.serve.steering.encode import (
    ENCODE_SCHEMA,
    EncodeService,
    listed_features,
    parse_encode,
)
from vllm.entrypoints.serve.steering.evidence import of_features, parse_indices
from vllm.entrypoints.serve.steering.openapi import asks, errors, takes
from vllm.entrypoints.serve.steering.protocol import (
    MAX_BODY_BYTES,
    MAX_QUERY,
    REGISTER_SCHEMA,
    check_name,
    parse_count,
    parse_flag,
    parse_register,
    parse_words,
)
from vllm.entrypoints.serve.steering.service import SteeringModulesService

router = APIRouter(tags=["steering"])
T = TypeVar("T")
LABELS_LIMIT = 1000
PATH = "/v1/steering/modules"


@router.get(PATH, responses=errors(409))
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


@router.get(PATH + "/{name}", responses=errors(400, 404, 409))
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
    try:
        service = modules_to_change(request)
        asked = parse_register(await read_body(request))
        module = await service.register(asked, request.is_disconnected)
    except RequestRefused as error:
        return refused(error)
    return JSONResponse({"module": module}, status_code=201)


@router.get(
    PATH + "/{name}/evidence",
    responses=errors(400, 404, 409),
    openapi_extra=asks(
        index=("At most 256 feature indices, such as 3,457.", {"type": "string"})
    ),
)
async def steering_module_evidence(name: str, request: Request) -> JSONResponse:
    """What the module's author measured: its card, and what is known of features."""
    try:
        service = modules_of(request)
        check_name(name)
        indices = parse_indices(request.query_params.get("index"))
        path = await service.path_of(name)
        found = await asyncio.to_thread(of_features, path, indices)
    except RequestRefused as error:
        return refused(error)
    return JSONResponse({"module_name": name, **found})


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
    try:
        service = modules_to_change(request)
        check_name(name)
        drain = parse_flag("drain", request.query_params.get("drain"))
        await service.unregister(name, drain, request.is_disconnected)
    except RequestRefused as error:
        return refused(error)
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
            {"type": "integer", "default": 20, "minimum": 0, "maximum": LABELS_LIMIT},
        ),
    ),
)
async def search_features(name: str, request: Request) -> JSONResponse:
    """Labelled features of a module, by words of the label or by index."""
    try:
        service = modules_of(request)
        check_name(name)
        query = request.query_params
        found = await service.search_labels(
            name,
            parse_words("q", query.get("q")),
            parse_count("index", query.get("index"), None, 2**31 - 1),
            parse_count("limit", query.get("limit"), 20, LABELS_LIMIT, least=1) or 20,
        )
    except RequestRefused as error:
        return refused(error)
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
    try:
        asked = parse_encode(await read_body(request))
        config = await modules_of(request).config()
        service: EncodeService = request.app.state.steering_encode
        answer = await while_connected(request, service.encode(asked, config))
        answer["labels"] = await modules_of(request).labels_among(
            asked.module_name, listed_features(answer)
        )
        # Its text is megabytes; other streams go on meanwhile.
        return await asyncio.to_thread(JSONResponse, answer)
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
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise RequestRefused(
                    413, f"body: found more than {MAX_BODY_BYTES} bytes, expected fewer"
                )
    except ClientDisconnect:
        raise RequestRefused(408, "the caller disconnected") from None
    return bytes(body)


async def while_connected(request: Request, work: Coroutine[None, None, T]) -> T:
    """The result of some work, which is cancelled if the caller goes away.

    Args:
        request: its body has been read.
        work: what the caller waits for.

    Raises:
        RequestRefused: 408, the caller has gone away.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RequestRefused(408, "the caller disconnected")
    finally:
        leaving.cancel()
        working.cancel()


async def _left(request: Request) -> None:
    """Return when the caller has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
