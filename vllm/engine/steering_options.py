# SPDX-License-Identifier: Apache-2.0
"""What a user may write in `additional_config["steering"]`.

    {"modules": {"name": "path" | {"path": ..., "feature_units": ...,
                                   "skip_token_ids": [...] | None,
                                   "norm_guard": float | None, "sites": [...],
                                   "sharding": "auto" | "replicate" | "shard",
                                   "screening": "auto" | "off"}},
     "max_clamps": 64,
     "max_specs": 64,
     "max_pieces": 8,
     "max_body_mib": 32,
     "presets": {"name": "file" | {...}},
     "default_preset": "name",
     "readout": True,
     "decoder_layer": "known" | "auto",
     "spare": [{"layer": 20, "hook": "resid_post", "width": 16384, "count": 1},
               {"layer": 20, "hook": "resid_post", "vectors": 4}],
     "inline_vectors": {"post_block.20": 4},
     "module_roots": ["/srv/saes", "hf:"]}

`spare` reserves room for modules that are registered later; `inline_vectors` says how
many vectors of its own a request may bring to each site; `module_roots` says where
the HTTP routes may load them from. Every refusal is one line that names the field, what
was found and what would be accepted.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import torch

from vllm.config.sae_inline_vectors import INLINE_PREFIX
from vllm.config.steering import (
    HOOK_ALIASES,
    HOOK_NAMES,
    DecoderLayers,
    FeatureUnits,
    HookPoint,
    InlineSite,
    Ranks,
    Screening,
    Sharding,
    SlotInfo,
    parse_site,
    point_widths,
)
from vllm.config.steering_checks import SteeringConfigError, shown
from vllm.config.steering_json import Json
from vllm.config.steering_points import RESIDUAL_HOOKS
from vllm.config.steering_screening import DEFAULT_SCREENING, screens

if TYPE_CHECKING:
    from vllm.config import ModelConfig

ROOT = "additional_config.steering"
TOP_FIELDS = (
    "modules",
    "max_clamps",
    "max_specs",
    "max_pieces",
    "max_body_mib",
    "presets",
    "default_preset",
    "readout",
    "decoder_layer",
    "spare",
    "inline_vectors",
    "module_roots",
    "resolved",
)
MODULE_OPTIONS = (
    "feature_units", "skip_token_ids", "norm_guard", "sites", "sharding", "screening",
)  # fmt: skip
SPARE_FIELDS = (
    "layer", "hook", "hook_out", "skip", "width", "count", "vectors", "sharding",
    "screening",
)  # fmt: skip
MAX_CLAMPS_LIMIT = 4096
MAX_SPECS_LIMIT = 4096
MAX_PIECES_LIMIT = 64
DEFAULT_MAX_BODY_MIB = 32
MAX_BODY_MIB_LIMIT = 65536
MAX_SPARE_COUNT = 1024
MAX_SPARE_WIDTH = 1 << 24
MAX_INLINE_VECTORS = 64


def readout_option(value: object) -> bool:
    if type(value) is not bool:
        raise SteeringConfigError(
            f"{ROOT}.readout: found {shown(value)}, expected true or false"
        )
    return value


def decoder_layer_option(value: object) -> DecoderLayers:
    for known in get_args(DecoderLayers):
        if value == known:
            return known
    raise SteeringConfigError(
        f'{ROOT}.decoder_layer: found {shown(value)}, expected "known" or "auto"'
    )


def check_dtype(where: str, hook: HookPoint, model_config: ModelConfig) -> None:
    """Raise if a very large value at the point would overflow in the layer itself."""
    if model_config.dtype == torch.float16 and hook not in RESIDUAL_HOOKS:
        raise SteeringConfigError(
            f"{where}: found {hook.value} in float16, expected bfloat16 or float32: "
            "large values at this point overflow float16 in the layer that reads them"
        )


def check_transcoder(where: str, hook: HookPoint, hook_out: HookPoint) -> None:
    if (hook, hook_out) != (HookPoint.MLP_IN, HookPoint.MLP_OUT):
        raise SteeringConfigError(
            f"{where}: found a transcoder from {hook.value} to {hook_out.value}, "
            "expected one from mlp_in to mlp_out"
        )


def object_option(
    path: str, value: object, fields: tuple[str, ...] | None = None
) -> Json:
    if not isinstance(value, dict):
        raise SteeringConfigError(f"{path}: found {shown(value)}, expected an object")
    for key in value:
        if fields is not None and key not in fields:
            known = ", ".join(field for field in fields if field != "resolved")
            raise SteeringConfigError(
                f"{path}: unknown field {shown(key)}, expected {known}"
            )
    return value


def limit_option(steering: Json, key: str, default: int, most: int) -> int:
    least = 2 if key == "max_pieces" else 1  # prompt and answer
    return _integer(f"{ROOT}.{key}", steering.get(key, default), least, most)


def spare_slots(
    value: object, model_config: ModelConfig, ranks: Ranks
) -> list[SlotInfo]:
    """The slots that `spare` reserves, each checked against the model."""
    if not isinstance(value, (list, tuple)):
        raise SteeringConfigError(
            f"{ROOT}.spare: found {shown(value)}, expected a list of objects"
        )
    num_layers = model_config.get_total_num_hidden_layers()
    slots: list[SlotInfo] = []
    for at, given in enumerate(value):
        where = f"{ROOT}.spare[{at}]"
        object_option(where, given, SPARE_FIELDS)
        layer = _integer(f"{where}.layer", given.get("layer"), 0, num_layers - 1)
        hook = _hook(f"{where}.hook", given.get("hook"))
        check_dtype(f"{where}.hook", hook, model_config)
        if ("width" in given) == ("vectors" in given):
            has = "both" if "width" in given else "neither"
            raise SteeringConfigError(
                f"{where}: found {has} of width and vectors, expected exactly one"
            )
        if "vectors" in given:
            for key in ("count", "hook_out", "skip", "sharding", "screening"):
                if key in given:
                    raise SteeringConfigError(
                        f"{where}.{key}: found {shown(given[key])} with vectors, "
                        "expected only with width"
                    )
            count = _integer(f"{where}.vectors", given["vectors"], 1, MAX_SPARE_COUNT)
            slot = SlotInfo(layer, hook, "vectors", 1)
        else:
            slot = _spare_sae(where, given, layer, hook)
            if slot.sharded:
                width = point_widths(model_config).of(slot.out_hook)
                check_sharded(f"{where}.sharding", slot.width, width, ranks)
                slot = replace(slot, sharded=ranks.size > 1)
            slot = _screened(where, given, slot, model_config, ranks)
            count = _integer(
                f"{where}.count", given.get("count", 1), 1, MAX_SPARE_COUNT
            )
        slots += [slot] * count
    return slots


def inline_sites(
    value: object, model_config: ModelConfig, max_num_seqs: int
) -> tuple[InlineSite, ...]:
    """The sites at which requests may bring vectors, each checked against the model.

    Args:
        value: `{site: vectors of one request}`.
        model_config: vLLM's `ModelConfig`.
        max_num_seqs: requests that are in a batch at once.
    """
    path = f"{ROOT}.inline_vectors"
    num_layers = model_config.get_total_num_hidden_layers()
    widths = point_widths(model_config)
    sites: dict[tuple[int, HookPoint], InlineSite] = {}
    for name, given in object_option(path, value).items():
        found = parse_site(name) if type(name) is str else None
        if found is None or not found[0] < num_layers:
            raise SteeringConfigError(
                f"{path}: found the site {shown(name)}, expected HOOK.LAYER such as "
                f"post_block.{num_layers - 1}, with a layer in 0..{num_layers - 1} and "
                f"one of {HOOK_NAMES}"
            )
        if found in sites:
            raise SteeringConfigError(
                f"{path}: site {sites[found].name} is given twice, expected once"
            )
        layer, hook = found
        check_dtype(f"{path}.{name}", hook, model_config)
        count = _integer(f"{path}.{name}", given, 1, MAX_INLINE_VECTORS)
        sites[found] = InlineSite(
            layer, hook, widths.of(hook), count, count * max_num_seqs
        )
    return tuple(sites.values())


def _spare_sae(where: str, given: Json, layer: int, hook: HookPoint) -> SlotInfo:
    """Room for an SAE, or with `hook_out` for a transcoder."""
    width = _integer(f"{where}.width", given["width"], 1, MAX_SPARE_WIDTH)
    skip = given.get("skip", False)
    if type(skip) is not bool or (skip and "hook_out" not in given):
        raise SteeringConfigError(
            f"{where}.skip: found {shown(skip)}, expected true or false, and "
            "true only with hook_out"
        )
    hook_out = None
    if "hook_out" in given:
        hook_out = _hook(f"{where}.hook_out", given["hook_out"])
        check_transcoder(where, hook, hook_out)
    sharding = given.get("sharding", "replicate")
    if sharding not in ("replicate", "shard"):
        raise SteeringConfigError(
            f'{where}.sharding: found {shown(sharding)}, expected "replicate" or '
            '"shard"'
        )
    return SlotInfo(
        layer,
        hook,
        "sae",
        width,
        hook_out=hook_out,
        has_skip=skip,
        sharded=sharding == "shard",
    )


def _screened(
    where: str, given: Json, slot: SlotInfo, model_config: ModelConfig, ranks: Ranks
) -> SlotInfo:
    """The slot, with a copy in 10 bits where it was asked for and the width gains."""
    asked = given.get("screening", DEFAULT_SCREENING)
    if accepted := _check_screening(asked):
        raise SteeringConfigError(
            f"{where}.screening: found {shown(asked)}, expected {accepted}"
        )
    if not ranks.screens:
        return slot
    encoded = ranks.encoded(slot.width, slot.sharded)
    d_in = point_widths(model_config).of(slot.hook)
    return replace(slot, screened=screens(asked, encoded, d_in, ranks.item_bytes))


def check_sharded(path: str, d_sae: int, d_out: int, ranks: Ranks) -> None:
    """Raise unless the ranks can share an SAE of these widths; one rank always can."""
    if ranks.size == 1:
        return
    if not ranks.can_shard(d_sae, d_out):
        raise SteeringConfigError(
            f'{path}: found "shard" with {d_sae} features and {d_out} columns on '
            f"{ranks.size} ranks, expected multiples of {ranks.unit}, or "
            '"replicate"'
        )


def _hook(where: str, name: object) -> HookPoint:
    if type(name) is not str or name not in HOOK_ALIASES:
        raise SteeringConfigError(
            f"{where}: found {shown(name)}, expected one of {HOOK_NAMES}"
        )
    return HOOK_ALIASES[name]


def check_module_roots(value: object) -> None:
    """Raise unless `module_roots` is a list of absolute directories and `hf:` paths."""
    accepted = 'absolute directories, "hf:", "hf:owner" or "hf:owner/repo"'
    path = f"{ROOT}.module_roots"
    if not isinstance(value, (list, tuple)):
        raise SteeringConfigError(
            f"{path}: found {shown(value)}, expected a list of {accepted}"
        )
    for at, root in enumerate(value):
        if type(root) is not str or not (root.startswith("hf:") or os.path.isabs(root)):
            raise SteeringConfigError(
                f"{path}[{at}]: found {shown(root)}, expected one of {accepted}"
            )


def _integer(path: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise SteeringConfigError(
            f"{path}: found {shown(value)}, expected an integer in {low}..{high}"
        )
    return value


def module_form(name: object, given: object) -> tuple[str, Json]:
    """The path and the options of one entry of `modules`."""
    if type(name) is not str or not name.strip():
        raise SteeringConfigError(
            f"{ROOT}.modules: found the name {shown(name)}, expected a non-empty string"
        )
    if name.startswith(INLINE_PREFIX):
        raise SteeringConfigError(
            f"{ROOT}.modules: found the name {shown(name)}, expected one that does not "
            f'begin with "{INLINE_PREFIX}"'
        )
    where = f"{ROOT}.modules.{name}"
    if isinstance(given, str):
        given = {"path": given}
    options = dict(object_option(where, given, ("path", *MODULE_OPTIONS)))
    path = options.pop("path", None)
    if type(path) is not str or not path:
        raise SteeringConfigError(
            f"{where}.path: found {shown(path)}, expected a path, hf:owner/repo or "
            "saelens:RELEASE/SAE_ID"
        )
    for key, value in options.items():
        accepted = _OPTION_CHECKS[key](value)
        if accepted is not None:
            raise SteeringConfigError(
                f"{where}.{key}: found {shown(value)}, expected {accepted}"
            )
    return path, options


def _one_of(value: object, known: tuple[str, ...]) -> str | None:
    *first, last = (f'"{item}"' for item in known)
    return None if value in known else f"{', '.join(first)} or {last}"


def _check_units(value: object) -> str | None:
    return _one_of(value, get_args(FeatureUnits))


def _check_ids(value: object) -> str | None:
    good = value is None or (
        isinstance(value, (list, tuple))
        and all(type(item) is int and item >= 0 for item in value)
    )
    return None if good else "null or a list of token ids"


def _check_guard(value: object) -> str | None:
    good = value is None or (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 < value < math.inf
    )
    return None if good else "null or a positive number"


def _check_sites(value: object) -> str | None:
    good = value is None or (
        isinstance(value, (list, tuple)) and all(type(item) is str for item in value)
    )
    return None if good else 'null or a list of sites such as "post_block.20"'


def _check_sharding(value: object) -> str | None:
    return _one_of(value, get_args(Sharding))


def _check_screening(value: object) -> str | None:
    return _one_of(value, get_args(Screening))


_OPTION_CHECKS = {
    "feature_units": _check_units,
    "skip_token_ids": _check_ids,
    "norm_guard": _check_guard,
    "sites": _check_sites,
    "sharding": _check_sharding,
    "screening": _check_screening,
}
