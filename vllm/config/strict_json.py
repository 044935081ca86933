# SPDX-License-Identifier: Apache-2.0
"""Refuses JSON that readers could understand differently: duplicate keys and `-0`."""

from __future__ import annotations

import json
import re

from vllm.config.steering_checks import key_path, refusal
from vllm.config.steering_json import Json
from vllm.exceptions import VLLMValidationError

# Finds every `-0`, and some that are inside strings.
_NEGATIVE_ZERO = re.compile(rb"-0[\s,\]}]")


class _Doubled(Json):
    """An object with a key that was given twice."""

    twice: str


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
        raise refusal(key_path(path, value.twice), "is given twice, expected once")
    if isinstance(value, dict):
        for key, item in value.items():
            refuse_ambiguous(key_path(path, key), item)
    elif isinstance(value, list):
        for at, item in enumerate(value):
            refuse_ambiguous(f"{path}[{at}]", item)


def refuse_ambiguous_fields(data: bytes, fields: tuple[str, ...]) -> None:
    """Check these fields of a JSON object, and that none of them is given twice.

    Args:
        data: a body that was read as JSON before, so that it is an object.
        fields: the names that matter; other parts of the body are not looked at.
    """
    if not any(field.encode() in data for field in fields):
        return
    body = marked_loads(data)
    if isinstance(body, _Doubled) and body.twice in fields:
        raise refusal(body.twice, "is given twice, expected once")
    if isinstance(body, dict):
        for field in fields:
            refuse_ambiguous(field, body.get(field))


def _object(pairs: list[tuple[str, object]]) -> Json:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    doubled = _Doubled(made)
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            doubled.twice = key
            break
        seen.add(key)
    return doubled


def _integer(text: str) -> int:
    return _NegativeZero() if text == "-0" else int(text)
