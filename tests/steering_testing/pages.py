# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of a page, run one after the other, and what they print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

# A block of Python and, if it follows at once, the block of text that it prints.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Code and shown output (empty if the page shows none), in the page's order."""
    return BLOCK.findall(page.read_text())


def printed(code: str, names: dict[str, Any], page: Path) -> str:
    """Run a block; gives what it wrote to standard output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, str(page), "exec"), names)
    return out.getvalue()


def words(text: str) -> list[str]:
    """A text without its numbers, whose last digits differ between machines."""
    return NUMBER.sub("#", text).split()


def run_page(
    page: Path,
    names: dict[str, Any],
    count: int | None = None,
    replaced: dict[str, str] | None = None,
) -> None:
    """Run a page's first `count` blocks (all of them if None) in `names`.

    Raises:
        AssertionError: a block prints other words than the page shows below it.
    """
    for code, shown in blocks(page)[:count]:
        for old, new in (replaced or {}).items():
            code = code.replace(old, new)
        said = printed(code, names, page)
        if shown:
            assert words(said) == words(shown), said
