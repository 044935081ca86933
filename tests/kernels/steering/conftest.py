# SPDX-License-Identifier: Apache-2.0
"""Which kernels the tests run; Triton's interpreter if vLLM was built for a CPU."""

import os
from collections import defaultdict
from types import SimpleNamespace

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    # vLLM's CPU build turns Triton off unless it has a backend of this name.
    # Interpreted kernels do not use it.
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: False)
    backends.setdefault("cpu", SimpleNamespace(driver=driver, compiler=None))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """When interpreted, all but a test's first and last Triton case are slow."""
    if not INTERPRETED:
        return
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if "cuda" not in item.name:
            cases[item.nodeid.partition("[")[0]].append(item)
    for same in cases.values():
        for item in same[1:-1]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in Triton, also where the extension is built."""
    from vllm.model_executor.layers import sae_full_reconstruction_kernel as kernel

    monkeypatch.setattr(kernel, "extension_is_built", lambda: False)


@pytest.fixture(params=["cuda", "triton"])
def implementation(request: pytest.FixtureRequest) -> None:
    """The test runs with the extension, where it is built, and in Triton alone."""
    from vllm.model_executor.layers import sae_full_reconstruction_kernel as kernel

    if request.param == "triton":
        request.getfixturevalue("triton_alone")
    elif not kernel.extension_is_built():
        pytest.skip("the CUDA extension is not built")
