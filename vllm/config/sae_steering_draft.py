# SPDX-License-Identifier: Apache-2.0
"""The second pass over a request's specs: what needs the configuration.

Modules, sites, ranges, duplicates, overlaps and limits. The structs have been read by
then, so every value has its type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm.config.sae_readout_specs import SiteRead
from vllm.config.sae_steering_request import (
    HOOK_ORDER,
    Group,
    SiteEdit,
    SteeringRequest,
    VectorAction,
    add_scales,
    round_to_fp32,
    sorted_clamps,
)
from vllm.config.sae_steering_sites import (
    ListedSite,
    Site,
    listed_sites,
    named_module,
)
from vllm.config.sae_steering_spans import (
    SPEC_PHASES,
    TOKEN_PHASES,
    Coverage,
    acts,
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
from vllm.config.steering import (
    HookPoint,
    SteeringConfig,
    Tier,
)
from vllm.config.steering_checks import (
    bad,
    refusal,
    shown,
)


@dataclass
class _Named:
    """Where a spec names something that another may not touch on the same tokens."""

    path: str
    coverage: Coverage


def _clash(one: Coverage, other: Coverage) -> bool:
    """Whether two specs count as acting together.

    Specs by phase always do: spans say that two never meet.
    """
    by_phase = isinstance(one, str) and isinstance(other, str)
    return by_phase or may_overlap(one, other)


@dataclass
class _Reconstruction(_Named):
    """Which module reconstructs a site, and where."""

    module: str


@dataclass
class _Vector(_Named):
    """What a spec does along a module's vectors."""

    action: VectorAction


@dataclass
class Draft:
    """A request while its specs are checked; holds what must be unique or bounded."""

    config: SteeringConfig
    sae: dict[Tier, dict[Group, dict[Site, list[SAEClampEntry]]]] = field(
        default_factory=lambda: {Tier.DELTA: {}, Tier.FULL: {}}
    )
    vectors: dict[str, list[_Vector]] = field(default_factory=dict)
    features: dict[tuple[Tier, str, Site, int], list[Coverage]] = field(
        default_factory=dict
    )
    num_clamps: dict[tuple[Tier, Site], dict[Coverage, int]] = field(
        default_factory=dict
    )
    # By site and the point that is written: a transcoder is not an SAE that reads
    # the same point.
    reconstructed: dict[tuple[Site, HookPoint], list[_Reconstruction]] = field(
        default_factory=dict
    )
    first_spans: str = ""
    reads: tuple[SiteRead, ...] = ()

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
                    f"layer {site[1]}, {site[0].value}, expected once, or spans that "
                    "cannot overlap",
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
        self.require_extended(path, "conditions")
        if (when.above is None) == (when.below is None):
            raise refusal(path, "expected exactly one of above and below")
        if when.feature_idx >= clamps.site.d_sae:
            raise bad(
                f"{path}.feature_idx",
                when.feature_idx,
                f"an integer in 0..{clamps.site.d_sae - 1}",
            )
        above = None if when.above is None else round_to_fp32(when.above)
        below = None if when.below is None else round_to_fp32(when.below)
        return SAECondition(when.feature_idx, above, below)

    def require_extended(self, path: str, what: str) -> None:
        """Refuse what the engine's kernels cannot do."""
        if not self.config.extended_clamps:
            raise refusal(path, f"{what} are not supported by this engine's kernels")

    def reconstruct(
        self, site: Site, written: HookPoint, asked: _Reconstruction
    ) -> None:
        """Note who reconstructs a site; at most one module does, on each token."""
        others = self.reconstructed.setdefault((site, written), [])
        for other in others:
            clashes = _clash(asked.coverage, other.coverage)
            if other.module != asked.module and clashes:
                raise refusal(
                    asked.path,
                    f"layer {site[1]} at {site[0].value} is reconstructed by module "
                    f"{shown(other.module)} already ({other.path}), expected at most "
                    "one module a site, or spans that cannot overlap",
                )
        others.append(asked)

    def count(self, tier: Tier, site: Site, named: _Named, added: int) -> None:
        """Bound what one tier does at one site, over all specs of the request."""
        counts = self.num_clamps.setdefault((tier, site), {})
        total = added + sum(
            n for other, n in counts.items() if _clash(named.coverage, other)
        )
        if total > self.config.max_clamps:
            raise refusal(
                named.path,
                f"found {total} clamps at layer {site[1]}, {site[0].value} in this "
                f"request, expected at most {self.config.max_clamps}",
            )
        counts[named.coverage] = counts.get(named.coverage, 0) + added

    def add_vector_spec(self, path: str, spec: SteeringVectorSpec) -> None:
        """Check one spec; scales of one module add up, other kinds stand alone."""
        name = spec.module_name
        module = named_module(f"{path}.module_name", name, self.config, "vectors")
        asked = _Vector(path, self.coverage(path, spec), _action(path, spec))
        if not asked.action.sums:
            self.require_extended(f"{path}.kind", "kinds other than add, and relative")
        others = self.vectors.setdefault(name, [])
        for other in others:
            together = other.action.sums and asked.action.sums
            if not together and may_overlap(asked.coverage, other.coverage):
                raise refusal(
                    f"{path}.kind",
                    f"module {shown(name)} acts on some of these tokens already "
                    f"({other.path}); only specs that add without relative add up",
                )
        if not others:
            for site in module.sites:
                self.count(Tier.ADDITIVE, (site.hook, site.layer), asked, 1)
        others.append(asked)
        self.check_sums(others)

    def check_sums(self, vectors: Sequence[_Vector]) -> None:
        """Refuse scales of one module whose sum float32 does not hold."""
        adding = [vector for vector in vectors if vector.action.sums]
        if all(isinstance(vector.coverage, str) for vector in adding):
            subsets = [
                [v.action.value for v in adding if acts(v.coverage, phase)]
                for phase in TOKEN_PHASES
            ]
        else:
            # Any subset may act on some token.
            subsets = [[abs(vector.action.value) for vector in adding]]
        for scales in subsets:
            try:
                add_scales(scales)
            except OverflowError:
                raise refusal(
                    f"{vectors[-1].path}.scale",
                    "the scales of this module add up to more than float32 holds, "
                    "expected a finite sum",
                ) from None

    def finish(self) -> SteeringRequest:
        """The canonical request."""
        order = {name: i for i, name in enumerate(self.config.modules)}

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
        summed = self.summed_vectors()
        vectors = {group: summed[group] for group in sorted(summed, key=rank)}
        named = {name for groups in self.sae.values() for name, _ in groups}
        named.update(self.vectors)
        named.update(read.module for read in self.reads)
        modules = {n: m for n, m in self.config.modules.items() if n in named}
        request = SteeringRequest(sae_edits, vectors, modules, self.reads)
        if self.first_spans:
            self.check_pieces(request)
        return request

    def summed_vectors(self) -> dict[Group, VectorAction]:
        """The action of every module and coverage."""
        found: dict[Group, VectorAction] = {}
        for name, vectors in self.vectors.items():
            for coverage in dict.fromkeys(vector.coverage for vector in vectors):
                same = [v.action for v in vectors if v.coverage == coverage]
                action = same[0]
                if action.sums:
                    action = VectorAction("add", add_scales([a.value for a in same]))
                found[name, coverage] = action
        return found

    def check_pieces(self, request: SteeringRequest) -> None:
        """Bound the pieces of the schedule, so that rows suffice."""
        found = len(boundaries(request.coverages))
        most = self.config.max_pieces - 2
        if found > most:
            raise refusal(
                self.first_spans,
                f"the spans of this request begin or end at {found} places within the "
                f"prompt or the answer, expected at most {most} "
                "(additional_config.steering.max_pieces)",
            )


def _action(path: str, spec: SteeringVectorSpec) -> VectorAction:
    """What a vector spec does; its fields fit its kind."""
    kind = spec.kind
    for name, value, owner in (
        ("value", spec.value, "set"),
        ("bounds", spec.bounds, "bound"),
    ):
        if value is not None and kind != owner:
            raise refusal(f"{path}.{name}", f'expected only with kind "{owner}"')
        if value is None and kind == owner:
            raise refusal(f"{path}.{name}", f'is missing, expected with kind "{kind}"')
    if kind in ("set", "bound") and spec.scale != 1.0:
        raise refusal(f"{path}.scale", 'expected only with kind "add" or "scale"')
    if kind == "scale":
        if spec.relative:
            raise refusal(f"{path}.relative", 'found true, expected false for "scale"')
        if spec.scale == 1.0:
            raise bad(f"{path}.scale", 1.0, "a factor other than 1, such as 0")
    if spec.bounds is not None:
        low, high = (round_to_fp32(bound) for bound in spec.bounds)
        if low > high:
            raise refusal(f"{path}.bounds", "expected [low, high] with low <= high")
        return VectorAction("bound", bounds=(low, high), relative=spec.relative)
    value = spec.scale if spec.value is None else spec.value
    return VectorAction(kind, round_to_fp32(value), relative=spec.relative)


def _site_edits(
    name: str, sites: Mapping[Site, list[SAEClampEntry]]
) -> tuple[SiteEdit, ...]:
    ordered = sorted(sites, key=lambda site: (site[1], HOOK_ORDER[site[0]]))
    return tuple(
        SiteEdit(name, hook, layer, sorted_clamps(sites[hook, layer]))
        for hook, layer in ordered
    )
