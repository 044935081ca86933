# SPDX-License-Identifier: Apache-2.0
"""The body of `POST /v1/steering/modules`: one definition of parser and schema."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, TypeVar

from vllm.config.steering_checks import listing, shown
from vllm.config.steering_json import Json
from vllm.config.steering_module_options import ModuleOptions
from vllm.config.steering_points import plain_name
from vllm.config.steering_reader import Reader, expects, json_schema
from vllm.config.strict_json import strict_loads
from vllm.entrypoints.serve.steering.access import RequestRefused
from vllm.exceptions import VLLMValidationError

T = TypeVar("T")

MAX_BODY_BYTES = 256 << 10
MAX_QUERY = 256

Name = Annotated[
    str,
    expects(
        "1 to 128 letters, digits, '.', '_' or '-'",
        pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z",
    ),
]
Path = Annotated[
    str,
    # No unprintable characters: no lone surrogates and no NULs, for example.
    expects(
        "a path or hf:owner/repo",
        pattern=r"\A[^\x00-\x1f\x7f-\x9f]+\Z",
        min_length=1,
        max_length=4096,
    ),
]


class RegisterRequest(ModuleOptions, frozen=True):
    """A module to load: its name, its path and the options that start-up has too."""

    name: Name
    path: Path
    replace: bool = False
    drain: bool = False


_REGISTER = Reader(RegisterRequest)
REGISTER_SCHEMA = json_schema(RegisterRequest)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def parse_register(body: bytes) -> RegisterRequest:
    """Parse a body.

    Raises:
        RequestRefused: 400, naming the field, what was found and what is accepted.
    """
    return read_body_as(_REGISTER, body)


def read_body_as(reader: Reader[T], body: bytes) -> T:
    """A body, read into the type of a reader.

    Raises:
        RequestRefused: 400, naming the field, what was found and what is accepted.
    """
    try:
        return reader.read(strict_loads(body))
    except VLLMValidationError as error:
        raise RequestRefused(400, error.args[0], _top_field(error)) from None


def _top_field(error: VLLMValidationError) -> str | None:
    """The field of the body that an error is about, or None."""
    field = re.split(r"[.\[]", error.parameter or "")[0]
    return field if field and field != _REGISTER.root else None


def check_name(value: str) -> None:
    """Raise `RequestRefused` unless `value` can be a module's name."""
    if _NAME.fullmatch(value) is None:
        raise RequestRefused(
            400,
            f"name: found {shown(value)}, expected 1 to 128 letters, digits, '.', '_' "
            "or '-'",
            "name",
        )


def check_features(module: Json, features: Iterable[int]) -> None:
    """Raise `RequestRefused` unless the listed module has all these features."""
    most = max((site["d_sae"] for site in module["sites"]), default=0)
    for feature in features:
        if feature >= most:
            raise RequestRefused(
                400, f"index: found {feature}, expected 0..{most - 1}", "index"
            )


def site_of(module: Json, given: str | None) -> str:
    """The name of a listed module's site; of its first, if none is given.

    Raises:
        RequestRefused: 400, the module has no such site.
    """
    names: list[str] = [site["name"] for site in module["sites"]]
    if given is None:
        return names[0]
    name = plain_name(given)
    if name is None or name not in names:
        raise RequestRefused(
            400, f"site: found {shown(given)}, expected one of {listing(names)}", "site"
        )
    return name


def parse_flag(key: str, value: str | None) -> bool:
    """A boolean query parameter."""
    if value is None or value in ("false", "true"):
        return value == "true"
    raise RequestRefused(
        400, f"{key}: found {shown(value)}, expected true or false", key
    )


def parse_words(key: str, value: str | None) -> str:
    """A query parameter that is a few words."""
    if value is not None and len(value) > MAX_QUERY:
        raise RequestRefused(
            400,
            f"{key}: found {len(value)} characters, expected at most {MAX_QUERY}",
            key,
        )
    return value or ""


def parse_count(
    key: str, value: str | None, default: int | None, most: int, least: int = 0
) -> int | None:
    """A query parameter that is a number from `least` to `most`."""
    if value is None:
        return default
    digits = value.isascii() and value.isdigit() and len(value) <= 10
    if digits and least <= int(value) <= most:
        return int(value)
    raise RequestRefused(
        400, f"{key}: found {shown(value)}, expected an integer in {least}..{most}", key
    )
