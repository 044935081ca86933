# SPDX-License-Identifier: Apache-2.0
"""How large things may grow, counted from the source.

Lower a limit when the code allows it, and never raise one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("vllm", "vllm_steering_cli")
OURS = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
EVERYTHING = sorted(
    path
    for folder in (*PACKAGES, "csrc", "tests", "tools", "benchmarks", "examples")
    for pattern in ("*.py", "*.cu", "*.cuh", "*.h")
    for path in (ROOT / folder).rglob(pattern)
)

MAX_FUNCTION = 80
MAX_FILE = 400
MAX_POSITIONAL = 8
# getattr, hasattr, setattr, delattr and __dict__, for 1000 lines.
MAX_REFLECTIVE = 0.7
MAX_ANY_LINES = 21

REFLECTIVE = {"getattr", "hasattr", "setattr", "delattr"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def reflective_calls(source: ast.AST) -> Iterator[int]:
    """Lines of calls that read or write attributes by a computed name."""
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in REFLECTIVE:
                yield node.lineno
        elif isinstance(node, ast.Attribute) and node.attr == "__dict__":
            yield node.lineno


def any_lines(text: str) -> list[int]:
    """Lines that say `Any`."""
    lines = enumerate(text.splitlines(), start=1)
    return [number for number, line in lines if re.search(r"\bAny\b", line)]


def long_functions(source: ast.AST) -> dict[str, int]:
    """Functions above the limit, with their lines."""
    return {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(source)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION
    }


def long_calls(source: ast.AST) -> list[int]:
    """Lines of calls with more positional arguments than the limit."""
    return [
        node.lineno
        for node in ast.walk(source)
        if isinstance(node, ast.Call) and len(node.args) > MAX_POSITIONAL
    ]


@pytest.mark.parametrize("path", OURS, ids=name)
def test_functions_and_calls_are_short(path: Path) -> None:
    source = tree(path)
    assert not long_functions(source)
    assert not long_calls(source)


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE


def test_attributes_are_rarely_read_by_a_computed_name() -> None:
    found = {name(path): list(reflective_calls(tree(path))) for path in OURS}
    lines = sum(len(path.read_text().splitlines()) for path in OURS)
    calls = sum(map(len, found.values()))
    assert calls <= MAX_REFLECTIVE * lines / 1000, {k: v for k, v in found.items() if v}


def test_types_are_said() -> None:
    found = {name(path): any_lines(path.read_text()) for path in OURS}
    total = sum(map(len, found.values()))
    assert total <= MAX_ANY_LINES, {k: len(v) for k, v in found.items() if v}


def test_what_breaks_a_rule_is_seen() -> None:
    body = "\n".join(["    pass"] * MAX_FUNCTION)
    assert long_functions(ast.parse(f"def f():\n{body}")) == {"f": MAX_FUNCTION + 1}
    arguments = ", ".join("x" * (MAX_POSITIONAL + 1))
    assert long_calls(ast.parse(f"f({arguments})")) == [1]
    seen = ast.parse("a = getattr(b, c)\nd = e.__dict__\nf = g.h")
    assert list(reflective_calls(seen)) == [1, 2]
    assert any_lines("x: Any\nMany: int\n") == [1]
