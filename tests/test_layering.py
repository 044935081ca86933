# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: config <- layers <- managers <- mixin <- engine <- plugins,
and entrypoints import config only. Read from the source, with imports inside functions.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
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
    ("vllm.v1.core.", "engine"),
    ("vllm.v1.engine.", "engine"),
    # The command-line tool reads SAE files; no server and no engine imports it.
    ("vllm.entrypoints.cli.steering", "tool"),
    ("vllm.entrypoints.steering.__main__", "command"),
    ("vllm_steering_cli", "command"),
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
    "command": {"tool", "command"},
    "plugins": {level for _, level in LEVELS} - {"tool", "command"},
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for package in ("vllm", "vllm_steering_cli")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def level_of(module: str) -> str:
    for prefix, level in LEVELS:
        if module.startswith(prefix):
            return level
    raise AssertionError(f"{module} has no level: give it one in LEVELS")


def running(source: str) -> Iterator[ast.AST]:
    """The nodes of a source but those that only a type checker reads."""
    ahead: list[ast.AST] = [ast.parse(source)]
    while ahead:
        node = ahead.pop()
        yield node
        checked = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ahead += node.orelse if checked else ast.iter_child_nodes(node)  # type: ignore


def imported(module: str, source: str) -> set[str]:
    """Modules of this project that the source imports when it runs."""
    found: set[str] = set()
    for node in running(source):
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


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules in which each leads to every other, whatever the way."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        ahead = list(edges[start])
        while ahead:
            module = ahead.pop()
            if module not in seen:
                seen.add(module)
                ahead += edges[module]
        reached[start] = seen
    groups = {
        tuple(sorted(other for other in reached[one] if one in reached[other]))
        for one in edges
        if one in reached[one]
    }
    return [list(group) for group in sorted(groups)]


def test_no_imports_run_in_a_circle() -> None:
    edges = {name: imported(name, path.read_text()) for name, path in FILES.items()}
    for package, others in edges.items():
        # A package may gather the names of its own modules.
        if FILES[package].name == "__init__.py":
            edges[package] = {o for o in others if not o.startswith(f"{package}.")}
    assert circles(edges) == []


def test_a_circle_of_any_length_is_seen() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set()}
    assert circles(edges) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
