# SPDX-License-Identifier: Apache-2.0
"""The canonical form of a request's steering, and its digests.

`SteeringRequest` is what `vllm.config.sae_steering_parser.parse_steering_request`
makes of the specs: merged, sorted, in range, and resolved to the sites that each tier
edits in each phase.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from vllm.config.sae_inline_vectors import as_text
from vllm.config.sae_readout_specs import SiteRead, reads_to_json
from vllm.config.sae_steering_edits import (
    SiteEdit,
    digest_of,
    module_fingerprint,
    tier_block,
)
from vllm.config.sae_steering_spans import Coverage, When, acts, pieces
from vllm.config.sae_steering_specs import (
    ADDITIVE_KEY,
    DELTA_KEY,
    FULL_KEY,
    READOUT_KEY,
    SAEClampEntry,
)
from vllm.config.sae_steering_vector_action import VectorAction, add_scales
from vllm.config.steering import ModuleInfo, Tier
from vllm.config.steering_json import Json
from vllm.config.steering_points import HookPoint

HOOK_ORDER = {hook: order for order, hook in enumerate(HookPoint)}

# One canonical group of specs: what one module does where one coverage holds.
Group = tuple[str, Coverage]


class Acting(msgspec.Struct, frozen=True, gc=False):
    """What edits the tokens of a phase or a piece; the tuples are by tier.

    Attributes:
        edits: sorted by layer, hook and the order in which the site's slots run (for
            modules not placed, registration order); every (module, site) occurs once.
        row_keys: key of the row that holds the tier's edits (hex), or None. Requests
            with equal keys can share a row. The key does not say when they act.
        digest: `hash_steering_config` with the request's own module digests.
    """

    edits: tuple[tuple[SiteEdit, ...], ...]
    row_keys: tuple[str | None, ...]
    digest: str | None


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Positions before `stop` (None: all others) that are edited alike."""

    stop: int | None
    when: When
    acting: Acting

    @property
    def digest(self) -> str | None:
        """See `Acting.digest`; None if the piece is not edited."""
        return self.acting.digest


@dataclass(frozen=True)
class SteeringRequest:
    """The canonical form of a request's steering; built by the parser only.

    Attributes:
        sae_edits: for the delta and full tiers, the edits of each (module, coverage)
            in canonical order.
        vectors: action of each (vector module, coverage), in canonical order.
        modules: every module that is named, in registration order; then those that
            stand for vectors of the request's own, by name.
        reads: what is read, in canonical order; not part of any digest.
        inline: components of the request's own vectors, little-endian float32, by the
            name of the module that stands for each.
    """

    sae_edits: Mapping[Tier, Mapping[Group, tuple[SiteEdit, ...]]]
    vectors: Mapping[Group, VectorAction]
    modules: Mapping[str, ModuleInfo]
    reads: tuple[SiteRead, ...] = ()
    inline: Mapping[str, bytes] = field(default_factory=dict)
    # Kept, because one object serves many requests.
    _acting: dict[When | Coverage, Acting] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _schedules: dict[int, tuple[Piece, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @functools.cached_property
    def module_digests(self) -> dict[str, str]:
        """`module_fingerprint` of every module that the request names."""
        return {name: module_fingerprint(m) for name, m in self.modules.items()}

    def to_extra_args(self) -> Json:
        """The canonical specs in JSON types, under `EXTRA_ARGS_KEYS`; not to be edited.

        Parsing the result gives an equal request; absent tiers have no key.
        """
        return dict(self._extra_args)

    @functools.cached_property
    def _extra_args(self) -> Json:
        args: Json = {}
        for key, tier in ((FULL_KEY, Tier.FULL), (DELTA_KEY, Tier.DELTA)):
            groups = self.sae_edits.get(tier)
            if groups:
                args[key] = [_spec_json(group, groups[group]) for group in groups]
        if self.vectors:
            args[ADDITIVE_KEY] = [
                self._named_json(name) | _vector_json(coverage, action)
                for (name, coverage), action in self.vectors.items()
            ]
        if self.reads:
            args[READOUT_KEY] = reads_to_json(self.reads)
        return args

    def _named_json(self, name: str) -> Json:
        """How a vector spec names a module, or gives its own vector."""
        if name not in self.inline:
            return {"module_name": name}
        (site,) = self.modules[name].sites
        return {
            "vector": as_text(self.inline[name]),
            "layer": site.layer,
            "hook": site.hook.value,
        }

    @functools.cached_property
    def coverages(self) -> frozenset[Coverage]:
        """Where the request's specs act."""
        groups = [
            *self.vectors,
            *(g for found in self.sae_edits.values() for g in found),
        ]
        return frozenset(coverage for _, coverage in groups)

    @property
    def has_spans(self) -> bool:
        """Whether the schedule is more than prompt and answer."""
        return not all(isinstance(coverage, str) for coverage in self.coverages)

    def schedule(self, num_prompt_tokens: int) -> tuple[Piece, ...]:
        """The pieces of a request with this prompt.

        Neighbouring pieces differ, except at the prompt's end, where a piece always
        ends.
        """
        kept = self._schedules.get(num_prompt_tokens)
        if kept is not None:
            return kept
        found: list[Piece] = []
        for stop, when in pieces(self.coverages, num_prompt_tokens):
            acting = self.acting(when)
            alike = found and found[-1].digest == acting.digest
            if alike and found[-1].stop != num_prompt_tokens:
                found.pop()
            found.append(Piece(stop, when, acting))
        made = self._schedules[num_prompt_tokens] = tuple(found)
        return made

    def acting(self, when: When) -> Acting:
        """What edits the tokens of a phase or a piece."""
        # Phases without specs of their own are edited alike; so this is computed once.
        is_shared = isinstance(when, str) and when not in self.coverages
        key: When | Coverage = "both" if is_shared else when
        found = self._acting.get(key)
        if found is not None:
            return found
        edits: list[tuple[SiteEdit, ...]] = [()] * len(Tier)
        keys: list[str | None] = [None] * len(Tier)
        blocks = []
        for tier in self._tiers:
            edits[tier] = self._edits(tier, when)
            if edits[tier]:
                blocks.append(tier_block(tier, edits[tier], self.module_digests))
                keys[tier] = digest = digest_of(blocks[-1:])
        if len(blocks) != 1:  # of one tier, the same bytes have been hashed
            digest = digest_of(blocks)
        found = self._acting[key] = Acting(tuple(edits), tuple(keys), digest)
        return found

    @functools.cached_property
    def _tiers(self) -> list[Tier]:
        """The tiers that the request uses."""
        sae = [tier for tier, groups in self.sae_edits.items() if groups]
        return sorted(sae + [Tier.ADDITIVE] * bool(self.vectors))

    def edits(self, tier: Tier, when: When) -> tuple[SiteEdit, ...]:
        """See `Acting.edits`."""
        return self.acting(when).edits[tier]

    def digest(self, when: When) -> str | None:
        """See `Acting.digest`."""
        return self.acting(when).digest

    def row_key(self, tier: Tier, when: When) -> str | None:
        """See `Acting.row_keys`."""
        return self.acting(when).row_keys[tier]

    def _edits(self, tier: Tier, when: When) -> tuple[SiteEdit, ...]:
        if tier is Tier.ADDITIVE:
            return self._merged(self._vector_edits(when))
        groups = self._by_coverage[tier]
        acting: Iterable[Coverage] = ("both", when) if isinstance(when, str) else when
        found = [edits for coverage in acting for edits in groups.get(coverage, ())]
        if len(found) == 1:  # in order already
            return found[0]
        return self._merged(edit for edits in found for edit in edits)

    def _merged(self, edits: Iterable[SiteEdit]) -> tuple[SiteEdit, ...]:
        """In order, with one edit for each module and site."""
        order = {name: position for position, name in enumerate(self.modules)}
        merged: dict[tuple[int, int, bool, int], SiteEdit] = {}
        for edit in edits:
            slot = self.modules[edit.module].slot_at(edit.hook, edit.layer)
            place = order[edit.module] if slot is None else slot
            key = (edit.layer, HOOK_ORDER[edit.hook], slot is None, place)
            if key in merged:
                entries = sorted_clamps((*merged[key].entries, *edit.entries))
                edit = SiteEdit(edit.module, edit.hook, edit.layer, entries)
            merged[key] = edit
        return tuple(merged[key] for key in sorted(merged))

    @functools.cached_property
    def _by_coverage(self) -> dict[Tier, dict[Coverage, list[tuple[SiteEdit, ...]]]]:
        """The edits of the groups of each SAE tier."""
        found: dict[Tier, dict[Coverage, list[tuple[SiteEdit, ...]]]] = {}
        for tier in (Tier.DELTA, Tier.FULL):
            groups = found[tier] = {}
            for (_, coverage), edits in self.sae_edits.get(tier, {}).items():
                groups.setdefault(coverage, []).append(edits)
        return found

    def _vector_edits(self, when: When) -> Iterable[SiteEdit]:
        for name, module in self.modules.items():
            acting = [
                action
                for (owner, coverage), action in self.vectors.items()
                if owner == name and acts(coverage, when)
            ]
            if acting:
                action = acting[0]
                if action.sums:
                    scales = [one.value for one in acting]
                    action = VectorAction("add", add_scales(scales))
                for site in module.sites:
                    yield SiteEdit(name, site.hook, site.layer, actions=(action,))


def sorted_clamps(clamps: Iterable[SAEClampEntry]) -> tuple[SAEClampEntry, ...]:
    """Clamps in canonical order; a site holds a feature at most once."""
    return tuple(sorted(clamps, key=lambda clamp: clamp.feature_idx))


def hash_steering_config(
    request: SteeringRequest, when: When, module_digests: Mapping[str, str]
) -> str | None:
    """SHA-256 (hex) of everything that edits the tokens of a phase or piece, or None.

    It covers the tiers, sites, clamps and the named modules' digests, but not the
    tokens: if both phases are steered alike, both have the same digest. Blocks are
    length-prefixed and tagged, so no two contents share an encoding.

    Args:
        request: the canonical request.
        when: whose edits to hash.
        module_digests: digest of every module that the request names.
    """
    blocks = []
    for tier in Tier:
        edits = request.edits(tier, when)
        if edits:
            blocks.append(tier_block(tier, edits, module_digests))
    return digest_of(blocks)


def _coverage_json(coverage: Coverage) -> Json:
    if isinstance(coverage, str):
        return {"phase": coverage}
    return {"spans": msgspec.to_builtins(coverage)}


def _vector_json(coverage: Coverage, action: VectorAction) -> Json:
    spec: Json = {}
    if action.kind == "set":
        spec["value"] = action.value
    elif action.kind == "bound":
        spec["bounds"] = list(action.bounds)
    else:
        spec["scale"] = action.value
    if not action.sums:
        spec |= {"kind": action.kind, "relative": action.relative}
    return spec | _coverage_json(coverage)


def _spec_json(group: Group, edits: Sequence[SiteEdit]) -> Json:
    clamps: dict[str, dict[str, list[Json]]] = {}
    for edit in edits:
        layers = clamps.setdefault(edit.hook.value, {})
        layers[str(edit.layer)] = msgspec.to_builtins(edit.clamps)
    name, coverage = group
    return {"module_name": name, "clamps": clamps} | _coverage_json(coverage)
