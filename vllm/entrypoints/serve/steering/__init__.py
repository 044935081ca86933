# SPDX-License-Identifier: Apache-2.0
"""HTTP routes that change the modules of a running server, and their metrics.

`SteeringEndpoints` is the `vllm.endpoint_plugins` entry point named `steering`: vLLM
loads it only when `VLLM_PLUGINS` names it.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.datastructures import State

from vllm.entrypoints.serve.steering import preset_router
from vllm.entrypoints.serve.steering.access import configured_key
from vllm.entrypoints.serve.steering.api_router import router
from vllm.entrypoints.serve.steering.encode import EncodeService, served_names
from vllm.entrypoints.serve.steering.metrics import SteeringMetrics
from vllm.entrypoints.serve.steering.playground import PATH, Playground, to_page
from vllm.entrypoints.serve.steering.service import SteeringModulesService

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask

__all__ = ["SteeringEndpoints"]


class SteeringEndpoints:
    """The endpoint plugin."""

    name = "steering"
    required_tasks: tuple[SupportedTask, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; they answer once `init_state` has run."""
        app.include_router(router)
        app.include_router(preset_router.router)
        app.add_route(PATH, to_page, include_in_schema=False)
        app.mount(PATH, Playground(), name="steering-playground")

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Connect the routes to the engine and start the metrics."""
        if engine_client is None:
            return
        service = SteeringModulesService(engine_client)
        state.steering_modules = service
        state.steering_encode = EncodeService(engine_client, served_names(args))
        state.steering_api_key = configured_key(args)
        if service.steering is not None:
            state.steering_metrics = SteeringMetrics(service)
            state.steering_metrics.start()
