# SPDX-License-Identifier: Apache-2.0
"""Vectors that requests bring themselves, on an engine, against Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing.engine import VECTORS, engine, generate, params, runner, squeezed
from steering_testing.reference import Clamp
from steering_testing.requests import Ask, Modules, prompt, specs, vector
from steering_testing.tiers import (
    FAMILY,
    MAX_TOKENS,
    MID,
    POST,
    PRE,
    check,
    prompts_for,
    run,
    sae,
)

from vllm import LLM, SamplingParams
from vllm.config.sae_steering_types import SteeringSamplingParams, SteeringVectorSpec
from vllm.exceptions import VLLMValidationError
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.steering_runtime import SteeringRuntime

pytestmark = pytest.mark.engine

MODULES = Modules(
    {"a": {POST: sae("jumprelu", 1)}}, {"v": {POST: vector(1), PRE: vector(2)}}
)
# POST has vectors of a module too, MID has none.
RESERVED = {"post_block.1": 2, "2.resid_mid": 1}
STEERING = {"inline_vectors": RESERVED}
BLOCK = 32


def own(seed: int, site: Any = POST, half: bool = False, **fields: Any) -> Ask:
    """An ask that brings a vector, of float16 numbers where `half`."""
    values = vector(seed)
    return Ask(
        "additive", vector=values.half() if half else values, site=site, **fields
    )


def asks() -> list[list[Ask]]:
    """Kinds, sites, spans and tiers, two vectors of equal content among them."""
    clamp = {POST: [Clamp(8, "absolute", 3.0)]}
    return [
        [own(10, scale=1.5)],
        [own(11, half=True, scale=-0.5)],
        [own(10, scale=-0.75), own(12, kind="scale", scale=0.0)],
        [own(13, kind="set", value=1.5)],
        [own(13, kind="bound", bounds=(-0.02, 0.01), relative=True)],
        [own(14, scale=0.3, relative=True), own(15, MID, scale=0.5)],
        [own(10, scale=1.0), own(10, scale=0.5)],
        [own(16, kind="set", value=2.0), Ask("additive", "v", scale=0.7)],
        [own(17, scale=0.9), Ask("full", "a", clamp)],
        [own(18, phase="decode"), own(10, phase="prefill", scale=2.0)],
        [
            own(19, scale=1.5, spans=[("prompt", -2, None)]),
            own(19, kind="scale", scale=0, spans=[("generated", 1, 3)]),
            own(20, MID, scale=2.0, spans=[("generated", 2, None)]),
        ],
    ]


def mixed() -> list[list[Ask]]:
    """One batch of these, with plain requests between."""
    return [one for asked in asks() for one in (asked, [])]


def held(llm: LLM) -> int:
    """Directions that requests use."""
    return runner(llm).steering.modules.inline.in_use


def settle(llm: LLM) -> None:
    """One more step: the worker hears then which requests have finished."""
    run(llm, [[]], [prompt(1, 4)])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return MODULES.save(tmp_path_factory.mktemp("inline"))


@pytest.fixture(scope="module")
def llm(model_root: Path, paths: dict[str, str]) -> Iterator[LLM]:
    with engine(FAMILY, model_root, paths, STEERING, block_size=BLOCK) as llm:
        yield llm


def test_a_mixed_batch_says_what_hugging_face_says(llm: LLM) -> None:
    asked = mixed()
    prompts = prompts_for(len(asked))
    plain = run(llm, [[]] * (len(asked) // 2), prompts[1::2])
    found = run(llm, asked, prompts)
    check(MODULES, found, asked, prompts)
    assert found[1::2] == plain
    settle(llm)
    assert held(llm) == 0
    runner(llm).steering.check_integrity([])


def test_a_warm_cache_serves_equal_contents_only(llm: LLM) -> None:
    asked = asks()
    same = [prompt(6, 40)] * len(asked)
    first = run(llm, asked, same)
    check(MODULES, first, asked, same)
    assert run(llm, asked, same) == pytest.approx(first, abs=1e-4)


def cached(llm: LLM, ask: Ask | None, ids: list[int]) -> int:
    extra = {} if ask is None else specs(ask)
    (output,) = llm.generate(
        [{"prompt_token_ids": ids}], [params(2, **extra)], use_tqdm=False
    )
    return output.num_cached_tokens or 0


def test_blocks_are_keyed_by_content(llm: LLM) -> None:
    llm.reset_prefix_cache()
    ids = prompt(7, 2 * BLOCK + 1)
    assert cached(llm, own(30), ids) == 0
    assert cached(llm, own(30), ids) == 2 * BLOCK
    assert cached(llm, own(31), ids) == 0
    assert cached(llm, own(30, MID), ids) == 0
    assert cached(llm, own(30, kind="set", value=1.0), ids) == 0
    assert cached(llm, None, ids) == 0
    # The same numbers in float16 and in float32 are one content.
    exact = vector(32).half()
    assert cached(llm, Ask("additive", vector=exact), ids) == 0
    assert cached(llm, Ask("additive", vector=exact.float()), ids) == 2 * BLOCK


def test_requests_with_one_content_share_one_direction(llm: LLM) -> None:
    core, steering = llm.llm_engine, runner(llm).steering
    for at in range(6):
        extra = specs(own(40, scale=1.0 + at), own(41 + at % 2))
        core.add_request(
            f"share-{at}", {"prompt_token_ids": prompt(at, 6)}, params(4, **extra)
        )
    core.step()
    core.step()
    assert held(llm) == 3
    steering.check_integrity()
    core.abort_request([f"share-{at}" for at in range(5)], internal=False)
    core.step()
    assert held(llm) == 2
    while core.has_unfinished_requests():
        core.step()
    settle(llm)
    assert held(llm) == 0


def test_tensors_arrays_and_text_are_one_request(llm: LLM) -> None:
    values = vector(50)
    tensor = SteeringVectorSpec(vector=values, layer=1, hook="resid_post")
    array = {"vector": values.numpy(), "layer": 1, "hook": "post_block"}
    text = specs(own(50))[VECTORS]
    ids = prompt(3, 9)
    found = [
        generate(llm, [ids], [params(MAX_TOKENS, **{VECTORS: one})])[0]
        for one in ([tensor], [array], text)
    ]
    by_params = SteeringSamplingParams(
        temperature=0,
        max_tokens=MAX_TOKENS,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        steering_vector_specs=[tensor],
    )
    found += generate(llm, [ids], [by_params])
    check(MODULES, found, [[own(50)]] * 4, [ids] * 4)


def test_each_of_n_completions_is_steered(llm: LLM) -> None:
    sampling = SamplingParams(
        n=3, temperature=1.0, seed=1, max_tokens=4, ignore_eos=True, detokenize=False,
        extra_args=specs(own(60, scale=50.0)),
    )  # fmt: skip
    prompts = [{"prompt_token_ids": prompt(1, 8)}]
    (steered,) = llm.generate(prompts, [sampling], use_tqdm=False)
    sampling.extra_args = None
    (plain,) = llm.generate(prompts, [sampling], use_tqdm=False)
    for one, other in zip(steered.outputs, plain.outputs, strict=True):
        assert one.token_ids != other.token_ids
    settle(llm)
    assert held(llm) == 0


@pytest.mark.parametrize(
    ("asked", "path", "words"),
    [
        ([own(1), own(2), own(3)], "vector", "inline_vectors"),
        ([own(1, (0, "post_block"))], "layer", "inline_vectors: post_block.1"),
    ],
)
def test_what_is_beyond_the_reserve_is_refused(
    llm: LLM, asked: list[Ask], path: str, words: str
) -> None:
    with pytest.raises(VLLMValidationError) as refused:
        generate(llm, [prompt(1, 5)], [params(2, **specs(*asked))])
    last = len(asked) - 1
    assert refused.value.parameter == f"{VECTORS}[{last}].{path}"
    assert words in str(refused.value)


def test_the_reserve_is_on_the_device_before_the_cache_is_sized(llm: LLM) -> None:
    """Of every site: a direction for each vector of each request of the batch."""
    modules = runner(llm).steering.modules
    post, mid = modules.inline.stacks.values()
    assert post.slot.directions.shape[0] == 1 + 2 * 32
    assert mid.slot.directions.shape[0] == 1 * 32
    buffers = {
        id(buffer) for site in modules.sites.values() for buffer in site.buffers()
    }
    for stack in (post, mid):
        assert id(stack.slot.directions) in buffers
    assert modules.nbytes >= sum(s.slot.directions.nbytes for s in (post, mid))


def test_finite_values_of_any_size_leave_finite_text(llm: LLM) -> None:
    """The largest components that a client can send, and the smallest."""
    for size in (3e38, 1e-45, 0.0):
        values = torch.full((vector(1).numel(),), size)
        asked = [[Ask("additive", vector=values, scale=3e38)], []]
        flooded, plain = run(llm, asked, [prompt(1, 6), prompt(2, 6)])
        assert all(score == score for score in flooded.logprobs)
        check(MODULES, [plain], [[]], [prompt(2, 6)])


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_chunks_and_preemption_change_nothing(
    model_root: Path, paths: dict[str, str], compiled: bool
) -> None:
    """Few tokens a step, and a cache too small for the batch."""
    asked = mixed()
    prompts = [prompt(at, BLOCK - 2 + at % 3) for at in range(len(asked))]
    options = {"block_size": BLOCK, "enforce_eager": not compiled}
    with squeezed(FAMILY, model_root, paths, STEERING, **options) as llm:
        found = run(llm, asked, prompts)
        settle(llm)
        assert held(llm) == 0
        runner(llm).steering.check_integrity()
    check(MODULES, found, asked, prompts)


def test_the_fullest_batch_fits_what_was_there_when_the_cache_was_sized(
    model_root: Path, paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request brings all the vectors it may, each its own; no buffer is new."""
    sized: list[dict[int, int]] = []
    size_cache = CPUWorker.determine_available_memory

    def buffers(steering: SteeringRuntime) -> dict[int, int]:
        sites = steering.modules.sites.values()
        return {b.data_ptr(): b.nbytes for site in sites for b in site.buffers()}

    def watched(worker: Any) -> int:
        sized.append(buffers(worker.model_runner.steering))
        return size_cache(worker)

    monkeypatch.setattr(CPUWorker, "determine_available_memory", watched)
    batch = 4
    asked = [[own(30 + at), own(40 + at), own(50 + at, MID)] for at in range(2 * batch)]
    prompts = [prompt(at, 6) for at in range(len(asked))]
    most: list[int] = []
    options = {"block_size": BLOCK, "max_num_seqs": batch}
    with engine(FAMILY, model_root, paths, STEERING, **options) as llm:
        for at, (ids, asks) in enumerate(zip(prompts, asked, strict=True)):
            llm.llm_engine.add_request(
                f"r{at}", {"prompt_token_ids": ids}, params(3, **specs(*asks))
            )
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            most.append(held(llm))
        runner(llm).steering.check_integrity()
        now = buffers(runner(llm).steering)
    assert max(most) == 3 * batch
    assert sized == [now]
    assert sum(now.values()) >= 3 * batch * vector(1).numel() * 4
