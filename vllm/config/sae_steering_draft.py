# SPDX-License-Identifier: Apache-2.0
"""The second pass over a request's specs, which needs the configuration.

It checks modules, sites, ranges, duplicates, overlaps and limits. The structs have been
read before, so every value has its type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from vllm.config.sae_readout_specs import SiteRead
from vllm.config.sae_steering_edits import SiteEdit
from vllm.config.sae_steering_request import (
    HOOK_ORDER,
    Group,
    SteeringRequest,
    sorted_clamps,
)
from vllm.config.sae_steering_sites import (
    ListedSite,
    NamedSite,
    check_feature,
    listed_sites,
    named_module,
)
from vllm.config.sae_steering_spans import (
    Coverage,
    CoverageOrder,
    Spans,
    boundaries,
    coverage_of,
    coverage_order,
    spans_may_overlap,
    spans_of,
)
from vllm.config.sae_steering_specs import (
    SAEClampEntry,
    SAEClampSpec,
    SAECondition,
    SAEFullReconstructionSpec,
    SteeringVectorSpec,
)
from vllm.config.sae_steering_vector_action import round_to_fp32
from vllm.config.sae_steering_vector_draft import VectorDraft
from vllm.config.steering import SteeringConfig, Tier
from vllm.config.steering_checks import refusal, shown
from vllm.config.steering_points import HookPoint, site_name


class _Part(msgspec.Struct, gc=False):
    """The tokens of some specs of a request.

    Attributes:
        bit: one bit, its own.
        clashes: the bits of the parts that count as on the same tokens. Phases always
            do, and spans if they may overlap.
    """

    coverage: Coverage
    spans: Spans
    bit: int
    clashes: int


@dataclass
class _Parts:
    """The coverages of a request. Each pair is compared once."""

    most_places: int
    exact_positions: bool
    known: dict[Coverage, _Part] = field(default_factory=dict)
    places: set[tuple[str, int]] = field(default_factory=set)

    def add(self, path: str, coverage: Coverage) -> _Part:
        """The part of a coverage. Bounds the pieces, so that rows suffice."""
        part = self.known.get(coverage)
        if part is not None:
            return part
        inside = boundaries(coverage)
        if not self.exact_positions and any(of == "generated" for of, _ in inside):
            raise refusal(
                f"{path}.spans",
                "found a span that starts or stops inside the answer, expected none, "
                "because this engine schedules ahead of draft tokens that may be "
                "rejected; it can with --no-async-scheduling",
            )
        self.places |= inside
        if len(self.places) > self.most_places:
            raise refusal(
                f"{path}.spans",
                f"the spans of this request start or stop at {len(self.places)} or "
                "more places inside the prompt or the answer, expected at most "
                f"{self.most_places} (additional_config.steering.max_pieces)",
            )
        bit = 1 << len(self.known)
        spans, by_phase = spans_of(coverage), isinstance(coverage, str)
        part = _Part(coverage, spans, bit, bit)
        for other in self.known.values():
            if (by_phase and isinstance(other.coverage, str)) or spans_may_overlap(
                spans, other.spans
            ):
                part.clashes |= other.bit
                other.clashes |= bit
        self.known[coverage] = part
        return part


class _Reconstruction(msgspec.Struct, frozen=True, gc=False):
    """Which module reconstructs a site, and where."""

    path: str
    part: _Part
    module: str


@dataclass
class Draft:
    """A request while its specs are checked; holds what must be unique or bounded."""

    config: SteeringConfig
    sae: dict[Tier, dict[Group, dict[NamedSite, list[SAEClampEntry]]]] = field(
        default_factory=lambda: {Tier.DELTA: {}, Tier.FULL: {}}
    )
    # The bits of the parts in which a feature is clamped.
    features: dict[tuple[Tier, str, NamedSite, int], int] = field(default_factory=dict)
    # Clamps by the bit of their part.
    num_clamps: dict[tuple[Tier, NamedSite], dict[int, int]] = field(
        default_factory=dict
    )
    # By site and written point, since an SAE and a transcoder may read the same point.
    reconstructed: dict[tuple[NamedSite, HookPoint], list[_Reconstruction]] = field(
        default_factory=dict
    )
    reads: tuple[SiteRead, ...] = ()

    def __post_init__(self) -> None:
        self.vectors = VectorDraft(self.config)
        self.parts = _Parts(self.config.max_pieces - 2, self.config.exact_positions)

    def part(
        self,
        path: str,
        spec: SAEFullReconstructionSpec | SAEClampSpec | SteeringVectorSpec,
    ) -> _Part:
        """Where a spec acts."""
        return self.parts.add(path, coverage_of(path, spec.phase, spec.spans))

    def add_sae_spec(
        self,
        tier: Tier,
        path: str,
        spec: SAEFullReconstructionSpec | SAEClampSpec,
    ) -> None:
        """Check one spec of an SAE tier and add it."""
        module = named_module(
            f"{path}.module_name", spec.module_name, self.config, "sae"
        )
        part = self.part(path, spec)
        where = f"{path}.clamps"
        sites = listed_sites(where, spec.clamps, module)
        if not sites and tier is Tier.FULL:
            sites = [ListedSite(where, site, ()) for site in module.sites]
        elif not sites:
            raise refusal(where, "is empty, expected at least one clamp entry")
        for site in sites:
            if not site.entries and tier is not Tier.FULL:
                raise refusal(
                    site.path, "found an empty list, expected at least one clamp entry"
                )
            self.add_site(tier, module.name, part, site)

    def add_site(self, tier: Tier, name: str, part: _Part, clamps: ListedSite) -> None:
        """Merge one site of a spec, refusing what the request already has there."""
        site = (clamps.site.hook, clamps.site.layer)
        if tier is Tier.FULL:
            asked = _Reconstruction(clamps.path, part, name)
            self.reconstruct(site, clamps.site.out_hook, asked)
        conditions = {entry.when for entry in clamps.entries} - {None}
        used = len(clamps.entries) + len(conditions)
        self.count(tier, site, clamps.path, part, used)
        group = (name, part.coverage)
        merged = self.sae[tier].setdefault(group, {}).setdefault(site, [])
        for position, entry in enumerate(clamps.entries):
            feature = entry.feature_idx
            where = f"{clamps.path}[{position}]"
            check_feature(f"{where}.feature_idx", feature, clamps.site)
            key = (tier, name, site, feature)
            others = self.features.get(key, 0)
            if others & part.clashes:
                raise refusal(
                    f"{where}.feature_idx",
                    f"feature {feature} of module {shown(name)} is clamped twice at "
                    f"{clamps.site.name}, expected once, or spans that cannot overlap",
                )
            self.features[key] = others | part.bit
            when = entry.when
            if when is not None:
                when = self.condition(f"{where}.when", when, clamps)
            value = round_to_fp32(entry.value)
            merged.append(
                SAEClampEntry(feature, entry.kind, value, entry.only_if_active, when)
            )

    def condition(
        self, path: str, when: SAECondition, clamps: ListedSite
    ) -> SAECondition:
        """The canonical form of a condition."""
        if (when.above is None) == (when.below is None):
            has = "neither" if when.above is None else "both"
            raise refusal(path, f"found {has} of above and below, expected exactly one")
        check_feature(f"{path}.feature_idx", when.feature_idx, clamps.site)
        above = None if when.above is None else round_to_fp32(when.above)
        below = None if when.below is None else round_to_fp32(when.below)
        return SAECondition(when.feature_idx, above, below)

    def reconstruct(
        self, site: NamedSite, written: HookPoint, asked: _Reconstruction
    ) -> None:
        """Record which module reconstructs a site. At most one does, on each token."""
        others = self.reconstructed.setdefault((site, written), [])
        for other in others:
            if other.module != asked.module and asked.part.clashes & other.part.bit:
                raise refusal(
                    asked.path,
                    f"{site_name(*site)} is already reconstructed by module "
                    f"{shown(other.module)} ({other.path}), expected at most one "
                    "module per site, or spans that cannot overlap",
                )
        others.append(asked)

    def count(
        self, tier: Tier, site: NamedSite, path: str, part: _Part, added: int
    ) -> None:
        """Bound what one tier does at one site, over all specs of the request."""
        counts = self.num_clamps.setdefault((tier, site), {})
        total = added + sum(n for bit, n in counts.items() if part.clashes & bit)
        if total > self.config.max_clamps:
            raise refusal(
                path,
                f"found {total} clamps at {site_name(*site)} in this request, "
                f"expected at most {self.config.max_clamps} "
                "(additional_config.steering.max_clamps)",
            )
        counts[part.bit] = counts.get(part.bit, 0) + added

    def add_vector_spec(self, path: str, spec: SteeringVectorSpec) -> None:
        """Check one spec; scales of one vector add up, other kinds stand alone."""
        part = self.part(path, spec)
        module, is_first = self.vectors.add(path, spec, part.coverage)
        if is_first:
            for site in module.sites:
                place = (site.hook, site.layer)
                self.count(Tier.ADDITIVE, place, path, part, 1)

    def finish(self) -> SteeringRequest:
        """The canonical request."""
        inline = self.vectors.inline
        order = {name: i for i, name in enumerate((*self.config.modules, *inline))}

        def rank(group: Group) -> tuple[int, CoverageOrder]:
            name, coverage = group
            return order[name], coverage_order(coverage)

        sae_edits = {
            tier: {
                group: _site_edits(group[0], groups[group])
                for group in sorted(groups, key=rank)
            }
            for tier, groups in self.sae.items()
            if groups
        }
        summed = self.vectors.summed()
        vectors = {group: summed[group] for group in sorted(summed, key=rank)}
        named = {name for groups in self.sae.values() for name, _ in groups}
        named.update(name for name, _ in summed)
        named.update(read.module for read in self.reads)
        modules = {n: m for n, m in self.config.modules.items() if n in named}
        modules |= {name: own.module for name, own in inline.items()}
        data = {name: own.data for name, own in inline.items()}
        return SteeringRequest(sae_edits, vectors, modules, self.reads, data)


def _site_edits(
    name: str, sites: Mapping[NamedSite, list[SAEClampEntry]]
) -> tuple[SiteEdit, ...]:
    ordered = sorted(sites, key=lambda site: (site[1], HOOK_ORDER[site[0]]))
    return tuple(
        SiteEdit(name, hook, layer, sorted_clamps(sites[hook, layer]))
        for hook, layer in ordered
    )
