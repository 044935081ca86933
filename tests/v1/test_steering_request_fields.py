# SPDX-License-Identifier: Apache-2.0
"""Conditions, kinds of vector and spans: what is accepted, refused and hashed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.config.sae_steering_spans import may_overlap, pieces
from vllm.config.sae_steering_types import (
    EXTRA_ARGS_KEYS,
    SAEClampEntry,
    SAEClampSpec,
    SAECondition,
    SteeringSpan,
    SteeringVectorSpec,
    parse_steering_request,
)
from vllm.config.steering import ModuleInfo, SiteInfo, SteeringConfig, Tier
from vllm.config.steering_points import HookPoint
from vllm.exceptions import VLLMValidationError

FULL, DELTA, ADDITIVE = EXTRA_ARGS_KEYS[:3]
POST = HookPoint.POST_BLOCK
SITES = (SiteInfo(1, POST, 8, 16),)
VECTOR = (SiteInfo(1, POST, 8, 1),)
CONFIG = SteeringConfig(
    {
        "a": ModuleInfo("a", "sae", "p", "native", "da", SITES),
        "b": ModuleInfo("b", "sae", "p", "native", "db", SITES),
        "v": ModuleInfo(
            "v", "vectors", "p", "native", "dv", (SiteInfo(1, POST, 8, 1),)
        ),
    },
    max_clamps=8,
)


def parse(extra_args: dict[str, Any], config: SteeringConfig = CONFIG) -> Any:
    return parse_steering_request(extra_args, config)


def entry(feature: int = 0, value: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"feature_idx": feature, "kind": "absolute", "value": value, **more}


def spec(*entries: dict[str, Any], module: str = "a", **more: Any) -> dict[str, Any]:
    return {"module_name": module, "clamps": list(entries), **more}


def span(of: str, start: int = 0, stop: int | None = None) -> dict[str, Any]:
    return {"of": of, "start": start, "stop": stop}


def vector(**more: Any) -> dict[str, Any]:
    return {"module_name": "v", **more}


def digests(extra_args: dict[str, Any], length: int = 6) -> list[str | None]:
    """The digest of each of the first twelve positions."""
    schedule = parse(extra_args).schedule(length)
    return [
        next(p.digest for p in schedule if p.stop is None or at < p.stop)
        for at in range(12)
    ]


ABOVE = {"feature_idx": 3, "above": 0.5}
WHEN = f"{DELTA}[0].clamps[0].when"
SPANS = f"{FULL}[0].spans"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no bound": ({DELTA: [spec(entry(when={"feature_idx": 3}))]}, WHEN),
    "two bounds": ({DELTA: [spec(entry(when={**ABOVE, "below": 1}))]}, WHEN),
    "no feature": ({DELTA: [spec(entry(when={"above": 1}))]}, f"{WHEN}.feature_idx"),
    "a feature beyond the SAE": (
        {DELTA: [spec(entry(when={**ABOVE, "feature_idx": 16}))]},
        f"{WHEN}.feature_idx",
    ),
    "a bool as bound": (
        {DELTA: [spec(entry(when={**ABOVE, "above": True}))]}, f"{WHEN}.above",
    ),
    "conditions are counted": (
        {DELTA: [spec(*(entry(f, when={"feature_idx": f, "above": f})
                        for f in range(5)))]},
        f"{DELTA}[0].clamps",
    ),
    "an unknown kind": ({ADDITIVE: [vector(kind="clamp")]}, f"{ADDITIVE}[0].kind"),
    "set without value": ({ADDITIVE: [vector(kind="set")]}, f"{ADDITIVE}[0].value"),
    "value with add": ({ADDITIVE: [vector(value=1)]}, f"{ADDITIVE}[0].value"),
    "scale with set": (
        {ADDITIVE: [vector(kind="set", value=1, scale=2)]}, f"{ADDITIVE}[0].scale",
    ),
    "scale by one": ({ADDITIVE: [vector(kind="scale")]}, f"{ADDITIVE}[0].scale"),
    "relative scale": (
        {ADDITIVE: [vector(kind="scale", scale=0, relative=True)]},
        f"{ADDITIVE}[0].relative",
    ),
    "bounds upside down": (
        {ADDITIVE: [vector(kind="bound", bounds=[1, 0])]}, f"{ADDITIVE}[0].bounds",
    ),
    "one bound": (
        {ADDITIVE: [vector(kind="bound", bounds=[1])]}, f"{ADDITIVE}[0].bounds",
    ),
    "two kinds on one vector": (
        {ADDITIVE: [vector(), vector(kind="set", value=1)]}, f"{ADDITIVE}[1].kind",
    ),
    "relative adds do not add up": (
        {ADDITIVE: [vector(relative=True)] * 2}, f"{ADDITIVE}[1].kind",
    ),
    "scales that may add up beyond float32": (
        {ADDITIVE: [vector(scale=3e38, spans=[span("prompt", -1)]),
                    vector(scale=3e38, spans=[span("prompt")])]},
        f"{ADDITIVE}[1].scale",
    ),
    "no span": ({FULL: [spec(spans=[])]}, SPANS),
    "phase and spans": (
        {FULL: [spec(phase="decode", spans=[span("prompt")])]}, f"{FULL}[0].phase",
    ),
    "an unknown part": ({FULL: [spec(spans=[span("answer")])]}, f"{SPANS}[0].of"),
    "the end of an answer": (
        {FULL: [spec(spans=[span("generated", -1)])]}, f"{SPANS}[0].start",
    ),
    "an empty span": ({FULL: [spec(spans=[span("prompt", 3, 3)])]}, f"{SPANS}[0].stop"),
    "nothing behind the prompt's end": (
        {FULL: [spec(spans=[span("prompt", -2, 0)])]}, f"{SPANS}[0].stop",
    ),
    "too many pieces": (
        {FULL: [spec(spans=[span("generated", i, i + 1) for i in (2, 4, 6, 8)])]},
        SPANS,
    ),
    "two reconstructions that may meet": (
        {FULL: [spec(spans=[span("prompt", 0, 5)]),
                spec(module="b", spans=[span("prompt", -1)])]},
        f"{FULL}[1].clamps",
    ),
    "a feature twice where spans may meet": (
        {DELTA: [spec(entry(1), spans=[span("generated", 0, 5)]),
                 spec(entry(1), spans=[span("generated", 4)])]},
        f"{DELTA}[1].clamps[0].feature_idx",
    ),
    "a single span": (
        {FULL: [spec(spans=span("prompt"))]}, SPANS,
    ),
}  # fmt: skip


ANSWER = [span("generated", 0, 5)], [span("generated", 4)]
AROUND = [span("prompt", -2)], [span("prompt", 0, 3)], [span("generated")]


@pytest.mark.parametrize("spans", [*ANSWER, *AROUND])
@pytest.mark.parametrize("exact", [True, False])
def test_spans_inside_an_answer_need_a_worker_that_knows_where_it_is(
    spans: list[Any], exact: bool
) -> None:
    config = dataclasses.replace(CONFIG, exact_positions=exact)
    asked = {FULL: [spec(spans=spans)]}
    if exact or spans not in ANSWER:
        assert parse_steering_request(asked, config) is not None
        return
    with pytest.raises(VLLMValidationError, match="no-async-scheduling") as caught:
        parse_steering_request(asked, config)
    assert caught.value.parameter == SPANS


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_the_path_of_the_field(what: str) -> None:
    extra_args, path = REFUSED[what]
    with pytest.raises(VLLMValidationError) as caught:
        parse(extra_args)
    assert caught.value.parameter == path
    assert path in str(caught.value)


def test_both_paths_of_an_overlap_are_named() -> None:
    extra_args, _ = REFUSED["two reconstructions that may meet"]
    with pytest.raises(VLLMValidationError) as caught:
        parse(extra_args)
    assert f"{FULL}[0].clamps" in str(caught.value)


GOOD = [
    {DELTA: [spec(entry(1, when=ABOVE), entry(2, when=ABOVE), entry(4))]},
    {FULL: [spec(entry(1, when={"feature_idx": 1, "below": -0.0}))]},
    {ADDITIVE: [vector(kind="set", value=2, relative=True)]},
    {ADDITIVE: [vector(kind="bound", bounds=[-1, 1])]},
    {ADDITIVE: [vector(kind="scale", scale=0, spans=[span("generated", 3)])]},
    {ADDITIVE: [vector(), vector(scale=2, spans=[span("prompt", -1)])]},
    {FULL: [spec(spans=[span("prompt", 0, 2)]),
            spec(module="b", spans=[span("prompt", 2), span("generated")])]},
    {DELTA: [spec(entry(1), spans=[span("generated", 0, 5)]),
             spec(entry(1, 2.0), spans=[span("generated", 5)])]},
]  # fmt: skip


@pytest.mark.parametrize("extra_args", GOOD)
def test_the_canonical_form_parses_to_itself(extra_args: dict[str, Any]) -> None:
    request = parse(extra_args)
    again = parse(json.loads(json.dumps(request.to_extra_args())))
    assert again == request
    assert again.to_extra_args() == request.to_extra_args()
    assert again.schedule(6) == request.schedule(6)


def test_classes_are_the_same_requests_as_json() -> None:
    clamp = SAEClampEntry(1, "absolute", 1.0, when=SAECondition(3, above=0.5))
    spans = [SteeringSpan("prompt", -1)]
    specs = [SAEClampSpec("a", [clamp], spans=spans)]
    same = [spec(entry(1, when=ABOVE), spans=[span("prompt", -1)])]
    assert parse({DELTA: specs}) == parse({DELTA: same})
    bound = SteeringVectorSpec("v", kind="bound", bounds=[-1, 1])
    assert parse({ADDITIVE: [bound]}) == parse(
        {ADDITIVE: [vector(kind="bound", bounds=[-1, 1])]}
    )


DIFFERENT = [
    {DELTA: [spec(entry(1))]},
    {DELTA: [spec(entry(1, when=ABOVE))]},
    {DELTA: [spec(entry(1, when={"feature_idx": 3, "below": 0.5}))]},
    {DELTA: [spec(entry(1, when={"feature_idx": 4, "above": 0.5}))]},
    {DELTA: [spec(entry(1, when={"feature_idx": 3, "above": 0.25}))]},
    {ADDITIVE: [vector()]},
    {ADDITIVE: [vector(relative=True)]},
    {ADDITIVE: [vector(kind="set", value=1)]},
    {ADDITIVE: [vector(kind="scale", scale=2)]},
    {ADDITIVE: [vector(kind="bound", bounds=[0, 1])]},
    {ADDITIVE: [vector(kind="bound", bounds=[0, 2])]},
]


def test_different_contents_have_different_digests() -> None:
    found = {parse(extra_args).digest("decode") for extra_args in DIFFERENT}
    assert len(found) == len(DIFFERENT)


def test_a_digest_is_of_what_acts_and_not_of_where() -> None:
    plain = parse({FULL: [spec(entry(1))]}).digest("decode")
    by_span = digests(
        {FULL: [spec(entry(1), spans=[span("prompt", -2), span("generated", 1, 3)])]}
    )
    assert by_span == [None] * 4 + [plain] * 2 + [None] + [plain] * 2 + [None] * 3


def test_spans_of_all_tokens_are_both_phases() -> None:
    everywhere = [span("prompt"), span("generated")]
    assert digests({FULL: [spec(entry(1), spans=everywhere)]}) == digests(
        {FULL: [spec(entry(1))]}
    )


def test_the_units_of_conditions_are_no_integers_only() -> None:
    request = parse(GOOD[1])
    (edit,) = request.edits(Tier.FULL, "decode")
    assert edit.clamps[0].when == SAECondition(1, below=0.0)
    assert str(edit.clamps[0].when.below) == "0.0"


spans = st.builds(
    SteeringSpan,
    st.sampled_from(["prompt", "generated"]),
    st.integers(0, 5),
    st.none() | st.integers(6, 9),
) | st.builds(
    SteeringSpan, st.just("prompt"), st.integers(-5, 5), st.none() | st.integers(-5, 9)
)
coverages = st.sampled_from(["both", "prefill", "decode"]) | st.lists(
    spans, min_size=1, max_size=3
).map(tuple)


def acting(coverage: Any, length: int) -> set[int]:
    """Positions of the first twenty on which a coverage acts."""
    if isinstance(coverage, str):
        prompt, answer = set(range(length)), set(range(length, 20))
        return {"prefill": prompt, "decode": answer, "both": prompt | answer}[coverage]
    found: set[int] = set()
    for one in coverage:
        if one.of == "prompt":
            found |= set(range(length)[one.start : one.stop])
        else:
            found |= set(range(length, 20)[one.start : one.stop])
    return found


@settings(max_examples=200)
@given(st.lists(coverages, min_size=1, max_size=4), st.integers(1, 8))
def test_pieces_say_what_acts_on_every_token(found: list[Any], length: int) -> None:
    schedule = pieces(found, length)
    stops = [stop for stop, _ in schedule]
    assert length in stops
    assert stops[-1] is None
    assert stops[:-1] == sorted(set(stops[:-1]))
    for at in range(20):
        held = next(held for stop, held in schedule if stop is None or at < stop)
        assert held == {c for c in found if at in acting(c, length)}


@settings(max_examples=300)
@given(coverages, coverages)
def test_spans_that_cannot_overlap_never_do(one: Any, other: Any) -> None:
    if not may_overlap(one, other):
        for length in range(1, 12):
            assert not acting(one, length) & acting(other, length)
