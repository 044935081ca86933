# SPDX-License-Identifier: Apache-2.0
"""Test engines run in this process and never access a model hub."""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# With tiny models, more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def _llvmlite_has_no_dunders() -> None:
    """Let vLLM's CPU engine start after numba is imported in the same process.

    vLLM's n-gram drafter imports numba. llvmlite's library object then answers every
    attribute name with a function, `__dict__` too, and the scan of modules with which
    vLLM's CPU worker replaces kernels fails on it in the next engine.
    """
    try:
        from llvmlite.binding import ffi
    except ImportError:
        return
    library = type(ffi.lib)
    stock = library.__getattr__

    def named(self: object, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return stock(self, name)

    library.__getattr__ = named


_llvmlite_has_no_dunders()


@pytest.fixture(scope="session")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models of this session are saved, once each."""
    return tmp_path_factory.mktemp("models")
