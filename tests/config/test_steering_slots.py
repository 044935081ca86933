# SPDX-License-Identifier: Apache-2.0
"""Which slot holds which module."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.config.steering import (
    Activation,
    ModuleInfo,
    SiteInfo,
    SlotInfo,
    SteeringConfig,
)
from vllm.config.steering_points import HookPoint
from vllm.config.steering_sharding import Ranks
from vllm.config.steering_slots import (
    MAX_SKIP_SETS,
    NoRoomError,
    fits,
    free_slots,
    module_bytes,
    start_up_slots,
    undivided,
    with_module,
    without_module,
)

POST = HookPoint.POST_BLOCK
TOPK, RELU = Activation.TOPK, Activation.RELU


def sae(name: str, *widths: int, act: Activation = RELU, ids: int = 0) -> ModuleInfo:
    """A module with one site per width, at layers 0, 1, ..."""
    k = 4 if act is TOPK else None
    sites = tuple(
        SiteInfo(at, POST, 8, width, act, k) for at, width in enumerate(widths)
    )
    return ModuleInfo(name, "sae", "p", "f", f"d-{name}", sites, skip_token_ids=(ids,))


def vectors(name: str) -> ModuleInfo:
    return ModuleInfo(name, "vectors", "p", "f", "d", (SiteInfo(0, POST, 8, 1),))


def slot(width: int, layer: int = 0, **kinds: bool) -> SlotInfo:
    return SlotInfo(layer, POST, "sae", width, **kinds)


def started(*modules: ModuleInfo, spare: tuple[SlotInfo, ...] = ()) -> SteeringConfig:
    return start_up_slots(SteeringConfig({m.name: m for m in modules}), spare)


def placed(config: SteeringConfig, name: str) -> tuple[int, ...] | None:
    return config.modules[name].slots


def test_start_up_gives_every_site_its_own_slot_and_then_the_spare() -> None:
    config = started(sae("a", 16, 32), sae("b", 8), spare=(slot(64),))
    assert placed(config, "a") == (0, 1)
    assert placed(config, "b") == (2,)
    assert [s.width for s in config.slots] == [16, 32, 8, 64]
    assert list(free_slots(config)) == [3]


def test_a_module_takes_the_narrowest_slot_that_fits() -> None:
    config = started(spare=(slot(64), slot(16), slot(32)))
    assert placed(with_module(config, sae("a", 20), False), "a") == (2,)


def test_a_slot_behind_the_held_ones_comes_first_so_registration_order_holds() -> None:
    config = started(spare=(slot(64), slot(64), slot(64)))
    for name in ("a", "b"):
        config = with_module(config, sae(name, 8), False)
    config = without_module(config, "a")
    assert placed(with_module(config, sae("c", 8), False), "c") == (2,)


def test_a_replacement_keeps_its_slots_and_its_place_in_the_order() -> None:
    config = started(sae("a", 16), sae("b", 16), spare=(slot(16),))
    after = with_module(config, sae("a", 12), False)
    assert placed(after, "a") == (0,)
    assert list(after.modules) == ["a", "b"]


def test_a_replacement_that_does_not_fit_its_slot_takes_another() -> None:
    config = started(sae("a", 16), spare=(slot(64),))
    assert placed(with_module(config, sae("a", 32), False), "a") == (1,)


def test_a_threshold_slot_takes_no_topk_module() -> None:
    module = sae("t", 8, act=TOPK)
    assert not fits(module, module.sites[0], slot(8, topk=False))
    assert fits(module, module.sites[0], slot(8, threshold=False))


def test_every_missing_slot_is_named() -> None:
    config = started(spare=(slot(16),))
    with pytest.raises(NoRoomError) as caught:
        with_module(config, sae("a", 17, 20), False)
    for part in ("post_block.0", '"width": 17', "post_block.1", '"width": 20', "spare"):
        assert part in str(caught.value)


def test_an_engine_that_captured_nothing_gets_the_slots_it_lacks() -> None:
    config = with_module(started(), sae("a", 16, 16), True)
    assert placed(config, "a") == (0, 1)
    config = without_module(config, "a")
    assert placed(with_module(config, sae("b", 16), True), "b") == (0,)


def test_a_stack_of_vectors_does_not_grow() -> None:
    config = started(vectors("v"))
    with pytest.raises(NoRoomError, match='"vectors": 1'):
        with_module(config, vectors("w"), True)


def test_the_skip_sets_of_an_engine_are_bounded() -> None:
    modules = [sae(f"m{at}", 4, ids=at) for at in range(MAX_SKIP_SETS)]
    config = started(*modules, spare=(slot(4),))
    with pytest.raises(NoRoomError, match="skip_token_ids"):
        with_module(config, sae("one-more", 4, ids=99), False)
    assert with_module(config, sae("same", 4, ids=3), False).modules["same"]
    with pytest.raises(NoRoomError, match="skip_token_ids: found 32 distinct sets"):
        started(*modules, sae("one-more", 4, ids=99))


def test_slots_and_drains_survive_json() -> None:
    config = started(sae("a", 16), vectors("v"), spare=(slot(64, 1, topk=False),))
    config = SteeringConfig(config.modules, 8, config.slots, frozenset({"a"}))
    again = SteeringConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config


def test_the_bytes_of_a_module_are_those_of_its_buffers() -> None:
    import torch

    from vllm.model_executor.layers.steering_state import SAEWeights

    weights = SAEWeights(16, 8, torch.bfloat16, torch.device("cpu"))
    held = sum(
        buffer.nbytes
        for name, buffer in weights.named_buffers()
        if name not in ("meta", "norm_limit")
    )
    assert module_bytes(sae("a", 16), 2) == held


def test_the_bytes_of_a_shared_module_are_those_of_a_rank() -> None:
    import torch

    from vllm.model_executor.layers.steering_shards import Shard
    from vllm.model_executor.layers.steering_state import SAEWeights

    weights = SAEWeights(64, 64, torch.bfloat16, torch.device("cpu"), shard=Shard(3, 4))
    held = sum(tensor.nbytes for tensor in weights.tensors())
    site = SiteInfo(0, POST, 64, 64, RELU)
    module = replace(sae("a", 64), sites=(site,), sharded=(0,))
    assert module_bytes(module, 2, Ranks(4)) == held
    assert module_bytes(module, 2, Ranks(4)) < module_bytes(sae("a", 64), 2) * 64 / 8


# F, D, tp: what auto chooses in bfloat16.
AUTO = [
    (131072, 5376, 4, True),
    (131072, 5376, 2, True),
    (65536, 8192, 4, True),
    (16384, 2304, 2, False),
    (16384, 2304, 8, False),
    (131072, 5376, 1, False),
    (131072 + 16, 5376, 4, False),
    (131072, 5376 + 16, 4, False),
]


@pytest.mark.parametrize(("d_sae", "d_model", "tp", "sharded"), AUTO)
def test_auto_shares_what_saves_a_rank_many_bytes(
    d_sae: int, d_model: int, tp: int, sharded: bool
) -> None:
    ranks = Ranks(tp, 2)
    widths = (d_sae, d_model, d_model)
    assert ranks.shards("auto", *widths) is sharded
    assert not ranks.shards("replicate", *widths)
    assert ranks.shards("shard", *widths) is (tp > 1)


@pytest.mark.parametrize(("d_sae", "d_model", "tp", "sharded"), AUTO)
def test_what_auto_copies_for_its_widths_alone_is_known(
    d_sae: int, d_model: int, tp: int, sharded: bool
) -> None:
    site = SiteInfo(0, POST, d_model, d_sae, RELU)
    module = replace(sae("a", 64), sites=(site,))
    divides = d_sae % (16 * tp) == 0 and d_model % (16 * tp) == 0
    large = d_sae >= 65536 and tp > 1
    expected = [site] if large and not divides else []
    assert undivided(module, Ranks(tp, 2)) == expected
    assert undivided(replace(module, sharding="replicate"), Ranks(tp, 2)) == []
    assert undivided(module, Ranks(tp, 2, auto_copies=True)) == []


def test_what_auto_copies_on_gpus_for_its_widths_alone_is_known() -> None:
    gpus = Ranks(4, 2, stores=True)
    for d_sae, expected in ((131072, 0), (131072 + 64, 1), (16384 + 64, 0)):
        site = SiteInfo(0, POST, 5376, d_sae, RELU)
        module = replace(sae("a", 64), sites=(site,))
        assert len(undivided(module, gpus)) == expected


def test_a_sharded_slot_takes_modules_of_its_width_that_may_be_shared() -> None:
    whole, shared = slot(64), slot(64, sharded=True)
    for sharding, fitting in {
        "auto": (whole, shared),
        "shard": (shared,),
        "replicate": (whole,),
    }.items():
        module = replace(sae("a", 64), sharding=sharding)
        (site,) = module.sites
        for one in (whole, shared):
            assert fits(module, site, one) is (one in fitting), sharding
    narrow = sae("a", 32)
    assert fits(narrow, narrow.sites[0], whole)
    assert not fits(narrow, narrow.sites[0], shared)


def test_a_placed_module_knows_its_shared_sites() -> None:
    config = SteeringConfig({}, ranks=Ranks(2, 2))
    config = start_up_slots(config, (slot(64), slot(64, layer=1, sharded=True)))
    after = with_module(config, sae("a", 64, 64), may_add_slots=False)
    module = after.modules["a"]
    assert module.sharded == (1,)
    assert [module.is_sharded(site) for site in module.sites] == [False, True]
    again = SteeringConfig.from_json(json.loads(json.dumps(after.to_json())))
    assert again == after
    asked = replace(sae("b", 64), sharding="shard")
    with pytest.raises(NoRoomError, match='"sharding": "shard", "width": 64'):
        with_module(config, asked, may_add_slots=False)
    grown = with_module(config, asked, may_add_slots=True)
    assert grown.modules["b"].sharded == (0,)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 20)), max_size=30))
def test_no_two_modules_ever_share_a_slot(changes: list[tuple[str, int]]) -> None:
    config = started(sae("a", 8), spare=(slot(8), slot(16), slot(16)))
    for name, width in changes:
        if width == 0:
            config = without_module(config, name)
            continue
        try:
            config = with_module(config, sae(name, width), False)
        except NoRoomError:
            continue
        held = [at for m in config.modules.values() for at in m.slots or ()]
        assert len(held) == len(set(held))
        for module in config.modules.values():
            for site, at in zip(module.sites, module.slots or (), strict=True):
                assert fits(module, site, config.slots[at])
