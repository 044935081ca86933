# SPDX-License-Identifier: Apache-2.0
"""Refuses keys that look like a steering field but are none, with the right name.

vLLM drops unknown fields and ignores unknown `extra_args`, so a misspelt key would give
unsteered text and no error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from vllm.config.sae_steering_specs import EXTRA_ARGS_KEYS, PRESET_KEY, RESERVED_KEYS
from vllm.config.steering_checks import refusal, shown

_FIELDS = (*EXTRA_ARGS_KEYS, PRESET_KEY)
_KNOWN = frozenset((*_FIELDS, *RESERVED_KEYS))
_LIKENESS = 0.8
# No field is longer than this; longer keys are not compared.
_MAX_KEY = 64


def refuse_misspelt(keys: Iterable[object], where: str = "") -> None:
    """Raise `VLLMValidationError` for the first key that is nearly one of ours.

    Args:
        keys: of a request's body, or of its `extra_args`.
        where: path in front of a key in the message, such as `vllm_xargs.`.
    """
    for key in keys:
        if type(key) is str and key not in _KNOWN and _looks_like_ours(key):
            raise refusal(
                where + (key if key.isascii() else shown(key)),
                f"unknown field, expected {_nearest(key)}",
            )


def _plain(key: str) -> str:
    return key.lower().replace("-", "").replace("_", "")


_PLAIN = {_plain(name): name for name in _FIELDS}


def _looks_like_ours(key: str) -> bool:
    if len(key) > _MAX_KEY:
        return False
    plain = _plain(key)
    words = key.lower().replace("-", "_").split("_")
    return (
        "steering" in plain
        or words[0] in ("sae", "saes")
        or bool(difflib.get_close_matches(plain, _PLAIN, 1, _LIKENESS))
    )


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(_plain(key), _PLAIN, 1, 0.0)
    return _PLAIN[near[0]] if near else ", ".join(_FIELDS)
