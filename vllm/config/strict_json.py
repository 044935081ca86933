# SPDX-License-Identifier: Apache-2.0
"""Refuses JSON that readers could understand differently: duplicate keys and `-0`, and
half of a surrogate pair."""

from __future__ import annotations

import json
import os
import re

import msgspec

from vllm.config.steering_checks import key_path, refusal
from vllm.config.steering_json import Json
from vllm.config.unicode_text import holds_halves, refuse_halves
from vllm.exceptions import VLLMValidationError

# Finds every `-0`, and some that are inside strings.
_NEGATIVE_ZERO = re.compile(rb"-0[\s,\]}]")
# Finds every letter and underscore that is written as an escape, as a key may have it.
_ESCAPED_LETTER = re.compile(rb"\\u00[4-7]")
# An object, whose values stay as they are.
_TOP_LEVEL = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Doubled(Json):
    """An object with keys that were given twice, in the order of the second ones."""

    twice: list[str]


class _NegativeZero(int):
    """The integer `-0`."""


def marked_loads(data: bytes) -> object:
    """`json.loads`, with the marks that `refuse_ambiguous` looks for.

    Raises:
        ValueError, RecursionError: as `json.loads`.
    """
    # Without a hook, Python reads integers much faster.
    hook = _integer if _NEGATIVE_ZERO.search(data) else None
    return json.loads(data, object_pairs_hook=_object, parse_int=hook)


def strict_loads(data: bytes) -> object:
    """A body as JSON that all readers understand in the same way.

    Raises:
        VLLMValidationError: it is not JSON, or is ambiguous; `parameter` is the path.
    """
    try:
        found = marked_loads(data)
        refuse_ambiguous("", found)
        if holds_halves(data):
            refuse_halves(found)
    except RecursionError:
        raise _not_json("found JSON that is nested too deep") from None
    except UnicodeDecodeError as error:
        raise _not_json(f"found no UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        what = f"no JSON at character {error.pos} ({error.msg})"
        raise _not_json(f"found {what if data else 'nothing'}") from None
    except ValueError:
        raise _not_json("found an integer of thousands of digits") from None
    return found


def _not_json(found: str) -> VLLMValidationError:
    return refusal("body", f"{found}, expected a JSON object")


def refuse_ambiguous(path: str, value: object) -> None:
    """Raise `VLLMValidationError` where a marked value can be read in two ways."""
    if isinstance(value, _NegativeZero):
        raise refusal(path, "found -0, expected 0")
    if isinstance(value, _Doubled):
        raise refusal(key_path(path, value.twice[0]), "is given twice, expected once")
    if isinstance(value, dict):
        for key, item in value.items():
            refuse_ambiguous(key_path(path, key), item)
    elif isinstance(value, list):
        for at, item in enumerate(value):
            refuse_ambiguous(f"{path}[{at}]", item)


def refuse_ambiguous_fields(data: bytes, fields: tuple[str, ...]) -> None:
    """Check these fields of a JSON object, and that none of them is given twice.

    A large body costs a fraction of what reading it costs: only these fields are read.

    Args:
        data: a body that was read as JSON before, so that it is an object.
        fields: the names that matter; other parts of the body are not looked at.
    """
    is_plain = _is_plain(data)
    # One look at the body, not one for each field.
    end = os.path.commonprefix([field[::-1] for field in fields])[::-1]
    if is_plain and end.encode() not in data:
        return
    parts = _parts(data, fields) if is_plain else None
    if parts is not None:
        for field, part in parts.items():
            # Something ends a number in an object.
            refuse_ambiguous(field, marked_loads(part + b" "))
        return
    body = marked_loads(data)
    if isinstance(body, dict):
        for field in fields:
            if isinstance(body, _Doubled) and field in body.twice:
                raise refusal(field, "is given twice, expected once")
            refuse_ambiguous(field, body.get(field))


def _is_plain(data: bytes) -> bool:
    """Whether a key of letters and underscores has the same letters in the bytes."""
    if not json.detect_encoding(data).startswith("utf-8"):
        return False
    return b"\\u00" not in data or _ESCAPED_LETTER.search(data) is None


def _parts(data: bytes, fields: tuple[str, ...]) -> dict[str, bytes] | None:
    """The bytes of these fields of an object; None: one may be there twice."""
    try:
        found = _TOP_LEVEL.decode(data)
    except (ValueError, RecursionError):  # what Python reads and JSON has not
        return None
    parts = {field: bytes(found[field]) for field in fields if field in found}
    if any(data.count(f'"{field}"'.encode()) > 1 for field in parts):
        return None
    return parts


def _object(pairs: list[tuple[str, object]]) -> Json:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    doubled = _Doubled(made)
    doubled.twice = []
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            doubled.twice.append(key)
        seen.add(key)
    return doubled


def _integer(text: str) -> int:
    return _NegativeZero() if text == "-0" else int(text)
