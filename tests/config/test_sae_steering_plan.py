# SPDX-License-Identifier: Apache-2.0
"""What the engine tells workers is what the request asks for, token by token."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from steering_testing.specs import ADDITIVE, FULL, entry, fast, parse, refusal, requests

from vllm.config.sae_steering_admission import refuse_reserved_key
from vllm.config.sae_steering_plan import (
    NO_STOP,
    SteeringPlan,
    decode_plan,
    encode_plan,
)
from vllm.config.sae_steering_spans import TOKEN_PHASES
from vllm.config.sae_steering_specs import RESERVED_KEYS
from vllm.config.steering import Tier
from vllm.exceptions import VLLMValidationError


def rows_at(plan: SteeringPlan, position: int, length: int) -> list[Any]:
    """What each tier does at a position: the edits of its row, or None."""
    stops = np.frombuffer(plan.stops, np.int64)
    places = np.frombuffer(plan.places, np.int32).reshape(len(stops), len(Tier))
    held = places[int((stops <= position - length).sum())]
    found: list[Any] = [None] * len(Tier)
    for tier, place in enumerate(held):
        if place:
            row = plan.rows[place - 1]
            assert row.tier == tier
            found[tier] = row.key, row.edits
    return found


def with_spans(extra_args: dict[str, Any], spans: list[Any]) -> dict[str, Any]:
    """The specs act in these spans instead of their phases."""
    for specs in extra_args.values():
        for spec in specs:
            spec.pop("phase", None)
            spec["spans"] = spans
    return extra_args


SPANS = st.sampled_from(
    [
        None,
        [{"of": "prompt", "start": -1}],
        [{"of": "prompt", "start": 1, "stop": 3}, {"of": "generated", "stop": 2}],
        [{"of": "generated", "start": 1}],
        [{"of": "prompt"}, {"of": "generated"}],
    ]
)


@fast
@given(requests(), SPANS, st.integers(1, 5))
def test_the_plan_says_what_acts_at_every_position(
    extra_args: dict[str, Any], spans: Any, length: int
) -> None:
    if spans is not None:
        extra_args = with_spans(extra_args, spans)
    request = parse(extra_args)
    plan = decode_plan(encode_plan(request, length))
    for position in range(length + 4):
        if spans is None:
            acting = request.acting(TOKEN_PHASES[int(position >= length)])
        else:
            pieces = request.schedule(length)
            acting = next(
                piece.acting
                for piece in pieces
                if piece.stop is None or position < piece.stop
            )
        wanted = [
            None if key is None else (key, edits)
            for key, edits in zip(acting.row_keys, acting.edits, strict=True)
        ]
        assert rows_at(plan, position, length) == wanted
    assert len({(row.tier, row.key) for row in plan.rows}) == len(plan.rows)
    assert set(plan.modules) == set(request.modules)


def test_phases_are_two_pieces() -> None:
    request = parse({ADDITIVE: [{"module_name": "v1", "phase": "decode"}]})
    plan = decode_plan(encode_plan(request, 7))
    assert np.frombuffer(plan.stops, np.int64).tolist() == [0, NO_STOP]
    assert np.frombuffer(plan.places, np.int32).tolist() == [0, 0, 0, 1, 0, 0]
    assert len(plan.rows) == 1 and not plan.reads and not plan.vectors


@pytest.mark.parametrize("key", RESERVED_KEYS)
def test_no_client_may_set_what_the_engine_does(key: str) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        refuse_reserved_key({key: b""})
    assert caught.value.parameter == key


def test_very_many_spans_are_refused_at_once() -> None:
    """As many specs and spans as a request may list, each at places of its own."""
    specs = [
        {
            "module_name": "one",
            "clamps": [entry(at % 16)],
            "spans": [
                {
                    "of": "generated",
                    "start": 200 * at + 3 * n,
                    "stop": 200 * at + 3 * n + 1,
                }
                for n in range(64)
            ],
        }
        for at in range(64)
    ]
    begin = time.thread_time()
    error = refusal({FULL: specs})
    assert time.thread_time() - begin < 0.2
    assert error.parameter == f"{FULL}[0].spans"
    assert "max_pieces" in str(error)
