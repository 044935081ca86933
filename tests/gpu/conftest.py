# SPDX-License-Identifier: Apache-2.0
"""Everything in this folder needs a CUDA device and an installed vLLM for it."""

from __future__ import annotations

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the folder without a device. The hook gets every folder's tests."""
    ours = [item for item in items if item.path.parent.name == "gpu"]
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def capture_is_allowed() -> None:
    """Runner V1 forbids capture, for the whole process, once it has captured."""
    from vllm.compilation.monitor import set_cudagraph_capturing_enabled

    set_cudagraph_capturing_enabled(True)
