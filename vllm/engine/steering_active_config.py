# SPDX-License-Identifier: Apache-2.0
"""The steering configuration of a running engine, in every process that needs it.

The engine core decides which modules there are. Its answer to each change holds the new
configuration, and the front end that asked takes it over. Several API server processes
of one engine tell each other through a file (`steering_shared_config.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config.steering import SteeringConfig, get_steering_config
from vllm.config.steering_json import Json
from vllm.engine.steering_options import limit_option
from vllm.engine.steering_shared_config import shared_config
from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

# The resolved JSON that was read last, and its configuration. Keeping the JSON alive
# keeps its identity from being reused.
_LAST: tuple[Json | None, SteeringConfig | None] = (None, None)


def active_steering_config(vllm_config: VllmConfig) -> SteeringConfig | None:
    """`get_steering_config` of a `VllmConfig`, without rebuilding it per request.

    Replacing `additional_config["steering"]["resolved"]` replaces the result.
    """
    global _LAST
    steering = _section(vllm_config)
    if steering is None:
        return None
    shared = shared_config(vllm_config.parallel_config)
    if shared is not None:
        _take(steering, shared.read_if_changed())
    resolved, config = _LAST
    if resolved is not steering["resolved"]:
        resolved = steering["resolved"]
        config = get_steering_config(vllm_config.additional_config)
        _LAST = (resolved, config)
    return config


def max_body_bytes(vllm_config: VllmConfig) -> int | None:
    """How large the body of a request may be; None: any size, without steering."""
    steering = _section(vllm_config)
    if steering is None:
        return None
    return limit_option(steering, "max_body_mib") << 20


def may_register(vllm_config: VllmConfig) -> bool:
    """Whether clients may name files to load modules from."""
    steering = _section(vllm_config)
    return steering is not None and bool(steering.get("module_roots"))


def publish(vllm_config: VllmConfig, config: SteeringConfig) -> None:
    """Make `config` what the engine core admits requests under."""
    vllm_config.additional_config["steering"]["resolved"] = config.to_json()


def take_over(vllm_config: VllmConfig, resolved: Json | None) -> None:
    """In a front end: use the engine core's new configuration.

    Args:
        vllm_config: of the front end.
        resolved: the configuration in an answer of the engine core. It is ignored if it
            is older than the front end's.
    """
    steering = _section(vllm_config)
    if steering is None or resolved is None:
        return
    _take(steering, resolved)
    shared = shared_config(vllm_config.parallel_config)
    if shared is not None:
        try:
            shared.keep(steering["resolved"])
        except OSError as error:
            # The change is made. Each server asks the engine for metrics, and finds it.
            text = (
                "Steering: other API servers learn of changes some seconds later, "
                "because the file that they share cannot be written: %s"
            )
            logger.warning_once(text, str(error))


def _section(vllm_config: VllmConfig) -> Json | None:
    additional_config = vllm_config.additional_config
    if not isinstance(additional_config, dict):
        return None
    return additional_config.get("steering")


def _take(steering: Json, resolved: Json | None) -> None:
    if resolved is not None and resolved["version"] > steering["resolved"]["version"]:
        steering["resolved"] = resolved
