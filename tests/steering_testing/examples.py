# SPDX-License-Identifier: Apache-2.0
"""Loads programs of `examples/`, of which two folders have files of the same name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


def example(path: Path) -> Any:
    """The module at a path, under a name that no other folder's file has.

    The modules that it imports are looked for in its folder.
    """
    name = f"example_{path.parent.name}_{path.stem}"
    if name not in sys.modules:
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
