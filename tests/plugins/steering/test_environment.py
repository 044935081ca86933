# SPDX-License-Identifier: Apache-2.0
"""vLLM's check of environment variables knows ours, and only ours."""

from __future__ import annotations

import os

import pytest

from vllm.platforms import current_platform
from vllm.plugins.steering.platforms import interface

KNOWN = (
    "VLLM_STEERING_API_KEY",
    "VLLM_STEERING_BRANCHES",
    "VLLM_STEERING_DIRECTORY",
    "VLLM_STEERING_IDLE_GRAPHS",
    "VLLM_STEERING_NO_CUDA",
    "VLLM_STEERING_OTHER_GPUS",
    "VLLM_STEERING_PEER_MEMORY",
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of vLLM's is set but those of a test."""
    interface.install()
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", KNOWN)
def test_each_of_our_variables_is_known(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    current_platform.validate_environ(hard_fail=True)


def test_a_misspelt_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STEERING_IDLE_GRAPH", "1")
    with pytest.raises(ValueError, match="VLLM_STEERING_IDLE_GRAPH"):
        current_platform.validate_environ(hard_fail=True)
