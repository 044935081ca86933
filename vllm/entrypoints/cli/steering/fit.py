# SPDX-License-Identifier: Apache-2.0
"""How well an SAE fits a stream, and what about that is suspicious."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm.entrypoints.steering.sinks import warnings_of_large_norms
from vllm.model_executor.layers.steering_reference import (
    FEATURE_SLICE,
    encode,
    large_norms,
    within_norm,
)
from vllm.model_executor.layers.steering_state import SAEWeights

TOKEN_SLICE = 128

# Above this FVU, an SAE explains next to nothing, whatever it declares.
HOPELESS_FVU = 0.9
# FVU depends on the text. It disagrees above `FVU_FACTOR * declared + FVU_MARGIN`.
FVU_FACTOR, FVU_MARGIN = 1.5, 0.05
L0_FACTOR = 2.0
# Another layer fits better when its FVU is below this share of the site's.
NEARBY_SHARE = 0.5
# Below this FVU, an SAE fits well enough and other layers are not suggested.
GOOD_FVU = 0.05


@dataclass(frozen=True)
class Fit:
    """How well an SAE reconstructs `tokens` tokens: FVU and mean L0.

    FVU is `sum ||x - x'||^2 / sum ||x - mean(x)||^2`; L0 counts the non-zero feature
    activations of a token. `median_norm` is that of what the SAE reads, and `large` the
    number of tokens far above it (`large_norms`).
    """

    tokens: int
    fvu: float
    l0: float
    median_norm: float = 0.0
    large: int = 0


def measure(
    weights: SAEWeights, x: torch.Tensor, target: torch.Tensor | None = None
) -> Fit:
    """Reconstruct activations and say how well.

    Args:
        weights: a canonical SAE, on the device of `x`.
        x: `[T, D]`, in the model's dtype. Tokens past the SAE's norm limit, which
            the tiers leave untouched, do not count.
        target: `[T, d_out]`, what a transcoder's output should match; `x` if None.

    Raises:
        ValueError: no token counts, or all of them are the same.
    """
    x = x.to(torch.float32)
    target = x if target is None else target.to(torch.float32)
    kept = within_norm(x, weights.norm_limit)
    x, target = x[kept], target[kept]
    if not x.shape[0]:
        raise ValueError("norm_guard: every token exceeds it, expected a larger one")
    error = active = 0.0
    for part, true in zip(x.split(TOKEN_SLICE), target.split(TOKEN_SLICE), strict=True):
        acts = encode(weights, part)
        active += float(acts.count_nonzero())
        found = decode(weights, acts)
        if weights.W_skip is not None:
            found += part @ weights.W_skip.to(part.dtype).T
        error += float((true - found).double().square().sum())
    variance = float((target - target.mean(0)).double().square().sum())
    if variance == 0:
        raise ValueError(
            "text: expected tokens that differ, found the same stream at all of them"
        )
    median, large = large_norms(x.norm(dim=1))
    tokens = x.shape[0]
    return Fit(tokens, error / variance, active / tokens, median, int(large.sum()))


def decode(weights: SAEWeights, acts: torch.Tensor) -> torch.Tensor:
    """`b_dec + sum_i f_i W_dec[i]`, `[n, D]` of `acts [n, F]`."""
    out = weights.b_dec.to(acts.dtype).expand(acts.shape[0], -1).clone()
    for start in range(0, weights.d_sae_capacity, FEATURE_SLICE):
        part = slice(start, start + FEATURE_SLICE)
        out += acts[:, part] @ weights.W_dec[part].to(acts.dtype)
    return out


def judge(
    site: str,
    fit: Fit,
    declared: Mapping[str, float],
    nearby: Mapping[str, float],
) -> list[str]:
    """Warnings about a site, one line each; empty when nothing disagrees.

    Args:
        declared: what the files claim of `fvu` and `l0`.
        nearby: FVU of the same SAE at other sites, by name.
    """
    found = warnings_of_large_norms(site, fit.tokens, fit.large, fit.median_norm)
    if not fit.fvu <= HOPELESS_FVU:
        found.append(
            f"{site}: FVU {fit.fvu:.3f}: the SAE explains next to nothing here; is it "
            "of this model, layer and hook?"
        )
    elif "fvu" in declared and fit.fvu > FVU_FACTOR * declared["fvu"] + FVU_MARGIN:
        found.append(f"{site}: FVU {fit.fvu:.3f}, declared {declared['fvu']:g}")
    if "l0" in declared and not (
        declared["l0"] / L0_FACTOR <= fit.l0 <= declared["l0"] * L0_FACTOR
    ):
        found.append(f"{site}: L0 {fit.l0:.1f}, declared {declared['l0']:g}")
    if nearby and fit.fvu > GOOD_FVU:
        best = min(nearby, key=lambda name: nearby[name])
        if nearby[best] < NEARBY_SHARE * fit.fvu:
            found.append(
                f"{site}: the SAE fits {best} better, FVU {nearby[best]:.3f} there "
                f"and {fit.fvu:.3f} here; is the site right?"
            )
    return found
