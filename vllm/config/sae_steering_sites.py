# SPDX-License-Identifier: Apache-2.0
"""Finds the module and the sites that a spec names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from vllm.config.steering_points import (
    HOOK_ALIASES,
    HOOK_NAMES,
    HookPoint,
    parse_site,
)

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
    """The site of a module at a point, which it must have."""
    site = module.site(hook, layer)
    if site is None:
        raise refusal(
            path,
            f"module {shown(module.name)} does not cover layer {shown(layer)} at "
            f"{hook.value}, expected one of its sites: {_sites_of(module)}",
        )
    return site


def _sites_of(module: ModuleInfo) -> str:
    return listing([site.name for site in module.sites])


def named_site(path: str, name: str, module: ModuleInfo) -> SiteInfo:
    """The site of a module that a name such as `post_block.20` means."""
    place = parse_site(name)
    if place is None:
        raise bad(
            path, name, f"a site of module {shown(module.name)}: {_sites_of(module)}"
        )
    layer, hook = place
    return covered_site(path, module, hook, layer)


def _hook_or_site(path: str, key: str, module: ModuleInfo) -> HookPoint | SiteInfo:
    """What a key of `clamps` names."""
    if key in HOOK_ALIASES:
        return HOOK_ALIASES[key]
    if parse_site(key) is not None:
        return named_site(path, key, module)
    raise refusal(
        path,
        f"unknown hook or site {shown(key)}, expected a site of module "
        f"{shown(module.name)}: {_sites_of(module)}; or one of the hooks {HOOK_NAMES}",
    )


class ListedSite(msgspec.Struct, frozen=True, gc=False):
    """Where a spec names one site, and what it lists there."""

    path: str
    site: SiteInfo
    entries: Sequence[SAEClampEntry]


def listed_sites(path: str, clamps: SiteClamps, module: ModuleInfo) -> list[ListedSite]:
    """Every site that the `clamps` of a spec name, each once."""
    if isinstance(clamps, list):
        if len(module.sites) != 1:
            raise refusal(
                path,
                f"found a list, expected {{site: [entry, ...]}}, because module "
                f"{shown(module.name)} has {len(module.sites)} sites: "
                f"{_sites_of(module)}",
            )
        return [ListedSite(path, module.sites[0], clamps)]
    found: dict[NamedSite, ListedSite] = {}
    hooks: set[HookPoint] = set()
    for key, listed in clamps.items():
        where = key_path(path, key)
        named = _hook_or_site(where, key, module)
        if isinstance(named, SiteInfo):
            if not isinstance(listed, list):
                raise refusal(
                    where,
                    f"found an object, expected a list of entries, because {shown(key)}"
                    " names a site",
                )
            own = [ListedSite(where, named, listed)]
        else:
            if named in hooks:
                raise refusal(
                    where, f'hook "{named.value}" is given twice, expected once'
                )
            hooks.add(named)
            own = _sites_at(where, named, listed, module)
        for one in own:
            place = (one.site.hook, one.site.layer)
            if place in found:
                raise refusal(
                    one.path,
                    f"{one.site.name} is given twice (also as {found[place].path}), "
                    "expected once",
                )
            found[place] = one
    return list(found.values())


def _sites_at(
    path: str,
    hook: HookPoint,
    layers: Mapping[int | str, Sequence[SAEClampEntry]] | Sequence[SAEClampEntry],
    module: ModuleInfo,
) -> list[ListedSite]:
    """The sites that `{layer: [entry, ...]}` names at a hook."""
    if not isinstance(layers, Mapping):
        raise refusal(
            path,
            'found a list, expected {layer: [entry, ...]}, or a site instead of "'
            f'{hook.value}": {_sites_of(module)}',
        )
    if not layers:
        raise refusal(path, "is empty, expected at least one layer")
    found = []
    for key, entries in layers.items():
        where = key_path(path, key)
        site = covered_site(where, module, hook, _layer(where, key))
        found.append(ListedSite(where, site, entries))
    return found
