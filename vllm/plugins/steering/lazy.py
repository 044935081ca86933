# SPDX-License-Identifier: Apache-2.0
"""Install a seam when the stock module it belongs to is imported, and not before.

Plugins load in every process; a worker must not pay for importing the HTTP server.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Install = Callable[[], None]


class _Watcher(MetaPathFinder):
    """Runs the waiting installers right after their module's code has run."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Install]] = {}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        installs = self.waiting.pop(fullname, None)
        if installs is None:
            return None
        # The name is no longer waiting, so this search passes over the watcher.
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        stock_exec = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            stock_exec(module)
            for install in installs:
                install()

        # The finder made this loader for this one module.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_WATCHER = _Watcher()


def when_imported(module: str, install: Install) -> None:
    """Call `install` now if `module` is imported, else as soon as it is."""
    if module in sys.modules:
        install()
        return
    installs = _WATCHER.waiting.setdefault(module, [])
    if install not in installs:
        installs.append(install)
    if _WATCHER not in sys.meta_path:
        sys.meta_path.insert(0, _WATCHER)
