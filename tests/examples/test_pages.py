# SPDX-License-Identifier: Apache-2.0
"""Every page of the documentation: links, code and the names of files are right."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PAGES += sorted(ROOT.glob("*.md")) + sorted((ROOT / "examples").rglob("*.md"))
FILE = re.compile(r"`((?:vllm|tests|tools|csrc|docs|examples|benchmarks)/[\w./-]+)`")


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub makes of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_code_is_code(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")
    for text in blocks(page, "json"):
        json.loads(text)
    for text in blocks(page, "bash") + blocks(page, "console"):
        done = subprocess.run(["bash", "-n"], input=text, text=True, check=False)
        assert done.returncode == 0, text


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    for name in FILE.findall(page.read_text()):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"`make ([a-z-]+)`", page.read_text()):
        makefile = (ROOT / "Makefile").read_text()
        assert f"\n{target}:" in makefile, target


def test_the_index_lists_every_page_of_the_documentation() -> None:
    index = ROOT / "docs" / "README.md"
    text = index.read_text()
    for page in PAGES:
        if page.is_relative_to(index.parent) and page != index:
            assert f"({page.relative_to(index.parent)})" in text, page
