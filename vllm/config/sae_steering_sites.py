# SPDX-License-Identifier: Apache-2.0
"""Finds the module and the sites that a spec names."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm.config.sae_steering_specs import SAEClampEntry, SiteClamps
from vllm.config.steering import ModuleInfo, ModuleKind, SiteInfo, SteeringConfig
from vllm.config.steering_checks import (
    ModuleChangedError,
    bad,
    key_path,
    listing,
    refusal,
    shown,
)
from vllm.config.steering_points import HOOK_ALIASES, HOOK_NAMES, HookPoint

# No layer index has more digits than this. int() raises on a client's very long string.
MAX_LAYER_DIGITS = 9

# The hook and the layer that name a site of a module.
NamedSite = tuple[HookPoint, int]


def named_module(
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
        path, f'found the key {shown(key)}, expected a layer index such as 20 or "20"'
    )


def named_hook(path: str, key: str) -> HookPoint:
    """The point of a hook's name, or of one of its aliases."""
    if key in HOOK_ALIASES:
        return HOOK_ALIASES[key]
    raise refusal(path, f"unknown hook {shown(key)}, expected one of {HOOK_NAMES}")


def check_feature(path: str, feature: int, site: SiteInfo) -> None:
    """Raise unless the SAE at a site has such a feature; a spec's is 0 or more."""
    if feature >= site.d_sae:
        raise bad(path, feature, f"an integer in 0..{site.d_sae - 1}")


def covered_site(
    path: str, module: ModuleInfo, hook: HookPoint, layer: int
) -> SiteInfo:
    """The module's site at a point, which it must have."""
    site = module.site(hook, layer)
    if site is None:
        covered = [site.name for site in module.sites]
        raise refusal(
            path,
            f"module {shown(module.name)} does not cover layer {shown(layer)} at "
            f"{hook.value}, expected one of its sites: {listing(covered)}",
        )
    return site


class ListedSite(msgspec.Struct, frozen=True, gc=False):
    """Where a spec names one site, and what it lists there."""

    path: str
    site: SiteInfo
    entries: Sequence[SAEClampEntry]


def listed_sites(path: str, clamps: SiteClamps, module: ModuleInfo) -> list[ListedSite]:
    """Every site that the `clamps` of a spec name."""
    if isinstance(clamps, list):
        if len(module.sites) != 1:
            raise refusal(
                path,
                f"found a list, expected {{hook: {{layer: [entry, ...]}}}}, because "
                f"module {shown(module.name)} has {len(module.sites)} sites",
            )
        return [ListedSite(path, module.sites[0], clamps)]
    found: dict[NamedSite, ListedSite] = {}
    hooks: set[HookPoint] = set()
    for hook_key, layers in clamps.items():
        hook_path = key_path(path, hook_key)
        hook = named_hook(hook_path, hook_key)
        if hook in hooks:
            raise refusal(
                hook_path, f'hook "{hook.value}" is given twice, expected once'
            )
        hooks.add(hook)
        if not layers:
            raise refusal(hook_path, "is empty, expected at least one layer")
        for layer_key, entries in layers.items():
            layer_path = key_path(hook_path, layer_key)
            layer = _layer(layer_path, layer_key)
            if (hook, layer) in found:
                raise refusal(
                    layer_path, f"layer {layer} is given twice, expected once"
                )
            site = covered_site(layer_path, module, hook, layer)
            found[hook, layer] = ListedSite(layer_path, site, entries)
    return list(found.values())
