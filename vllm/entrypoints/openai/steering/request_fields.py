# SPDX-License-Identifier: Apache-2.0
"""The steering fields of HTTP requests. Some routes carry them; the others refuse them.

The models only declare the fields; the one strict parser checks them when the
request's sampling parameters are validated, so every surface gives the same errors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    GetCoreSchemaHandler,
    WithJsonSchema,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_before_validator_function

from vllm.config.sae_steering_names import refuse_misspelt
from vllm.config.sae_steering_parser import is_asked
from vllm.config.sae_steering_specs import (
    EXTRA_ARGS_KEYS,
    PRESET_KEY,
    PRESET_SCHEMA_FIELD,
    field_schemas,
)
from vllm.config.sae_steering_types import fold_into_extra_args
from vllm.config.steering_checks import refusal
from vllm.config.steering_json import Json
from vllm.config.strict_json import refuse_ambiguous_fields
from vllm.sampling_params import SamplingParams

FIELD_SCHEMAS = {**field_schemas(), PRESET_KEY: PRESET_SCHEMA_FIELD}


def declare_fields(model: type[BaseModel]) -> None:
    """Add the steering fields to a request model that carries them."""
    for name, schema in FIELD_SCHEMAS.items():
        _add_field(model, name, Annotated[Any, WithJsonSchema(schema)])
    model.model_rebuild(force=True)


def refuse_fields(model: type[BaseModel], route: str, hint: str) -> None:
    """Make a request model refuse steering, which its route cannot carry.

    Args:
        model: the request model; unknown fields would be dropped in silence.
        route: the route's path, for the message.
        hint: what to use instead.
    """
    for name in FIELD_SCHEMAS:
        refuse = _refuser(name, f"{route} does not support steering, {hint}")
        schema = WithJsonSchema({"type": "null", "description": "Not supported here."})
        _add_field(model, name, Annotated[Any, BeforeValidator(refuse), schema])
    model.__get_pydantic_core_schema__ = classmethod(_checked_schema)  # type: ignore[assignment, method-assign]
    model.model_rebuild(force=True)


def _checked_schema(
    cls: type[BaseModel], source: type[BaseModel], handler: GetCoreSchemaHandler
) -> CoreSchema:
    """The schema of a model whose unknown keys are looked at before they are lost."""
    return no_info_before_validator_function(_refuse_misspelt_keys, handler(source))


def _refuse_misspelt_keys(body: object) -> object:
    if isinstance(body, dict):
        refuse_misspelt(body)
        _refuse_nested_fields(body)
    return body


def _refuse_nested_fields(body: Json) -> None:
    """Refuse steering one level too deep, where vLLM drops it in silence.

    `extra_body` is an argument of OpenAI's Python client, which unpacks it, and
    `extra_args` one of `SamplingParams`.
    """
    for outer in ("extra_body", "extra_args"):
        inner = body.get(outer)
        for name in FIELD_SCHEMAS:
            if isinstance(inner, dict) and name in inner:
                raise refusal(
                    f"{outer}.{name}",
                    f"unknown field, expected {name} at the top level of the body",
                )


def _add_field(model: type[BaseModel], name: str, annotation: object) -> None:
    model.__annotations__[name] = annotation
    model.__pydantic_fields__[name] = FieldInfo.from_annotated_attribute(
        annotation, None
    )


def _refuser(path: str, reason: str) -> Callable[[object], object]:
    def refuse(value: object) -> object:
        if value is not None:
            raise refusal(path, reason)
        return value

    return refuse


def refuse_specs_beside_extra_args(value: object) -> object:
    """Refuse steering that is written into raw sampling parameters' top level.

    vLLM would drop it there. Only `extra_args` carries it.
    """
    if isinstance(value, dict):
        for name in FIELD_SCHEMAS:
            if name in value:
                raise refusal(
                    f"sampling_params.{name}",
                    "unknown field, expected it in sampling_params.extra_args",
                )
        refuse_misspelt(value, "sampling_params.")
    return value


def refuse_event_fields(event: object) -> None:
    """Refuse steering in a WebSocket event, whose unknown keys are dropped."""
    if isinstance(event, dict):
        for name in FIELD_SCHEMAS:
            if event.get(name) is not None:
                _refuser(name, "/v1/realtime does not support steering")(event[name])
        refuse_misspelt(event)


def specs_of(request: BaseModel) -> Json:
    """The steering fields of a request, by name; None where not given."""
    # If a route's schema was built before the fields were declared, they are extra
    # fields. `dict(request)` has those too.
    fields = dict(request)
    return {name: fields.get(name) for name in EXTRA_ARGS_KEYS}


def steering_of(request: BaseModel) -> Json:
    """What a request's fields say, as `extra_args` has it.

    A preset of null is not the same as none: it opts out of the server's default.
    """
    given = {
        name: specs for name, specs in specs_of(request).items() if is_asked(specs)
    }
    if PRESET_KEY in request.model_fields_set:
        given[PRESET_KEY] = dict(request)[PRESET_KEY]
    return given


def refuse_misspelt_fields(request: BaseModel) -> None:
    """Refuse a field that is nearly one of ours; vLLM's models drop unknown fields."""
    refuse_misspelt(request.model_extra or ())
    _refuse_nested_fields(request.model_extra or {})


def refuse_ambiguous_body(body: bytes) -> None:
    """Refuse duplicate keys and `-0` in the steering of the body that was sent."""
    with suppress(ValueError, RecursionError):
        refuse_ambiguous_fields(body, EXTRA_ARGS_KEYS)


def carry_specs(request: BaseModel, params: SamplingParams) -> None:
    """Fold the request's steering into the `extra_args` of its new parameters."""
    refuse_misspelt_fields(request)
    params.extra_args = fold_into_extra_args(params.extra_args, specs_of(request))
    if PRESET_KEY in request.model_fields_set:
        preset = dict(request)[PRESET_KEY]
        params.extra_args = {**(params.extra_args or {}), PRESET_KEY: preset}


def carry_preset(request: BaseModel, made: BaseModel) -> None:
    """Give a request that was made from another one its preset, null included."""
    if PRESET_KEY in request.model_fields_set:
        setattr(made, PRESET_KEY, dict(request)[PRESET_KEY])


def refuse_beam_search(request: BaseModel) -> None:
    """Raise when a beam search request asks for steering.

    Beams are separate engine requests whose prompts hold the tokens generated so
    far, so those tokens would be steered as prompt.
    """
    refuse_misspelt_fields(request)
    specs = specs_of(request)
    fields = dict(request)
    xargs = fields.get("vllm_xargs") or {}
    refuse_misspelt(xargs, "vllm_xargs.")
    specs[PRESET_KEY] = fields.get(PRESET_KEY)
    for name in FIELD_SCHEMAS:
        if specs[name] or xargs.get(name):
            raise refusal(
                name,
                "beam search does not support steering, expected use_beam_search=false "
                "or no specs",
            )
