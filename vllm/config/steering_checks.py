# SPDX-License-Identifier: Apache-2.0
"""Words refusals: the field's path, what was found, what is accepted."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from http import HTTPStatus
from typing import Protocol, SupportsIndex, runtime_checkable

from vllm.exceptions import GracefulHTTPError, VLLMValidationError

# Longest excerpt of a client's value or key in a message.
MAX_SHOWN = 60
# Longest list of names in a message.
MAX_LISTED = 10
# Of an engine that can neither steer nor take modules.
WITHOUT_STEERING = (
    "this engine was started without steering: configure a module or a spare slot in "
    "additional_config.steering when it starts"
)


@runtime_checkable
class Array(Protocol):
    """An array or a scalar of NumPy, PyTorch and the like."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> object: ...


class SteeringConfigError(ValueError):
    """The engine cannot start with this steering configuration."""


class SteeringRequestError(VLLMValidationError):
    """A request's steering is refused. `parameter` is the field's path.

    The message starts with the path, so it is not repeated behind it.
    """

    def __str__(self) -> str:
        return str(self.args[0])


class ModuleChangedError(SteeringRequestError, GracefulHTTPError):
    """A module that a request names is changing, or has changed: HTTP 409."""

    def __init__(self, message: str, parameter: str | None = None):
        Exception.__init__(self, message)
        self.message = message
        self.parameter = parameter
        self.value = None
        self.http_status = HTTPStatus.CONFLICT


def shown(value: object) -> str:
    """A short, printable, ASCII excerpt of any client value; never raises."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        if isinstance(value, int) and value.bit_length() > 128:
            return f"an integer of {value.bit_length()} bits"
        # Only the excerpt goes through ascii(), because the value may be megabytes.
        # ascii() removes lone surrogates, which an HTTP response cannot hold.
        if isinstance(value, (str, bytes)) and len(value) > MAX_SHOWN:
            return f"{ascii(value[:MAX_SHOWN])}..."
        return ascii(value)
    if isinstance(value, Array):
        dtype = str(value.dtype)[:MAX_SHOWN]
        return f"a {type(value).__name__} {list(value.shape)} of {dtype}"
    if type(value) in (dict, list):
        return "an object" if type(value) is dict else "a list"
    return f"a value of type {type(value).__name__}"


def refusal(path: str, reason: str) -> SteeringRequestError:
    """An error about the field at `path`."""
    return SteeringRequestError(f"{path}: {reason}", parameter=path)


def bad(path: str, value: object, accepted: str) -> SteeringRequestError:
    """An error about a value that the field at `path` does not take."""
    return refusal(path, f"found {shown(value)}, expected {accepted}")


def whole(value: object) -> object:
    """An integer of NumPy, PyTorch and the like as Python's; all else as it is."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return value
    if isinstance(value, Array) and (value.ndim or "bool" in str(value.dtype)):
        return value
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # it is no integer
        return value


def integer_in_range(
    path: str,
    value: object,
    low: int,
    high: int,
    error: type[Exception] = ValueError,
) -> int:
    """`value`, which must be an integer in `low..high`; a bool is none.

    Integers of NumPy, PyTorch and the like are taken, too.

    Raises:
        error: it is something else.
    """
    number = whole(value)
    if type(number) is int and low <= number <= high:
        return number
    raise error(f"{path}: found {shown(value)}, expected an integer in {low}..{high}")


def about(field: str | None, message: str) -> str:
    """A message that starts with the field that it is about."""
    named = field is None or message.startswith(field)
    return message if named else f"{field}: {message}"


def one_line(error: BaseException) -> str:
    """An error's text in one line, or what kind of error it is if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def key_path(path: str, key: object) -> str:
    """Path of a mapping's entry; keys that are not plain words are quoted."""
    plain = type(key) is int and key.bit_length() <= 64
    if type(key) is str and len(key) <= MAX_SHOWN and key.isascii():
        plain = key.replace("_", "").isalnum()
    if not plain:
        return f"{path}[{shown(key)}]"
    return f"{path}.{key}" if path else str(key)


def listing(names: Sequence[str]) -> str:
    """The first of some names, for a message."""
    if not names:
        return "none is loaded"
    left = len(names) - MAX_LISTED
    more = f" and {left} more" if left > 0 else ""
    return ", ".join(shown(name) for name in names[:MAX_LISTED]) + more
