# SPDX-License-Identifier: Apache-2.0
"""The body of `POST /v1/steering/modules`, parsed strictly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm.config.steering_checks import shown
from vllm.entrypoints.serve.steering.access import RequestRefused

MAX_BODY_BYTES = 256 << 10
MAX_PATH = 4096
MAX_LIST = 8192
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SITE = re.compile(r"[A-Za-z0-9_.]{1,64}")


@dataclass(frozen=True)
class RegisterRequest:
    """What to load under which name; `options` as at start-up."""

    name: str
    path: str
    options: dict[str, Any] = field(default_factory=dict)
    replace: bool = False
    drain: bool = False


def _is_name(value: Any) -> bool:
    return type(value) is str and NAME.fullmatch(value) is not None


def _is_path(value: Any) -> bool:
    return (
        type(value) is str
        and 0 < len(value) <= MAX_PATH
        and value.isprintable()  # lone surrogates and NULs are not
    )


def _is_ids(value: Any) -> bool:
    return value is None or (
        type(value) is list
        and len(value) <= MAX_LIST
        and all(type(i) is int and 0 <= i < 2**31 for i in value)
    )


def _is_guard(value: Any) -> bool:
    if type(value) is int and value.bit_length() > 64:
        return False
    return value is None or (type(value) in (int, float) and 0 < value < math.inf)


def _is_sites(value: Any) -> bool:
    return value is None or (
        type(value) is list
        and len(value) <= MAX_LIST
        and all(type(s) is str and SITE.fullmatch(s) is not None for s in value)
    )


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_units(value: Any) -> bool:
    return type(value) is str and value in ("native", "unit_decoder")


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_name, "1 to 128 letters, digits, '.', '_' or '-'"),
    "path": (_is_path, "a path or hf:owner/repo"),
    "feature_units": (_is_units, '"native" or "unit_decoder"'),
    "skip_token_ids": (_is_ids, "null or a list of token ids"),
    "norm_guard": (_is_guard, "null or a positive number"),
    "sites": (_is_sites, 'null or a list of sites such as "post_block.20"'),
    "replace": (_is_bool, "true or false"),
    "drain": (_is_bool, "true or false"),
}
OPTIONS = ("feature_units", "skip_token_ids", "norm_guard", "sites")


def parse_register(body: bytes) -> RegisterRequest:
    """Parse a body.

    Raises:
        RequestRefused: 400, naming the field, what was found and what is accepted.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestRefused(400, "body: expected a JSON object") from None
    if type(data) is not dict:
        raise RequestRefused(400, f"body: found {shown(data)}, expected a JSON object")
    for key, value in data.items():
        if key not in FIELDS:
            raise RequestRefused(
                400,
                f"{shown(key)}: unknown field, expected {', '.join(FIELDS)}",
                key if key.isascii() else None,
            )
        check_field(key, value)
    for key in ("name", "path"):
        if key not in data:
            raise RequestRefused(400, f"{key}: missing, expected {FIELDS[key][1]}", key)
    return RegisterRequest(
        data["name"],
        data["path"],
        {key: data[key] for key in OPTIONS if key in data},
        data.get("replace", False),
        data.get("drain", False),
    )


def check_field(key: str, value: Any) -> None:
    """Raise `RequestRefused` unless `value` is one that the field takes."""
    good, accepted = FIELDS[key]
    if not good(value):
        raise RequestRefused(
            400, f"{key}: found {shown(value)}, expected {accepted}", key
        )


def parse_flag(key: str, value: str | None) -> bool:
    """A boolean query parameter."""
    if value is None or value in ("false", "true"):
        return value == "true"
    raise RequestRefused(
        400, f"{key}: found {shown(value)}, expected true or false", key
    )
