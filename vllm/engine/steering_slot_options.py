# SPDX-License-Identifier: Apache-2.0
"""The options `spare` and `inline_vectors`, which reserve room at start-up."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from vllm.config.steering import InlineSite, SlotInfo
from vllm.config.steering_checks import SteeringConfigError, shown
from vllm.config.steering_json import Json
from vllm.config.steering_points import (
    HOOK_ALIASES,
    HOOK_NAMES,
    HookPoint,
    place_of,
    point_widths,
)
from vllm.config.steering_screening import DEFAULT_SCREENING, Screening, screens
from vllm.config.steering_sharding import Ranks
from vllm.engine.steering_options import ROOT, integer, object_option
from vllm.engine.steering_site_checks import (
    check_dtype,
    check_sharded,
    check_transcoder,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig

SPARE_FIELDS = (
    "site", "layer", "hook", "hook_out", "skip", "width", "count", "vectors",
    "sharding", "screening",
)  # fmt: skip
MAX_SPARE_COUNT = 1024
MAX_SPARE_WIDTH = 1 << 24
MAX_INLINE_VECTORS = 64


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
        layer, hook = _spare_place(where, given, num_layers)
        named = "site" if "site" in given else "hook"
        check_dtype(f"{where}.{named}", hook, model_config)
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
            count = integer(f"{where}.vectors", given["vectors"], 1, MAX_SPARE_COUNT)
            slot = SlotInfo(layer, hook, "vectors", 1)
        else:
            slot = _spare_sae(where, given, layer, hook)
            if slot.sharded:
                width = point_widths(model_config).of(slot.out_hook)
                check_sharded(f"{where}.sharding", slot.width, width, ranks)
                slot = replace(slot, sharded=ranks.size > 1)
            slot = _screened(where, given, slot, model_config, ranks)
            count = integer(f"{where}.count", given.get("count", 1), 1, MAX_SPARE_COUNT)
        slots += [slot] * count
    return slots


def _spare_place(where: str, given: Json, num_layers: int) -> tuple[int, HookPoint]:
    """The site of an entry: by its name, or by layer and hook."""
    if "site" not in given and ("layer" in given or "hook" in given):
        layer = integer(f"{where}.layer", given.get("layer"), 0, num_layers - 1)
        return layer, hook_point(f"{where}.hook", given.get("hook"))
    for key in ("layer", "hook"):
        if key in given:
            raise SteeringConfigError(
                f"{where}.{key}: found {shown(given[key])} beside site, expected only "
                "one of them"
            )
    site = given.get("site")
    return _in_model(f"{where}.site", site, place_of(site), num_layers)


def _in_model(
    where: str, site: object, found: tuple[int, HookPoint] | None, num_layers: int
) -> tuple[int, HookPoint]:
    """The layer and the hook that were found in a site, which the model must have."""
    if found is None or not found[0] < num_layers:
        raise SteeringConfigError(
            f"{where}: found the site {shown(site)}, expected HOOK.LAYER such as "
            f"post_block.{num_layers - 1}, with a layer in 0..{num_layers - 1} and "
            f"one of {HOOK_NAMES}"
        )
    return found


def _spare_sae(where: str, given: Json, layer: int, hook: HookPoint) -> SlotInfo:
    """Room for an SAE, or with `hook_out` for a transcoder."""
    width = integer(f"{where}.width", given["width"], 1, MAX_SPARE_WIDTH)
    skip = given.get("skip", False)
    if type(skip) is not bool or (skip and "hook_out" not in given):
        raise SteeringConfigError(
            f"{where}.skip: found {shown(skip)}, expected true or false, and "
            "true only with hook_out"
        )
    hook_out = None
    if "hook_out" in given:
        hook_out = hook_point(f"{where}.hook_out", given["hook_out"])
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
    known = get_args(Screening)
    if asked not in known:
        accepted = ", ".join(f'"{word}"' for word in known)
        raise SteeringConfigError(
            f"{where}.screening: found {shown(asked)}, expected one of {accepted}"
        )
    if not ranks.screens:
        return slot
    encoded = ranks.encoded(slot.width, slot.sharded)
    d_in = point_widths(model_config).of(slot.hook)
    return replace(slot, screened=screens(asked, encoded, d_in, ranks.item_bytes))


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
        # Only text can be a key of JSON.
        place = place_of(name) if type(name) is str else None
        found = _in_model(path, name, place, num_layers)
        if found in sites:
            raise SteeringConfigError(
                f"{path}: site {sites[found].name} is given twice, expected once"
            )
        layer, hook = found
        check_dtype(f"{path}.{name}", hook, model_config)
        count = integer(f"{path}.{name}", given, 1, MAX_INLINE_VECTORS)
        sites[found] = InlineSite(
            layer, hook, widths.of(hook), count, count * max_num_seqs
        )
    return tuple(sites.values())


def hook_point(where: str, name: object) -> HookPoint:
    if type(name) is not str or name not in HOOK_ALIASES:
        raise SteeringConfigError(
            f"{where}: found {shown(name)}, expected one of {HOOK_NAMES}"
        )
    return HOOK_ALIASES[name]
