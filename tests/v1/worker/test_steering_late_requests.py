# SPDX-License-Identifier: Apache-2.0
"""Requests that were admitted before their module changed."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from steering_testing import models
from steering_testing.engine import engine, params
from steering_testing.hot_modules import (
    BLOCK,
    FAMILY,
    IDS,
    KINDS,
    SITE,
    SPARE,
    TOKENS,
    check,
    leave_only_the_first,
    steered,
)
from steering_testing.reads import activations, assert_reads
from steering_testing.reference import DenseSAE

from vllm import LLM
from vllm.entrypoints.steering import (
    SteeringModuleError,
    register_module,
    replace_module,
    unregister_module,
)
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import FinishReason
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.steering_refusals import refusal_in

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def shared(model_root: Path, paths: dict[str, str]) -> Iterator[LLM]:
    modules, spare = {"first": paths["other"]}, {"spare": SPARE}
    with engine(FAMILY, model_root, modules, spare, block_size=BLOCK) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    leave_only_the_first(shared)


def admit_late(llm: LLM) -> tuple[Any, Any, int]:
    """The engine core, and a request for "hot" that it admitted but not yet added."""
    core = llm.llm_engine.engine_core.engine_core
    processor = llm.llm_engine.input_processor
    ids = {"type": "token", "prompt_token_ids": IDS}
    late = processor.process_inputs("late", ids, steered("hot"), ("generate",))
    request, wave = core.preprocess_add_request(late)
    return core, request, wave


def test_a_request_admitted_before_a_replacement_runs_under_the_new_module(
    llm: LLM, paths: dict[str, str]
) -> None:
    register_module(llm, "hot", paths["jumprelu"])
    core, request, wave = admit_late(llm)
    stale = list(request.block_hashes)
    replace_module(llm, "hot", paths["other"])
    core.add_request(request, wave)
    _, fresh, _ = admit_late(llm)
    assert request.block_hashes == fresh.block_hashes != stale
    assert request.sampling_params.extra_args == fresh.sampling_params.extra_args
    core.abort_requests([request.request_id])
    check(llm, "hot", KINDS["other"])


def test_a_request_admitted_before_a_removal_is_refused_alone(
    llm: LLM, paths: dict[str, str]
) -> None:
    register_module(llm, "hot", paths["jumprelu"])
    core, request, wave = admit_late(llm)
    unregister_module(llm, "hot")
    with pytest.raises(VLLMValidationError, match="'hot'"):
        core.add_request(request, wave)


def test_a_server_answers_such_a_request_and_goes_on(
    llm: LLM, paths: dict[str, str]
) -> None:
    register_module(llm, "hot", paths["jumprelu"])
    core, request, wave = admit_late(llm)
    unregister_module(llm, "hot")
    # The part of a server's engine core that answers, over this engine's modules.
    server = EngineCoreProc.__new__(EngineCoreProc)
    server.vllm_config = core.vllm_config
    server.output_queue = queue.Queue()
    server.add_request(request, wave)
    _, answer = server.output_queue.get_nowait()
    (output,) = answer.outputs
    assert (output.request_id, output.finish_reason) == ("late", FinishReason.ERROR)
    refusal = refusal_in(output.stop_reason)
    assert refusal is not None
    assert refusal.http_status == 409
    assert "'hot'" in refusal.message


def read_of(llm: LLM) -> dict[str, Any]:
    """A prompt and its answer, and what they read of "hot"."""
    spec = {"module_name": "hot", "top_k": 5}
    sampling = params(TOKENS, sae_readout_specs=[spec])
    (output,) = llm.generate([{"prompt_token_ids": IDS}], [sampling], use_tqdm=False)
    return whole(output)


def whole(output: Any) -> dict[str, Any]:
    answer = output.outputs[0]
    site = f"{SITE[1]}.{SITE[0]}"
    return {
        "tokens": list(answer.token_ids),
        "prompt": output.prompt_sae_features["hot"][site],
        "answer": answer.sae_features["hot"][site],
    }


def check_read(found: dict[str, Any], sae: DenseSAE) -> None:
    """It is what Hugging Face and this SAE say."""
    model = models.build(FAMILY)
    seen = activations(model, IDS, found["tokens"], {SITE: sae})[SITE]
    n = len(IDS)
    assert_reads(found["prompt"], seen[:n], 0, top_k=5)
    assert_reads(found["answer"], seen[n:], n, top_k=5)


def test_who_reads_keeps_the_module_until_it_ends(
    llm: LLM, paths: dict[str, str]
) -> None:
    register_module(llm, "hot", paths["jumprelu"])
    spec = {"module_name": "hot", "top_k": 5}
    sampling = params(TOKENS, sae_readout_specs=[spec])
    llm.llm_engine.add_request("r", {"prompt_token_ids": IDS}, sampling)
    for _ in range(3):
        llm.llm_engine.step()
    with pytest.raises(SteeringModuleError, match="1 request") as caught:
        replace_module(llm, "hot", paths["topk"])
    assert caught.value.status == 409
    outputs = []
    while llm.llm_engine.has_unfinished_requests():
        outputs += llm.llm_engine.step()
    check_read(whole(outputs[-1]), KINDS["jumprelu"])
    # The same slot, with other weights: nothing of the old ones is read.
    for name in ("topk", "other"):
        replace_module(llm, "hot", paths[name])
        check_read(read_of(llm), KINDS[name])
