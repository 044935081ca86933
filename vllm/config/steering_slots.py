# SPDX-License-Identifier: Apache-2.0
"""Which slot holds which module: pure functions over `SteeringConfig`.

The engine places a module once, for all ranks. At start-up every module gets slots of
its own, and the spare slots are added. Later modules take free slots that fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from vllm.config.steering import (
    Activation,
    ModuleInfo,
    SiteInfo,
    SlotInfo,
    SteeringConfig,
)
from vllm.config.steering_screening import screen_bytes, screens
from vllm.config.steering_sharding import Ranks

ALONE = Ranks()
# Each distinct set of skipped token ids has one bit of an int32 flag word.
MAX_SKIP_SETS = 31


class NoRoomError(ValueError):
    """No free slot fits; the message says which would be needed."""


def own_slot(module: ModuleInfo, site: SiteInfo, ranks: Ranks) -> SlotInfo:
    """The slot that exactly fits a module's site."""
    is_topk = site.activation is Activation.TOPK
    if module.kind == "vectors":
        return SlotInfo(site.layer, site.hook, "vectors", 1)
    sharded = ranks.shards(
        module.sharding, site.d_sae, site.d_in, site.out_width, site.has_skip
    )
    encoded = ranks.encoded(site.d_sae, sharded)
    can_screen = ranks.screens and not is_topk
    return SlotInfo(
        layer=site.layer,
        hook=site.hook,
        kind="sae",
        width=site.d_sae,
        topk=is_topk,
        threshold=not is_topk,
        hook_out=site.hook_out,
        has_skip=site.has_skip,
        sharded=sharded,
        screened=can_screen
        and screens(module.screening, encoded, site.d_in, ranks.item_bytes),
    )


def undivided(module: ModuleInfo, ranks: Ranks) -> list[SiteInfo]:
    """The sites that `auto` copies only because ranks cannot get equal parts."""

    def would_share(site: SiteInfo, feature_unit: int, column_unit: int) -> bool:
        d_sae = site.d_sae // feature_unit * feature_unit
        d_out = site.out_width // column_unit * column_unit
        return ranks.shards("auto", d_sae, site.d_in, d_out, site.has_skip)

    if module.kind == "vectors" or module.sharding != "auto":
        return []
    return [
        site
        for site in module.sites
        if not would_share(site, 1, 1)
        and would_share(site, ranks.auto_unit, ranks.unit)
    ]


def fits(module: ModuleInfo, site: SiteInfo, slot: SlotInfo) -> bool:
    """Whether a slot can hold a site of a module."""
    if (slot.kind, slot.layer, slot.hook) != (module.kind, site.layer, site.hook):
        return False
    if (slot.hook_out, slot.has_skip) != (site.hook_out, site.has_skip):
        return False
    if module.kind == "vectors":
        return True
    if module.sharding != "auto" and slot.sharded != (module.sharding == "shard"):
        return False
    if module.screening == "off" and slot.screened:
        return False
    is_topk = site.activation is Activation.TOPK
    can_compute = slot.topk if is_topk else slot.threshold
    width_fits = site.d_sae == slot.width if slot.sharded else site.d_sae <= slot.width
    return can_compute and width_fits


def start_up_slots(
    config: SteeringConfig, spare: Iterable[SlotInfo] = ()
) -> SteeringConfig:
    """`config` with a slot for every site of every module, and the spare ones.

    Raises:
        NoRoomError: the modules have more skip sets than there are flag bits.
    """
    check_skip_sets(config)
    slots: list[SlotInfo] = []
    modules: dict[str, ModuleInfo] = {}
    for name, module in config.modules.items():
        first = len(slots)
        slots += [own_slot(module, site, config.ranks) for site in module.sites]
        modules[name] = _placed(module, range(first, len(slots)), slots)
    return replace(config, modules=modules, slots=(*slots, *spare))


def free_slots(config: SteeringConfig) -> dict[int, SlotInfo]:
    """Slots that no module holds, by id."""
    held = {slot for m in config.modules.values() for slot in m.slots or ()}
    return {at: slot for at, slot in slots_of(config).items() if at not in held}


def slots_of(config: SteeringConfig) -> dict[int, SlotInfo]:
    """The existing slots, by id."""
    return {at: slot for at, slot in enumerate(config.slots) if slot is not None}


def with_module(
    config: SteeringConfig, module: ModuleInfo, may_add_slots: bool
) -> SteeringConfig:
    """`config` with a module in free slots. It replaces a module of the same name.

    It prefers the slots of the module that it replaces, then slots that run after all
    held slots of the site (so that modules run in registration order), then the
    narrowest.

    Args:
        config: of the running engine.
        module: to place; `slots` is ignored.
        may_add_slots: whether the engine may get new slots, because it captured no
            graphs. Vectors need a spare row if their site has vectors already.

    Raises:
        NoRoomError: a site finds no free slot, or no flag bit is left.
    """
    old = config.modules.get(module.name)
    others = {n: m for n, m in config.modules.items() if n != module.name}
    free = free_slots(replace(config, modules=others))
    own = set(old.slots or ()) if old else set()
    slots, placed, needed = slots_of(config), [], []
    for site in module.sites:
        held = [
            at
            for at, slot in slots.items()
            if (slot.layer, slot.hook) == (site.layer, site.hook) and at not in free
        ]
        last = max(held, default=-1)
        fitting = [at for at, slot in free.items() if fits(module, site, slot)]
        if fitting:
            best = min(
                fitting,
                key=lambda at: (at not in own, at < last, slots[at].width, at),
            )
            del free[best]
            placed.append(best)
        elif may_add_slots and not _has_vectors(config, module, site, slots):
            new = next(at for at in itertools.count(last + 1) if at not in slots)
            placed.append(new)
            slots[new] = replace(own_slot(module, site, config.ranks), added=True)
        else:
            needed.append(_needed(module, site))
    if needed:
        raise NoRoomError(
            f"no free slot fits: needed {', '.join(needed)}; reserve it in "
            "additional_config.steering.spare at start-up, or remove a module there"
            + _near_misses(module, free.values())
        )
    module = _placed(module, placed, slots)
    modules = {n: module if n == module.name else m for n, m in config.modules.items()}
    result = _with_slots(config, {**modules, module.name: module}, slots)
    check_skip_sets(result)
    return result


def _placed(
    module: ModuleInfo,
    ids: Iterable[int],
    slots: Mapping[int, SlotInfo] | Sequence[SlotInfo],
) -> ModuleInfo:
    """The module in the slots of these ids, one a site."""
    own = tuple(ids)
    sharded = tuple(at for at, slot in enumerate(own) if slots[slot].sharded)
    screened = tuple(at for at, slot in enumerate(own) if slots[slot].screened)
    return replace(module, slots=own, sharded=sharded, screened=screened)


def without_module(config: SteeringConfig, name: str) -> SteeringConfig:
    """`config` without a module. Its slots become free; `added` ones are removed."""
    modules = {n: m for n, m in config.modules.items() if n != name}
    result = _with_slots(config, modules, slots_of(config))
    return replace(result, draining=config.draining - {name})


def _with_slots(
    config: SteeringConfig, modules: dict[str, ModuleInfo], slots: dict[int, SlotInfo]
) -> SteeringConfig:
    """`config` with these modules, and these slots but `added` ones that are free."""
    held = {at for module in modules.values() for at in module.slots or ()}
    kept = {at: slot for at, slot in slots.items() if at in held or not slot.added}
    ids = range(max(kept, default=-1) + 1)
    return replace(config, modules=modules, slots=tuple(kept.get(at) for at in ids))


def check_skip_sets(config: SteeringConfig) -> None:
    """Raise `NoRoomError` when the modules have more skip sets than there are bits."""
    sets = {skip_set(module) for module in config.modules.values()} - {()}
    if len(sets) > MAX_SKIP_SETS:
        raise NoRoomError(
            f"skip_token_ids: found {len(sets)} distinct sets, expected at most "
            f"{MAX_SKIP_SETS} in one engine"
        )


def skip_set(module: ModuleInfo) -> tuple[int, ...]:
    """The token ids that a module bypasses, in canonical form."""
    return tuple(sorted(set(module.skip_token_ids or ())))


def module_bytes(module: ModuleInfo, item_bytes: int, ranks: Ranks = ALONE) -> int:
    """Bytes of a module's weights on a rank, all sites, in a dtype of `item_bytes`.

    With the copies of the encoders of the sites that are screened.
    """
    if module.kind == "vectors":
        return sum(4 * site.d_in for site in module.sites)
    screens = [(module.sites[at], at in module.sharded) for at in module.screened]
    return sum(
        shard_bytes(site, replace(ranks, item_bytes=item_bytes))
        if at in module.sharded
        else site_bytes(site, item_bytes)
        for at, site in enumerate(module.sites)
    ) + sum(
        screen_bytes(ranks.encoded(site.d_sae, sharded), site.d_in)
        for site, sharded in screens
    )


def shard_bytes(site: SiteInfo, ranks: Ranks) -> int:
    """As `site_bytes`, on each rank that shares the SAE."""
    widths = (site.d_sae, site.d_in, site.out_width)
    return ranks.shard_bytes(*widths, has_skip=site.has_skip)


def site_bytes(site: SiteInfo, item_bytes: int) -> int:
    """Bytes of an SAE's or a transcoder's weights in a dtype of `item_bytes`."""
    widths = (site.d_sae, site.d_in, site.out_width)
    return Ranks(1, item_bytes).whole_bytes(*widths, has_skip=site.has_skip)


def _has_vectors(
    config: SteeringConfig,
    module: ModuleInfo,
    site: SiteInfo,
    slots: dict[int, SlotInfo],
) -> bool:
    """Whether a vector's site has a stack of vectors, which cannot grow."""
    stacks = {(s.layer, s.hook) for s in slots.values() if s.kind == "vectors"}
    stacks |= {(room.layer, room.hook) for room in config.inline_sites}
    return module.kind == "vectors" and (site.layer, site.hook) in stacks


def _near_misses(module: ModuleInfo, free: Iterable[SlotInfo]) -> str:
    """Why free slots that ranks share do not take the module, if their width is why."""
    points = {(site.layer, site.hook, site.hook_out) for site in module.sites}
    widths = sorted(
        {
            slot.width
            for slot in free
            if slot.sharded and (slot.layer, slot.hook, slot.hook_out) in points
        }
    )
    if not widths or module.sharding == "replicate":
        return ""
    listed = ", ".join(str(width) for width in widths)
    return f"; the free slots that ranks share take SAEs of exactly {listed} features"


def _needed(module: ModuleInfo, site: SiteInfo) -> str:
    where = f'{{"site": "{site.name}", '
    if module.kind == "vectors":
        return where + '"vectors": 1}'
    if site.is_transcoder:
        where += f'"hook_out": "{site.out_hook.value}", '
        where += '"skip": true, ' if site.has_skip else ""
    if module.sharding == "shard":
        where += '"sharding": "shard", '
    return where + f'"width": {site.d_sae}}}'
