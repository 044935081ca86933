# SPDX-License-Identifier: Apache-2.0
"""The second pass over a request's specs, which needs the configuration.

It checks modules, sites, ranges, duplicates, overlaps and limits. The structs have been
read before, so every value has its type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm.config.sae_readout_specs import SiteRead
from vllm.config.sae_steering_request import (
    HOOK_ORDER,
    Group,
    SiteEdit,
    SteeringRequest,
    sorted_clamps,
)
from vllm.config.sae_steering_sites import (
    ListedSite,
    NamedSite,
    listed_sites,
    named_module,
)
from vllm.config.sae_steering_spans import (
    SPEC_PHASES,
    Coverage,
    boundaries,
    coverage_of,
    may_overlap,
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
from vllm.config.steering import (
    HookPoint,
    SteeringConfig,
    Tier,
    site_name,
)
from vllm.config.steering_checks import (
    bad,
    refusal,
    shown,
)


@dataclass
class _Named:
    """Where a spec names something that no other spec may touch on the same tokens."""

    path: str
    coverage: Coverage


def _clash(one: Coverage, other: Coverage) -> bool:
    """Whether two specs count as acting on the same tokens.

    Specs with phases always do. Specs with spans do not if their spans cannot overlap.
    """
    by_phase = isinstance(one, str) and isinstance(other, str)
    return by_phase or may_overlap(one, other)


@dataclass
class _Reconstruction(_Named):
    """Which module reconstructs a site, and where."""

    module: str


@dataclass
class Draft:
    """A request while its specs are checked; holds what must be unique or bounded."""

    config: SteeringConfig
    sae: dict[Tier, dict[Group, dict[NamedSite, list[SAEClampEntry]]]] = field(
        default_factory=lambda: {Tier.DELTA: {}, Tier.FULL: {}}
    )
    features: dict[tuple[Tier, str, NamedSite, int], list[Coverage]] = field(
        default_factory=dict
    )
    num_clamps: dict[tuple[Tier, NamedSite], dict[Coverage, int]] = field(
        default_factory=dict
    )
    # By site and written point, since an SAE and a transcoder may read the same point.
    reconstructed: dict[tuple[NamedSite, HookPoint], list[_Reconstruction]] = field(
        default_factory=dict
    )
    first_spans: str = ""
    reads: tuple[SiteRead, ...] = ()

    def __post_init__(self) -> None:
        self.vectors = VectorDraft(self.config)

    def coverage(
        self,
        path: str,
        spec: SAEFullReconstructionSpec | SAEClampSpec | SteeringVectorSpec,
    ) -> Coverage:
        """Where a spec acts."""
        if spec.spans is not None and not self.first_spans:
            self.first_spans = f"{path}.spans"
        return coverage_of(path, spec.phase, spec.spans)

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
        coverage = self.coverage(path, spec)
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
            self.add_site(tier, (module.name, coverage), site)

    def add_site(self, tier: Tier, group: Group, clamps: ListedSite) -> None:
        """Merge one site of a spec, refusing what the request already has there."""
        name, coverage = group
        site = (clamps.site.hook, clamps.site.layer)
        if tier is Tier.FULL:
            asked = _Reconstruction(clamps.path, coverage, name)
            self.reconstruct(site, clamps.site.out_hook, asked)
        conditions = {entry.when for entry in clamps.entries} - {None}
        used = len(clamps.entries) + len(conditions)
        self.count(tier, site, _Named(clamps.path, coverage), used)
        merged = self.sae[tier].setdefault(group, {}).setdefault(site, [])
        for position, entry in enumerate(clamps.entries):
            feature = entry.feature_idx
            if feature >= clamps.site.d_sae:
                raise bad(
                    f"{clamps.path}[{position}].feature_idx",
                    feature,
                    f"an integer in 0..{clamps.site.d_sae - 1}",
                )
            others = self.features.setdefault((tier, name, site, feature), [])
            if any(_clash(coverage, other) for other in others):
                raise refusal(
                    f"{clamps.path}[{position}].feature_idx",
                    f"feature {feature} of module {shown(name)} is clamped twice at "
                    f"{clamps.site.name}, expected once, or spans that cannot overlap",
                )
            others.append(coverage)
            when = entry.when
            if when is not None:
                when = self.condition(f"{clamps.path}[{position}].when", when, clamps)
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
        if when.feature_idx >= clamps.site.d_sae:
            raise bad(
                f"{path}.feature_idx",
                when.feature_idx,
                f"an integer in 0..{clamps.site.d_sae - 1}",
            )
        above = None if when.above is None else round_to_fp32(when.above)
        below = None if when.below is None else round_to_fp32(when.below)
        return SAECondition(when.feature_idx, above, below)

    def reconstruct(
        self, site: NamedSite, written: HookPoint, asked: _Reconstruction
    ) -> None:
        """Record which module reconstructs a site. At most one does, on each token."""
        others = self.reconstructed.setdefault((site, written), [])
        for other in others:
            clashes = _clash(asked.coverage, other.coverage)
            if other.module != asked.module and clashes:
                raise refusal(
                    asked.path,
                    f"{site_name(*site)} is already reconstructed by module "
                    f"{shown(other.module)} ({other.path}), expected at most one "
                    "module per site, or spans that cannot overlap",
                )
        others.append(asked)

    def count(self, tier: Tier, site: NamedSite, named: _Named, added: int) -> None:
        """Bound what one tier does at one site, over all specs of the request."""
        counts = self.num_clamps.setdefault((tier, site), {})
        total = added + sum(
            n for other, n in counts.items() if _clash(named.coverage, other)
        )
        if total > self.config.max_clamps:
            raise refusal(
                named.path,
                f"found {total} clamps at {site_name(*site)} in this request, "
                f"expected at most {self.config.max_clamps}",
            )
        counts[named.coverage] = counts.get(named.coverage, 0) + added

    def add_vector_spec(self, path: str, spec: SteeringVectorSpec) -> None:
        """Check one spec; scales of one vector add up, other kinds stand alone."""
        coverage = self.coverage(path, spec)
        module, is_first = self.vectors.add(path, spec, coverage)
        if is_first:
            for site in module.sites:
                place = (site.hook, site.layer)
                self.count(Tier.ADDITIVE, place, _Named(path, coverage), 1)

    def finish(self) -> SteeringRequest:
        """The canonical request."""
        inline = self.vectors.inline
        order = {name: i for i, name in enumerate((*self.config.modules, *inline))}

        def rank(group: Group) -> tuple[int, int, str]:
            name, coverage = group
            if isinstance(coverage, str):
                return order[name], SPEC_PHASES.index(coverage), ""
            return order[name], len(SPEC_PHASES), repr(coverage)

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
        request = SteeringRequest(sae_edits, vectors, modules, self.reads, data)
        if self.first_spans:
            self.check_pieces(request)
        return request

    def check_pieces(self, request: SteeringRequest) -> None:
        """Bound the pieces of the schedule, so that rows suffice."""
        found = len(boundaries(request.coverages))
        most = self.config.max_pieces - 2
        if found > most:
            raise refusal(
                self.first_spans,
                f"the spans of this request start or stop at {found} places inside the "
                f"prompt or the answer, expected at most {most} "
                "(additional_config.steering.max_pieces)",
            )


def _site_edits(
    name: str, sites: Mapping[NamedSite, list[SAEClampEntry]]
) -> tuple[SiteEdit, ...]:
    ordered = sorted(sites, key=lambda site: (site[1], HOOK_ORDER[site[0]]))
    return tuple(
        SiteEdit(name, hook, layer, sorted_clamps(sites[hook, layer]))
        for hook, layer in ordered
    )
