# SPDX-License-Identifier: Apache-2.0
"""Times ops by graph replay with a cold L2, and what the GPU reaches by itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
REPLAYS = 31


class Timer:
    """Replays graphs of an op with a cold L2 and a restored stream."""

    def __init__(self) -> None:
        self.cold = torch.randint(0, 9, (64 << 20,), dtype=torch.int32, device=DEVICE)
        self.sink = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def flush(self) -> None:
        """Read 256 MiB, so that nothing of the op's is left in L2 (nor dirty)."""
        torch.sum(self.cold, (0,), out=self.sink)

    def replay(self, body: Callable[[], None], repeat: int) -> Callable[[], float]:
        """Capture `repeat` calls of `body`; the result times one call, in us."""
        body()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeat):
                body()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def once() -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e3 / repeat

        once()
        return once

    def __call__(
        self, op: Callable[[], None], restore: Callable[[], None], guess_us: float
    ) -> float:
        """Median time of `op`, in us."""

        def without() -> None:
            restore()
            self.flush()

        def with_op() -> None:
            without()
            op()

        repeat = max(1, min(10, int(3000 / max(guess_us, 1))))
        base, full = self.replay(without, repeat), self.replay(with_op, repeat)
        pairs = [(base(), full()) for _ in range(REPLAYS)]
        return statistics.median(f for _, f in pairs) - statistics.median(
            b for b, _ in pairs
        )


def measured_ceilings() -> tuple[float, float, float]:
    """This GPU's copy and read bandwidths in bytes/s and its bf16 flop/s, now."""

    def seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(8):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times[3:])

    source = torch.randint(0, 9, (1 << 30,), dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    reading = source.nbytes / seconds(lambda: source.view(torch.float32).sum())
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=BF16) for _ in range(2))
    return bandwidth, reading, 2 * 8192**3 / seconds(lambda: a @ b)
