# SPDX-License-Identifier: Apache-2.0
"""Checks presets in a thread of its own, so that the engine goes on stepping.

A server may have hundreds of presets with thousands of clamps each. A check takes up to
about 20 ms each.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from msgspec.structs import replace

from vllm.config.steering import SteeringConfig
from vllm.config.steering_json import Json
from vllm.config.steering_replies import ModuleReply, RefusedCall
from vllm.engine.steering_presets import (
    warn_of_broken_presets,
    with_default,
    with_preset,
    without_preset,
)
from vllm.logger import init_logger

logger = init_logger(__name__)

# Makes the configuration after a change of presets from the change's payload.
PresetChange = Callable[[SteeringConfig, Json], SteeringConfig]
CHANGES: dict[str, PresetChange] = {
    "put_preset": with_preset,
    "delete_preset": without_preset,
    "set_default_preset": with_default,
}
# What the log says then.
_LOGGED = {
    "put_preset": "Steering: preset %s is in place",
    "delete_preset": "Steering: preset %s is removed",
    "set_default_preset": "Steering: the default preset is %s",
}
# Takes over a checked change, given the configuration that it was checked under; None
# if that is not the engine's any more.
Keep = Callable[[SteeringConfig, SteeringConfig, Json], ModuleReply | None]


class PresetChecks:
    """The thread that checks presets of one engine core.

    Args:
        config: the engine's configuration as it is now.
        keep: takes over a checked change. It is called in the thread.
    """

    def __init__(self, config: Callable[[], SteeringConfig], keep: Keep):
        self._config = config
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "steering-presets")

    def change(self, action: str, payload: Json) -> Future[ModuleReply]:
        """Check and make one of `CHANGES`."""
        return self._thread.submit(self._change, action, payload)

    def warn(self, before: SteeringConfig, after: SteeringConfig, module: str) -> None:
        """Log which presets the change of a module breaks."""
        self._thread.submit(warn_of_broken_presets, before, after, module)

    def _change(self, action: str, payload: Json) -> ModuleReply:
        reply: ModuleReply | None = None
        try:
            while reply is None:
                config = self._config()
                after = CHANGES[action](config, payload)
                reply = self._keep(config, after, payload)
            if "phase" not in payload:  # of several ranks, some may still refuse
                logger.info(_LOGGED[action], payload["name"])
        except RefusedCall as refused:
            reply = refused.reply
        return replace(reply, config=self._config().to_json())
