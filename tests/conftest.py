# SPDX-License-Identifier: Apache-2.0
"""Test engines run in this process and never access a model hub."""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# With tiny models, more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What processes of one run would write to the same files of vLLM's cache.
if WORKER := os.environ.get("PYTEST_XDIST_WORKER"):
    CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("VLLM_CACHE_ROOT", f"{CACHE}/vllm/tests-{WORKER}")

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

# As vLLM does when the first engine starts: tests before it see what tests after it do.
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())

with suppress(ImportError):  # a machine for the tests on GPUs may lack it
    from hypothesis import HealthCheck, settings

    # How long an example takes depends on what else the machine does. A fixture that
    # the examples share is meant to be shared.
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("tests", deadline=None, suppress_health_check=checks)
    settings.load_profile("tests")


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


def _process_settings() -> dict[str, object]:
    """What a later test of the same process would see."""
    return {
        "folder": os.getcwd(),
        "log level": logging.getLogger("vllm").level,
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True)
def the_process_is_left_as_it_was() -> Iterator[None]:
    """Many tests run in one process, and none may depend on those before it."""
    before = _process_settings()
    yield
    assert _process_settings() == before


@pytest.fixture(scope="session")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models of this session are saved, once each."""
    return tmp_path_factory.mktemp("models")
