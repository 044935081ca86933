# SPDX-License-Identifier: Apache-2.0
"""What the soak takes for decided by rounding, and what not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from soak.alone import Rounding, answer_alone, asked_as
from soak.choices import (
    LAYERS_OF_ERROR,
    UNITS,
    clamped_features,
    distances,
    jumps,
    undecided,
)
from soak.pool import Item
from steering_testing import models
from steering_testing.engine import DELTA, FULL, engine, sae_spec, save_sae
from steering_testing.reference import Clamp, random_sae
from steering_testing.requests import prompt

from vllm.config.steering import Activation, SiteInfo
from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_state import (
    CONDITION_SHIFT,
    ONLY_IF_ACTIVE,
    ClampKind,
    SAEWeights,
)

CPU = torch.device("cpu")
SITE = (1, "post_block")
F = D = 4


def sae(activation: str, k: int | None = None, threshold: float = 0.0) -> SAEWeights:
    """Feature i reads component i."""
    found = SAEWeights(F, D, torch.float32, CPU)
    found.W_enc.copy_(torch.eye(F))
    found.b_enc.zero_()
    found.threshold.fill_(threshold)
    kind = Activation(activation)
    site = SiteInfo(1, HookPoint.POST_BLOCK, D, F, kind, k, True)
    found.set_meta(site, 0, None)
    return found


def every(value: bool) -> torch.Tensor:
    return torch.full((1, F), value)


def decided(weights: SAEWeights, x: list[float], unit: float, **features: bool) -> bool:
    uses = every(features.get("uses", True))
    asked = every(features.get("asked", False))
    return not bool(undecided(weights, torch.tensor([x]), unit, uses, asked))


def test_the_distance_of_a_topk_is_to_the_other_side_of_its_last_place() -> None:
    pre = torch.tensor([[4.0, 1.0, 3.0, 2.5]])
    assert distances(sae("topk", k=2), pre).tolist() == [[1.5, 2.0, 0.5, 0.5]]
    assert torch.isinf(distances(sae("topk", k=F), pre)).all()
    assert jumps(sae("topk", k=2), -pre).tolist() == [[0.0] * F]


def test_the_distance_of_a_threshold_is_to_the_threshold() -> None:
    pre = torch.tensor([[0.5, -0.25, 0.75, 0.0]])
    weights = sae("jumprelu", threshold=0.5)
    assert distances(weights, pre).tolist() == [[0.0, 0.75, 0.25, 0.5]]
    assert jumps(weights, pre).tolist() == [[0.5] * F]
    assert jumps(sae("relu"), pre).tolist() == [[0.0] * F]


@pytest.mark.parametrize("unit", list(UNITS.values()))
def test_a_gap_counts_when_it_is_within_the_error_of_the_arithmetic(
    unit: float,
) -> None:
    weights = sae("topk", k=2)
    x = [2.0, 1.0, 1.0, 0.0]
    error = LAYERS_OF_ERROR * unit / D**0.5 * 6**0.5
    for gap, expected in ((2.0 * error, True), (0.5 * error, False)):
        assert decided(weights, [*x[:2], 1.0 - gap, 0.0], unit) is expected
    # Nothing of the selection is used.
    assert decided(weights, x, unit, uses=False)


def test_a_threshold_counts_where_its_jump_is_seen() -> None:
    unit = UNITS["tf32"]
    assert not decided(sae("jumprelu", threshold=0.5), [0.5, 0.0, 0.0, 2.0], unit)
    assert decided(sae("jumprelu", threshold=0.5), [0.4, 0.0, 0.0, 2.0], unit)
    assert decided(sae("jumprelu", threshold=1e-3), [1e-3, 0.0, 0.0, 2.0], unit)
    # A clamp that asks whether a feature is active may do anything.
    assert not decided(sae("relu"), [1e-5, 1.0, 1.0, 2.0], unit, asked=True)
    assert decided(sae("relu"), [1e-5, 1.0, 1.0, 2.0], unit)


def test_a_clamp_table_says_which_features_are_used_and_asked_about() -> None:
    table = ClampTable(2, 4, CPU)
    table.count[1] = 4
    table.feature[1] = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    table.code[1] = torch.tensor(
        [
            ClampKind.ADDITIVE,
            ClampKind.ABSOLUTE | ONLY_IF_ACTIVE,
            ClampKind.SCALE | 4 << CONDITION_SHIFT,
            ClampKind.CONDITION,
        ],
        dtype=torch.int32,
    )
    uses, asked = clamped_features(table, torch.tensor([1, 0]), F)
    assert uses.tolist() == [[False, True, True, True], [False] * F]
    assert asked.tolist() == [[False, True, False, True], [False] * F]


def test_ids_of_workers_lead_back_to_those_that_were_asked() -> None:
    found = [asked_as(one) for one in ("17", "17-8f3a2b1c", "0_17-8f3a2b1c", "2_17")]
    assert found == ["17"] * 4


@pytest.mark.engine
@pytest.mark.parametrize("tier", [FULL, DELTA])
def test_a_reference_with_a_near_tie_is_left_out_and_counted(
    tmp_path: Path, tier: str
) -> None:
    """Features come in pairs that differ in the seventh digit, and k is odd."""
    clear = random_sae(64, models.HIDDEN, "topk", 5, k=7)
    tied = random_sae(64, models.HIDDEN, "topk", 5, k=7)
    tied.W_enc[1::2] = tied.W_enc[::2] * (1 + 1e-7)
    tied.b_enc[1::2] = tied.b_enc[::2]
    paths = {
        name: save_sae(tmp_path / name, {SITE: one})
        for name, one in (("clear", clear), ("tied", tied))
    }
    every_feature = [Clamp(at, "scale", 0.5) for at in range(64)]
    pool = [
        Item(name, prompt(3, 6), 2, {tier: [sae_spec(name, {SITE: every_feature})]})
        for name in ("clear", "tied")
    ]
    # No margin for tokens: this is about the selection alone.
    limits = Rounding(-1.0, 1e-3, UNITS["exact"], repeats=False)
    with engine("llama", tmp_path, paths) as llm:
        found = answer_alone(
            llm, pool, {"hot0": paths["clear"], "hot1": paths["clear"]}, limits
        )
    assert [item.kind for item in found.items] == ["clear"]
    assert found.left_out["selection"] == 1
