# SPDX-License-Identifier: Apache-2.0
"""Which SAEs get an 8-bit copy of their encoder, and what it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vllm.config.steering import (
    Activation,
    ModuleInfo,
    SiteInfo,
    SlotInfo,
    SteeringConfig,
)
from vllm.config.steering_points import HookPoint
from vllm.config.steering_screening import Screening, most_tokens, screen_bytes, screens
from vllm.config.steering_sharding import Ranks
from vllm.config.steering_slots import fits, module_bytes, start_up_slots
from vllm.model_executor.layers.steering_state import SAEWeights

POST, RELU = HookPoint.POST_BLOCK, Activation.RELU
ON = Ranks(item_bytes=2, screens=True)


def module(
    width: int,
    d_in: int = 3584,
    act: Activation = RELU,
    screening: Screening = "auto",
) -> ModuleInfo:
    site = SiteInfo(0, POST, d_in, width, act, 4 if act is Activation.TOPK else None)
    return ModuleInfo("m", "sae", "p", "f", "d", (site,), screening=screening)


def screened(own: ModuleInfo, ranks: Ranks) -> bool:
    config = start_up_slots(SteeringConfig({"m": own}, ranks=ranks))
    slot = config.slots[0]
    assert slot is not None
    assert slot.screened == bool(config.modules["m"].screened)
    assert SteeringConfig.from_json(config.to_json()) == config
    return slot.screened


@pytest.mark.parametrize(
    ("d_sae", "d_in", "gains"),
    [
        (16384, 2304, False),
        (65536, 2304, False),
        (65536, 3584, True),
        (131072, 5376, True),
        (131072, 8200, False),
    ],
)
def test_only_wide_encoders_gain(d_sae: int, d_in: int, gains: bool) -> None:
    assert screens("auto", d_sae, d_in, 2) == gains
    assert not screens("off", d_sae, d_in, 2)
    assert not screens("auto", d_sae, d_in, 4)


@pytest.mark.parametrize(
    ("d_sae", "d_in", "most"), [(65536, 3584, 32), (131072, 5376, 64)]
)
def test_only_the_widest_gain_with_many_tokens(
    d_sae: int, d_in: int, most: int
) -> None:
    assert most_tokens(d_sae, d_in) == most


def test_a_slot_is_screened_where_the_device_can_and_the_module_may() -> None:
    assert screened(module(65536), ON)
    assert not screened(module(65536, screening="off"), ON)
    assert not screened(module(65536), Ranks(item_bytes=2))
    assert not screened(module(16384), ON)
    assert not screened(module(65536, act=Activation.TOPK), ON)


def test_ranks_screen_the_rows_that_they_hold() -> None:
    two, four = replace(ON, size=2), replace(ON, size=4)
    assert screened(module(131072), two)
    assert not screened(module(131072), four)  # a quarter is too narrow
    # The extension's kernels do not share an SAE of these features.
    assert not screened(module(131072 + 64), two)
    own = module(131072)
    config = start_up_slots(SteeringConfig({"m": own}, ranks=two))
    held = config.modules["m"]
    plain = module_bytes(replace(held, screened=()), 2, two)
    assert module_bytes(held, 2, two) - plain == screen_bytes(65536, 3584)


def test_a_module_that_is_off_takes_no_screened_slot() -> None:
    slot = SlotInfo(0, POST, "sae", 65536, screened=True)
    for own, fit in ((module(65536), True), (module(65536, screening="off"), False)):
        assert fits(own, own.sites[0], slot) == fit
        assert fits(own, own.sites[0], replace(slot, screened=False))


def test_the_bytes_of_the_copy_are_those_that_are_held() -> None:
    cpu = torch.device("cpu")
    plain, copied = (
        sum(b.nbytes for b in SAEWeights(96, 200, torch.bfloat16, cpu,
                                         screened=on).buffers())
        for on in (False, True)
    )  # fmt: skip
    assert copied - plain == screen_bytes(96, 200)
    own = module(96, 200)
    held = replace(own, screened=(0,))
    assert module_bytes(held, 2) - module_bytes(own, 2) == screen_bytes(96, 200)


def test_a_copy_follows_its_weights() -> None:
    cpu = torch.device("cpu")
    weights = SAEWeights(64, 72, torch.bfloat16, cpu, screened=True)
    staged = SAEWeights(48, 72, torch.bfloat16, cpu)
    assert weights.screen is not None
    place = weights.screen.q.data_ptr()
    staged.W_enc.normal_()
    weights.screen.state[:3].fill_(7)
    weights.copy_from(staged)
    weights.refresh()
    close = weights.screen.rows[:, :1] * weights.screen.q[:, :72]
    assert (close - weights.W_enc.float()).abs().max() < 0.03
    assert not weights.screen.q[48:].any() and weights.screen.q[:48].any()
    assert weights.screen.q.data_ptr() == place
    assert weights.screen.state.tolist() == [0, 0, 0, 32]
    staged.refresh()  # has no copy
