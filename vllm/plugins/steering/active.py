# SPDX-License-Identifier: Apache-2.0
"""The steering configuration of a running engine, rebuilt only when it changes."""

from __future__ import annotations

from typing import Any

from vllm.config.steering import SteeringConfig, get_steering_config

# The resolved JSON that was read last, and what it stands for. Holding the JSON
# keeps its identity from being reused.
_LAST: tuple[Any, SteeringConfig | None] = (None, None)


def active_steering_config(vllm_config: Any) -> SteeringConfig | None:
    """`get_steering_config` of a `VllmConfig`, without rebuilding it per request.

    Replacing `additional_config["steering"]["resolved"]` replaces the result.
    """
    global _LAST
    additional_config = vllm_config.additional_config
    if not isinstance(additional_config, dict):
        return None
    steering = additional_config.get("steering")
    if steering is None:
        return None
    resolved, config = _LAST
    if resolved is not steering["resolved"]:
        resolved = steering["resolved"]
        config = get_steering_config(additional_config)
        _LAST = (resolved, config)
    return config
