# SPDX-License-Identifier: Apache-2.0
"""Odd requests: what two ranks answer with a shared SAE has the bits of what they
answer with copies, and what is refused is refused by the whole SAE's widths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steering_testing import matrix, models
from steering_testing.engine import DELTA, FULL, answer_of, engine, params
from steering_testing.requests import Ask, prompt, specs, vector
from steering_testing.shard_engines import (
    INLINE,
    POST,
    RANKS,
    TRANSCODERS,
    WIDTH,
    Clamp,
    requests,
    save,
)

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LARGEST, TINY = 3.4e38, 1e-45
EDGE = WIDTH // 2  # the second rank's first feature


@pytest.fixture(autouse=True)
def unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def every_kind(values: Sequence[float], first: int) -> list[Clamp]:
    """A clamp of each kind with each value, of neighbouring features."""
    kinds = ("absolute", "additive", "scale")
    pairs = [(kind, value) for value in values for kind in kinds]
    return [Clamp(first + at, *pair) for at, pair in enumerate(pairs)]


def odd_requests() -> list[list[Ask]]:
    """Extremes that are accepted."""
    extreme = every_kind((LARGEST, -LARGEST, TINY, -0.0), EDGE - 6)
    many = [Clamp(3 * at, "scale", -1.0, at % 2 == 0) for at in range(64)]
    own = [Clamp(EDGE, "absolute", 2.0, when=(EDGE, "above", 0.0))]
    others = [
        Clamp(EDGE - 1, "absolute", 1.0, when=(EDGE, "below", 0.0)),
        Clamp(EDGE, "absolute", 1.0, when=(EDGE - 1, "above", -LARGEST)),
        Clamp(0, "scale", 0.0, True, when=(WIDTH - 1, "below", LARGEST)),
    ]
    spans: list[tuple[str, int, int | None]] = [
        ("prompt", -1, None),
        ("generated", 0, 1),
        ("generated", 90, None),
    ]
    found = []
    for tier in ("delta", "full"):
        for kind in ("jumprelu", "topk"):
            for clamps in (extreme, many, own, others):
                found.append([Ask(tier, kind, {POST: clamps})])
            found.append([Ask(tier, kind, {POST: own}, spans=spans)])
        found.append([Ask(tier, "transcoders", {TRANSCODERS[0]: extreme})])
    found.append(
        [
            # A request has at most 64 clamps at a point.
            *(Ask("delta", kind, {POST: many[:32]}) for kind in ("jumprelu", "topk")),
            Ask("additive", "vector", scale=-LARGEST),
            Ask("additive", vector=vector(3), site=POST, kind="set", value=LARGEST),
            Ask("full", "guarded", {POST: extreme}),
        ]
    )
    return found


def batch() -> tuple[list[list[int]], list[SamplingParams]]:
    """Odd and ordinary requests, each of which reads too; prompts from one token on."""
    reads = [
        {"module_name": "jumprelu", "sites": {"post_block": [1]}, "top_k": 64},
        {
            "module_name": "topk",
            "sites": {"post_block": [1]},
            "features": [0, EDGE - 1, EDGE, WIDTH - 1],
        },
    ]
    asked = [*odd_requests(), *requests()]
    lengths = [1, 2, 3, 9, 40]
    prompts = [
        prompt(at, lengths[at % 5]) if at % 3 else prompt(at, 1 + lengths[at % 5])[1:]
        for at in range(len(asked))
    ]
    sampling = [params(4, sae_readout_specs=reads, **specs(*asks)) for asks in asked]
    return prompts, sampling


def answers(llm: LLM) -> list[tuple[Any, list[np.ndarray]]]:
    """What each request got, and the numbers that it read."""
    prompts, sampling = batch()
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    found = []
    for output in llm.generate(inputs, sampling, use_tqdm=False):
        records = [
            record
            for features in (output.prompt_sae_features, output.outputs[0].sae_features)
            for sites in (features or {}).values()
            for record in sites.values()
        ]
        numbers = [
            array
            for record in records
            for array in (record.positions, record.features, record.values)
        ]
        found.append((answer_of(output), numbers))
    return found


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (FULL, {"clamps": [{"feature_idx": WIDTH}]}, f"0..{WIDTH - 1}"),
    (FULL, {"clamps": [{"feature_idx": -1}]}, "an integer of 0 or more"),
    (DELTA, {"clamps": [{"feature_idx": True}]}, "feature_idx"),
    (DELTA, {"clamps": [{"feature_idx": 0, "value": float("nan")}]}, "value"),
    (FULL, {"clamps": [], "sharding": "shard"}, "sharding"),
    (FULL, {"clamps": [{"feature_idx": 1}, {"feature_idx": 1}]}, "feature_idx"),
]


def check_refused(llm: LLM) -> None:
    entry = {"kind": "absolute", "value": 1.0}
    for field, given, part in REFUSED:
        clamps = [{**entry, **clamp} for clamp in given["clamps"]]
        spec = {**given, "module_name": "guarded", "clamps": clamps}
        with pytest.raises(VLLMValidationError) as caught:
            llm.generate([prompt(1, 4)], params(1, **{field: [spec]}), use_tqdm=False)
        assert field in str(caught.value) and part in str(caught.value)


def test_odd_requests_get_the_bits_of_copies(model_root: Path, tmp_path: Path) -> None:
    found = {}
    for sharding in ("replicate", "shard"):
        modules = {
            name: {**given, "sharding": sharding} if isinstance(given, dict) else given
            for name, given in save(tmp_path / sharding).items()
        }
        options = {**RANKS, "enable_prefix_caching": False}
        with engine(matrix.FAMILY, model_root, modules, INLINE, **options) as llm:
            found[sharding] = answers(llm)
            check_refused(llm)
            # The engine still steers as it did.
            again = answers(llm)
        assert [one[0] for one in again] == [one[0] for one in found[sharding]]
    for at, (whole, shared) in enumerate(
        zip(found["replicate"], found["shard"], strict=True)
    ):
        assert whole[0] == shared[0], at
        assert np.isfinite(shared[0].logprobs).all(), at
        assert len(whole[1]) == len(shared[1]) > 0
        assert all(map(np.array_equal, whole[1], shared[1])), at


def test_the_batch_is_what_it_says() -> None:
    prompts, sampling = batch()
    assert min(map(len, prompts)) == 1 and len(prompts) == len(sampling)
    assert any(ids[0] != models.BOS for ids in prompts)
