# SPDX-License-Identifier: Apache-2.0
"""Import single modules of `vllm` without running `vllm/__init__.py`.

That and the packages below it import PyTorch, transformers and more, which takes
seconds. What reads the header of a file needs none of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

# The packages of vLLM that hold our modules; packages that are wholly ours do run.
PACKAGES = (
    "vllm",
    "vllm.config",
    "vllm.entrypoints",
    "vllm.entrypoints.cli",
    "vllm.model_executor",
    "vllm.model_executor.layers",
    "vllm.model_executor.model_loader",
    "vllm.utils",
)


def can_be_bare() -> bool:
    """Whether neither vLLM nor PyTorch is loaded, and both are installed."""
    loaded = {"vllm", "torch"} & set(sys.modules)
    return not loaded and all(map(importlib.util.find_spec, ("vllm", "torch")))


@contextmanager
def bare_packages() -> Iterator[None]:
    """`import vllm.a.b` runs only `b` here, and `import torch` runs when it is used.

    Afterwards both can be imported anew, as if nothing had been.
    """
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    for name in PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    later = _Later("torch")
    sys.modules["torch"] = later
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "vllm"]:
            del sys.modules[name]
        if sys.modules["torch"] is later:
            del sys.modules["torch"]


class _Later(ModuleType):
    """Stands for a module that is imported when an attribute of it is asked for."""

    def __getattr__(self, name: str) -> object:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)
