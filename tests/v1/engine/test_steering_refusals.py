# SPDX-License-Identifier: Apache-2.0
"""A request that a change of modules overtakes gets 409 with the reason, never 500."""

from __future__ import annotations

import asyncio
import queue
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

import vllm.plugins.steering as plugin
from vllm.config.sae_steering_specs import FULL_KEY
from vllm.config.steering_checks import ModuleChangedError
from vllm.entrypoints.serve.exception_handling.error_response import (
    create_error_response,
)
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.plugins.steering.seam import exists, resolve
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
    steering_admission,
)
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.engine.steering_refusals import refusal_in, stop_reason_of

ERROR = VLLMValidationError("specs[0].module_name: 'sea' is gone", parameter="specs[0]")


def refused(request_id: str) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id,
        [],
        finish_reason=FinishReason.ERROR,
        stop_reason=stop_reason_of(ERROR),
    )


@pytest.mark.parametrize("reason", [None, 7, "stop", "steer", "length"])
def test_other_stop_reasons_are_no_refusal(reason: Any) -> None:
    assert refusal_in(reason) is None


def test_the_status_is_409_and_the_reason_is_told() -> None:
    refusal = refusal_in(refused("r").stop_reason)
    assert isinstance(refusal, (GracefulHTTPError, VLLMValidationError))
    answer = create_error_response(refusal)
    assert answer.error.code == 409
    assert "'sea' is gone" in answer.error.message
    assert (refusal.parameter, refusal.args[0]) == ("specs[0]", ERROR.args[0])


def processor() -> OutputProcessor:
    plugin.install_front_end_seams()
    return OutputProcessor(None, log_stats=False)


def add(
    outputs: OutputProcessor, request_id: str, parent: ParentRequest | None = None
) -> RequestOutputCollector:
    """A request that waits for its first output, as `add_request` leaves it."""
    queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, request_id)
    update = SimpleNamespace(update=lambda *_: None, num_output_tokens=lambda: 0)
    outputs.request_states[request_id] = SimpleNamespace(  # type: ignore[assignment]
        queue=queue,
        parent_req=parent,
        request_id=request_id,
        external_req_id="x",
        lora_name=None,
        is_prefilling=False,
        streaming_input=False,
        detokenizer=update,
        logprobs_processor=SimpleNamespace(update_from_output=lambda _: None),
        make_request_output=lambda *_, **__: None,
        stats=None,
    )
    outputs.external_req_ids["x"].append(request_id)
    return queue


def test_the_client_that_waits_gets_the_refusal() -> None:
    outputs = processor()
    queue = add(outputs, "r")
    other = add(outputs, "s")
    outputs.process_outputs([refused("r"), refused("unknown")])
    with pytest.raises(ModuleChangedError, match="is gone"):
        asyncio.run(queue.get())
    assert other.get_nowait() is None


def test_the_other_samples_of_its_prompt_are_aborted() -> None:
    outputs = processor()
    parent = SimpleNamespace(child_requests={"0_r", "1_r", "2_r"}, request_id="r")
    for name in sorted(parent.child_requests):
        add(outputs, name, parent)  # type: ignore[arg-type]
    result = outputs.process_outputs([refused("0_r")])
    assert sorted(result.reqs_to_abort) == ["1_r", "2_r"]
    assert not outputs.request_states


def arrived(args: dict[str, Any]) -> EngineCoreRequest:
    """A request as it comes to the engine core."""
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1, 5],
        mm_features=None,
        sampling_params=SamplingParams(extra_args=args),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        client_index=3,
    )


def test_an_id_that_a_client_chose_makes_one_short_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(
        steering_admission.logger,
        "warning",
        lambda text, *values: lines.append(text % values),
    )
    core: Any = SimpleNamespace(output_queue=queue.Queue())
    steering_admission.refuse(core, "a\nERROR forged" + "b" * 1_000_000, 0, ERROR)
    (line,) = lines
    assert "a\\nERROR forgedb" in line and "\n" not in line
    assert len(line) < 300


def test_whichever_way_the_core_takes_an_error_its_reason_is_told() -> None:
    """0.33 has a handler for validation errors alone."""
    plugin.install_front_end_seams()
    request = arrived({FULL_KEY: [{"module_name": "sea"}]})
    core = SimpleNamespace(output_queue=queue.Queue())
    ways: list[Any] = [EngineCoreProc._handle_request_preproc_error]
    own = "vllm.v1.engine.core:EngineCoreProc._handle_request_validation_error"
    if exists(own):
        ways.append(partial(resolve(own)[2], error=ERROR))
    for way in ways:
        try:
            raise ERROR
        except VLLMValidationError:
            way(core, request)
        client, outputs = core.output_queue.get_nowait()
        assert (client, outputs.finished_requests) == (3, {"r"})
        refusal = refusal_in(outputs.outputs[0].stop_reason)
        assert refusal is not None and refusal.parameter == "specs[0]"
