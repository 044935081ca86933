# SPDX-License-Identifier: Apache-2.0
"""Times single engine steps, on the host's clock and on the GPU's.

Wall: the time from one return of `engine.step()` to the next, in a batch that does
nothing but decode. Under async scheduling a call returns after the *previous* step's
tokens have arrived, so in a steady state each interval is one step of the batch.

Host: the time of the host's own work in a step, as far as steering and reading have a
part in it, whatever the GPU does meanwhile (`HostProbe`).

GPU: events around everything that a step launches, from the runner's preparation of
inputs to its sampling. A spinning kernel in front keeps the GPU busy until the host
has launched the whole step. So launch gaps do not count, and a slow host has no effect.
(An eager step takes longer to launch than that, so its gaps do count.)
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

# Longer than the host needs to launch a decoding step, at about 2 GHz.
SPIN_CYCLES = 16_000_000
MIN_ROUNDS = 3


class StepProbe:
    """Watches a model runner: tokens of every step, and GPU times when asked."""

    def __init__(self, runner: Any):
        self.runner = runner
        self.launched: list[int] = []  # tokens of every step so far
        self._timing = False
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start: torch.cuda.Event | None = None
        self._execute, self._sample = runner.execute_model, runner.sample_tokens
        runner.execute_model = self._execute_model
        runner.sample_tokens = self._sample_tokens

    def _execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = scheduler_output.total_num_scheduled_tokens
        if tokens:
            self.launched.append(tokens)
            if self._timing:
                torch.cuda._sleep(SPIN_CYCLES)
                self._start = torch.cuda.Event(enable_timing=True)
                self._start.record()
        return self._execute(scheduler_output, *args, **kwargs)

    def _sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = self._sample(*args, **kwargs)
        if self._start is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((self._start, end))
            self._start = None
        return output

    @contextmanager
    def gpu_times(self) -> Iterator[list[float]]:
        """Time the steps of the block; the list is filled when it ends."""
        times: list[float] = []
        self._timing, self._events = True, []
        try:
            yield times
        finally:
            self._timing = False
        torch.cuda.synchronize()
        times.extend(start.elapsed_time(end) for start, end in self._events)

    def steered_tokens(self) -> int:
        """Tokens that any tier steered, and tokens read, since the engine started."""
        steering = getattr(self.runner, "steering", None)
        if not steering:
            return 0
        read = sum(steering.readout.tokens_read.values())
        return int(steering.steered_tokens.sum()) + read


HOST_RUNNER_PARTS = ("prepare_steering", "take_steering_readout")


class HostProbe:
    """Adds up the durations of the host functions that reading is part of.

    They are the worker's preparation and copy, `Scheduler.update_from_output` and
    `OutputProcessor.process_outputs`, whole. None of them waits for the GPU. The engine
    and its core must be in this process.
    """

    def __init__(self, llm: Any, runner: Any):
        engine = llm.llm_engine
        self.parts = [(runner, name) for name in HOST_RUNNER_PARTS]
        self.parts.append(
            (engine.engine_core.engine_core.scheduler, "update_from_output")
        )
        self.parts.append((engine.output_processor, "process_outputs"))
        self._total = 0.0

    def take(self) -> float:
        """Milliseconds since the last call."""
        total, self._total = self._total, 0.0
        return total

    def _timed(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return stock(*args, **kwargs)
            finally:
                self._total += (time.perf_counter() - begin) * 1e3

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the block runs, the functions are timed."""
        for owner, name in self.parts:
            setattr(owner, name, self._timed(getattr(owner, name)))
        self.take()
        try:
            yield
        finally:
            for owner, name in self.parts:
                delattr(owner, name)


@dataclass
class Engine:
    """A running engine, watched; `failed` once a measurement in it has raised."""

    llm: Any
    probe: StepProbe
    host: HostProbe | None = None
    failed: bool = False

    def step(self) -> list[Any]:
        return self.llm.llm_engine.step()


@dataclass
class Mode:
    """What is compared: an engine, and what its requests ask for."""

    name: str
    engine: Engine
    specs: list[dict[str, Any]] | dict[str, Any] | None


@dataclass
class Window:
    """One mode's turn in a round: milliseconds a step."""

    wall: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


@contextmanager
def checked(mode: Mode, tokens: int) -> Iterator[None]:
    """Raises unless the block steers at least `tokens` tokens (0: exactly none)."""
    before = mode.engine.probe.steered_tokens()
    yield
    steered = mode.engine.probe.steered_tokens() - before
    if steered < tokens or (steered and not tokens):
        raise RuntimeError(f"{mode.name}: {steered} tokens steered, expected {tokens}")


def interleave(
    modes: Sequence[Mode],
    measure: Callable[[Mode, int], Window],
    rounds: int,
    deadline: float,
) -> dict[str, list[Window]]:
    """Let the modes take turns: one round to warm up, then `rounds` that count.

    Every round begins with another mode, so a drift of the machine favours none. A mode
    that raises is left out from then on, and so is every mode of its engine.
    """
    found: dict[str, list[Window]] = {mode.name: [] for mode in modes}
    for at in range(-1, rounds):
        if at >= MIN_ROUNDS and time.time() > deadline:
            print(f"  stopped after {at} of {rounds} rounds: out of time", flush=True)
            break
        first = at % len(modes)
        for mode in [*modes[first:], *modes[:first]]:
            if mode.engine.failed:
                continue
            try:
                window = measure(mode, at)
            except Exception:
                traceback.print_exc()
                mode.engine.failed = True
                continue
            if at >= 0:
                found[mode.name].append(window)
    return {name: windows for name, windows in found.items() if windows}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def tenth(values: Sequence[float]) -> float:
    """The tenth percentile."""
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=10, method="inclusive")[0]


def summarize(
    found: dict[str, list[Window]],
    phase: str,
    batch: int,
    tokens: int,
    baseline: str = "stock",
) -> list[dict[str, Any]]:
    """One row per mode, of `tokens` tokens a step.

    `tokens_per_s` is of the median step. A ratio is the median over the rounds of
    (median step of the baseline / median step of the mode), both of the same round.
    """
    rows = []
    for name, windows in found.items():
        row: dict[str, Any] = {"mode": name, "phase": phase, "batch": batch}
        row["rounds"] = len(windows)
        for clock in ("wall", "gpu", "host"):
            steps = [ms for window in windows for ms in getattr(window, clock)]
            if not steps:
                continue
            low, middle, high = (round(ms, 4) for ms in quartiles(steps))
            key = f"step_ms_{clock}"
            row |= {key: middle, f"{key}_p25": low, f"{key}_p75": high}
            row[f"steps_{clock}"] = len(steps)
            if clock == "wall":
                row["tokens_per_s"] = round(tokens * 1e3 / middle, 1)
            if clock == "wall":
                # Of the quietest tenth of the steps: other processes only add.
                row[f"{key}_p10"] = round(tenth(steps), 4)
            if baseline in found and clock != "host":
                suffix = "" if clock == "wall" else "_gpu"
                row |= paired_ratio(found[baseline], windows, clock, suffix)
        rows.append(row)
    return rows


def paired_ratio(
    stock: list[Window], windows: list[Window], clock: str, suffix: str
) -> dict[str, float]:
    """Stock's step over the mode's, round by round: median and quartiles."""
    ratios = [
        statistics.median(getattr(base, clock)) / statistics.median(own)
        for base, window in zip(stock, windows, strict=False)
        if (own := getattr(window, clock)) and getattr(base, clock)
    ]
    low, middle, high = (round(ratio, 4) for ratio in quartiles(ratios))
    name = f"ratio{suffix}"
    return {name: middle, f"{name}_p25": low, f"{name}_p75": high}
