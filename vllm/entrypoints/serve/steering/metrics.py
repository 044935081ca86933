# SPDX-License-Identifier: Apache-2.0
"""Steering metrics, beside vLLM's own on `/metrics`.

Modules, rows and tokens are the engine's; each API server asks for them every few
seconds and shows the latest answer. Refusals are counted where they happen.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, Counter, Gauge

from vllm.config.steering_json import Json
from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.entrypoints.serve.steering.service import SteeringModulesService

logger = init_logger(__name__)

REFRESH_S = 5.0
# Names the folder in which processes share their counts.
SHARED_FILES = "PROMETHEUS_MULTIPROC_DIR"
PREFIX = "vllm:steering_"


class _Totals:
    """Counters of what the engine has counted since it started.

    If several API servers read one engine, only one may count, because Prometheus adds
    up their counters.
    """

    def __init__(self, counts: bool):
        self._counts = counts
        self._seen: dict[tuple[Counter, tuple[str, ...]], int] = {}

    def follow(self, counter: Counter, total: int, *labels: str) -> None:
        """Raise the counter to the engine's total; a new engine begins at 0 again."""
        key = counter, labels
        before = self._seen.get(key, 0)
        self._seen[key] = total
        if self._counts:
            child = counter.labels(*labels) if labels else counter
            child.inc(total - before if total >= before else total)

    def keep_only(self, modules: set[str]) -> None:
        """Drop the series of all other modules. The first label is a module's name."""
        for key in [one for one in self._seen if one[1][0] not in modules]:
            counter, labels = key
            counter.remove(*labels)
            del self._seen[key]


class SteeringMetrics:
    """Publishes what the engine's registry knows, and what this server has seen."""

    def __init__(self, service: SteeringModulesService):
        global _CURRENT
        self.service = service
        self._task: asyncio.Task[None] | None = None
        if _CURRENT is not None:
            for collector in _CURRENT.collectors:
                REGISTRY.unregister(collector)
        parallel = service.engine.vllm_config.parallel_config
        self.totals = _Totals(counts=parallel._api_process_rank <= 0)
        self.modules = _gauge("modules", "Modules registered.")
        self.rows = _gauge("rows_in_use", "Table rows that requests hold.", "tier")
        self.memory = _gauge("bytes", "Device bytes of steering buffers.", "rank")
        self.tokens = _counter(
            "tokens", "Tokens that the module edited.", "module", "tier", "phase"
        )
        self.bypassed = _counter(
            "bypassed_tokens",
            "Tokens of those that the module left alone for their id.",
            "module",
        )
        self.saturated = _counter(
            "saturated_tokens",
            "Tokens whose edited stream was limited to stay finite, per site and tier.",
            "module",
        )
        self.read = {
            "tokens": _counter("read_tokens", "Tokens read, for each site.", "module"),
            "bytes": _counter("read_bytes", "Bytes that were read.", "module"),
            "stops": _counter("read_stops", "Requests a feature ended.", "module"),
        }
        self.requests = _counter(
            "requests", "Requests that named the module.", "module", "field"
        )
        # Labels of `requests`.
        self.named: set[tuple[str, str]] = set()
        self.refused = _counter(
            "refused_requests", "Requests refused for their steering.", "reason"
        )
        _CURRENT = self

    @property
    def collectors(self) -> tuple[Gauge | Counter, ...]:
        """Everything that is registered with Prometheus."""
        counters = (self.tokens, self.bypassed, self.saturated, self.requests)
        read = self.read.values()
        return (self.modules, self.rows, self.memory, *counters, *read, self.refused)

    def start(self) -> None:
        """Keep the metrics up to date until the event loop ends."""
        self._task = asyncio.create_task(self._run())

    async def refresh(self) -> None:
        """Ask the engine once."""
        found = await self.service.list()
        self.modules.set(len(found["modules"]))
        for tier, rows in found["rows_in_use"].items():
            self.rows.labels(tier).set(rows)
        for module, counts in found["module_tokens"].items():
            for tier, phases in counts["steered"].items():
                for phase, tokens in phases.items():
                    self.totals.follow(self.tokens, tokens, module, tier, phase)
            self.totals.follow(self.bypassed, counts["bypassed"], module)
            self.totals.follow(self.saturated, counts["saturated"], module)
        for module, counts in found["read"].items():
            for kind, counter in self.read.items():
                self.totals.follow(counter, counts[kind], module)
        for rank, size in enumerate(found["bytes"]):
            self.memory.labels(str(rank)).set(size)
        self._forget_all_but({INLINE, *found["module_tokens"]})

    def _forget_all_but(self, modules: set[str]) -> None:
        """Drop the series of modules that the engine has forgotten.

        Where several API servers share files of counts, their series cannot be dropped.
        """
        if SHARED_FILES in os.environ:
            return
        self.totals.keep_only(modules)
        for labels in [one for one in self.named if one[0] not in modules]:
            self.requests.remove(*labels)
            self.named.discard(labels)

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


# Set once the routes are loaded; until then nothing is counted.
_CURRENT: SteeringMetrics | None = None


def count_refusal(parameter: str | None) -> None:
    """Count a request that was refused for its steering, by the kind of its error."""
    if _CURRENT is not None:
        _CURRENT.refused.labels(refusal_reason(parameter)).inc()


# The label of vectors that requests bring themselves.
INLINE = "(inline)"


def count_request(extra_args: Json) -> None:
    """Count a request, given its canonical specs, once for each module it names."""
    if _CURRENT is None:
        return
    named = {
        (s.get("module_name", INLINE), key)
        for key, specs in extra_args.items()
        for s in specs
    }
    _CURRENT.named |= named
    for module, field in named:
        _CURRENT.requests.labels(module, field).inc()


def refusal_reason(parameter: str | None) -> str:
    """`module`: no such module, or not now; `spec`: anything else about a spec."""
    return "module" if (parameter or "").endswith(".module_name") else "spec"


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(PREFIX + name, text, labels, multiprocess_mode="mostrecent")


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(PREFIX + name, text, labels)
