# SPDX-License-Identifier: Apache-2.0
"""Start-up: how the ranks of an engine may divide the work, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.steering_testing import models
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.config.steering import get_steering_config
from vllm.config.steering_checks import SteeringConfigError
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.steering_resolution import resolve_steering

SPLIT_EXPERTS = {
    "enable_expert_parallel": True,
    "tensor_parallel_size": 2,
    "data_parallel_size": 4,
}


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    path = models.save("llama", tmp_path_factory.mktemp("model"))
    args = EngineArgs(str(path), skip_tokenizer_init=True, max_model_len=128)
    return args.create_engine_config()


def with_layout(base: VllmConfig, **fields: Any) -> VllmConfig:
    """The configuration with steering, and these fields of `parallel_config`."""
    config = copy.copy(base)
    config.parallel_config = copy.copy(base.parallel_config)
    for name, value in fields.items():
        setattr(config.parallel_config, name, value)
    config.additional_config = {"steering": {"modules": {}}}
    return config


def check_refused(config: VllmConfig, path: str, *parts: str) -> None:
    with pytest.raises(SteeringConfigError) as caught:
        resolve_steering(config)
    message = str(caught.value)
    assert message.startswith(f"{path}: found ") and "; steering expects " in message
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("fields", "path", "parts"),
    [
        (
            {**SPLIT_EXPERTS, "all2all_backend": "allgather_reducescatter"},
            "parallel_config.all2all_backend",
            ("'allgather_reducescatter'", "4 data-parallel groups of 2 ranks"),
        ),
        (
            {**SPLIT_EXPERTS, "all2all_backend": "deepep_low_latency"},
            "parallel_config.all2all_backend",
            ("sequence parallelism", "--enable-expert-parallel"),
        ),
        (
            {"enable_elastic_ep": True},
            "parallel_config.enable_elastic_ep",
            ("elastic expert parallelism", "no --enable-elastic-ep"),
        ),
        ({"enable_dbo": True}, "parallel_config.enable_dbo", ("micro-batching",)),
        ({"ubatch_size": 2}, "parallel_config.ubatch_size", ("micro-batching",)),
        (
            {"prefill_context_parallel_size": 2},
            "parallel_config.prefill_context_parallel_size",
            ("prefill context parallelism", "expects 1"),
        ),
        (
            {"tensor_parallel_size": 2, "enable_hc_sp": True},
            "parallel_config.enable_hc_sp",
            ("sequence parallelism", "expects false"),
        ),
    ],
    ids=str,
)
def test_a_layout_that_splits_the_tokens_of_a_step_is_refused_by_name(
    vllm_config: VllmConfig, fields: dict[str, Any], path: str, parts: tuple[str, ...]
) -> None:
    check_refused(with_layout(vllm_config, **fields), path, *parts)


@pytest.mark.parametrize("name", ["enable_sp", "fuse_gemm_comms"])
def test_the_sequence_parallel_pass_is_refused_by_name(
    vllm_config: VllmConfig, name: str
) -> None:
    """vLLM 0.31 has these passes; they need tensor parallelism."""
    for ranks in (1, 2):
        config = with_layout(vllm_config, tensor_parallel_size=ranks)
        config.compilation_config = copy.copy(config.compilation_config)
        passes = copy.copy(config.compilation_config.pass_config)
        vars(passes)[name] = True
        config.compilation_config.pass_config = passes
        if ranks == 1:
            resolve_steering(config)
        else:
            path = f"compilation_config.pass_config.{name}"
            check_refused(config, path, "sequence parallelism", "expects false")


@pytest.mark.parametrize(
    "fields",
    [
        {"tensor_parallel_size": 4},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        {"tensor_parallel_size": 2, "data_parallel_size": 2},
        {"tensor_parallel_size": 4, "enable_expert_parallel": True},
        {"data_parallel_size": 4, "enable_expert_parallel": True},
        {**SPLIT_EXPERTS, "all2all_backend": "flashinfer_nvlink_two_sided"},
        {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
        {"enable_hc_sp": True},
    ],
    ids=str,
)
def test_a_layout_that_keeps_the_stream_whole_is_accepted(
    vllm_config: VllmConfig, fields: dict[str, Any]
) -> None:
    config = with_layout(vllm_config, **fields)
    resolve_steering(config)
    resolved = config.additional_config["steering"]["resolved"]
    assert resolved["ranks"]["size"] == fields.get("tensor_parallel_size", 1)


@pytest.mark.parametrize(
    ("drafts", "is_async"), [(False, True), (True, False), (True, True)]
)
def test_steps_ahead_of_drafts_have_no_exact_positions(
    vllm_config: VllmConfig, drafts: bool, is_async: bool
) -> None:
    config = with_layout(vllm_config)
    config.scheduler_config = copy.copy(vllm_config.scheduler_config)
    config.scheduler_config.async_scheduling = is_async
    if drafts:
        config.speculative_config = SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=2,
            prompt_lookup_max=2,
            target_model_config=vllm_config.model_config,
            target_parallel_config=vllm_config.parallel_config,
        )
    resolve_steering(config)
    found = get_steering_config(config.additional_config)
    assert found is not None
    assert found.exact_positions == (not (drafts and is_async))
