# SPDX-License-Identifier: Apache-2.0
"""Requests with conditions, directions and spans, of the modules of `tiers.py`."""

from __future__ import annotations

from typing import Any

from steering_testing.reference import Clamp
from steering_testing.requests import Ask
from steering_testing.tiers import D_SAE, MID, POST

Spans = list[tuple[str, int, int | None]]


def conditional(module: str, tier: str, which: str) -> list[Ask]:
    """Clamps of which each token meets some, several on one condition."""
    conditions = [(f, which, 0.3) for f in range(5, D_SAE, 15)]
    clamps = [
        Clamp(f, kind, value, only, conditions[f % len(conditions)])
        for f, (kind, value, only) in zip(
            range(0, D_SAE, 6),
            [("absolute", 2.5, False), ("additive", 1.5, False), ("scale", -2.0, True)]
            * 6,
            strict=False,
        )
    ]
    return [Ask(tier, module, {POST: [*clamps, Clamp(1, "additive", 0.5)]})]


def directions() -> list[list[Ask]]:
    """Every kind of vector, alone and together with other tiers."""
    clamp = {POST: [Clamp(8, "absolute", 3.0)]}
    return [
        [Ask("additive", "v", kind="set", value=1.5)],
        [Ask("additive", "v", kind="set", value=0.25, relative=True)],
        [Ask("additive", "v", kind="scale", scale=0.0)],
        [Ask("additive", "v", kind="scale", scale=-1.5)],
        [Ask("additive", "w", kind="bound", bounds=(-0.1, 0.2))],
        [Ask("additive", "w", kind="bound", bounds=(-0.02, 0.01), relative=True)],
        [Ask("additive", "w", scale=0.4, relative=True)],
        [Ask("additive", "w", kind="bound", bounds=(-50.0, 50.0))],
        [
            Ask("additive", "v", kind="scale", scale=0.0),
            Ask("additive", "w", kind="bound", bounds=(0.0, 0.1)),
            Ask("additive", "dec_a", scale=0.7),
            Ask("delta", "a", clamp),
            Ask("full", "b", clamp),
        ],
        [
            Ask("additive", "v", kind="set", value=2.0, phase="prefill"),
            Ask("additive", "v", kind="scale", scale=0.0, phase="decode"),
        ],
    ]


def schedules() -> list[list[Ask]]:
    """Spans of prompt and answer, in every tier."""
    low, high = ({POST: [Clamp(8, "absolute", v)]} for v in (2.0, 5.0))

    def full(spans: Spans, clamps: Any = high, module: str = "a") -> Ask:
        return Ask("full", module, clamps, spans=spans)

    return [
        [full([("prompt", -1, None)])],
        [full([("prompt", 1, 3)])],
        [full([("prompt", -3, -1), ("generated", 1, 3)])],
        [full([("generated", 0, 2)], low), full([("generated", 2, None)])],
        [
            full([("prompt", 0, 2)], module="b"),
            full([("prompt", 2, None), ("generated", 0, 1)]),
        ],
        [
            Ask("delta", "a", low),
            Ask("delta", "b", high, spans=[("generated", 2, 4)]),
        ],
        [
            Ask("additive", "v", scale=1.0, spans=[("prompt", -2, None)]),
            Ask("additive", "v", scale=-0.5, spans=[("prompt", 0, 5)]),
            Ask("additive", "w", kind="scale", scale=0, spans=[("generated", 1, None)]),
            Ask("full", "b", {MID: [Clamp(9, "scale", 2.5)]}, phase="decode"),
        ],
        [full([("prompt", 100, 200)])],
        [full([("prompt", 0, None), ("generated", 0, None)])],
    ]


def everything() -> list[list[Ask]]:
    """One batch of all of it, with plain requests between."""
    mixed = [conditional("a", "delta", "above"), conditional("t", "full", "below")]
    asked: list[list[Ask]] = []
    for asks in (*mixed, *directions(), *schedules()):
        asked += [asks, []]
    return asked
