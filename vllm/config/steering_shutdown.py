# SPDX-License-Identifier: Apache-2.0
"""Whether a front end shuts its engine down, so that callers are told that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config.steering_json import Json

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_KEY = "shutdown_has_ended"


def note_shutdown(vllm_config: VllmConfig, has_ended: bool) -> None:
    """In a front end: it shuts its engine down, or has done so."""
    steering = _section(vllm_config)
    if steering is not None:
        steering[_KEY] = has_ended


def shutdown_has_ended(vllm_config: VllmConfig) -> bool | None:
    """Whether the front end has shut its engine down; None: it does not do so."""
    steering = _section(vllm_config)
    return None if steering is None else steering.get(_KEY)


def _section(vllm_config: VllmConfig) -> Json | None:
    additional = vllm_config.additional_config
    return additional.get("steering") if isinstance(additional, dict) else None
