# SPDX-License-Identifier: Apache-2.0
"""Says that a few tokens with a huge norm decide what was measured of an SAE."""

from __future__ import annotations

from vllm.config.steering import LARGE_NORM


def warnings_of_large_norms(
    site: str, tokens: int, large: int, median: float
) -> list[str]:
    """One line if some tokens have a norm far above the median, else none.

    Args:
        tokens: number of tokens that were measured.
        large: how many of them have such a norm, by `large_norms`.
        median: the median norm.
    """
    if not large:
        return []
    line = (
        f"{site}: {large} of {tokens} tokens have a norm above {LARGE_NORM} times the "
        "median, as attention sinks have; FVU and the largest activations are theirs. "
        f"The module options norm_guard={LARGE_NORM} and reference_norm={median:.4g} "
        "leave such tokens unchanged"
    )
    return [line]
