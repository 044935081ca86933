# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.engine.utils`: a failed start shows its cause.

The edit a branch would make: `wait_for_engine_startup` raises the error of the engine
core or worker, where vLLM's error only says where to look for it.
"""

from __future__ import annotations

from vllm.config.steering_private_directory import take_start_up_failure
from vllm.plugins.steering.seam import Stock, wrap

MODULE = "vllm.v1.engine.utils"
PARAMETERS = (
    "handshake_socket",
    "core_engines",
    "parallel_config",
    "coordinated_dp",
    "cache_config",
    "launch",
)


def install() -> None:
    """Raise the cause where the front end waits for engines."""
    wrap(f"{MODULE}:wait_for_engine_startup", PARAMETERS, _make)


def _make(stock: Stock) -> Stock:
    def wait_for_engine_startup(*args: object, **kwargs: object) -> object:
        take_start_up_failure()  # of an engine before this one
        try:
            return stock(*args, **kwargs)
        except RuntimeError:
            cause = take_start_up_failure()
            if cause is None:
                raise
            raise cause from None

    return wait_for_engine_startup
