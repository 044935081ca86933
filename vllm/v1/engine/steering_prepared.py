# SPDX-License-Identifier: Apache-2.0
"""A change of modules or presets between its two phases, `prepare` and `finish`."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config.steering import SteeringConfig

# After this time, the caller of an unfinished change is taken to have given up.
PREPARED_LIMIT_S = 600.0


@dataclass(frozen=True)
class PreparedChange:
    """A change that requests do not see yet.

    `by_workers`: workers have made it; else it is one of presets, which they do not
    know.
    """

    ident: str
    name: str
    after: SteeringConfig
    since: float
    by_workers: bool = True
