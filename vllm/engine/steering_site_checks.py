# SPDX-License-Identifier: Apache-2.0
"""Refuses sites that the model, or its ranks, cannot have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm.config.steering_checks import SteeringConfigError
from vllm.config.steering_points import RESIDUAL_HOOKS, HookPoint
from vllm.config.steering_sharding import Ranks

if TYPE_CHECKING:
    from vllm.config import ModelConfig


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
