# SPDX-License-Identifier: Apache-2.0
"""Finds text that is no Unicode: half of a surrogate pair, such as the JSON "\\ud800".

Python reads it, and then no tokenizer, log or answer can take it.
"""

from __future__ import annotations

import json
import re

from vllm.config.steering_checks import (
    SteeringRequestError,
    key_path,
    refusal,
    shown,
)

NO_UNICODE = "which has half of a surrogate pair, expected Unicode text"
# A half without the other one, where no backslash is escaped; or one that is written in
# UTF-8, in which no other character begins so.
_HALF = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
    rb"|\xed[\xa0-\xbf]"
)


def is_unicode(text: str) -> bool:
    """Whether a string can be written in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def no_unicode(path: str, text: object) -> SteeringRequestError:
    """The refusal of text with half of a surrogate pair."""
    return refusal(path, f"found {shown(text)}, {NO_UNICODE}")


def holds_halves(data: bytes) -> bool:
    """Whether JSON holds half of a surrogate pair. It is not read for that."""
    encoding = json.detect_encoding(data)
    if not encoding.startswith("utf-8"):
        text = data.decode(encoding, errors="surrogatepass")
        data = text.encode(errors="surrogatepass")
    return _HALF.search(data.replace(b"\\\\", b"__")) is not None


def refuse_halves(value: object, root: str = "body") -> None:
    """Refuse text with half of a surrogate pair, keys included.

    Args:
        value: what was read from JSON.
        root: the name of the value in the message, if it is that text itself.

    Raises:
        VLLMValidationError: `parameter` is the path of the first such text.
    """
    keys = _first_half(value)
    if keys is None:
        return
    path = ""
    for key in keys:
        path = f"{path}[{key}]" if isinstance(key, int) else key_path(path, key)
    raise no_unicode(path or root, _at(value, keys))


def _first_half(value: object) -> tuple[str | int, ...] | None:
    """Keys and positions that lead to the first such text; None: there is none."""
    if isinstance(value, str):
        return None if is_unicode(value) else ()
    if isinstance(value, list):
        for at, item in enumerate(value):
            if (keys := _first_half(item)) is not None:
                return at, *keys
    if isinstance(value, dict):
        for key, item in value.items():
            if not is_unicode(key):
                return (key,)
            if (keys := _first_half(item)) is not None:
                return key, *keys
    return None


def _at(value: object, keys: tuple[str | int, ...]) -> object:
    """The text that `_first_half` has found: a value, or the last key."""
    for key in keys:
        if isinstance(key, str) and not is_unicode(key):
            return key
        value = value[key]  # type: ignore[index]
    return value
