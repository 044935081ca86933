# SPDX-License-Identifier: Apache-2.0
"""The canonical form of a request's steering, and its digests.

`SteeringRequest` is what `vllm.config.sae_steering_parser.parse_steering_request`
makes of the specs: merged, sorted, in range, and resolved to the sites that each tier
edits in each phase.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Concatenate, ParamSpec, TypeVar, cast

import msgspec

from vllm.config.sae_inline_vectors import as_text
from vllm.config.sae_readout_specs import SiteRead, reads_to_json
from vllm.config.sae_steering_spans import Coverage, When, acts, pieces
from vllm.config.sae_steering_specs import (
    ADDITIVE_KEY,
    CLAMP_KINDS,
    DELTA_KEY,
    FULL_KEY,
    READOUT_KEY,
    VECTOR_KINDS,
    SAEClampEntry,
    SAECondition,
)
from vllm.config.sae_steering_vector_action import VectorAction, add_scales
from vllm.config.steering import HookPoint, ModuleInfo, Tier
from vllm.config.steering_json import Json

# Feature, kind, value, only_if_active; the condition's kind (0: none), feature, bound.
_CLAMP_RECORD = struct.Struct("<QBf?BQf")
# Kind, relative, value, bounds.
_VECTOR_RECORD = struct.Struct("<B?fff")

HOOK_ORDER = {hook: order for order, hook in enumerate(HookPoint)}


@dataclass(frozen=True)
class SiteEdit:
    """What one module does at one site: its clamps, sorted by feature.

    The additive tier's edit is one `VectorAction`.
    """

    module: str
    hook: HookPoint
    layer: int
    clamps: tuple[SAEClampEntry, ...] | tuple[VectorAction, ...]


_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")


def _found_once(
    method: Callable[Concatenate[SteeringRequest, _Given], _Found],
) -> Callable[Concatenate[SteeringRequest, _Given], _Found]:
    """Makes a method of `SteeringRequest` keep its result for each set of arguments."""

    @functools.wraps(method)
    def kept(
        self: SteeringRequest, *args: _Given.args, **kwargs: _Given.kwargs
    ) -> _Found:
        key = (method.__name__, *args, *kwargs.items())
        if key not in self._found:
            self._found[key] = method(self, *args, **kwargs)
        return cast(_Found, self._found[key])

    return kept


# One canonical group of specs: what one module does where one coverage holds.
Group = tuple[str, Coverage]


@dataclass(frozen=True)
class Piece:
    """Positions before `stop` (None: all others) that are edited alike.

    `digest` is from `hash_steering_config`; None if the piece is not edited.
    """

    stop: int | None
    when: When
    digest: str | None


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
    # What `_found_once` keeps: one object serves many requests.
    _found: dict[tuple[object, ...], object] = field(
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

    @_found_once
    def schedule(self, num_prompt_tokens: int, /) -> tuple[Piece, ...]:
        """The pieces of a request with this prompt.

        Neighbouring pieces differ, except at the prompt's end, where a piece always
        ends.
        """
        found: list[Piece] = []
        for stop, acting in pieces(self.coverages, num_prompt_tokens):
            digest = self.digest(acting)
            alike = found and found[-1].digest == digest
            if alike and found[-1].stop != num_prompt_tokens:
                found.pop()
            found.append(Piece(stop, acting, digest))
        return tuple(found)

    @_found_once
    def edits(self, tier: Tier, when: When, /) -> tuple[SiteEdit, ...]:
        """The edits of a tier for the tokens of a phase or a piece.

        Sorted by layer, hook and the order in which the site's slots run (for modules
        not placed, registration order); every (module, site) occurs once.
        """
        order = {name: position for position, name in enumerate(self.modules)}
        merged: dict[tuple[int, int, bool, int], SiteEdit] = {}
        for edit in self._applying(tier, when):
            slot = self.modules[edit.module].slot_at(edit.hook, edit.layer)
            place = order[edit.module] if slot is None else slot
            key = (edit.layer, HOOK_ORDER[edit.hook], slot is None, place)
            if key in merged:
                clamps = sorted_clamps((*merged[key].clamps, *edit.clamps))
                edit = SiteEdit(edit.module, edit.hook, edit.layer, clamps)
            merged[key] = edit
        return tuple(merged[key] for key in sorted(merged))

    @_found_once
    def digest(self, when: When, /) -> str | None:
        """`hash_steering_config` of this request with its own module digests."""
        acting = [tier for tier in Tier if self.edits(tier, when)]
        if len(acting) == 1:  # the same bytes are hashed, once
            return self.row_key(acting[0], when)
        return hash_steering_config(self, when, self.module_digests)

    @_found_once
    def row_key(self, tier: Tier, when: When, /) -> str | None:
        """Key of the row that holds a tier's edits there (hex), or None.

        Requests with equal keys can share a row. The key does not say when they act.
        """
        edits = self.edits(tier, when)
        return _hash([_tier_block(tier, edits, self.module_digests)] if edits else [])

    def _applying(self, tier: Tier, when: When) -> Iterable[SiteEdit]:
        if tier is Tier.ADDITIVE:
            yield from self._vector_edits(when)
            return
        for (_, coverage), edits in self.sae_edits.get(tier, {}).items():
            if acts(coverage, when):
                yield from edits

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
                    yield SiteEdit(name, site.hook, site.layer, (action,))


_Clamp = TypeVar("_Clamp", SAEClampEntry, VectorAction)


def sorted_clamps(clamps: Iterable[_Clamp]) -> tuple[_Clamp, ...]:
    """Clamps in canonical order; a site holds a feature at most once."""
    return tuple(sorted(clamps, key=lambda clamp: clamp.feature_idx))


def module_fingerprint(module: ModuleInfo) -> str:
    """Identifies what a module does: its content digest and its bypassed tokens.

    The bypassed ids are not in the content digest, because the default depends on
    the model that the module is loaded for.
    """
    skipped = module.skip_token_ids
    ids = "default" if skipped is None else ",".join(map(str, sorted(skipped)))
    return f"{module.digest}/skip={ids}"


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
            blocks.append(_tier_block(tier, edits, module_digests))
    return _hash(blocks)


def _hash(blocks: Sequence[bytes]) -> str | None:
    if not blocks:
        return None
    return hashlib.sha256(_block("vllm.steering.v2", *blocks)).hexdigest()


def _block(tag: str, *parts: bytes) -> bytes:
    """A tag and its parts, each preceded by its length."""
    head = tag.encode()
    out = [struct.pack("<IQ", len(head), len(parts)), head]
    for part in parts:
        out += [struct.pack("<Q", len(part)), part]
    return b"".join(out)


def _tier_block(
    tier: Tier, edits: Sequence[SiteEdit], module_digests: Mapping[str, str]
) -> bytes:
    return _block(
        f"tier.{tier.name.lower()}",
        *(_edit_block(edit, module_digests[edit.module]) for edit in edits),
    )


def _edit_block(edit: SiteEdit, module_digest: str) -> bytes:
    return _block(
        "edit",
        edit.module.encode("utf-8", "surrogatepass"),
        module_digest.encode(),
        edit.hook.value.encode(),
        struct.pack("<Q", edit.layer),
        b"".join(_clamp_record(clamp) for clamp in edit.clamps),
    )


def _clamp_record(clamp: SAEClampEntry | VectorAction) -> bytes:
    """Fixed width within a tier, so that a list of records needs no lengths."""
    if isinstance(clamp, VectorAction):
        kind = VECTOR_KINDS.index(clamp.kind)
        return _VECTOR_RECORD.pack(kind, clamp.relative, clamp.value, *clamp.bounds)
    kind = CLAMP_KINDS.index(clamp.kind)
    return _CLAMP_RECORD.pack(
        clamp.feature_idx,
        kind,
        clamp.value,
        clamp.only_if_active,
        *_condition_record(clamp.when),
    )


def _condition_record(when: SAECondition | None) -> tuple[int, int, float]:
    if when is None:
        return 0, 0, 0.0
    if when.above is not None:
        return 1, when.feature_idx, when.above
    return 2, when.feature_idx, when.below or 0.0


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
