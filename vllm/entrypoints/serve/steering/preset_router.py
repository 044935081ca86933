# SPDX-License-Identifier: Apache-2.0
"""`/v1/steering/presets`: list, put and delete presets, and choose the default one."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import Request
from fastapi.responses import JSONResponse

from vllm.config.sae_steering_presets import PRESET_SCHEMA, read_preset
from vllm.config.steering_reader import Reader, expects, json_schema
from vllm.config.strict_json import strict_loads
from vllm.entrypoints.serve.steering.access import RequestRefused
from vllm.entrypoints.serve.steering.openapi import errors, takes
from vllm.entrypoints.serve.steering.protocol import check_name, read_body_as
from vllm.entrypoints.serve.steering.routing import (
    modules_of,
    modules_to_change,
    read_body,
    steering_router,
)
from vllm.exceptions import VLLMValidationError

router = steering_router()
PATH = "/v1/steering/presets"
DEFAULT = "/v1/steering/default_preset"


@router.get(PATH, responses=errors(409))
async def list_steering_presets(request: Request) -> JSONResponse:
    """Every preset, whether it is valid now, and the default."""
    return JSONResponse(await modules_of(request).list_presets())


@router.put(
    PATH + "/{name}",
    responses=errors(400, 401, 403, 408, 409, 413),
    openapi_extra=takes(PRESET_SCHEMA),
)
async def put_steering_preset(name: str, request: Request) -> JSONResponse:
    """Make a preset, or replace one. Needs the steering key.

    Requests that run keep the preset that they had.
    """
    asked = modules_to_change(request)
    check_name(name)
    preset = _preset(await read_body(request))
    await asked.call("put_preset", {"name": name, "preset": preset})
    return JSONResponse({"name": name, "preset": preset})


@router.delete(PATH + "/{name}", responses=errors(400, 401, 403, 404, 409))
async def delete_steering_preset(name: str, request: Request) -> JSONResponse:
    """Remove a preset that is not the default. Needs the steering key."""
    asked = modules_to_change(request)
    check_name(name)
    await asked.call("delete_preset", {"name": name})
    return JSONResponse({"name": name, "deleted": True})


class _DefaultPreset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The name of the preset for requests that name none; null for no preset."""

    preset: Annotated[str | None, expects("the name of a preset, or null")]


_DEFAULT = Reader(_DefaultPreset)


@router.put(
    DEFAULT,
    responses=errors(400, 401, 403, 404, 408, 409, 413),
    openapi_extra=takes(json_schema(_DefaultPreset)),
)
async def set_default_steering_preset(request: Request) -> JSONResponse:
    """Apply a preset to every request that names none. Needs the steering key.

    `{"preset": null}` ends that.
    """
    asked = modules_to_change(request)
    name = read_body_as(_DEFAULT, await read_body(request)).preset
    await asked.call("set_default_preset", {"name": name})
    return JSONResponse({"default_preset": name})


def _preset(body: bytes) -> object:
    """The preset in a body, as it was written; its types are right."""
    try:
        found = strict_loads(body)
        read_preset(found)
    except VLLMValidationError as error:
        raise RequestRefused(400, error.args[0], error.parameter) from None
    return found
