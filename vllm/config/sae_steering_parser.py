# SPDX-License-Identifier: Apache-2.0
"""The one strict parser of steering specs, for every surface.

Takes the JSON form (dicts and lists) and the dataclasses of
`vllm.config.sae_steering_specs`, and returns the canonical `SteeringRequest`.
Whatever a client sends, the only exception is `VLLMValidationError`; its
`parameter` is the path of the offending field.
"""

from __future__ import annotations

import functools
import marshal
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.config.sae_steering_specs import (
    ADDITIVE_KEY,
    CLAMP_KINDS,
    DELTA_KEY,
    EXTRA_ARGS_KEYS,
    FULL_KEY,
    HOOK_ORDER,
    SPEC_PHASES,
    TOKEN_PHASES,
    Group,
    SAEClampEntry,
    SAEClampSpec,
    SAEFullReconstructionSpec,
    SiteEdit,
    SpecPhase,
    SteeringRequest,
    SteeringVectorSpec,
    add_scales,
    round_to_fp32,
    sorted_clamps,
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
from vllm.exceptions import VLLMValidationError

# Longest excerpt of a client's value or key in a message.
MAX_SHOWN = 60
# Parsed requests that are kept, and the longest one in marshalled bytes.
MAX_KEPT = 256
MAX_KEPT_BYTES = 16 << 10
# No model has more digits than this in a layer index; bounds int() of a client's
# string, which raises on very long ones.
MAX_LAYER_DIGITS = 9
NOT_CONFIGURED = (
    "this engine was started without steering modules. Start it with "
    "--steering-modules NAME=PATH, or with "
    'additional_config={"steering": {"modules": {"NAME": "PATH"}}}'
)

Site = tuple[HookPoint, int]


def parse_steering_request(
    extra_args: Mapping[str, Any] | None, config: SteeringConfig | None
) -> SteeringRequest | None:
    """Check what a request asks for and return its canonical form.

    Args:
        extra_args: `SamplingParams.extra_args`; only `EXTRA_ARGS_KEYS` are read.
        config: what the engine was started with; None when without steering.

    Returns:
        None when nothing is asked: no key, null, or an empty list of specs.

    Raises:
        VLLMValidationError: `parameter` is the path of the first bad field.
    """
    if not isinstance(extra_args, Mapping):
        return None
    asked = [key for key in EXTRA_ARGS_KEYS if _is_asked(extra_args.get(key))]
    if not asked:
        return None
    if config is None:
        raise _refusal(asked[0], NOT_CONFIGURED)
    given = {key: extra_args[key] for key in asked}
    return _parsed_before(given, config) or _parse(given, config)


def _parse(given: Mapping[str, Any], config: SteeringConfig) -> SteeringRequest:
    draft = _Draft(config)
    for key, specs in given.items():
        if not isinstance(specs, (list, tuple)):
            raise _bad(key, specs, "a list of specs")
        for position, spec in enumerate(specs):
            _SPEC_PARSERS[key](draft, f"{key}[{position}]", spec)
    return draft.finish()


def _parsed_before(
    given: dict[str, Any], config: SteeringConfig
) -> SteeringRequest | None:
    """The request that the same JSON gave before, or None: parse it.

    A request is parsed wherever it passes, and many requests ask for the same.
    """
    try:
        # Exact types only, so True is not 1; version 2 has no references.
        data = marshal.dumps(given, 2)
    except ValueError:  # dataclasses, numbers of other libraries, deep nests
        return None
    if len(data) > MAX_KEPT_BYTES:
        return None
    try:
        return _parse_data(data, _Same(config))
    except VLLMValidationError:
        return None  # the message is to show the client's own values


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to another one of the same configuration object, whatever it holds."""

    config: SteeringConfig

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.config is self.config

    def __hash__(self) -> int:
        return id(self.config)


@functools.lru_cache(maxsize=MAX_KEPT)
def _parse_data(data: bytes, same: _Same) -> SteeringRequest:
    return _parse(marshal.loads(data), same.config)


def _is_asked(specs: Any) -> bool:
    return specs is not None and not (isinstance(specs, (list, tuple)) and not specs)


def shown(value: Any) -> str:
    """A short, printable, ASCII excerpt of any client value; never raises."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        if isinstance(value, int) and value.bit_length() > 128:
            return f"an integer of {value.bit_length()} bits"
        # ascii() of the excerpt only: the whole value may be megabytes, and lone
        # surrogates could not be sent back in an HTTP response.
        if isinstance(value, (str, bytes)) and len(value) > MAX_SHOWN:
            return f"{ascii(value[:MAX_SHOWN])}..."
        return ascii(value)
    return f"a value of type {type(value).__name__}"


def _refusal(path: str, reason: str) -> VLLMValidationError:
    return VLLMValidationError(f"{path}: {reason}", parameter=path)


def _bad(path: str, value: Any, accepted: str) -> VLLMValidationError:
    return _refusal(path, f"found {shown(value)}, expected {accepted}")


def _fields(
    path: str,
    value: Any,
    spec_type: type,
    required: tuple[str, ...],
    optional: tuple[str, ...],
) -> dict[str, Any]:
    """The fields of a spec given as a dict or as its dataclass."""
    names = required + optional
    if type(value) is spec_type:
        return {name: getattr(value, name) for name in names}
    if not isinstance(value, dict):
        raise _bad(path, value, f"an object with {', '.join(names)}")
    for key in value:
        if key not in names:
            raise _refusal(
                _key_path(path, key),
                f"unknown field, expected only {', '.join(names)}",
            )
    for name in required:
        if name not in value:
            raise _refusal(f"{path}.{name}", "is missing")
    return {name: value[name] for name in names if name in value}


def _choice(path: str, value: Any, choices: tuple[str, ...]) -> Any:
    if type(value) is not str or value not in choices:
        raise _bad(path, value, "one of " + ", ".join(f'"{c}"' for c in choices))
    return value


def _finite(path: str, value: Any) -> float:
    """A number as fp32 holds it."""
    if type(value) in (int, float):
        try:
            number = round_to_fp32(float(value))
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise _bad(path, value, "a finite number within the range of float32")


def _module(
    path: str, value: Any, config: SteeringConfig, kind: ModuleKind
) -> ModuleInfo:
    fitting = [
        name
        for name, m in config.modules.items()
        if m.kind == kind and name not in config.draining
    ]
    accepted = f'a module of kind "{kind}": {_listing(fitting)}'
    if type(value) is not str or value not in config.modules:
        raise _bad(path, value, accepted)
    module = config.modules[value]
    if module.kind != kind:
        raise _refusal(
            path,
            f'module {shown(value)} is of kind "{module.kind}", expected {accepted}',
        )
    if value in config.draining:
        raise _refusal(
            path, f"module {shown(value)} is being removed, expected {accepted}"
        )
    return module


def _listing(names: list[str]) -> str:
    if not names:
        return "none is loaded"
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(shown(name) for name in names[:10]) + more


def _layer(path: str, key: Any) -> int:
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
    raise _refusal(
        path, f'layer key {shown(key)}, expected a layer index such as 20 or "20"'
    )


def _key_path(path: str, key: Any) -> str:
    """Path of a mapping's entry; keys that are not plain words are quoted."""
    plain = type(key) is int and key.bit_length() <= 64
    if type(key) is str and len(key) <= MAX_SHOWN and key.isascii():
        plain = key.replace("_", "").isalnum()
    return f"{path}.{key}" if plain else f"{path}[{shown(key)}]"


def _entry(path: str, value: Any, site: SiteInfo) -> SAEClampEntry:
    fields = _fields(
        path,
        value,
        SAEClampEntry,
        ("feature_idx", "kind", "value"),
        ("only_if_active",),
    )
    feature = fields["feature_idx"]
    if type(feature) is not int or not 0 <= feature < site.d_sae:
        raise _bad(f"{path}.feature_idx", feature, f"an integer in 0..{site.d_sae - 1}")
    kind = _choice(f"{path}.kind", fields["kind"], CLAMP_KINDS)
    number = _finite(f"{path}.value", fields["value"])
    only_if_active = fields.get("only_if_active", False)
    if type(only_if_active) is not bool:
        raise _bad(f"{path}.only_if_active", only_if_active, "true or false")
    return SAEClampEntry(feature, kind, number, only_if_active)


def _entries(
    path: str, value: Any, site: SiteInfo, max_clamps: int, may_be_empty: bool
) -> list[SAEClampEntry]:
    """The entries of one site, in the order given."""
    if not isinstance(value, (list, tuple)):
        raise _bad(path, value, "a list of clamp entries")
    if not value and not may_be_empty:
        raise _refusal(path, "found an empty list, expected at least one clamp entry")
    if len(value) > max_clamps:
        raise _refusal(
            path, f"found {len(value)} clamps, expected at most {max_clamps} a site"
        )
    return [_entry(f"{path}[{i}]", item, site) for i, item in enumerate(value)]


@dataclass
class _SiteClamps:
    """Where a spec names one site, and what it lists there."""

    path: str
    site: SiteInfo
    entries: list[SAEClampEntry]


def _clamps(
    path: str, value: Any, module: ModuleInfo, max_clamps: int, may_be_empty: bool
) -> list[_SiteClamps]:
    """`clamps` of a spec: every site that it names."""
    if isinstance(value, (list, tuple)):
        if len(module.sites) != 1:
            raise _refusal(
                path,
                f"found a list, expected {{hook: {{layer: [entry, ...]}}}}, because "
                f"module {shown(module.name)} has {len(module.sites)} sites",
            )
        site = module.sites[0]
        entries = _entries(path, value, site, max_clamps, may_be_empty)
        return [_SiteClamps(path, site, entries)]
    if not isinstance(value, dict):
        raise _bad(path, value, "{hook: {layer: [entry, ...]}}")
    if not value and may_be_empty:
        return [_SiteClamps(path, site, []) for site in module.sites]
    if not value:
        raise _refusal(path, "is empty, expected at least one clamp entry")
    found: list[_SiteClamps] = []
    seen: set[Site] = set()
    hooks: set[HookPoint] = set()
    for hook_key, layers in value.items():
        hook_path = _key_path(path, hook_key)
        hook = _hook(hook_path, hook_key)
        if hook in hooks:
            raise _refusal(hook_path, f'hook "{hook.value}" is given twice')
        hooks.add(hook)
        if not isinstance(layers, dict):
            raise _bad(hook_path, layers, "{layer: [entry, ...]}")
        if not layers:
            raise _refusal(hook_path, "is empty, expected at least one layer")
        for layer_key, entries in layers.items():
            layer_path = _key_path(hook_path, layer_key)
            layer = _layer(layer_path, layer_key)
            if (hook, layer) in seen:
                raise _refusal(layer_path, f"layer {layer} is given twice")
            seen.add((hook, layer))
            site = _covered_site(layer_path, module, hook, layer)
            listed = _entries(layer_path, entries, site, max_clamps, may_be_empty)
            found.append(_SiteClamps(layer_path, site, listed))
    return found


def _hook(path: str, key: Any) -> HookPoint:
    if type(key) is HookPoint:
        return key
    if type(key) is str and key in HOOK_ALIASES:
        return HOOK_ALIASES[key]
    raise _refusal(path, f"unknown hook {shown(key)}, expected one of {HOOK_NAMES}")


def _covered_site(
    path: str, module: ModuleInfo, hook: HookPoint, layer: int
) -> SiteInfo:
    site = module.site(hook, layer)
    if site is None:
        covered = [site.name for site in module.sites]
        raise _refusal(
            path,
            f"module {shown(module.name)} does not cover layer {shown(layer)} at "
            f"{hook.value}, expected one of its sites: {_listing(covered)}",
        )
    return site


@dataclass
class _Draft:
    """A request while its specs are read; holds what must be unique or bounded."""

    config: SteeringConfig
    sae: dict[Tier, dict[Group, dict[Site, list[SAEClampEntry]]]] = field(
        default_factory=lambda: {Tier.DELTA: {}, Tier.FULL: {}}
    )
    scales: dict[Group, list[float]] = field(default_factory=dict)
    vector_paths: dict[str, str] = field(default_factory=dict)
    features: set[tuple[Tier, str, Site, int]] = field(default_factory=set)
    num_clamps: dict[tuple[Tier, Site], int] = field(default_factory=dict)
    # By site and the point that is written: a transcoder is not an SAE that reads
    # the same point.
    reconstructed_by: dict[tuple[Site, HookPoint], str] = field(default_factory=dict)

    def add_site(self, tier: Tier, group: Group, clamps: _SiteClamps) -> None:
        """Merge one site of a spec, refusing what the request already has there."""
        name, _ = group
        site = (clamps.site.hook, clamps.site.layer)
        if tier is Tier.FULL:
            written = (site, clamps.site.out_hook)
            owner = self.reconstructed_by.setdefault(written, name)
            if owner != name:
                raise _refusal(
                    clamps.path,
                    f"layer {site[1]} at {site[0].value} is reconstructed by module "
                    f"{shown(owner)} already, expected at most one module a site",
                )
        for position, clamp in enumerate(clamps.entries):
            key = (tier, name, site, clamp.feature_idx)
            if key in self.features:
                raise _refusal(
                    f"{clamps.path}[{position}].feature_idx",
                    f"feature {clamp.feature_idx} of module {shown(name)} is clamped "
                    f"twice at layer {site[1]}, {site[0].value}, expected once",
                )
            self.features.add(key)
        self.count(tier, site, clamps.path, len(clamps.entries))
        self.sae[tier].setdefault(group, {}).setdefault(site, []).extend(clamps.entries)

    def count(self, tier: Tier, site: Site, path: str, added: int) -> None:
        """Bound what one tier does at one site, over all specs of the request."""
        total = self.num_clamps.get((tier, site), 0) + added
        if total > self.config.max_clamps:
            raise _refusal(
                path,
                f"found {total} clamps at layer {site[1]}, {site[0].value} in this "
                f"request, expected at most {self.config.max_clamps}",
            )
        self.num_clamps[tier, site] = total

    def add_vector(
        self, path: str, module: ModuleInfo, group: Group, scale: float
    ) -> None:
        """Merge one scale; a module that is named again adds no clamp."""
        if module.name not in self.vector_paths:
            for site in module.sites:
                self.count(Tier.ADDITIVE, (site.hook, site.layer), path, 1)
        self.vector_paths[module.name] = path
        self.scales.setdefault(group, []).append(scale)

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
            raise _refusal(
                f"{self.vector_paths[name]}.scale",
                f"the scales of module {shown(name)} add up to more than float32 "
                "holds, expected a finite sum",
            ) from None

    def finish(self) -> SteeringRequest:
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
        modules = {n: m for n, m in self.config.modules.items() if n in named}
        return SteeringRequest(sae_edits, vectors, modules)


def _site_edits(
    name: str, sites: Mapping[Site, list[SAEClampEntry]]
) -> tuple[SiteEdit, ...]:
    ordered = sorted(sites, key=lambda site: (site[1], HOOK_ORDER[site[0]]))
    return tuple(
        SiteEdit(name, hook, layer, sorted_clamps(sites[hook, layer]))
        for hook, layer in ordered
    )


def _parse_sae_spec(draft: _Draft, path: str, value: Any, tier: Tier) -> None:
    full = tier is Tier.FULL
    fields = _fields(
        path,
        value,
        SAEFullReconstructionSpec if full else SAEClampSpec,
        ("module_name",) if full else ("module_name", "clamps"),
        ("clamps", "phase") if full else ("phase",),
    )
    module = _module(f"{path}.module_name", fields["module_name"], draft.config, "sae")
    phase: SpecPhase = _choice(
        f"{path}.phase", fields.get("phase", "both"), SPEC_PHASES
    )
    sites = _clamps(
        f"{path}.clamps",
        fields.get("clamps", {}),
        module,
        draft.config.max_clamps,
        may_be_empty=full,
    )
    for site in sites:
        draft.add_site(tier, (module.name, phase), site)


def _parse_vector_spec(draft: _Draft, path: str, value: Any) -> None:
    fields = _fields(
        path, value, SteeringVectorSpec, ("module_name",), ("scale", "phase")
    )
    module = _module(
        f"{path}.module_name", fields["module_name"], draft.config, "vectors"
    )
    scale = _finite(f"{path}.scale", fields.get("scale", 1.0))
    phase: SpecPhase = _choice(
        f"{path}.phase", fields.get("phase", "both"), SPEC_PHASES
    )
    draft.add_vector(path, module, (module.name, phase), scale)


_SPEC_PARSERS: dict[str, Callable[[_Draft, str, Any], None]] = {
    FULL_KEY: lambda draft, path, spec: _parse_sae_spec(draft, path, spec, Tier.FULL),
    DELTA_KEY: lambda draft, path, spec: _parse_sae_spec(draft, path, spec, Tier.DELTA),
    ADDITIVE_KEY: _parse_vector_spec,
}
