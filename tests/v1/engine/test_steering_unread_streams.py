# SPDX-License-Identifier: Apache-2.0
"""A stream that reads and that nobody takes is ended; one that is taken never is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from steering_testing import models
from steering_testing.engine import TRACED, engine, runner, save_sae
from steering_testing.reference import random_sae

from vllm import LLM, SamplingParams
from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import steering_read_states
from vllm.v1.engine.output_processor import RequestOutputCollector

pytestmark = pytest.mark.engine

SITE = (1, "post_block")
TOKENS = 40
SPEC = {"module_name": "sae", "sites": {"post_block": [1]}, "top_k": 8}


@pytest.fixture(scope="module")
def llm(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    sae = random_sae(96, models.HIDDEN, "relu", seed=3)
    path = save_sae(tmp_path_factory.mktemp("saes") / "sae", {SITE: sae})
    with engine("llama", model_root, {"sae": path}, **TRACED) as found:
        yield found


def stream(llm: LLM, name: str, n: int = 1) -> list[RequestOutputCollector]:
    """Start a stream; the queues of its samples, in the order of the engine."""
    params = SamplingParams(
        temperature=float(n > 1),
        n=n,
        seed=1,
        max_tokens=TOKENS,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={READOUT_KEY: [SPEC]},
    )
    llm.llm_engine.add_request(name, {"prompt_token_ids": [5, 6, 7]}, params)
    states = llm.llm_engine.output_processor.request_states
    queue = RequestOutputCollector(RequestOutputKind.DELTA, name)
    own = [state for id_, state in states.items() if name in id_]
    assert len(own) == n
    for state in own:
        state.queue = queue
    return [queue]


def steps(llm: LLM) -> Iterator[None]:
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        yield


@pytest.mark.parametrize("n", [1, 3])
def test_only_the_stream_that_nobody_takes_is_ended(
    llm: LLM, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering_read_states, "MAX_UNREAD_BYTES", 3000)
    (left,) = stream(llm, "left", n)
    (taken,) = stream(llm, "taken")
    found: list[Any] = []
    held = 0
    for _ in steps(llm):
        held = max(held, steering_read_states.unread_bytes(left.output))
        if (output := taken.get_nowait()) is not None:
            found.append(output.outputs[0])
    # It grew by no more than a step after the limit.
    assert 3000 < held < 3000 + n * 500
    with pytest.raises(
        VLLMValidationError, match="sae_readout_specs: found more than .* MiB"
    ):
        asyncio.run(left.get())
    assert sum(len(output.token_ids) for output in found) == TOKENS
    read = [
        one.sae_features["sae"]["post_block.1"] for one in found if one.sae_features
    ]
    assert sum(map(len, read)) == TOKENS - 1
    assert not llm.llm_engine.output_processor.request_states
    runner(llm).steering.check_integrity()


def test_a_stream_within_the_limit_waits_for_its_client(llm: LLM) -> None:
    (queue,) = stream(llm, "slow")
    for _ in steps(llm):
        pass
    output = queue.get_nowait()
    assert output is not None
    record = output.outputs[0].sae_features["sae"]["post_block.1"]
    assert len(record) == TOKENS - 1
