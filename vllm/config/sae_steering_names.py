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
# Comparing takes some 50 us a key, and a client may send a hundred thousand keys. So no
# more than these are compared letter by letter.
_MAX_COMPARED = 256


def refuse_misspelt(keys: Iterable[object], where: str = "") -> None:
    """Raise `VLLMValidationError` for the first key that is nearly one of ours.

    Args:
        keys: of a request's body, or of its `extra_args`.
        where: path in front of a key in the message, such as `vllm_xargs.`.
    """
    compared = 0
    for key in keys:
        if type(key) is not str or key in _KNOWN or len(key) > _MAX_KEY:
            continue
        compared += 1
        if _has_our_words(key) or (compared <= _MAX_COMPARED and _is_near(key)):
            raise refusal(
                where + (key if key.isascii() else shown(key)),
                f"unknown field, expected {_nearest(key)}",
            )


def _plain(key: str) -> str:
    return key.lower().replace("-", "").replace("_", "")


_PLAIN = {_plain(name): name for name in _FIELDS}


def _has_our_words(key: str) -> bool:
    words = key.lower().replace("-", "_").split("_")
    return "steering" in _plain(key) or words[0] in ("sae", "saes")


def _is_near(key: str) -> bool:
    return bool(difflib.get_close_matches(_plain(key), _PLAIN, 1, _LIKENESS))


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(_plain(key), _PLAIN, 1, 0.0)
    return _PLAIN[near[0]] if near else ", ".join(_FIELDS)
