# SPDX-License-Identifier: Apache-2.0
"""Enables Triton's interpreter if vLLM was built for a CPU."""

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
