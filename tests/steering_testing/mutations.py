# SPDX-License-Identifier: Apache-2.0
"""Documents that differ from a valid one in a few places, or in their bytes."""

from __future__ import annotations

import json
import random
import re
from typing import Any

# On either side of limits, of other types, and hard to show, to compare or to hash.
JUNK: list[Any] = [
    *(None, True, False, 0, -1, -(2**31), 2**31, 2**63, 10**30, -(10**400)),
    *(0.5, -0.0, 1e308, 3.5e38, 5e-324, 457.0),
    *("", "a", "\ud800", "\x00", "golden-gate\n", "../x", "1" * 5000, "\u00e9" * 300),
    *([], {}, [[]], [None], ["x"] * 5000, list(range(3000))),
    *({"": 1}, {"a": {"b": {}}}, {"\ud83d": 1}, {"0": []}, {"-1": []}, {"00": []}),
]
KEYS = ("x", "", "phase", "clamps", "\ud800", "module_name", "sae", "when", "spans")
NUMBERS = (b"NaN", b"Infinity", b"1e400", b"-0", b"9" * 6000, b"0x10", b".5", b"01")


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in a document."""
    found = [path]
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for key, inner in children:
        found += places(inner, (*path, key))
    return found


def replaced(value: Any, path: tuple, new: Any) -> Any:
    """The document with another value at a path."""
    if not path:
        return new
    key, *rest = path
    copy = value.copy()
    copy[key] = replaced(value[key], tuple(rest), new)
    return copy


def mutated(rng: random.Random, document: dict[str, Any], *roots: str) -> bytes:
    """A body with up to three changes in the parts that these roots begin."""
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        paths = [p for p in places(document) if p and str(p[0]).startswith(roots)]
        if not paths:
            break
        path = rng.choice(paths)
        document = replaced(document, path, _changed(rng, at(document, path)))
    body = json.dumps(document, ensure_ascii=rng.random() < 0.7)
    data = body.encode("utf-8", "surrogatepass")
    return _broken(rng, data) if rng.random() < 0.25 else data


def at(value: Any, path: tuple) -> Any:
    """What a document has at a path."""
    for key in path:
        value = value[key]
    return value


def _changed(rng: random.Random, value: Any) -> Any:
    if rng.random() < 0.75:
        return rng.choice(JUNK)
    if isinstance(value, dict):
        return {**value, rng.choice(KEYS): rng.choice(JUNK)}
    if isinstance(value, list):
        return value * rng.choice((2, 100, 5000 if len(value) < 4 else 3))
    return [value]


def _broken(rng: random.Random, data: bytes) -> bytes:
    """Bytes that `json.dumps` does not write."""
    deep = rng.choice((100, 1000, 200_000))
    changes = (
        lambda: re.sub(rb"9\.4", rng.choice(NUMBERS), data, count=1),
        lambda: data.replace(b"457", rng.choice(NUMBERS), 1),
        lambda: data.replace(b"[{", b"[" * deep + b"{", 1),
        lambda: data.replace(b'"module_name": ', b'"module_name": 1, "module_name": '),
        lambda: data.replace(b"sae_clamp_specs", b"SAE-clamp-spec"),
        lambda: re.sub(rb'"(sae_\w+)": ', rb'"\1": null, "\1": ', data, count=1),
        lambda: data[: rng.randrange(len(data) + 1)],
        lambda: data + rng.randbytes(5),
    )
    return rng.choice(changes)()
