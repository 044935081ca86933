# SPDX-License-Identifier: Apache-2.0
"""Steering metrics, beside vLLM's own on `/metrics`.

Modules, rows and tokens are the engine's; each API server asks for them every few
seconds and shows the latest answer. Refusals are counted where they happen.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, Counter, Gauge

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.entrypoints.serve.steering.service import SteeringModulesService

logger = init_logger(__name__)

REFRESH_S = 5.0
PREFIX = "vllm:steering_"
# Set once the routes are loaded; until then refusals are not counted.
_REFUSED: Counter | None = None


class SteeringMetrics:
    """Publishes what the engine's registry knows."""

    def __init__(self, service: SteeringModulesService):
        global _REFUSED
        self.service = service
        self._task: asyncio.Task[None] | None = None
        for collector in list(REGISTRY._collector_to_names):
            if getattr(collector, "_name", "").startswith(PREFIX):
                REGISTRY.unregister(collector)
        self.modules = _gauge("modules", "Modules registered.")
        self.rows = _gauge("rows_in_use", "Table rows that requests hold.", "tier")
        # Totals since start-up; a gauge, because several API servers read one engine.
        self.tokens = _gauge(
            "tokens", "Tokens that were steered since start-up.", "tier", "phase"
        )
        self.bypassed = _gauge(
            "bypassed_tokens",
            "Tokens of those that the SAE tiers left alone for their id.",
        )
        self.saturated = _gauge(
            "saturated_tokens",
            "Tokens whose edited stream was limited to stay finite, per site and tier.",
        )
        self.read = {
            "tokens": _gauge(
                "read_tokens", "Tokens read since start-up, per site.", "module"
            ),
            "bytes": _gauge("read_bytes", "Bytes that were read of them.", "module"),
            "stops": _gauge("read_stops", "Requests that a feature ended.", "module"),
        }
        self.memory = _gauge("bytes", "Device bytes of steering buffers.", "rank")
        _REFUSED = Counter(
            PREFIX + "refused_requests",
            "Requests refused for their steering.",
            ["reason"],
        )

    def start(self) -> None:
        """Keep the metrics up to date until the event loop ends."""
        self._task = asyncio.create_task(self._run())

    async def refresh(self) -> None:
        """Ask the engine once."""
        found = await self.service.list()
        self.modules.set(len(found["modules"]))
        for tier, rows in found["rows_in_use"].items():
            self.rows.labels(tier).set(rows)
        for tier, phases in found["steered_tokens"].items():
            for phase, tokens in phases.items():
                self.tokens.labels(tier, phase).set(tokens)
        self.bypassed.set(found["bypassed_tokens"])
        self.saturated.set(found["saturated_tokens"])
        for module, counts in found["read"].items():
            for kind, gauge in self.read.items():
                gauge.labels(module).set(counts[kind])
        for rank, size in enumerate(found["bytes"]):
            self.memory.labels(str(rank)).set(size)

    async def _run(self) -> None:
        while True:
            try:
                await self.refresh()
            except asyncio.CancelledError:
                raise
            except Exception as error:
                # An engine that is gone is reported by vLLM itself.
                logger.debug("Steering metrics are not refreshed: %s", error)
            await asyncio.sleep(REFRESH_S)


def count_refusal(parameter: str | None) -> None:
    """Count a request that was refused for its steering, by the kind of its error."""
    if _REFUSED is not None:
        _REFUSED.labels(refusal_reason(parameter)).inc()


def refusal_reason(parameter: str | None) -> str:
    """`module`: no such module, or not now; `spec`: anything else about a spec."""
    return "module" if (parameter or "").endswith(".module_name") else "spec"


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(PREFIX + name, text, labels, multiprocess_mode="mostrecent")
