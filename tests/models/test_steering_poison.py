# SPDX-License-Identifier: Apache-2.0
"""Whatever one request asks for, nobody else's bits change: before, beside, after.

Every batch of a test has the same shape, so that plain requests can be compared bit
for bit: only what their neighbours ask for differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steering_testing.cases import CASES, TRANSFORMERS_CASES, Case
from steering_testing.conformance import case_engine
from steering_testing.engine import DELTA, FULL, VECTORS, engine, generate, params
from steering_testing.models import HIDDEN
from steering_testing.oracle import Greedy
from steering_testing.reference import random_sae
from steering_testing.requests import Modules, Site, prompt, vector

from vllm import LLM, SamplingParams
from vllm.config.steering_replies import METHOD

pytestmark = pytest.mark.engine

D_SAE, BLOCK, LENGTHS = 96, 32, (5, 40, 70, 33, 12, 64)
PLAIN = (0, 3)  # of the batch; the others are steered
SITES = [(0, "pre_attn"), (1, "post_block"), (2, "post_attn")]
# Points other than the stream: a linear layer reads them, or they are added to it.
INNER = [(0, "attn_z"), (0, "attn_out"), (1, "mlp_in"), (2, "mlp_out")]
LARGEST = 3e38
OPTIONS: dict[str, Any] = {
    # Room for little more than one batch: blocks go from request to request.
    "num_gpu_blocks_override": 16,
    "block_size": BLOCK,
    "max_model_len": 128,
    "max_num_seqs": len(LENGTHS),
}
ALL_CASES = {**CASES, **TRANSFORMERS_CASES}
# Without a point in float16, or not started or not run by vLLM in it.
NOT_IN_FLOAT16 = (
    *("exaone4", "transformers-olmo2"),
    *("gemma", "gemma2", "gemma3", "gemma4", "gemma4_moe", "glm4"),
    *("transformers-gemma2",),
    *("apertus", "deepseek_v2", "deepseek_v3"),
)
BREADTH = [
    (name, dtype)
    for name in ALL_CASES
    # The caches of the others have no blocks of this size.
    if not (ALL_CASES[name].linear or ALL_CASES[name].recurrent)
    for dtype in ("float32", "bfloat16", "float16")
    if dtype != "float16" or name not in NOT_IN_FLOAT16
]
QUICK = [("llama", "bfloat16"), ("gpt2", "float16")]


def stream_sites(case: Case | None = None) -> list[Site]:
    """One site of every hook of the stream that the family has."""
    return [at for at in SITES if case is None or at[1] in case.hooks_of(at[0])]


def inner_sites(case: Case) -> list[Site]:
    return [at for at in INNER if at[1] in case.hooks_of(at[0])]


def modules(case: Case | None = None, inner: bool = False) -> Modules:
    """SAEs of both kinds and a vector, at a site of every hook of the stream."""
    sites = stream_sites(case)
    saes = {
        kind: {at: random_sae(D_SAE, HIDDEN, kind, 7) for at in sites}
        for kind in ("jumprelu", "topk")
    }
    if case and inner:
        saes["inner"] = {
            (layer, hook): random_sae(D_SAE, case.width(hook), "relu", 8)
            for layer, hook in inner_sites(case)
        }
    return Modules(saes, {"v": {at: vector(5) for at in sites}})


def entry(feature: int, kind: str, value: float) -> dict[str, Any]:
    return {"feature_idx": feature, "kind": kind, "value": value}


def spec(
    module: str, entries: list[dict[str, Any]], sites: list[Site]
) -> dict[str, Any]:
    """The same clamps at the sites."""
    clamps: dict[str, dict[int, Any]] = {}
    for layer, hook in sites:
        clamps.setdefault(hook, {})[layer] = entries
    return {"module_name": module, "clamps": clamps}


def flood(sites: list[Site]) -> list[dict[str, Any]]:
    """What four requests ask for that mean harm."""

    def one(module: str, *entries: dict[str, Any]) -> list[dict[str, Any]]:
        return [spec(module, list(entries), sites)]

    most = [entry(at, "absolute", LARGEST) for at in range(64)]
    return [
        {FULL: one("jumprelu", entry(3, "scale", LARGEST), entry(4, "scale", -1e38))},
        {FULL: one("topk", *most)},
        {DELTA: one("topk", entry(9, "additive", -LARGEST))},
        {
            VECTORS: [{"module_name": "v", "scale": LARGEST}],
            DELTA: one("jumprelu", entry(2, "additive", 1e30)),
            FULL: one("topk", entry(1, "absolute", 1e6)),
        },
    ]


def batch(llm: LLM, asked: list[dict[str, Any]]) -> list[Greedy]:
    """One batch with these specs in its steered places."""
    steered = iter(asked)
    sampling: list[SamplingParams] = [
        params(4) if at in PLAIN else params(4, **next(steered))
        for at in range(len(LENGTHS))
    ]
    prompts = [prompt(at, length) for at, length in enumerate(LENGTHS)]
    llm.reset_prefix_cache()
    return generate(llm, prompts, sampling)


def plain_bits(found: list[Greedy]) -> list[tuple[list[int], list[float]]]:
    return [(found[at].tokens, found[at].logprobs) for at in PLAIN]


def assert_finite(found: list[Greedy]) -> None:
    scores = [score for result in found for score in result.logprobs]
    assert all(math.isfinite(score) for score in scores), scores


NOTHING: list[dict[str, Any]] = [{}] * 4


def check_flood(llm: LLM, stream: list[Site], inner: list[Site]) -> None:
    before = batch(llm, NOTHING)
    assert_finite(before)
    for _ in range(3):
        beside = batch(llm, flood(stream))
        assert_finite(beside)
        assert plain_bits(beside) == plain_bits(before)
    # Each inner point alone, then all of them.
    for sites in [[at] for at in inner] + ([inner] if inner else []):
        clamps = [entry(3, "absolute", LARGEST), entry(4, "additive", -LARGEST)]
        asked = [{tier: [spec("inner", clamps, sites)]} for tier in (FULL, DELTA)]
        beside = batch(llm, [*asked, *asked])
        assert_finite(beside)
        assert plain_bits(beside) == plain_bits(before), sites
    after = batch(llm, NOTHING)
    assert after == before
    stats = llm.llm_engine.engine_core.engine_core.collective_rpc(
        METHOD, args=("stats", {})
    )
    saturated = {
        name: tokens["saturated"]
        for name, tokens in stats[0].stats["module_tokens"].items()
    }
    assert all(saturated.values()), f"nothing was tested: {saturated}"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in BREADTH
    ],
)
def test_a_flood_of_poison_stays_with_those_who_ask(
    name: str, dtype: str, model_root: Path, tmp_path: Path
) -> None:
    case = ALL_CASES[name]
    inner = dtype != "float16"
    paths = modules(case, inner).save(tmp_path)
    with case_engine(case, model_root, paths, **OPTIONS, dtype=dtype) as llm:
        check_flood(llm, stream_sites(case), inner_sites(case) if inner else [])


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("exaone4", "attention"),
        ("transformers-olmo2", "attention"),
        pytest.param("gemma4", "per_layer_input_gate", marks=pytest.mark.slow),
    ],
)
def test_float16_is_refused_where_linear_layers_read_the_stream_itself(
    name: str, reader: str, model_root: Path, tmp_path: Path
) -> None:
    case = ALL_CASES[name]
    options = {**dict(case.options), **OPTIONS, "dtype": "float16"}
    paths = modules(case).save(tmp_path)
    with (
        pytest.raises(
            ValueError, match=f"its {reader} reads the stream without a norm"
        ),
        engine(case.family, model_root, paths, **options),
    ):
        pass


@pytest.fixture(scope="module")
def llm(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    paths = modules().save(tmp_path_factory.mktemp("modules"))
    with engine("gemma2", model_root, paths, dtype="bfloat16", **OPTIONS) as llm:
        yield llm


values = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Any accepted request over the three tiers."""
    asked: dict[str, Any] = {}
    for key in draw(st.sets(st.sampled_from([FULL, DELTA, VECTORS]), min_size=1)):
        if key == VECTORS:
            one = {"module_name": "v", "scale": draw(values)}
        else:
            features = st.lists(st.integers(0, D_SAE - 1), min_size=1, unique=True)
            kinds = st.sampled_from(["absolute", "additive", "scale"])
            entries = [
                entry(feature, draw(kinds), draw(values))
                for feature in draw(features)[:64]
            ]
            one = spec(draw(st.sampled_from(["jumprelu", "topk"])), entries, SITES)
        one["phase"] = draw(st.sampled_from(["both", "prefill", "decode"]))
        asked[key] = [one]
    return asked


@settings(max_examples=12)
@given(asked=st.lists(requests(), min_size=4, max_size=4))
def test_no_accepted_request_changes_a_neighbour(
    llm: LLM, asked: list[dict[str, Any]]
) -> None:
    before = batch(llm, NOTHING)
    beside = batch(llm, asked)
    assert_finite(beside)
    assert plain_bits(beside) == plain_bits(before)
    assert batch(llm, NOTHING) == before
