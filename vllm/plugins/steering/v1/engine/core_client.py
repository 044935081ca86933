# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.engine.core_client`: what front ends do with module changes.

The edits a branch would make: `collective_rpc_async` calls the registries of all
data-parallel ranks as one, where vLLM returns only the first rank's reply. The
synchronous client takes over the configuration in the reply. `shutdown` notes that the
client was stopped, so that calls that wait are not told of an engine that has died.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config.steering_json import Json
from vllm.config.steering_replies import METHOD, as_reply
from vllm.engine.steering_active_config import take_over
from vllm.plugins.steering.seam import Stock, declare, wrap
from vllm.v1.engine.steering_ranks import call_registries

if TYPE_CHECKING:
    from vllm.v1.engine.core_client import AsyncMPClient, MPClient, SyncMPClient

MODULE = "vllm.v1.engine.core_client"
PARAMETERS = ("self", "method", "timeout", "args", "kwargs")


def install() -> None:
    """Call the registries where clients call workers."""
    wrap(f"{MODULE}:AsyncMPClient.collective_rpc_async", PARAMETERS, _make_async)
    wrap(f"{MODULE}:SyncMPClient.collective_rpc", PARAMETERS, _make_sync)
    declare(f"{MODULE}:MPClient", "steering_stopping")
    wrap(f"{MODULE}:MPClient.shutdown", ("self", "timeout"), _make_shutdown)


def _make_shutdown(stock: Stock) -> Stock:
    def shutdown(self: MPClient, timeout: float | None = None) -> None:
        # vLLM shuts the client down too when an engine has died.
        if not self.resources.engine_dead:
            self.steering_stopping = True
        stock(self, timeout)

    return shutdown


def _make_async(stock: Stock) -> Stock:
    async def collective_rpc_async(
        self: AsyncMPClient,
        method: object,
        timeout: float | None = None,
        args: tuple = (),
        kwargs: Json | None = None,
    ) -> list:
        if method != METHOD:
            return await stock(self, method, timeout, args, kwargs)
        action, payload = args
        return [await call_registries(self, action, payload)]

    return collective_rpc_async


def _make_sync(stock: Stock) -> Stock:
    def collective_rpc(
        self: SyncMPClient,
        method: object,
        timeout: float | None = None,
        args: tuple = (),
        kwargs: Json | None = None,
    ) -> list:
        answers = stock(self, method, timeout, args, kwargs)
        if method == METHOD:
            take_over(self.vllm_config, as_reply(answers[0]).config)
        return answers

    return collective_rpc
