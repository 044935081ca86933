# SPDX-License-Identifier: Apache-2.0
"""Start-up: which modules the ranks share, and what is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.plugins.steering.conftest import D_SAE
from tests.steering_testing import models
from vllm.config import VllmConfig
from vllm.config.steering import SteeringConfig, get_steering_config
from vllm.config.steering_checks import SteeringConfigError
from vllm.config.steering_environment import PEER_MEMORY_ENV
from vllm.config.steering_sharding import Ranks
from vllm.engine import steering_topology
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.steering_resolution import resolve_steering


@pytest.fixture(scope="module")
def vllm_config(model_path: Path) -> VllmConfig:
    args = EngineArgs(str(model_path), skip_tokenizer_init=True, max_model_len=128)
    return args.create_engine_config()


def resolved(base: VllmConfig, tp: int, steering: dict[str, Any]) -> SteeringConfig:
    config = copy.copy(base)
    config.parallel_config = copy.copy(base.parallel_config)
    config.parallel_config.tensor_parallel_size = tp
    config.additional_config = {"steering": steering}
    resolve_steering(config)
    found = get_steering_config(config.additional_config)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("tp", "sharding", "sharded"),
    [(1, "shard", ()), (2, "shard", (0,)), (2, "replicate", ()), (2, "auto", ())],
)
def test_a_module_says_whether_ranks_share_it(
    vllm_config: VllmConfig,
    sae_path: Path,
    tp: int,
    sharding: str,
    sharded: tuple[int, ...],
) -> None:
    module = {"path": str(sae_path), "sharding": sharding}
    config = resolved(vllm_config, tp, {"modules": {"m": module}})
    assert config.modules["m"].sharded == sharded
    assert config.slots[0] is not None
    assert config.slots[0].sharded == bool(sharded)
    assert config.ranks.size == tp


def test_sharding_does_not_change_the_digest(
    vllm_config: VllmConfig, sae_path: Path
) -> None:
    digests = {
        resolved(
            vllm_config, 2, {"modules": {"m": {"path": str(sae_path), "sharding": how}}}
        )
        .modules["m"]
        .digest
        for how in ("shard", "replicate")
    }
    assert len(digests) == 1


def slot(**options: Any) -> dict[str, Any]:
    return {"spare": [{"layer": 1, "hook": "post_block", "width": 32, **options}]}


def test_a_spare_slot_is_copied_unless_it_says_otherwise(
    vllm_config: VllmConfig,
) -> None:
    for options, sharded in (({}, False), ({"sharding": "shard"}, True)):
        [found] = resolved(vllm_config, 2, slot(**options)).slots
        assert found is not None and found.sharded is sharded
    [found] = resolved(vllm_config, 1, slot(sharding="shard")).slots
    assert found is not None and not found.sharded


def check_refused(
    base: VllmConfig, tp: int, steering: dict[str, Any], *parts: str
) -> None:
    with pytest.raises(SteeringConfigError) as caught:
        resolved(base, tp, steering)
    for part in parts:
        assert part in str(caught.value)


def test_what_ranks_cannot_share_is_refused_by_name(
    vllm_config: VllmConfig, sae_path: Path, tmp_path: Path
) -> None:
    def module(path: Path, sharding: object) -> dict[str, Any]:
        return {"modules": {"m": {"path": str(path), "sharding": sharding}}}

    widths = f"{D_SAE} features and {models.HIDDEN} columns on 4 ranks"
    check_refused(
        vllm_config, 4, module(sae_path, "shard"), "'m': sharding", widths, "of 64"
    )
    check_refused(vllm_config, 2, module(sae_path, "all"), "m.sharding: found ")
    save_file({"layers.1.post_block": torch.ones(64)}, tmp_path / "v.safetensors")
    vectors = module(tmp_path / "v.safetensors", "shard")
    check_refused(vllm_config, 2, vectors, "'m': sharding", "steering vectors")
    where = "steering.spare[0].sharding"
    check_refused(
        vllm_config, 2, slot(sharding="auto"), where, '"replicate" or "shard"'
    )
    narrow = slot(sharding="shard", width=40)
    check_refused(vllm_config, 2, narrow, where, "40 features", "multiples of 32")
    both = {"spare": [{"layer": 1, "hook": "post_block", "vectors": 1}]}
    both["spare"][0]["sharding"] = "shard"
    check_refused(vllm_config, 2, both, where, "only with width")


HALF = "\ud800"  # of a surrogate pair
ODD_VALUES = ["all", "SHARD", "", None, True, 2, 0.5, ["shard"], {"shard": 2}, HALF]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("value", ODD_VALUES, ids=ascii)
def test_another_value_is_refused_by_its_path_on_any_number_of_ranks(
    vllm_config: VllmConfig, sae_path: Path, tp: int, value: Any
) -> None:
    module = {"modules": {"m": {"path": str(sae_path), "sharding": value}}}
    accepted = 'expected one of "auto", "replicate", "shard"'
    if value == HALF:
        accepted = "expected Unicode text"
    where = "additional_config.steering.modules.m.sharding: found "
    check_refused(vllm_config, tp, module, where, accepted)
    where = "additional_config.steering.spare[0].sharding: found "
    accepted = 'expected "replicate" or "shard"'
    check_refused(vllm_config, tp, slot(sharding=value), where, accepted)


class Hopper:
    """GPUs that NVLink joins, as far as sharding asks."""

    capability = (9, 0)
    joined = True

    @staticmethod
    def is_cpu() -> bool:
        return False

    @staticmethod
    def is_cuda() -> bool:
        return True

    @classmethod
    def is_device_capability(cls, asked: tuple[int, int]) -> bool:
        return asked == cls.capability

    @staticmethod
    def device_count() -> int:
        return 4

    @staticmethod
    def device_id_to_physical_device_id(index: int) -> int:
        return 7 - index

    @classmethod
    def is_fully_connected(cls, ids: list[int]) -> bool:
        assert ids == [7 - index for index in range(len(ids))]
        return cls.joined


class Ampere(Hopper):
    capability = (8, 0)


class Apart(Hopper):
    joined = False


class ROCm(Hopper):
    @staticmethod
    def is_cuda() -> bool:
        return False


def on_platform(monkeypatch: pytest.MonkeyPatch, platform: type[Hopper]) -> None:
    monkeypatch.setattr(steering_topology, "current_platform", platform)
    library = Path("_steering_C.so")
    monkeypatch.setattr(steering_topology, "extension_library", lambda: library)
    monkeypatch.setenv(PEER_MEMORY_ENV, "1")


def half(base: VllmConfig) -> VllmConfig:
    """The same with a model of 16 bits, and custom all-reduce as on GPUs."""
    config = copy.copy(base)
    config.parallel_config = copy.copy(base.parallel_config)
    config.parallel_config.disable_custom_all_reduce = False
    config.model_config = copy.copy(base.model_config)
    config.model_config.dtype = torch.bfloat16
    return config


def test_auto_shares_large_saes_on_gpus_that_nvlink_joins(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_platform(monkeypatch, Hopper)
    ranks = resolved(half(vllm_config), 4, {}).ranks
    assert ranks.stores and not ranks.auto_copies
    assert ranks.shards("auto", 131072, 5376, 5376)
    assert ranks.shards("auto", 65536, 8192, 8192)
    # What the extension cannot share would gather, which costs idle steps too.
    assert not ranks.shards("auto", 131072 + 64, 5376, 5376)
    assert ranks.shards("shard", 131072 + 64, 5376, 5376)
    assert not ranks.shards("auto", 131072, 5376, 5376, has_skip=True)
    two = resolved(half(vllm_config), 2, {}).ranks
    assert two.stores and not two.shards("auto", 16384, 2304, 2304)


def test_auto_copies_where_ranks_would_gather(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_platform(monkeypatch, Hopper)
    config = half(vllm_config)

    def copies(tp: int = 4) -> bool:
        ranks = resolved(config, tp, {}).ranks
        assert ranks.auto_copies is not ranks.stores
        return ranks.auto_copies

    assert not copies()
    assert copies(8)  # more ranks than GPUs here
    config.model_config.dtype = torch.float32
    assert copies()
    config.model_config.dtype = torch.float16
    assert not copies()
    config.parallel_config.disable_custom_all_reduce = True
    assert copies()
    config.parallel_config.disable_custom_all_reduce = False
    monkeypatch.setenv(PEER_MEMORY_ENV, "0")
    assert copies()
    assert copies(2)
    monkeypatch.delenv(PEER_MEMORY_ENV)
    assert not copies() and not copies(2)  # they store unless told not to
    monkeypatch.setenv(PEER_MEMORY_ENV, "1")
    monkeypatch.setattr(steering_topology, "extension_library", lambda: None)
    assert copies()


@pytest.mark.parametrize("platform", [Ampere, Apart, ROCm])
def test_auto_copies_on_other_gpus(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch, platform: type[Hopper]
) -> None:
    on_platform(monkeypatch, platform)
    assert resolved(half(vllm_config), 4, {}).ranks.auto_copies


def test_gpus_on_which_auto_copies_share_what_is_asked_for(
    vllm_config: VllmConfig, sae_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_platform(monkeypatch, Ampere)
    asked = {"modules": {"m": {"path": str(sae_path), "sharding": "shard"}}}
    assert resolved(vllm_config, 2, asked).modules["m"].sharding == "shard"
    assert resolved(vllm_config, 2, {}).ranks.auto_copies
    assert not Ranks(2, 2, auto_copies=True).shards("auto", 131072, 5376, 5376)
    transcoder = slot(hook="mlp_in", hook_out="mlp_out", sharding="shard")
    [found] = resolved(vllm_config, 2, transcoder).slots
    assert found is not None and found.sharded
    assert resolved(vllm_config, 1, asked).modules["m"].sharded == ()
