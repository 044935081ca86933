# SPDX-License-Identifier: Apache-2.0
"""Drive one engine through any schedule and compare what comes out."""

from __future__ import annotations

import math
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from soak.pool import BAD, HOT, PASSING, Item, answers_of, drift
from soak.report import Report, say
from steering_testing.engine import runner
from steering_testing.observe import steps_of

from vllm import LLM, SamplingParams
from vllm.entrypoints.steering import (
    SteeringModuleError,
    delete_preset,
    put_preset,
    register_module,
    unregister_module,
)
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput

DRAIN_S = 60.0
PROGRESS_S = 15.0


@dataclass
class Limits:
    """How much a run does, and what it takes for equal."""

    seconds: float
    requests: int
    concurrency: int
    tolerance: float
    steps_per_fault: int = 12


class Chaos:
    """One engine under a seeded random schedule.

    Args:
        llm: an engine in this process.
        pool: requests with their references.
        versions: paths of the module that changes, by version.
        report: is filled.
    """

    def __init__(
        self,
        llm: LLM,
        pool: list[Item],
        versions: dict[str, str],
        report: Report,
        seed: int,
    ):
        self.llm = llm
        self.pool = pool
        self.versions = versions
        self.report = report
        self.rng = random.Random(seed)
        self.running: dict[str, Item] = {}
        self.started = 0
        self.version: str | None = None
        self.passing = False
        self.bag: list[Callable[[], str]] = []
        self.faults: list[Callable[[], str]] = [
            self._abort,
            self._abort,
            self._disconnect,
            self._preempt_everybody,
            self._reset_cache,
            self._bad_request,
            self._change_module,
            self._change_module,
            self._change_preset,
            self._idle,
        ]

    def _next_fault(self) -> Callable[[], str]:
        """Each in turn, in an order that is shuffled anew every time."""
        if not self.bag:
            self.bag = self.rng.sample(self.faults, len(self.faults))
        return self.bag.pop()

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    def run(self, limits: Limits) -> None:
        """Run until the time or the requests are used up; then look for leaks."""
        start = time.monotonic()
        free = self._free_blocks()
        with steps_of(self.llm) as steps:
            try:
                self._churn(start + limits.seconds, limits)
                self._drain(limits)
                self._check_leaks(free)
            except Exception:
                self.report.exceptions.append(traceback.format_exc(limit=-6))
        self.report.seconds = time.monotonic() - start
        self.report.schedule.update(
            preempted=steps.preempted,
            unfinished_prefills=steps.chunks,
            drafted=steps.drafted,
            accepted=steps.accepted,
            **{f"{mode} steps": count for mode, count in steps.graphs.items()},
        )

    def _churn(self, deadline: float, limits: Limits) -> None:
        step, shown = 0, time.monotonic()
        while time.monotonic() < deadline and self.report.requests < limits.requests:
            # Now and then the batch nearly empties, then fills in one go.
            target = limits.concurrency
            if step % 97 > 80:
                target = self.rng.randint(1, 3)
            while len(self.running) < target:
                self._add()
            if step % limits.steps_per_fault == 0:
                self.report.faults[self._next_fault()()] += 1
            self._step(limits)
            step += 1
            if step % 50 == 0:
                self._check_integrity()
            if time.monotonic() > shown + PROGRESS_S:
                shown = time.monotonic()
                self._show()

    def _show(self) -> None:
        report = self.report
        faults = report.wrong_tokens + report.wrong_scores + len(report.exceptions)
        say(f"{report.name}: {report.requests} requests, {faults} wrong")

    def _step(self, limits: Limits) -> None:
        for output in self.llm.llm_engine.step():
            item = self.running.pop(output.request_id, None)
            if item is None:
                self.report.exceptions.append(f"{output.request_id} came back twice")
            else:
                self._compare(item, output, limits.tolerance)

    def _add(self) -> None:
        item = self.rng.choice(self.pool)
        if item.version is not None and item.version != self.version:
            return
        self.started += 1
        req_id = f"{item.kind}-{self.started}"
        priority = self.rng.randint(0, 3) if self._by_priority else 0
        self.llm.llm_engine.add_request(
            req_id,
            {"prompt_token_ids": item.prompt},
            item.params(),
            priority=priority,
        )
        self.running[req_id] = item
        self.report.faults["poison"] += item.kind == "poison"

    @property
    def _by_priority(self) -> bool:
        return self.llm.llm_engine.vllm_config.scheduler_config.policy == "priority"

    def _compare(self, item: Item, output: RequestOutput, tolerance: float) -> None:
        report = self.report
        report.finished[item.kind] += 1
        found = answers_of(output)
        report.tokens += sum(len(said.tokens) for said in found)
        for said, alone in zip(found, item.reference, strict=True):
            off = drift(said, alone)
            report.wrong_tokens += said.tokens != alone.tokens
            report.wrong_scores += said.tokens == alone.tokens and off > tolerance
            if off > tolerance:
                report.example(f"{output.request_id}, off by {off}: {item}: {said}")
            if math.isfinite(off):
                report.largest_drift = max(report.largest_drift, off)

    # --- Faults: each says what it was -------------------------------------------

    def _abort(self) -> str:
        if self.running:
            req_id = self.rng.choice(list(self.running))
            del self.running[req_id]
            self.llm.llm_engine.abort_request([req_id])
        return "abort"

    def _disconnect(self) -> str:
        """A client goes away with some of its requests, one of them just sent."""
        self._add()
        newest = list(self.running)[-1:]
        others = self.rng.sample(list(self.running), len(self.running) // 4)
        gone = {*newest, *others}
        for req_id in gone:
            del self.running[req_id]
        self.llm.llm_engine.abort_request(list(gone))
        return "disconnect"

    def _preempt_everybody(self) -> str:
        self.llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        return "preempt all"

    def _reset_cache(self) -> str:
        self.llm.llm_engine.reset_prefix_cache()
        return "reset cache"

    def _idle(self) -> str:
        """A dummy run between two steps, as data-parallel ranks make when idle."""
        self.core.execute_dummy_batch()
        return "dummy run"

    def _bad_request(self) -> str:
        extra = self.rng.choice(BAD)
        try:
            params = SamplingParams(max_tokens=2, extra_args=extra)
            prompt = {"prompt_token_ids": [5, 6]}
            self.llm.llm_engine.add_request("bad", prompt, params)
        except VLLMValidationError:
            return "bad request refused"
        self.report.exceptions.append(f"accepted: {extra}")
        return "bad request accepted"

    def _change_module(self) -> str:
        """Register, replace or remove; refused while a request names the module."""
        in_use = any(item.version for item in self.running.values())
        removes = self.version is not None and self.rng.random() < 0.3
        target = None if removes else self.rng.choice(list(self.versions))
        try:
            if target is None:
                unregister_module(self.llm, HOT)
            else:
                path = self.versions[target]
                register_module(self.llm, HOT, path, replace=self.version is not None)
        except SteeringModuleError as error:
            if not in_use:
                self.report.exceptions.append(f"module change: {error}")
            return "module change refused"
        if in_use and target != self.version:
            self.report.exceptions.append("a module changed under its requests")
        self.version = target
        return "module removed" if removes else "module registered"

    def _change_preset(self) -> str:
        """Make or delete a preset that no request names; all may run on."""
        name, preset = PASSING
        if self.passing:
            delete_preset(self.llm, name)
        else:
            put_preset(self.llm, name, preset)
        self.passing = not self.passing
        return "preset changed"

    # --- The end ------------------------------------------------------------------

    def _drain(self, limits: Limits) -> None:
        deadline = time.monotonic() + DRAIN_S
        engine = self.llm.llm_engine
        while engine.has_unfinished_requests() and time.monotonic() < deadline:
            self._step(limits)
        if self.running:
            self.report.leaks.append(f"never finished: {sorted(self.running)[:5]}")
        # The runner hears of the last finished requests with the next step.
        params = SamplingParams(max_tokens=2, detokenize=False)
        for at in range(2):
            engine.add_request(f"last-{at}", {"prompt_token_ids": [5, 6]}, params)
            while engine.has_unfinished_requests():
                engine.step()

    def _check_integrity(self) -> None:
        scheduler = self.core.scheduler
        live = {*scheduler.requests, *scheduler.finished_req_ids}
        runner(self.llm).steering.check_integrity(live)

    def _free_blocks(self) -> int:
        self.llm.llm_engine.reset_prefix_cache()
        return self.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def _check_leaks(self, free: int) -> None:
        leaks, steering = self.report.leaks, runner(self.llm).steering
        scheduler = self.core.scheduler
        steering.check_integrity(scheduler.requests)
        if scheduler.requests:
            leaks.append(f"the scheduler still has {list(scheduler.requests)[:5]}")
        for tier, manager in steering.managers.items():
            if manager.rows_in_use:
                leaks.append(f"{manager.rows_in_use} rows of the {tier.name} tier")
        now = self._free_blocks()
        if now != free:
            leaks.append(f"{free - now} KV blocks")
        if self.llm.llm_engine.output_processor.request_states:
            leaks.append("the output processor still has requests")
