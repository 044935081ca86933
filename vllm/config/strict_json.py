# SPDX-License-Identifier: Apache-2.0
"""JSON whose meaning does not depend on who reads it: no duplicate key, no `-0`."""

from __future__ import annotations

import json
from typing import Any

from vllm.config.steering_checks import shown


class StrictJSONError(ValueError):
    """The text is JSON that two readers could understand differently."""


def strict_loads(data: bytes | str) -> Any:
    """`json.loads` that refuses an object's second use of a key, and the integer `-0`.

    Raises:
        StrictJSONError: for these two, in one sentence.
        ValueError, RecursionError: as `json.loads`.
    """
    return json.loads(data, object_pairs_hook=_object, parse_int=_integer)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise StrictJSONError(f"key {shown(key)} is given twice, expected once")
            seen.add(key)
    return made


def _integer(text: str) -> int:
    if text == "-0":
        raise StrictJSONError("found -0, expected 0")
    return int(text)
