# SPDX-License-Identifier: Apache-2.0
"""Admission in a real engine: bad steering concerns its own request only."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm.plugins.steering as plugin
from tests.plugins.steering.conftest import D_SAE
from vllm import LLM, SamplingParams
from vllm.config.sae_steering_specs import ROWS_KEY
from vllm.config.sae_steering_types import (
    EXTRA_ARGS_KEYS,
    SAEClampEntry,
    SAEFullReconstructionSpec,
    SteeringSamplingParams,
)
from vllm.engine.steering_active_config import active_steering_config
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.steering.request_checks import check_request
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest

pytestmark = pytest.mark.engine

FULL = EXTRA_ARGS_KEYS[0]
PROMPT = {"prompt_token_ids": list(range(5, 45))}
BLOCK = 32


def clamp(value: float = 5.0, phase: str = "both") -> dict[str, Any]:
    entries = [SAEClampEntry(3, "absolute", value)]
    return {FULL: [SAEFullReconstructionSpec("s", entries, phase)]}


BAD = {
    f"{FULL}[0].module_name": {FULL: [{"module_name": "none"}]},
    f"{FULL}[0].clamps.post_block.0": {
        FULL: [{"module_name": "s", "clamps": {"post_block": {"0": []}}}]
    },
    f"{FULL}[0].clamps[0].feature_idx": {
        FULL: [
            {
                "module_name": "s",
                "clamps": [{"feature_idx": D_SAE, "kind": "scale", "value": 1}],
            }
        ]
    },
}


@pytest.fixture(scope="module")
def llm(model_path: Path, sae_path: Path) -> Iterator[LLM]:
    plugin.register()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield LLM(
            str(model_path),
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=128,
            dtype="float32",
            block_size=BLOCK,
            additional_config={"steering": {"modules": {"s": str(sae_path)}}},
        )


@pytest.fixture(scope="module")
def core(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core


def generate(llm: LLM, params: SamplingParams, prompt: Any = None) -> Any:
    return llm.generate([prompt or PROMPT], params, use_tqdm=False)[0]


def greedy(max_tokens: int = 4, **specs: Any) -> SteeringSamplingParams:
    return SteeringSamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **specs
    )


def raw(params: SamplingParams, **changes: Any) -> EngineCoreRequest:
    """A request as a client that skips the front end would send it."""
    fields: dict[str, Any] = dict(
        request_id="raw",
        prompt_token_ids=PROMPT["prompt_token_ids"],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return EngineCoreRequest(**{**fields, **changes})


@pytest.mark.parametrize("path", BAD)
def test_the_front_end_refuses_with_the_path(llm: LLM, path: str) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        generate(llm, SamplingParams(extra_args=BAD[path]))
    assert caught.value.parameter == path


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BAD)
def test_servers_refuse_before_a_stream_begins(
    llm: LLM, path: str, stream: bool
) -> None:
    request = CompletionRequest(prompt="x", stream=stream, **BAD[path])
    with pytest.raises(VLLMValidationError) as caught:
        check_request(request, active_steering_config(llm.llm_engine.vllm_config))
    assert caught.value.parameter == path


@pytest.mark.parametrize("fields", [{}, {FULL: [{"module_name": "s"}]}])
def test_servers_let_good_requests_pass(llm: LLM, fields: dict[str, Any]) -> None:
    request = CompletionRequest(prompt="x", vllm_xargs={"mine": 1}, **fields)
    check_request(request, active_steering_config(llm.llm_engine.vllm_config))


@pytest.mark.parametrize("path", BAD)
def test_the_engine_refuses_what_the_front_end_did_not_see(
    core: Any, path: str
) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        core.preprocess_add_request(raw(SamplingParams(extra_args=BAD[path])))
    assert caught.value.parameter == path


def test_after_a_hundred_bad_requests_the_next_good_one_is_served(
    llm: LLM, core: Any
) -> None:
    for position in range(100):
        extra_args = list(BAD.values())[position % len(BAD)]
        with pytest.raises(VLLMValidationError):
            core.preprocess_add_request(raw(SamplingParams(extra_args=extra_args)))
    assert len(generate(llm, greedy(**clamp())).outputs[0].token_ids) == 4


def test_the_reserved_key_is_refused_by_the_front_end(llm: LLM) -> None:
    with pytest.raises(VLLMValidationError, match=ROWS_KEY):
        generate(llm, SamplingParams(extra_args={ROWS_KEY: {}}))


def test_the_reserved_key_of_a_raw_client_is_dropped(core: Any) -> None:
    forged = dict.fromkeys(("prefill", "decode"), "forged")
    plain, _ = core.preprocess_add_request(raw(SamplingParams()))
    request, _ = core.preprocess_add_request(
        raw(SamplingParams(extra_args={ROWS_KEY: forged}))
    )
    assert request.sampling_params.extra_args is None
    assert request.block_hashes == plain.block_hashes


def test_the_admitted_request_holds_specs_and_digests(core: Any) -> None:
    params = greedy(**clamp(phase="decode"))
    request, _ = core.preprocess_add_request(raw(params))
    rows = request.sampling_params.extra_args[ROWS_KEY]
    assert set(rows) == {"prefill", "decode"}
    assert rows["prefill"] is None
    assert len(bytes.fromhex(rows["decode"])) == 32
    assert ROWS_KEY not in params.extra_args


def test_the_callers_params_are_never_changed(llm: LLM) -> None:
    params = greedy(**clamp())
    before = copy.deepcopy(params.extra_args)
    generate(llm, params)
    assert params.extra_args == before


def test_other_extra_args_reach_the_engine(core: Any) -> None:
    params = SteeringSamplingParams(extra_args={"mine": [1]}, **clamp())
    request, _ = core.preprocess_add_request(raw(params))
    assert request.sampling_params.extra_args["mine"] == [1]


def test_parallel_samples_are_all_steered(llm: LLM) -> None:
    params = SteeringSamplingParams(n=3, temperature=1.0, max_tokens=2, **clamp())
    assert len(generate(llm, params).outputs) == 3


def test_streaming_input_with_steering_is_refused(core: Any) -> None:
    with pytest.raises(VLLMValidationError, match="streaming input"):
        core.preprocess_add_request(raw(greedy(**clamp()), resumable=True))


def test_a_second_turn_reuses_the_blocks_of_its_own_steering_only(llm: LLM) -> None:
    llm.reset_prefix_cache()
    steered = greedy(max_tokens=BLOCK, **clamp(7.0))
    first = generate(llm, steered)
    history = [*first.prompt_token_ids, *first.outputs[0].token_ids, 9, 9]
    turn = {"prompt_token_ids": history}
    assert generate(llm, greedy(), turn).num_cached_tokens == 0
    assert generate(llm, greedy(**clamp(8.0)), turn).num_cached_tokens == 0
    assert generate(llm, steered, turn).num_cached_tokens == 2 * BLOCK
