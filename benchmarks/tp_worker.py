# SPDX-License-Identifier: Apache-2.0
"""Times the steps of one rank of a tensor-parallel engine (`worker_extension_cls`).

GPU: two events round everything that a step launches, from the runner's preparation of
inputs to its sampling. In front, a spinning kernel keeps the GPU busy until the host
has launched the step, and a small all-reduce lets the ranks begin together. So launch
gaps and late ranks do not count.

Between: from the end of one step to the end of the next on the GPU, in a batch that
does nothing but decode, as a server runs it. Host: the same between two calls.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from tp_shapes import SHAPES, firing, spread_embeddings

# Longer than the host needs to launch a decoding step, at about 1.8 GHz.
SPIN_CYCLES = 14_000_000

Times = dict[str, list[float]]


class HostMark:
    """A time on the host, where there is no GPU."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: HostMark) -> float:
        """Milliseconds, as of a CUDA event."""
        return (later.at - self.at) * 1e3


def mark() -> Any:
    """This moment on the GPU's stream."""
    if not torch.cuda.is_available():
        return HostMark()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class StepLog:
    """Watches a model runner, and times steps of a given number of tokens."""

    def __init__(self, runner: Any):
        self.runner = runner
        self._execute, self._sample = runner.execute_model, runner.sample_tokens
        runner.execute_model = self._execute_model
        runner.sample_tokens = self._sample_tokens
        self._ones: torch.Tensor | None = None
        self.expect(0, 0, 0, 0)

    def expect(self, tokens: int, warm: int, plain: int, inside: int) -> None:
        """Of the next steps of `tokens` tokens: how many to pass over, to time from one
        to the next, and to time inside."""
        self._tokens, self._warm = tokens, warm
        self._plain, self._inside = plain, inside
        self._seen, self._kind = 0, ""
        self._start: Any = None
        self._ends: list[Any] = []
        self._calls: list[float] = []
        self._pairs: list[tuple[Any, Any]] = []
        self._steered = self.steered_tokens()

    def steered_tokens(self) -> int:
        """Tokens that any tier steered since the engine started."""
        steering = getattr(self.runner, "steering", None)
        return int(steering.steered_tokens.sum()) if steering else 0

    def _execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._kind = ""
        if self._tokens == scheduler_output.total_num_scheduled_tokens > 0:
            at = self._seen - self._warm
            self._seen += 1
            # One plain step more: its end is where the first interval begins.
            if 0 <= at <= self._plain and self._plain:
                self._kind = "plain"
                self._calls.append(time.perf_counter())
            elif at >= 0 and len(self._pairs) < self._inside:
                self._kind = "inside"
                self._begin_together()
        return self._execute(scheduler_output, *args, **kwargs)

    def _begin_together(self) -> None:
        if torch.cuda.is_available():
            from vllm.distributed import get_tp_group

            if self._ones is None:
                self._ones = torch.ones(1, 1024, dtype=torch.bfloat16, device="cuda")
            torch.cuda._sleep(SPIN_CYCLES)
            get_tp_group().all_reduce(self._ones)
        self._start = mark()

    def _sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = self._sample(*args, **kwargs)
        if self._kind == "plain":
            self._ends.append(mark())
        elif self._kind == "inside":
            self._pairs.append((self._start, mark()))
        self._kind = ""
        return output

    def take(self) -> tuple[Times, int]:
        """Milliseconds by clock, and how many tokens were steered."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends, calls = self._ends, self._calls
        times = {
            "gpu": [start.elapsed_time(end) for start, end in self._pairs],
            "between": [
                start.elapsed_time(end)
                for start, end in zip(ends, ends[1:], strict=False)
            ],
            "host": [
                (end - start) * 1e3
                for start, end in zip(calls, calls[1:], strict=False)
            ],
        }
        return times, self.steered_tokens() - self._steered


class StepTimer:
    """What a worker can be asked for by `collective_rpc`."""

    def watch_steps(self, root: str, name: str) -> dict[str, Any]:
        """Spread the embeddings and begin to watch; facts of this rank."""
        from safetensors.torch import load_file

        runner = self.model_runner  # type: ignore[attr-defined]
        (path,) = (Path(root) / "one").glob("*.safetensors")
        weight = runner.get_model().model.embed_tokens.weight.data
        every = load_file(path)["W_enc"].to(weight.device)
        spread_embeddings(weight, every, SHAPES[name], self.rank)  # type: ignore[attr-defined]
        fire = firing(weight[100:132], every, SHAPES[name])
        del every
        facts: dict[str, Any] = {"runner": type(runner).__module__, "l0": fire}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            facts["free_gib"] = round(torch.cuda.mem_get_info()[0] / 2**30, 1)
        self.step_log = StepLog(runner)
        return facts

    def expect_steps(self, tokens: int, warm: int, plain: int, inside: int) -> None:
        """As `StepLog.expect`."""
        self.step_log.expect(tokens, warm, plain, inside)

    def take_steps(self) -> tuple[Times, int]:
        """As `StepLog.take`."""
        return self.step_log.take()

    def begin_profile(self) -> None:
        """Record the kernels of this rank."""
        kinds = torch.profiler.ProfilerActivity
        on_gpu = torch.cuda.is_available()
        self.kernel_times = torch.profiler.profile(
            activities=[kinds.CUDA if on_gpu else kinds.CPU]
        )
        self.kernel_times.start()

    def end_profile(self) -> dict[str, tuple[int, float]]:
        """Kernel -> how often it ran since `begin_profile`, and microseconds in all."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.kernel_times.stop()
        return {
            event.key: (event.count, event.device_time_total)
            for event in self.kernel_times.key_averages()
        }
