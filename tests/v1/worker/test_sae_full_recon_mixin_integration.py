# SPDX-License-Identifier: Apache-2.0
"""Whatever the scheduler does, a steered request equals Hugging Face."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_testing import models, oracle
from steering_testing.engine import (
    FULL,
    assert_same,
    engine,
    generate,
    params,
    runner,
    sae_spec,
    save_sae,
)
from steering_testing.reference import Clamp, Edit, random_sae

from vllm import LLM, SamplingParams
from vllm.config.sae_steering_types import (
    SAEClampEntry,
    SAEFullReconstructionSpec,
    SteeringSamplingParams,
)
from vllm.exceptions import VLLMValidationError

pytestmark = pytest.mark.engine

FAMILY = "llama"
SITE = (1, "post_block")
CLAMPS = [Clamp(5, "absolute", 4.0), Clamp(9, "additive", 1.0, True)]
SAE = random_sae(96, models.HIDDEN, "jumprelu", 3)
BLOCK = 32  # the smallest that vLLM's CPU attention takes


def steered(phase: str = "both", max_tokens: int = 12) -> SamplingParams:
    return params(max_tokens, **{FULL: [sae_spec("m", {SITE: CLAMPS}, phase)]})


def sites(phase: str = "both") -> dict[tuple[int, str], list[Edit]]:
    return {SITE: [Edit("full", SAE, CLAMPS, phase=phase)]}


def prompt(seed: int, length: int = 21) -> list[int]:
    rng = random.Random(seed)
    return [models.BOS, *(rng.randrange(3, models.VOCAB) for _ in range(length - 1))]


def expected(ids: list[int], phase: str | None, max_tokens: int = 12) -> oracle.Greedy:
    edits = sites(phase) if phase else {}
    return oracle.greedy(models.build(FAMILY), ids, edits, max_tokens)


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_sae(tmp_path_factory.mktemp("sae") / "m", {SITE: SAE})


@pytest.fixture(scope="module")
def llm(model_root: Path, module_path: str) -> Iterator[LLM]:
    with engine(FAMILY, model_root, {"m": module_path}, block_size=BLOCK) as llm:
        yield llm


def drain(llm: LLM) -> Any:
    """Let the runner hear of every finished request; its steering runtime."""
    generate(llm, [prompt(999, 3)], [params(1)])
    runtime = runner(llm).steering
    core = llm.llm_engine.engine_core.engine_core
    runtime.check_integrity(
        {*core.scheduler.requests, *core.scheduler.finished_req_ids}
    )
    return runtime


MIXED: list[str | None] = ["both", None, "prefill", "decode", None, "both"]


def check_mixed(llm: LLM, length: int = 21, max_tokens: int = 12) -> None:
    prompts = [prompt(at, length + at) for at in range(len(MIXED))]
    sampling = [
        steered(phase, max_tokens) if phase else params(max_tokens) for phase in MIXED
    ]
    found = generate(llm, prompts, sampling)
    for ids, phase, result in zip(prompts, MIXED, found, strict=True):
        assert_same(result, expected(ids, phase, max_tokens), str(phase))


def test_small_prefill_chunks_change_nothing(
    model_root: Path, module_path: str
) -> None:
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 8}
    with engine(FAMILY, model_root, {"m": module_path}, **options) as llm:
        check_mixed(llm, length=30)


def test_forced_preemption_changes_nothing(model_root: Path, module_path: str) -> None:
    options = {"num_gpu_blocks_override": 8, "block_size": BLOCK}
    options |= {"max_model_len": 128, "max_num_seqs": 6}
    with engine(FAMILY, model_root, {"m": module_path}, **options) as llm:
        core = llm.llm_engine.engine_core.engine_core
        preempted = []
        stock = core.scheduler._preempt_request

        def spy(request: Any, *args: Any, **kwargs: Any) -> None:
            preempted.append(request.request_id)
            stock(request, *args, **kwargs)

        core.scheduler._preempt_request = spy
        check_mixed(llm, length=24, max_tokens=24)
        assert preempted, "the cache was large enough: nothing was tested"
        assert drain(llm).holding == []


def test_compiled_graphs_say_what_eager_says(
    model_root: Path, module_path: str
) -> None:
    with engine(FAMILY, model_root, {"m": module_path}, enforce_eager=False) as llm:
        check_mixed(llm)


def test_a_plain_request_is_bit_identical_beside_steered_ones(llm: LLM) -> None:
    prompts = [prompt(at) for at in range(4)]
    alone = generate(llm, prompts, [params(12)] * 4)
    llm.reset_prefix_cache()
    mixed = generate(llm, prompts, [params(12), steered(), params(12), steered()])
    for at in (0, 2):
        assert mixed[at].tokens == alone[at].tokens
        assert mixed[at].logprobs == alone[at].logprobs
    assert mixed[1].logprobs != alone[1].logprobs


def test_order_in_the_batch_changes_nothing(llm: LLM) -> None:
    prompts = [prompt(at) for at in range(4)]
    sampling = [steered("both"), params(12), steered("decode"), steered("prefill")]
    forth = generate(llm, prompts, sampling)
    llm.reset_prefix_cache()
    back = generate(llm, prompts[::-1], sampling[::-1])[::-1]
    for one, other in zip(forth, back, strict=True):
        assert_same(one, other)


def test_dummy_runs_between_steps_change_nothing(llm: LLM) -> None:
    """As idle data-parallel ranks run them, in the middle of a decoding batch."""
    ids, steps = prompt(41), llm.llm_engine
    steps.add_request("dummy-between", {"prompt_token_ids": ids}, steered())
    tokens: list[int] = []
    while steps.has_unfinished_requests():
        for output in steps.step():
            tokens = list(output.outputs[0].token_ids)
        index = runner(llm).steering.step.index
        assert index.any() or not steps.has_unfinished_requests()
        runner(llm)._dummy_run(1)
        assert not index.any()
    assert tokens == expected(ids, "both").tokens
    drain(llm)


def cached_tokens(llm: LLM, ids: list[int], sampling: SamplingParams) -> int:
    [output] = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    return output.num_cached_tokens


def test_a_warm_prefix_cache_says_the_same(llm: LLM) -> None:
    llm.reset_prefix_cache()
    ids = prompt(50, 80)
    cold = generate(llm, [ids], [steered()])[0]
    assert cached_tokens(llm, ids, steered()) == 2 * BLOCK
    warm = generate(llm, [ids], [steered()])[0]
    assert_same(warm, cold)
    assert_same(warm, expected(ids, "both"))


def test_steered_blocks_serve_nobody_else(llm: LLM) -> None:
    llm.reset_prefix_cache()
    ids = prompt(51, 80)
    generate(llm, [ids], [steered("both")])
    other = copy.deepcopy(steered("both"))
    other.extra_args[FULL][0]["clamps"]["post_block"][1][0]["value"] = 4.5
    assert cached_tokens(llm, ids, params(4)) == 0
    assert cached_tokens(llm, ids, other) == 0
    # Only the decode phase of this one is steered: its prompt is a plain prompt.
    assert cached_tokens(llm, ids, steered("decode")) == 2 * BLOCK
    assert_same(generate(llm, [ids], [params(12)])[0], expected(ids, None))


def test_the_next_turn_reuses_a_steered_answer(llm: LLM) -> None:
    llm.reset_prefix_cache()
    ids = prompt(52, 20)
    answer = generate(llm, [ids], [steered("both", 90)])[0].tokens
    turn = [*ids, *answer, 7, 8, 9]
    assert cached_tokens(llm, turn, params(2)) == 0
    assert cached_tokens(llm, turn, steered("both", 2)) == 3 * BLOCK
    again = generate(llm, [turn], [steered("both", 4)])[0]
    assert_same(again, expected(turn, "both", 4))


def test_a_block_of_both_phases_never_serves_a_uniform_prompt(llm: LLM) -> None:
    llm.reset_prefix_cache()
    ids = prompt(53, 40)
    answer = generate(llm, [ids], [steered("prefill", 60)])[0].tokens
    turn = [*ids, *answer, 7]
    # Block 0 is all prompt in both; block 1 is half answer, unsteered there.
    assert cached_tokens(llm, turn, steered("prefill", 2)) == BLOCK
    result = generate(llm, [turn], [steered("prefill", 4)])[0]
    assert_same(result, expected(turn, "prefill", 4))


def test_rows_return_when_requests_finish_or_are_aborted(llm: LLM) -> None:
    llm_engine = llm.llm_engine
    for at in range(3):
        llm_engine.add_request(
            f"a{at}", {"prompt_token_ids": prompt(at)}, steered(max_tokens=40)
        )
    for _ in range(4):
        llm_engine.step()
    assert len(runner(llm).steering.holding) == 3
    llm_engine.abort_request(["a0", "a1", "a2"])
    while llm_engine.has_unfinished_requests():
        llm_engine.step()
    runtime = drain(llm)
    assert runtime.holding == []
    assert all(manager.rows_in_use == 0 for manager in runtime.managers.values())


def test_several_samples_of_one_request_are_all_steered(llm: LLM) -> None:
    sampling = steered()
    sampling.n = 3
    sampling.temperature = 0.8
    sampling.seed = 5
    ids = prompt(60)
    [output] = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    assert len(output.outputs) == 3
    model = models.build(FAMILY)
    with torch.no_grad(), oracle.hooked(model, sites(), ids, len(ids)):
        scores = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    for completion in output.outputs:
        token = completion.token_ids[0]
        assert abs(completion.logprobs[0][token].logprob - scores[token]) < 1e-4


def test_steering_sampling_params_are_the_same_request(llm: LLM) -> None:
    entries = [
        SAEClampEntry(c.feature, c.kind, c.value, c.only_if_active) for c in CLAMPS
    ]
    spec = SAEFullReconstructionSpec("m", {"post_block": {1: entries}})
    typed = SteeringSamplingParams(
        temperature=0,
        max_tokens=12,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        sae_full_reconstruction_specs=[spec],
    )
    ids = prompt(61)
    one, other = generate(llm, [ids, ids], [typed, steered()])
    assert one == other
    assert_same(one, expected(ids, "both"))


def test_a_hundred_bad_requests_hurt_nobody(llm: LLM) -> None:
    """Sent directly to the engine, as a client without the front end can."""
    core = llm.llm_engine.engine_core.engine_core
    requests: list[Any] = []
    stock = core.preprocess_add_request

    def keep(request: Any) -> Any:
        requests.append(copy.deepcopy(request))
        return stock(request)

    core.preprocess_add_request = keep
    try:
        generate(llm, [prompt(70)], [steered()])
    finally:
        del core.preprocess_add_request
    rng = random.Random(0)
    bad: list[Any] = [
        [sae_spec("nobody")],
        [sae_spec("m", {(2, "post_block"): CLAMPS})],
        [sae_spec("m", {SITE: [Clamp(96, "absolute", 1.0)]})],
        [sae_spec("m", {SITE: [Clamp(1, "absolute", float("nan"))]})],
        [sae_spec("m", {SITE: [Clamp(1, "sideways", 1.0)]})],
        "not a list",
        [{"module_name": "m", "clamps": {}, "phase": "both", "extra": 1}],
        [None],
    ]
    for at in range(100):
        request = copy.deepcopy(requests[0])
        request.request_id = f"bad-{at}"
        request.sampling_params.extra_args = {FULL: rng.choice(bad)}
        with pytest.raises(VLLMValidationError, match=FULL):
            core.preprocess_add_request(request)
    assert_same(
        generate(llm, [prompt(71)], [steered()])[0], expected(prompt(71), "both")
    )


def test_steering_an_engine_without_it_is_refused(model_root: Path) -> None:
    with (
        engine(FAMILY, model_root, None) as llm,
        pytest.raises(VLLMValidationError, match="steering"),
    ):
        generate(llm, [prompt(0)], [steered()])


def test_without_steering_the_model_and_the_runner_are_stock(model_root: Path) -> None:
    with engine(FAMILY, model_root, None) as llm:
        model = runner(llm).get_model()
        assert runner(llm).__dict__.get("steering") is None
        assert not any("Steered" in type(m).__name__ for m in model.modules())
        assert not any("steering" in name for name, _ in model.named_modules())
