# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: config <- layers <- managers <- mixin <- engine <- plugins,
and entrypoints import config only. Read from the source, with imports inside functions.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The first prefix that fits says a module's level.
LEVELS: list[tuple[str, str]] = [
    ("vllm.config.", "config"),
    ("vllm.model_executor.layers.", "layers"),
    ("vllm.model_executor.model_loader.", "loader"),
    ("vllm.v1.worker.steering_model_runner_mixin", "mixin"),
    ("vllm.v1.worker.", "managers"),
    ("vllm.engine.", "engine"),
    ("vllm.v1.engine.", "engine"),
    # The command-line tool reads SAE files; no server and no engine imports it.
    ("vllm.entrypoints.cli.steering", "tool"),
    ("vllm.entrypoints.steering.__main__", "tool"),
    ("vllm.entrypoints.", "entrypoints"),
    ("vllm.plugins.", "plugins"),
]
MAY_IMPORT: dict[str, set[str]] = {
    "config": {"config"},
    "layers": {"config", "layers"},
    "loader": {"config", "layers", "loader"},
    "managers": {"config", "layers", "loader", "managers"},
    "mixin": {"config", "layers", "loader", "managers", "mixin"},
    "engine": {"config", "layers", "loader", "managers", "mixin", "engine"},
    "entrypoints": {"config", "entrypoints"},
    "tool": {"config", "layers", "loader", "tool", "entrypoints"},
    "plugins": {level for _, level in LEVELS} - {"tool"},
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted((ROOT / "vllm").rglob("*.py"))}


def level_of(module: str) -> str:
    for prefix, level in LEVELS:
        if module.startswith(prefix):
            return level
    raise AssertionError(f"{module} has no level: give it one in LEVELS")


def imported(module: str, source: str) -> set[str]:
    """Modules of this project that the source imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                if FILES[module].name != "__init__.py":
                    package = package[:-1]
                kept = package[: len(package) - node.level + 1]
                base = ".".join([*kept, *([base] if base else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name for name in names if name in FILES}
    return found - {module}


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_no_higher_level(module: str) -> None:
    level = level_of(module)
    wrong = {
        other: level_of(other)
        for other in imported(module, FILES[module].read_text())
        if level_of(other) not in MAY_IMPORT[level]
    }
    assert not wrong, f"{module} ({level}) imports {wrong}"


def test_every_level_has_modules() -> None:
    assert {level_of(module) for module in FILES} == set(MAY_IMPORT)


def test_an_import_that_breaks_the_rule_is_seen() -> None:
    module = "vllm.config.steering"
    top = "from vllm.v1.worker import steering_runtime"
    inner = "def f():\n    import vllm.plugins.steering.seam"
    assert imported(module, top) == {"vllm.v1.worker.steering_runtime"}
    assert "vllm.plugins.steering.seam" in imported(module, inner)
    relative = "from ..v1.worker.steering_index import BatchView"
    assert imported(module, relative) == {"vllm.v1.worker.steering_index"}


def test_no_two_modules_import_each_other() -> None:
    edges = {name: imported(name, path.read_text()) for name, path in FILES.items()}
    # A package and its own modules may: the package gathers their names.
    cycles = {
        frozenset((one, other))
        for one, others in edges.items()
        for other in others
        if one in edges[other] and not one.startswith(f"{other}.")
    }
    assert not {pair for pair in cycles if not is_package_pair(pair)}


def is_package_pair(pair: frozenset[str]) -> bool:
    short, long = sorted(pair, key=len)
    return long.startswith(f"{short}.")
