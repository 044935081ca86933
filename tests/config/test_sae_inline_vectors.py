# SPDX-License-Identifier: Apache-2.0
"""Vectors in requests: what is accepted and refused, what is hashed, who holds what."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
import time
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.config.sae_inline_vectors import read_vector, vector_text
from vllm.config.sae_steering_plan import PlannedVector, decode_plan, encode_plan
from vllm.config.sae_steering_specs import ADDITIVE_KEY as VECTORS
from vllm.config.sae_steering_types import SteeringVectorSpec, parse_steering_request
from vllm.config.steering import InlineSite, ModuleInfo, SiteInfo, SteeringConfig, Tier
from vllm.config.steering_points import HookPoint
from vllm.config.steering_slots import NoRoomError, start_up_slots, with_module
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.steering import SiteKey
from vllm.v1.worker.steering_inline import InlineVectors, make_stack

POST, PRE = HookPoint.POST_BLOCK, HookPoint.PRE_ATTN
D = 8
ROOM = InlineSite(1, POST, D, per_request=2, directions=2 * 3)
OTHER = InlineSite(2, PRE, D, per_request=1, directions=3)
MODULE = ModuleInfo("v", "vectors", "p", "native", "dv", (SiteInfo(1, POST, D, 1),))
CONFIG = SteeringConfig({"v": MODULE}, inline_sites=(ROOM, OTHER))
WHERE = f"{VECTORS}[0]"


def values(seed: int, kind: str = "<f4") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(D).astype(kind)


def text(data: np.ndarray) -> str:
    return base64.b64encode(data.tobytes()).decode()


def own(seed: int = 0, **more: Any) -> dict[str, Any]:
    return {"vector": text(values(seed)), "layer": 1, "hook": "post_block", **more}


def parse(*given: Any, config: SteeringConfig = CONFIG) -> Any:
    return parse_steering_request({VECTORS: list(given)}, config)


def planned(*given: dict[str, Any]) -> tuple[PlannedVector, ...]:
    """What a worker is told of the vectors."""
    request = parse(*given)
    assert request is not None
    return decode_plan(encode_plan(request, 4)).vectors


def refused(*given: Any, config: SteeringConfig = CONFIG) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as caught:
        parse(*given, config=config)
    return caught.value


def with_component(value: float, kind: str = "<f4") -> str:
    data = values(0, kind)
    data[3] = value
    return text(data)


@pytest.mark.parametrize("kind", ["<f2", "<f4"])
def test_both_types_are_read_by_their_length(kind: str) -> None:
    data = values(1, kind)
    assert read_vector("x", text(data), D) == data.astype("<f4").tobytes()
    assert read_vector("x", text(-data * 0), D) == bytes(4 * D)  # no negative zero


@pytest.mark.parametrize("site", ["post_block.1", "blocks.1.hook_resid_post"])
def test_a_site_may_be_named_in_one_field(site: str) -> None:
    named = own(layer=None, hook=None, site=site)
    assert parse(named) == parse(own())
    by_class = SteeringVectorSpec(vector=values(0), site=site)
    assert parse(by_class) == parse(own())


@pytest.mark.parametrize(
    ("changed", "field", "words"),
    [
        ({"site": "post_block.1"}, "layer", "found 1 beside site"),
        ({"site": "post_block.1", "layer": None}, "hook", "found 'post_block' beside"),
        ({"site": "post_blok.1", "layer": None, "hook": None}, "site",
         "found 'post_blok.1', expected HOOK.LAYER such as post_block.20"),
        ({"site": "post_block.2", "layer": None, "hook": None}, "site",
         "post_block.1, pre_attn.2"),
        ({"vector": None, "layer": None, "hook": None, "site": "post_block.1"}, "site",
         "only with vector"),
        ({"site": 1, "layer": None, "hook": None}, "site", "found 1, expected a site"),
        ({"vector": "@" * 43}, "vector", "found '@"),
        ({"vector": "é" * 40}, "vector", "base64"),
        ({"vector": text(values(0))[:-1]}, "vector", "base64"),
        ({"vector": ""}, "vector", "found 0 bytes"),
        ({"vector": text(values(0))[:-4]}, "vector", "found 30 bytes"),
        ({"vector": text(np.ones(D + 1, "<f4"))}, "vector", "found 48 characters"),
        ({"vector": "A" * 10_000_000}, "vector", "found 10000000 characters"),
        ({"vector": with_component(np.nan)}, "vector", "found nan at position 3"),
        ({"vector": with_component(np.inf)}, "vector", "found inf at position 3"),
        ({"vector": with_component(-np.inf, "<f2")}, "vector", "found -inf at"),
        ({"vector": 7}, "vector", "base64"),
        ({"vector": None}, "layer", "only with vector"),
        ({"vector": None, "layer": None}, "hook", "only with vector"),
        ({"layer": None}, "layer", "is missing"),
        ({"hook": None}, "hook", "is missing"),
        ({"layer": True}, "layer", "layer index"),
        ({"layer": -1}, "layer", "layer index"),
        ({"layer": 2}, "layer", "post_block.1, pre_attn.2"),
        ({"hook": "resid_pre"}, "layer", "no room is reserved"),
        ({"hook": "nowhere"}, "hook", "unknown hook"),
        ({"module_name": "v"}, "module_name", "found module_name and vector"),
        ({"vector": text(np.zeros(D, "<f4")), "kind": "set", "value": 1},
         "vector", "norm 0"),
        ({"vector": text(np.full(D, 1e30, "<f4")), "relative": True},
         "vector", "unit vector"),
    ],
)  # fmt: skip
def test_a_bad_vector_is_refused_by_its_path(
    changed: dict[str, Any], field: str, words: str
) -> None:
    error = refused({**own(), **changed})
    assert error.parameter == f"{WHERE}.{field}"
    assert words in str(error)
    assert len(str(error)) < 400


def test_a_vector_of_megabytes_is_refused_before_it_is_read() -> None:
    long = own(vector="A" * (1 << 21))
    start = time.process_time()
    with pytest.raises(VLLMValidationError, match="found 2097152 characters") as caught:
        parse(*[long] * 64)
    assert caught.value.parameter == f"{WHERE}.vector"
    assert time.process_time() - start < 0.5


def test_a_spec_without_module_and_vector_is_refused() -> None:
    error = refused({"scale": 1.0})
    assert error.parameter == f"{WHERE}.module_name"


@pytest.mark.parametrize("size", [0.0, 1e-45, 3e38])
def test_adding_takes_any_finite_vector(size: float) -> None:
    assert parse(own(vector=text(np.full(D, size, "<f4"))))


def test_more_vectors_than_are_reserved_are_refused_with_the_option() -> None:
    assert len(parse(own(1), own(2), own(1, scale=2.0)).inline) == 2
    error = refused(own(1), own(2), own(3))
    assert error.parameter == f"{VECTORS}[2].vector"
    assert "at most 2 (additional_config.steering.inline_vectors)" in str(error)
    none = dataclasses.replace(CONFIG, inline_sites=())
    assert "none is reserved" in str(refused(own(), config=none))


def test_spans_do_not_raise_the_limit() -> None:
    """A direction is held for the whole request, whatever tokens it acts on."""
    spans = [[{"of": "generated", "start": at, "stop": at + 1}] for at in range(3)]
    given = [own(at, spans=span) for at, span in enumerate(spans)]
    assert refused(*given).parameter == f"{VECTORS}[2].vector"


def test_kinds_of_one_content_exclude_each_other() -> None:
    error = refused(own(1), own(1, kind="scale", scale=0))
    assert "this vector already acts on some of these tokens" in str(error)
    assert parse(own(1, phase="prefill"), own(1, kind="scale", scale=0, phase="decode"))


def test_scales_of_one_content_add_up() -> None:
    (edit,) = parse(own(1), own(1, scale=0.5)).edits(Tier.ADDITIVE, "decode")
    assert edit.clamps[0].value == 1.5


def test_tensors_arrays_and_text_are_one_request() -> None:
    data = values(3)
    forms = [
        own(3),
        own(3, vector=torch.from_numpy(data)),
        own(3, vector=data.astype(np.float64)),
        own(3, vector=torch.from_numpy(data).bfloat16().float().double()),
        SteeringVectorSpec(vector=data, layer=1, hook="resid_post"),
    ]
    requests = [parse(form) for form in forms]
    assert requests[0] == requests[1] == requests[2] == requests[4]
    assert requests[3] != requests[0]  # rounded to bfloat16


@pytest.mark.parametrize(
    "wrong", [torch.ones(1, D), np.ones((2, 2)), np.array(["a"]), torch.ones(D) * 1j]
)
def test_what_is_no_vector_is_refused_where_it_is_written(wrong: Any) -> None:
    assert refused(own(vector=wrong)).parameter == f"{WHERE}.vector"
    with pytest.raises(VLLMValidationError, match="real numbers"):
        SteeringVectorSpec(vector=wrong, layer=1, hook="post_block")


def test_the_canonical_form_survives_json_and_the_codec() -> None:
    request = parse(own(1, kind="set", value=2), own(2, scale=3), {"module_name": "v"})
    args = request.to_extra_args()
    again = parse_steering_request(json.loads(json.dumps(args)), CONFIG)
    assert again == request
    packed = msgspec.msgpack.encode(SteeringVectorSpec(**own(1)))
    assert msgspec.msgpack.decode(packed, type=SteeringVectorSpec) == (
        SteeringVectorSpec(**own(1))
    )


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=2), st.booleans())
def test_digests_are_equal_exactly_where_contents_are(
    seeds: list[int], half: bool
) -> None:
    """The same numbers in another type are the same content."""
    exact = [values(seed, "<f2") for seed in seeds]
    first = parse(own(vector=text(exact[0])))
    second = parse(own(vector=text(exact[1].astype("<f2" if half else "<f4"))))
    for phase in ("prefill", "decode"):
        same = first.digest(phase) == second.digest(phase)
        assert same == (seeds[0] == seeds[1])
        key = Tier.ADDITIVE, phase
        assert (first.row_key(*key) == second.row_key(*key)) == same


def test_a_site_a_module_and_a_vector_never_collide() -> None:
    requests = [
        parse(own(1)),
        parse(own(1, layer=2, hook="pre_attn")),
        parse({"module_name": "v"}),
        parse(own(1), {"module_name": "v"}),
    ]
    assert len({request.digest("decode") for request in requests}) == len(requests)


def test_the_order_of_specs_changes_nothing() -> None:
    given = [own(1), own(2, scale=2), {"module_name": "v"}]
    assert parse(*given) == parse(*given[::-1])


def test_a_stack_with_room_for_requests_cannot_grow() -> None:
    """A module finds a spare slot there, or the start-up option that makes one."""
    config = start_up_slots(dataclasses.replace(CONFIG, modules={}))
    with pytest.raises(NoRoomError, match="spare"):
        with_module(config, MODULE, may_add_slots=True)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_the_device_holds_exactly_what_the_batch_uses(seed: int) -> None:
    """Any order of arrivals and departures of a batch of three."""
    rng = random.Random(seed)
    key = SiteKey(1, POST)
    inline = InlineVectors()
    stack = make_stack(1, ROOM, D, num_rows=25, device=torch.device("cpu"))
    inline.stacks[key] = stack
    batch: list[Any] = []
    for _ in range(40):
        if len(batch) < 3 and rng.random() < 0.6:
            seeds = rng.sample(range(5), rng.randint(1, 2))
            batch.append(planned(*(own(at) for at in seeds)))
            inline.acquire(batch[-1])
        elif batch:
            inline.release(batch.pop(rng.randrange(len(batch))))
        if rng.random() < 0.5:
            inline.upload()
            for vectors in batch:
                for vector in vectors:
                    found = inline.find(vector.module, key)
                    assert found is not None
                    table, direction = found
                    assert table is stack.table and direction >= 1
                    row = stack.slot.directions[direction].numpy()
                    assert row.tobytes() == vector.data
        inline.check_integrity(batch)
        distinct = {vector.module for vectors in batch for vector in vectors}
        assert inline.in_use == len(distinct)
    assert not stack.slot.directions[0].any()  # a module's


def test_vectors_of_other_ranks_are_passed_over() -> None:
    inline, vectors = InlineVectors(), planned(own(1))
    inline.acquire(vectors)
    assert inline.find(vectors[0].module, SiteKey(1, POST)) is None
    inline.check_integrity([vectors])
    inline.release(vectors)


def test_float16_text_is_half_as_long() -> None:
    short, long = vector_text(values(0, "<f2")), vector_text(values(0))
    assert (len(base64.b64decode(short)), len(base64.b64decode(long))) == (16, 32)
    assert vector_text(torch.from_numpy(values(0, "<f2"))) == short
