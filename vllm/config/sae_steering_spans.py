# SPDX-License-Identifier: Apache-2.0
"""The tokens on which a spec acts: a phase, or spans of the prompt and of the answer.

A request's specs make a piecewise constant schedule over positions. `pieces` takes the
prompt's length, because a piece's end may depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import msgspec

from vllm.config.steering_checks import bad, refusal
from vllm.config.steering_reader import expects

# The phase of one token, by its position in the request.
TokenPhase = Literal["prefill", "decode"]
TOKEN_PHASES: tuple[TokenPhase, ...] = ("prefill", "decode")

# The phases that a spec can name.
SpecPhase = Literal["both", "prefill", "decode"]
SPEC_PHASES: tuple[SpecPhase, ...] = ("both", "prefill", "decode")

MAX_SPANS = 64
Position = Annotated[
    int, expects("a token position, an integer of 32 bits", ge=-(2**31), lt=2**31)
]


class SteeringSpan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """Tokens of the prompt or generated tokens, selected like a Python slice.

    `start=-1` of the prompt is its last token; generated tokens count from 0. Their
    number is not known before, so neither bound may be negative there.
    """

    of: Literal["prompt", "generated"]
    start: Position = 0
    stop: Position | None = None


# The spans of one spec, in canonical order.
Spans = tuple[SteeringSpan, ...]
Coverage = SpecPhase | Spans
CoverageOrder = tuple[int, tuple[tuple[str, int, float], ...]]
# Selects edits of a request: a phase, or the coverages that hold at some position.
When = TokenPhase | frozenset[Coverage]

_OF_PHASE: dict[SpecPhase, Spans] = {
    "both": (SteeringSpan("prompt"), SteeringSpan("generated")),
    "prefill": (SteeringSpan("prompt"),),
    "decode": (SteeringSpan("generated"),),
}


def coverage_of(
    path: str, phase: SpecPhase, spans: Sequence[SteeringSpan] | None
) -> Coverage:
    """Check where a spec acts.

    Raises:
        VLLMValidationError: both are given, or a span can hold no token.
    """
    if spans is None:
        return phase
    if phase != "both":
        raise refusal(
            f"{path}.phase", f'found "{phase}" and spans, expected only one of them'
        )
    if not spans:
        raise refusal(f"{path}.spans", "is empty, expected at least one span")
    for at, span in enumerate(spans):
        where = f"{path}.spans[{at}]"
        if span.of == "generated":
            for name, value in (("start", span.start), ("stop", span.stop)):
                if value is not None and value < 0:
                    raise bad(
                        f"{where}.{name}",
                        value,
                        "the index of a generated token, 0 or more",
                    )
        if span.stop is not None and _is_empty(span.start, span.stop):
            raise bad(
                f"{where}.stop",
                span.stop,
                f"a token behind start={span.start}, or null for the end",
            )
    return tuple(sorted(set(spans), key=_order))


def acts(coverage: Coverage, when: When) -> bool:
    """Whether a spec of this coverage acts at `when`."""
    if isinstance(when, str):
        return coverage in ("both", when)
    return coverage in when


def may_overlap(one: Coverage, other: Coverage) -> bool:
    """Whether both act on the same token for some prompt length."""
    return spans_may_overlap(spans_of(one), spans_of(other))


def spans_may_overlap(one: Spans, other: Spans) -> bool:
    """See `may_overlap`."""
    for a in one:
        for b in other:
            if (
                a.of == b.of
                and (a.stop is None or not _precedes(a.stop, b.start))
                and (b.stop is None or not _precedes(b.stop, a.start))
            ):
                return True
    return False


def boundaries(coverage: Coverage) -> set[tuple[str, int]]:
    """Where pieces may begin inside the prompt and inside the answer."""
    return {
        (span.of, bound)
        for span in spans_of(coverage)
        for bound in (span.start, span.stop)
        if bound
    }


def pieces(
    coverages: Iterable[Coverage], num_prompt_tokens: int
) -> list[tuple[int | None, frozenset[Coverage]]]:
    """The schedule: where each piece stops (None: never), and what acts in it."""
    intervals = [
        (coverage, *_resolved(span, num_prompt_tokens))
        for coverage in set(coverages)
        for span in spans_of(coverage)
    ]
    stops: set[int | None] = {num_prompt_tokens}
    for _, start, stop in intervals:
        stops |= {start, stop}
    ends = sorted(stop for stop in stops if stop)
    # The piece that begins at a position; one more begins nowhere.
    begins: dict[int | None, int] = {end: at for at, end in enumerate(ends, 1)}
    begins |= {0: 0, None: len(ends) + 1}
    acting: list[list[Coverage]] = [[] for _ in range(len(ends) + 1)]
    for coverage, start, stop in intervals:
        for at in range(begins[start], begins[stop]):
            acting[at].append(coverage)
    return [
        (stop, frozenset(found))
        for stop, found in zip((*ends, None), acting, strict=True)
    ]


def spans_of(coverage: Coverage) -> Spans:
    """The spans of a coverage, of a phase too."""
    return _OF_PHASE[coverage] if isinstance(coverage, str) else coverage


def _order(span: SteeringSpan) -> tuple[str, int, float]:
    return span.of, span.start, float("inf") if span.stop is None else span.stop


def coverage_order(coverage: Coverage) -> CoverageOrder:
    """Sorts coverages: phases first."""
    if isinstance(coverage, str):
        return SPEC_PHASES.index(coverage), ()
    return len(SPEC_PHASES), tuple(_order(span) for span in coverage)


def _is_empty(start: int, stop: int) -> bool:
    """Whether a span holds no token, for every prompt length."""
    return stop == 0 or _precedes(stop, start)


def _precedes(stop: int, start: int) -> bool:
    """Whether `stop` comes before `start` for every prompt length."""
    return (stop < 0) == (start < 0) and stop <= start


def _resolved(span: SteeringSpan, length: int) -> tuple[int, int | None]:
    """The positions of a span, once the prompt's length is known."""
    if span.of == "prompt":
        start, stop, _ = slice(span.start, span.stop).indices(length)
        return start, max(start, stop)
    return length + span.start, None if span.stop is None else length + span.stop
