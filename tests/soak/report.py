# SPDX-License-Identifier: Apache-2.0
"""What a soak counts, and how it says so."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

MOST_SHOWN = 5


@dataclass
class Report:
    """Counts of one engine's run.

    Attributes:
        finished: requests that were compared, by kind.
        faults: what was done to the engine and to requests, by kind.
        schedule: what the scheduler did.
        wrong_tokens, wrong_scores: completions that differ from the request's alone in
            a token, or by more than the tolerance in a log-probability or in what was
            read.
        distinct: requests that were drawn from.
        exceptions: of the engine, and of calls that should have been accepted.
        leaks: what was left when nothing was running.
        shortened: requests that end before rounding decides a token.
        left_out: requests without one right answer, by `Pool`'s reasons.
    """

    name: str
    finished: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    schedule: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    wrong_tokens: int = 0
    wrong_scores: int = 0
    largest_drift: float = 0.0
    exceptions: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    distinct: int = 0
    shortened: int = 0
    seconds: float = 0.0

    @property
    def requests(self) -> int:
        return self.finished.total()

    @property
    def failed(self) -> bool:
        found = self.wrong_tokens or self.wrong_scores or self.exceptions or self.leaks
        return bool(found)

    def example(self, text: str) -> None:
        """Remember one of the first faults."""
        if len(self.examples) < MOST_SHOWN:
            self.examples.append(text)

    def lines(self) -> list[str]:
        """The report, for people."""
        found = [
            f"{self.name}: {self.requests} requests, {self.tokens} tokens",
            f"  in {self.seconds:.0f} s: {_counts(self.finished)}",
            f"  faults injected: {self.faults.total()}: {_counts(self.faults)}",
            f"  schedule: {_counts(self.schedule)}",
            f"  wrong tokens: {self.wrong_tokens}",
            f"  wrong log-probabilities: {self.wrong_scores}",
            f"  largest difference of a log-probability: {self.largest_drift:.1e}",
            f"  exceptions: {len(self.exceptions)}, leaks: {len(self.leaks)}",
            f"  distinct requests: {self.distinct}, shortened {self.shortened}",
            f"  left out: {self.left_out.total()}: {_counts(self.left_out)}",
        ]
        return found + [
            f"  ! {text}" for text in (*self.examples, *self.exceptions, *self.leaks)
        ]


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))


def say(text: str) -> None:
    """Show progress at once, also where the output is a file."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def summary(reports: list[Report]) -> str:
    """One line over all engines, and whether anything failed."""
    totals = {
        "requests": sum(r.requests for r in reports),
        "faults": sum(r.faults.total() for r in reports),
        "wrong tokens": sum(r.wrong_tokens for r in reports),
        "wrong log-probabilities": sum(r.wrong_scores for r in reports),
        "exceptions": sum(len(r.exceptions) for r in reports),
        "leaks": sum(len(r.leaks) for r in reports),
    }
    verdict = "FAILED" if any(r.failed for r in reports) else "passed"
    return f"soak {verdict}: " + ", ".join(f"{n} {name}" for name, n in totals.items())
