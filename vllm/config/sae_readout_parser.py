# SPDX-License-Identifier: Apache-2.0
"""Checks typed `sae_readout_specs` against an engine and makes `SiteRead`s of them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vllm.config.sae_readout_specs import (
    SITES_IN_FULL,
    ReadSites,
    SAEReadoutSpec,
    SAEStopEntry,
    SiteRead,
)
from vllm.config.sae_steering_sites import (
    check_feature,
    covered_site,
    named_hook,
    named_module,
    named_site,
)
from vllm.config.steering import MAX_READ_VALUES, ModuleInfo, SiteInfo, SteeringConfig
from vllm.config.steering_checks import bad, key_path, refusal, shown
from vllm.config.steering_points import HOOK_ALIASES, parse_site

_OPTION = "additional_config.steering.max_read_values"


def check_reads(
    path: str, specs: Sequence[SAEReadoutSpec], config: SteeringConfig
) -> tuple[SiteRead, ...]:
    """Every site that a request reads, in canonical order.

    Args:
        path: the field that holds the specs.
        specs: typed, and not yet checked against the engine.
        config: what the engine was started with.

    Raises:
        VLLMValidationError: `parameter` is the path of the first bad field.
    """
    if specs and not config.readout:
        raise refusal(
            path,
            "this engine cannot read features: it was started with "
            "additional_config.steering.readout=false",
        )
    found: dict[tuple[str, str, int], SiteRead] = {}
    total = 0
    for position, spec in enumerate(specs):
        at = f"{path}[{position}]"
        module = named_module(f"{at}.module_name", spec.module_name, config, "sae")
        for where, site in sites_to_read(f"{at}.sites", spec.sites, module):
            read = _site_read(at, spec, module, site, config)
            key = (module.name, site.hook.value, site.layer)
            if key in found:
                raise refusal(
                    where,
                    f"module {shown(module.name)} is read at {site.name} twice in "
                    "this request, expected once",
                )
            _check_stage(where, module, site, config)
            found[key] = read
            total += read.num_values
            _check_total(where, total, config)
    return tuple(sorted(found.values(), key=lambda read: read.order))


def sites_to_read(
    path: str, sites: ReadSites | None, module: ModuleInfo
) -> list[tuple[str, SiteInfo]]:
    """The sites of a module that `sites` names, with the path of each.

    Raises:
        VLLMValidationError: `parameter` is the path of the first bad one.
    """
    if sites is None:
        return [(path, site) for site in module.sites]
    if not sites:
        raise refusal(path, "is empty, expected null or at least one site")
    if isinstance(sites, list):
        places = [(f"{path}[{at}]", name) for at, name in enumerate(sites)]
        return [(where, named_site(where, name, module)) for where, name in places]
    found = []
    for name, layers in sites.items():
        hook_path = key_path(path, name)
        if name not in HOOK_ALIASES and parse_site(name) is not None:
            raise refusal(
                hook_path,
                f"found the site {shown(name)} instead of a hook, expected a list of "
                f"sites, such as [{shown(name)}], or {{hook: [layer, ...]}}",
            )
        hook = named_hook(hook_path, name)
        if not layers:
            raise refusal(hook_path, "is empty, expected at least one layer")
        for at, layer in enumerate(layers):
            where = f"{hook_path}[{at}]"
            found.append((where, covered_site(where, module, hook, layer)))
    return found


def _site_read(
    path: str,
    spec: SAEReadoutSpec,
    module: ModuleInfo,
    site: SiteInfo,
    config: SteeringConfig,
) -> SiteRead:
    if (spec.top_k is None) == (spec.features is None):
        has = "neither" if spec.top_k is None else "both"
        raise refusal(path, f"found {has} of top_k and features, expected exactly one")
    features = tuple(sorted(spec.features or ()))
    for at, feature in enumerate(spec.features or ()):
        check_feature(f"{path}.features[{at}]", feature, site)
        if features.count(feature) > 1:
            raise refusal(
                f"{path}.features", f"feature {feature} is given twice, expected once"
            )
    if spec.stop_if and spec.phase == "prefill":
        raise refusal(
            f"{path}.stop_if",
            'found phase "prefill", expected "both" or "decode": stop_if looks at '
            "generated tokens only",
        )
    read = SiteRead(
        module.name,
        site.hook,
        site.layer,
        spec.top_k or 0,
        features,
        _stops(f"{path}.stop_if", spec.stop_if or [], site),
        spec.phase,
    )
    _check_number(path, spec, read, config)
    return read


def _check_number(
    path: str, spec: SAEReadoutSpec, read: SiteRead, config: SteeringConfig
) -> None:
    """Limit the values of a token at a site: the engine's buffers have that room."""
    most = config.max_read_values
    if read.num_values <= most:
        return
    option = f"start the engine with {_OPTION}={read.num_values} to read more"
    if read.num_values > MAX_READ_VALUES:
        option = f"{_OPTION} is {most}, and can be {MAX_READ_VALUES}"
    asked = len(spec.features or ()) or read.top_k
    if asked <= most:
        raise refusal(
            f"{path}.stop_if",
            f"found {read.num_values} values per token, the features of stop_if "
            f"included, expected at most {most} per site: {option}",
        )
    if spec.features is None:
        raise bad(f"{path}.top_k", asked, f"an integer in 1..{most}: {option}")
    raise refusal(
        f"{path}.features",
        f"found {asked} features, expected a list of 1 to {most}: {option}",
    )


def _check_total(path: str, total: int, config: SteeringConfig) -> None:
    """Limit the values of a token at all sites of a request."""
    most = SITES_IN_FULL * config.max_read_values
    if total > most:
        raise refusal(
            path,
            f"found at least {total} values per token in this request, expected at "
            f"most {most} over all sites: read fewer sites, or use a smaller top_k",
        )


def _stops(
    path: str, entries: list[SAEStopEntry], site: SiteInfo
) -> tuple[tuple[int, float], ...]:
    found: dict[int, float] = {}
    for at, entry in enumerate(entries):
        where = f"{path}[{at}]"
        check_feature(f"{where}.feature_idx", entry.feature_idx, site)
        if entry.feature_idx in found:
            raise refusal(
                f"{where}.feature_idx",
                f"feature {entry.feature_idx} is given twice, expected once",
            )
        found[entry.feature_idx] = _bound(f"{where}.above", entry.above)
    return tuple(sorted(found.items()))


def _bound(path: str, value: float) -> float:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0] + 0.0
    except OverflowError:
        raise bad(path, value, "a number within the range of float32") from None


def _check_stage(
    path: str, module: ModuleInfo, site: SiteInfo, config: SteeringConfig
) -> None:
    """Only the last pipeline stage sends its output to the scheduler."""
    if site.layer < config.first_read_layer:
        raise refusal(
            path,
            f"module {shown(module.name)} reads layer {site.layer}, which is not on "
            f"the last pipeline stage, expected layer {config.first_read_layer} or "
            "higher, or pipeline_parallel_size=1",
        )
