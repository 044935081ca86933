# SPDX-License-Identifier: Apache-2.0
"""How a seam replaces one stock symbol: check it, wrap it once, remember it.

A seam file is named after a stock module. It states the edit that a vLLM branch would
make there, and makes that edit at run time through `wrap`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import vllm

# The releases that docs/compatibility.md says were run.
SUPPORTED_RELEASES = ("0.31", "0.32", "0.33")
SUPPORTED_VLLM = ", ".join(f"{release}.x" for release in SUPPORTED_RELEASES)

# Names of a function's parameters; a list holds one tuple per signature that is known.
Signatures = tuple[str, ...] | list[tuple[str, ...]]

# A stock function, or its replacement.
Stock = Callable[..., Any]

# Every seam bound in this process: target -> the stock function it wraps.
BOUND: dict[str, Stock] = {}


class SeamError(RuntimeError):
    """A stock symbol is missing or has changed, so steering cannot be installed."""


def vllm_is_supported() -> bool:
    """Whether the installed vLLM is of a release that the seams were written for."""
    return ".".join(vllm.__version__.split(".")[:2]) in SUPPORTED_RELEASES


def resolve(target: str) -> tuple[Any, str, Any]:
    """`"module:Class.name"` -> (owner, attribute name, stock value)."""
    module_name, _, qualname = target.partition(":")
    try:
        owner = importlib.import_module(module_name)
        *path, name = qualname.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, name, getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise SeamError(
            f"steering seam {target}: not found in vLLM {vllm.__version__} "
            f"(written for {SUPPORTED_VLLM}): {error}"
        ) from error


def exists(target: str) -> bool:
    """Whether this release has the symbol, for those that not every release has."""
    try:
        resolve(target)
    except SeamError:
        return False
    return True


def check_signature(target: str, function: Stock, parameters: Signatures) -> None:
    """Raise `SeamError` unless `function` takes exactly `parameters`, in order."""
    found = tuple(inspect.signature(function).parameters)
    known = parameters if isinstance(parameters, list) else [parameters]
    if found not in known:
        expected = " or ".join(map(str, known))
        raise SeamError(
            f"steering seam {target}: expected parameters {expected}, found {found} "
            f"in vLLM {vllm.__version__} (written for {SUPPORTED_VLLM})"
        )


def wrap(
    target: str,
    parameters: Signatures,
    make: Callable[[Stock], Stock],
    kind: type[classmethod] | type[staticmethod] | None = None,
) -> None:
    """Replace the stock function at `target` by `make(stock)`, once per process.

    Args:
        target: `"package.module:Class.method"` or `"package.module:function"`.
        parameters: the stock function's parameter names, checked first; a list where
            they differ between the supported releases.
        make: builds the replacement around the stock function; a class method's takes
            the class first.
        kind: `classmethod` or `staticmethod`, if the stock function is one.

    Raises:
        SeamError: the symbol is missing or its signature has changed.
    """
    if target in BOUND:
        return
    check_signature(target, resolve(target)[2], parameters)
    replace_unchecked(target, make, kind)


def replace_unchecked(
    target: str,
    make: Callable[[Stock], Stock],
    kind: type[classmethod] | type[staticmethod] | None = None,
) -> None:
    """As `wrap`, for a replacement that takes any arguments."""
    owner, name, stock = resolve(target)
    function = stock.__func__ if kind is classmethod else stock
    replacement = make(function)
    functools.update_wrapper(replacement, function)
    setattr(owner, name, kind(replacement) if kind else replacement)
    BOUND[target] = stock


def declare(target: str, attribute: str) -> None:
    """Give a stock class one more attribute, None until somebody sets it.

    Raises:
        SeamError: there is no such class, or it has the attribute already.
    """
    name = f"{target}.{attribute}"
    if name in BOUND:
        return
    _, _, owner = resolve(target)
    if attribute in vars(owner):
        raise SeamError(
            f"steering seam {name}: exists in vLLM {vllm.__version__} already"
        )
    setattr(owner, attribute, None)
    BOUND[name] = owner
