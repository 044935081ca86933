# SPDX-License-Identifier: Apache-2.0
"""Which blocks of the prefix cache requests share, by enumeration.

From what a client writes to the key of a block: over all pairs of many small requests,
two keys are equal exactly where the effective content of every position of the block is
equal. The content comes from this file's own reading of the specs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Any

from steering_testing.specs import admitted

from vllm.config.sae_steering_admission import admitted_schedule
from vllm.config.steering import ModuleInfo, SiteInfo, SteeringConfig
from vllm.config.steering_points import HookPoint
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.steering_block_keys import steering_block_key

LENGTH, BLOCK, POSITIONS = 4, 2, 8

SAE = (SiteInfo(1, HookPoint.POST_BLOCK, 8, 16),)
VECTOR = (SiteInfo(1, HookPoint.POST_BLOCK, 8, 1),)
CONFIG = SteeringConfig(
    {
        "a": ModuleInfo("a", "sae", "p", "native", "da", SAE),
        "v": ModuleInfo("v", "vectors", "p", "native", "dv", VECTOR),
        "w": ModuleInfo("w", "vectors", "p", "native", "dw", VECTOR),
    }
)
FULL, DELTA = "sae_full_reconstruction_specs", "sae_clamp_specs"
ADDITIVE = "steering_vector_specs"

# Of a position: what acts there.
Content = frozenset[tuple[Any, ...]]


@dataclass(frozen=True)
class Part:
    """One spec: what it does, and where (None: on every token)."""

    tier: str
    does: tuple[tuple[str, Any], ...]
    span: tuple[str, int, int | None] | None

    def spec(self) -> dict[str, Any]:
        """As a client writes it."""
        found: dict[str, Any] = dict(self.does)
        if self.tier != ADDITIVE:
            found = {"module_name": "a", "clamps": [found]}
        if self.span is not None:
            found["spans"] = [
                dict(zip(("of", "start", "stop"), self.span, strict=True))
            ]
        return found

    def acts_at(self, position: int) -> bool:
        if self.span is None:
            return True
        of, start, stop = self.span
        whole = range(LENGTH) if of == "prompt" else range(LENGTH, POSITIONS)
        return position in whole[start:stop]

    @property
    def sets(self) -> tuple[Any, ...]:
        """What another spec may not also set: the feature, or the vector."""
        does = dict(self.does)
        return self.tier, does.get("feature_idx"), does.get("module_name")


def clamp(tier: str, value: float, feature: int = 1, **when: float) -> Any:
    does = {"feature_idx": feature, "kind": "absolute", "value": value}
    return tier, does | ({"when": {"feature_idx": 3, **when}} if when else {})


EDITS = [
    clamp(FULL, 1.0),
    clamp(FULL, 2.0),
    clamp(FULL, 1.0, above=0.5),
    clamp(FULL, 1.0, above=0.75),
    clamp(FULL, 1.0, below=0.5),
    clamp(DELTA, 1.0),
    clamp(DELTA, 1.0, above=0.5),
    clamp(DELTA, 1.0, feature=2),
    (ADDITIVE, {"module_name": "v", "scale": 0.5}),
    (ADDITIVE, {"module_name": "v", "scale": 1.0}),
    (ADDITIVE, {"module_name": "w", "scale": 0.5}),
    (ADDITIVE, {"module_name": "v", "scale": 0.5, "relative": True}),
    (ADDITIVE, {"module_name": "v", "kind": "scale", "scale": 0.5}),
    (ADDITIVE, {"module_name": "v", "kind": "set", "value": 0.5}),
    (ADDITIVE, {"module_name": "v", "kind": "bound", "bounds": (0.0, 0.5)}),
]
SPANS = [
    None,
    ("prompt", 0, None),
    ("prompt", -1, None),
    ("prompt", 1, 3),
    ("generated", 0, None),
    ("generated", 0, 1),
    ("generated", 2, None),
]
PARTS = [Part(tier, tuple(d.items()), span) for tier, d in EDITS for span in SPANS]


def written(parts: Iterable[Part]) -> dict[str, Any]:
    """The fields of a request."""
    found: dict[str, Any] = {}
    for part in parts:
        found.setdefault(part.tier, []).append(part.spec())
    return found


def content(parts: Iterable[Part], position: int) -> Content:
    """What acts at a position. Plain additions of one vector are summed."""
    found: set[tuple[Any, ...]] = set()
    sums: dict[str, float] = {}
    for part in parts:
        if not part.acts_at(position):
            continue
        does = dict(part.does)
        if part.tier == FULL:
            found.add(("reconstructed",))
        if part.tier == ADDITIVE and set(does) == {"module_name", "scale"}:
            name = does["module_name"]
            sums[name] = sums.get(name, 0.0) + does["scale"]
        elif does:
            found.add((part.tier, repr(does)))
    return frozenset(found | set(sums.items()))


@dataclass(frozen=True)
class Case:
    """A request, the configuration that it meets, and what it comes to."""

    given: dict[str, Any]
    config: SteeringConfig
    parts: tuple[Part, ...]


def own_requests() -> Iterator[Case]:
    """The plain request, all of one spec and all pairs of specs."""
    yield Case({}, CONFIG, ())
    for part in PARTS:
        yield Case(written([part]), CONFIG, (part,))
    for pair in combinations_with_replacement(PARTS, 2):
        yield Case(written(pair), CONFIG, pair)


def beside(preset: Part, own: Part) -> tuple[Part, ...]:
    """A request's own entry wins; a site stays reconstructed without the clamp."""
    if preset.sets != own.sets:
        return preset, own
    kept = (replace(preset, does=()),) if preset.tier == FULL else ()
    return *kept, own


def preset_requests() -> Iterator[Case]:
    """Presets of one spec: named, the default, opted out of, and beside own specs."""
    for preset in PARTS[::3]:
        presets = {"p": {**written([preset]), "locked": False}}
        named = replace(CONFIG, presets=presets)
        default = replace(named, default_preset="p")
        yield Case({"steering_preset": "p"}, named, (preset,))
        yield Case({}, named, ())
        yield Case({}, default, (preset,))
        yield Case({"steering_preset": None}, default, ())
        for own in PARTS[::4]:
            parts, given = beside(preset, own), written([own])
            yield Case(given, default, parts)
            yield Case({**given, "steering_preset": "p"}, named, parts)
            yield Case({**given, "steering_preset": None}, default, (own,))


def test_blocks_are_shared_exactly_where_the_content_of_every_position_is_equal() -> (
    None
):
    by_key: dict[Any, set[Any]] = {}
    by_content: dict[Any, set[Any]] = {}
    accepted = [0, 0]
    for kind, cases in enumerate((own_requests(), preset_requests())):
        for case in cases:
            with suppress(VLLMValidationError):
                args = admitted(case.given or None, case.config, LENGTH)
                accepted[kind] += 1
                schedule = admitted_schedule(args or {}, LENGTH)
                for start in range(0, POSITIONS, BLOCK):
                    key = steering_block_key(schedule, start, start + BLOCK)
                    acting = tuple(
                        content(case.parts, at) for at in range(start, start + BLOCK)
                    )
                    by_key.setdefault(key, set()).add(acting)
                    by_content.setdefault(acting, set()).add(key)
    assert accepted[0] > 3000 and accepted[1] > 1000 and len(by_key) > 500
    wrong = {key: found for key, found in by_key.items() if len(found) > 1}
    assert not wrong, "one key for different contents"
    lost = {acting: keys for acting, keys in by_content.items() if len(keys) > 1}
    assert not lost, "different keys for one content"
    assert by_key[None] == {(frozenset(), frozenset())}
