# SPDX-License-Identifier: Apache-2.0
"""The one strict parser of steering specs, for every surface.

`vllm.config.steering_reader` reads the structs of `vllm.config.sae_steering_specs`;
what follows here needs the configuration: modules, sites, ranges, duplicates,
conflicts. Whatever a client sends, the only exception is `VLLMValidationError`; its
`parameter` is the path of the offending field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from vllm.config.sae_readout_parser import check_reads
from vllm.config.sae_readout_specs import SiteRead
from vllm.config.sae_steering_names import refuse_misspelt
from vllm.config.sae_steering_request import (
    HOOK_ORDER,
    Group,
    SiteEdit,
    SteeringRequest,
    add_scales,
    round_to_fp32,
    sorted_clamps,
)
from vllm.config.sae_steering_specs import (
    ADDITIVE_KEY,
    DELTA_KEY,
    EXTRA_ARGS_KEYS,
    FULL_KEY,
    READOUT_KEY,
    SPEC_PHASES,
    SPEC_TYPES,
    TOKEN_PHASES,
    SAEClampEntry,
    SAEClampSpec,
    SAEFullReconstructionSpec,
    SpecPhase,
    SteeringFields,
    SteeringVectorSpec,
)
from vllm.config.steering import (
    HOOK_ALIASES,
    HOOK_NAMES,
    HookPoint,
    ModuleInfo,
    ModuleKind,
    SiteInfo,
    SteeringConfig,
    Tier,
)
from vllm.config.steering_checks import (
    ModuleChangedError,
    bad,
    key_path,
    listing,
    refusal,
    shown,
)
from vllm.config.steering_json import JsonView
from vllm.config.steering_reader import Reader, packed

# No model has more digits than this in a layer index; bounds int() of a client's
# string, which raises on very long ones.
MAX_LAYER_DIGITS = 9
# Of one request, over all of its specs.
MAX_SITES = 1024
MAX_CLAMPS = 4096
NOT_CONFIGURED = (
    "this engine was started without steering modules. Start it with "
    "--steering-modules NAME=PATH, or with "
    'additional_config={"steering": {"modules": {"NAME": "PATH"}}}'
)

Site = tuple[HookPoint, int]
_READERS = {key: Reader(list[spec]) for key, spec in SPEC_TYPES.items()}  # type: ignore[valid-type]


def parse_steering_request(
    extra_args: JsonView | None, config: SteeringConfig | None
) -> SteeringRequest | None:
    """Check what a request asks for and return its canonical form.

    Args:
        extra_args: `SamplingParams.extra_args`; `EXTRA_ARGS_KEYS` are read, and keys
            that are nearly one of them refused.
        config: what the engine was started with; None when without steering.

    Returns:
        None when nothing is asked: no key, null, or an empty list of specs.

    Raises:
        VLLMValidationError: `parameter` is the path of the first bad field.
    """
    if not isinstance(extra_args, Mapping):
        return None
    refuse_misspelt(extra_args, "extra_args.")
    given = {
        key: extra_args[key]
        for key in EXTRA_ARGS_KEYS
        if _is_asked(extra_args.get(key))
    }
    if not given:
        return None
    if config is None:
        raise refusal(next(iter(given)), NOT_CONFIGURED)
    check_counts(given, config)
    # A request is parsed wherever it passes, and many requests ask for the same.
    data = packed(given)
    request = config.parsed.get(data)
    if request is None:
        request = _parse(given, config)
        config.parsed.keep(data, request)
    return cast(SteeringRequest, request)


def check_counts(given: JsonView, config: SteeringConfig) -> None:
    """Bound what a request lists, before anything of it is read."""
    specs = [spec for specs in given.values() for spec in _items(specs)]
    if len(specs) > config.max_specs:
        raise refusal(
            next(iter(given)),
            f"found {len(specs)} specs in this request, expected at most "
            f"{config.max_specs} (additional_config.steering.max_specs)",
        )
    sites = clamps = 0
    for key, listed in given.items():
        for position, spec in enumerate(_items(listed)):
            for entries in _listed_sites(spec):
                sites += 1
                clamps += len(_items(entries))
                if sites > MAX_SITES or clamps > MAX_CLAMPS:
                    raise refusal(
                        f"{key}[{position}].clamps",
                        f"found more than {MAX_SITES} sites or {MAX_CLAMPS} clamps in "
                        "this request, expected fewer",
                    )


def _listed_sites(spec: Any) -> Iterator[Any]:
    """What a spec lists for each site, before its types are known."""
    if isinstance(spec, dict):
        clamps = spec.get("clamps")
    elif isinstance(spec, (SAEFullReconstructionSpec, SAEClampSpec)):
        clamps = spec.clamps
    else:
        return
    if not isinstance(clamps, dict):
        yield clamps
        return
    for layers in clamps.values():
        if isinstance(layers, dict):
            yield from layers.values()
        else:
            yield layers


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _is_asked(specs: Any) -> bool:
    return specs is not None and not (isinstance(specs, (list, tuple)) and not specs)


def _parse(given: JsonView, config: SteeringConfig) -> SteeringRequest:
    draft = _Draft(config)
    fields = SteeringFields(**{key: _read(key, given[key]) for key in given})
    for position, full in enumerate(fields.sae_full_reconstruction_specs or ()):
        draft.add_sae_spec(Tier.FULL, f"{FULL_KEY}[{position}]", full)
    for position, delta in enumerate(fields.sae_clamp_specs or ()):
        draft.add_sae_spec(Tier.DELTA, f"{DELTA_KEY}[{position}]", delta)
    for position, vector in enumerate(fields.steering_vector_specs or ()):
        draft.add_vector_spec(f"{ADDITIVE_KEY}[{position}]", vector)
    draft.reads = check_reads(READOUT_KEY, fields.sae_readout_specs or (), config)
    return draft.finish()


def _read(key: str, specs: Any) -> Any:
    for position, spec in enumerate(_items(specs)):
        # The encoder would take the struct of another tier for an object.
        if isinstance(spec, msgspec.Struct) and type(spec) is not SPEC_TYPES[key]:
            raise bad(f"{key}[{position}]", spec, f"a {SPEC_TYPES[key].__name__}")
    return _READERS[key].read(specs, key)


def _module(
    path: str, name: str, config: SteeringConfig, kind: ModuleKind
) -> ModuleInfo:
    """The module that a spec names."""
    module = config.modules.get(name)
    if module is not None and module.kind == kind and name not in config.draining:
        return module
    fitting = [
        known
        for known, m in config.modules.items()
        if m.kind == kind and known not in config.draining
    ]
    accepted = f'a module of kind "{kind}": {listing(fitting)}'
    if module is None:
        raise bad(path, name, accepted)
    if module.kind != kind:
        raise refusal(
            path,
            f'module {shown(name)} is of kind "{module.kind}", expected {accepted}',
        )
    raise ModuleChangedError(
        f"{path}: module {shown(name)} is being removed or replaced, expected "
        f"{accepted}",
        path,
    )


def _layer(path: str, key: int | str) -> int:
    if type(key) is int and key >= 0:
        return key
    if (
        type(key) is str
        and key.isascii()
        and key.isdigit()
        and len(key) <= MAX_LAYER_DIGITS
        and (key == "0" or key[0] != "0")
    ):
        return int(key)
    raise refusal(
        path, f'layer key {shown(key)}, expected a layer index such as 20 or "20"'
    )


def _hook(path: str, key: str) -> HookPoint:
    if key in HOOK_ALIASES:
        return HOOK_ALIASES[key]
    raise refusal(path, f"unknown hook {shown(key)}, expected one of {HOOK_NAMES}")


def _covered_site(
    path: str, module: ModuleInfo, hook: HookPoint, layer: int
) -> SiteInfo:
    site = module.site(hook, layer)
    if site is None:
        covered = [site.name for site in module.sites]
        raise refusal(
            path,
            f"module {shown(module.name)} does not cover layer {shown(layer)} at "
            f"{hook.value}, expected one of its sites: {listing(covered)}",
        )
    return site


@dataclass
class _SiteClamps:
    """Where a spec names one site, and what it lists there."""

    path: str
    site: SiteInfo
    entries: Sequence[SAEClampEntry]


def _clamps(path: str, clamps: Any, module: ModuleInfo) -> list[_SiteClamps]:
    """Every site that the `clamps` of a spec name; none where they are empty."""
    if isinstance(clamps, list):
        if len(module.sites) != 1:
            raise refusal(
                path,
                f"found a list, expected {{hook: {{layer: [entry, ...]}}}}, because "
                f"module {shown(module.name)} has {len(module.sites)} sites",
            )
        return [_SiteClamps(path, module.sites[0], clamps)]
    found: dict[Site, _SiteClamps] = {}
    hooks: set[HookPoint] = set()
    for hook_key, layers in clamps.items():
        hook_path = key_path(path, hook_key)
        hook = _hook(hook_path, hook_key)
        if hook in hooks:
            raise refusal(hook_path, f'hook "{hook.value}" is given twice')
        hooks.add(hook)
        if not layers:
            raise refusal(hook_path, "is empty, expected at least one layer")
        for layer_key, entries in layers.items():
            layer_path = key_path(hook_path, layer_key)
            layer = _layer(layer_path, layer_key)
            if (hook, layer) in found:
                raise refusal(layer_path, f"layer {layer} is given twice")
            site = _covered_site(layer_path, module, hook, layer)
            found[hook, layer] = _SiteClamps(layer_path, site, entries)
    return list(found.values())


@dataclass
class _Draft:
    """A request while its specs are checked; holds what must be unique or bounded."""

    config: SteeringConfig
    sae: dict[Tier, dict[Group, dict[Site, list[SAEClampEntry]]]] = field(
        default_factory=lambda: {Tier.DELTA: {}, Tier.FULL: {}}
    )
    scales: dict[Group, list[float]] = field(default_factory=dict)
    vector_paths: dict[str, str] = field(default_factory=dict)
    features: dict[tuple[Tier, str, Site], set[int]] = field(default_factory=dict)
    num_clamps: dict[tuple[Tier, Site], int] = field(default_factory=dict)
    # By site and the point that is written: a transcoder is not an SAE that reads
    # the same point.
    reconstructed_by: dict[tuple[Site, HookPoint], str] = field(default_factory=dict)
    reads: tuple[SiteRead, ...] = ()

    def add_sae_spec(
        self,
        tier: Tier,
        path: str,
        spec: SAEFullReconstructionSpec | SAEClampSpec,
    ) -> None:
        """Check one spec of an SAE tier and add it."""
        module = _module(f"{path}.module_name", spec.module_name, self.config, "sae")
        where = f"{path}.clamps"
        sites = _clamps(where, spec.clamps, module)
        if not sites and tier is Tier.FULL:
            sites = [_SiteClamps(where, site, ()) for site in module.sites]
        elif not sites:
            raise refusal(where, "is empty, expected at least one clamp entry")
        for site in sites:
            if not site.entries and tier is not Tier.FULL:
                raise refusal(
                    site.path, "found an empty list, expected at least one clamp entry"
                )
            self.add_site(tier, (module.name, spec.phase), site)

    def add_site(self, tier: Tier, group: Group, clamps: _SiteClamps) -> None:
        """Merge one site of a spec, refusing what the request already has there."""
        name, _ = group
        info = clamps.site
        site = (info.hook, info.layer)
        if tier is Tier.FULL:
            written = (site, clamps.site.out_hook)
            owner = self.reconstructed_by.setdefault(written, name)
            if owner != name:
                raise refusal(
                    clamps.path,
                    f"layer {site[1]} at {site[0].value} is reconstructed by module "
                    f"{shown(owner)} already, expected at most one module a site",
                )
        self.count(tier, site, clamps.path, len(clamps.entries))
        seen = self.features.setdefault((tier, name, site), set())
        merged = self.sae[tier].setdefault(group, {}).setdefault(site, [])
        for position, clamp in enumerate(clamps.entries):
            feature = clamp.feature_idx
            if feature >= info.d_sae or feature in seen:
                path = f"{clamps.path}[{position}].feature_idx"
                if feature >= info.d_sae:
                    raise bad(path, feature, f"an integer in 0..{info.d_sae - 1}")
                raise refusal(
                    path,
                    f"feature {feature} of module {shown(name)} is clamped twice at "
                    f"layer {site[1]}, {site[0].value}, expected once",
                )
            seen.add(feature)
            value = round_to_fp32(clamp.value)
            merged.append(
                SAEClampEntry(feature, clamp.kind, value, clamp.only_if_active)
            )

    def count(self, tier: Tier, site: Site, path: str, added: int) -> None:
        """Bound what one tier does at one site, over all specs of the request."""
        total = self.num_clamps.get((tier, site), 0) + added
        if total > self.config.max_clamps:
            raise refusal(
                path,
                f"found {total} clamps at layer {site[1]}, {site[0].value} in this "
                f"request, expected at most {self.config.max_clamps}",
            )
        self.num_clamps[tier, site] = total

    def add_vector_spec(self, path: str, spec: SteeringVectorSpec) -> None:
        """Check one spec and merge its scale; a module named again adds no clamp."""
        name = spec.module_name
        module = _module(f"{path}.module_name", name, self.config, "vectors")
        if name not in self.vector_paths:
            for site in module.sites:
                self.count(Tier.ADDITIVE, (site.hook, site.layer), path, 1)
        self.vector_paths[name] = path
        group = (name, spec.phase)
        self.scales.setdefault(group, []).append(round_to_fp32(spec.scale))

    def summed_scales(self) -> dict[Group, float]:
        """The scale of every group, once all specs are read."""
        by_name: dict[str, dict[SpecPhase, float]] = {}
        for (name, phase), scales in self.scales.items():
            sums = by_name.setdefault(name, {})
            sums[phase] = self.sum_scales(name, scales)
        for name, sums in by_name.items():
            for phase in TOKEN_PHASES:
                both = [s for p, s in sums.items() if p in ("both", phase)]
                self.sum_scales(name, both)
        return {(n, p): s for n, sums in by_name.items() for p, s in sums.items()}

    def sum_scales(self, name: str, scales: list[float]) -> float:
        try:
            return add_scales(scales)
        except OverflowError:
            raise refusal(
                f"{self.vector_paths[name]}.scale",
                f"the scales of module {shown(name)} add up to more than float32 "
                "holds, expected a finite sum",
            ) from None

    def finish(self) -> SteeringRequest:
        """The canonical request."""
        order = {name: i for i, name in enumerate(self.config.modules)}

        def rank(group: Group) -> tuple[int, int]:
            return order[group[0]], SPEC_PHASES.index(group[1])

        sae_edits = {
            tier: {
                group: _site_edits(group[0], groups[group])
                for group in sorted(groups, key=rank)
            }
            for tier, groups in self.sae.items()
            if groups
        }
        scales = self.summed_scales()
        vectors = {group: scales[group] for group in sorted(scales, key=rank)}
        named = {name for groups in self.sae.values() for name, _ in groups}
        named.update(name for name, _ in self.scales)
        named.update(read.module for read in self.reads)
        modules = {n: m for n, m in self.config.modules.items() if n in named}
        return SteeringRequest(sae_edits, vectors, modules, self.reads)


def _site_edits(
    name: str, sites: Mapping[Site, list[SAEClampEntry]]
) -> tuple[SiteEdit, ...]:
    ordered = sorted(sites, key=lambda site: (site[1], HOOK_ORDER[site[0]]))
    return tuple(
        SiteEdit(name, hook, layer, sorted_clamps(sites[hook, layer]))
        for hook, layer in ordered
    )
