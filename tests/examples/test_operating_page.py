# SPDX-License-Identifier: Apache-2.0
"""docs/features/operating.md lists every option, flag, route, metric and status."""

from __future__ import annotations

import re
from pathlib import Path

from vllm.config.steering_environment import DIRECTORY_ENV, KEY_ENV
from vllm.config.steering_module_options import MODULE_OPTIONS
from vllm.engine import steering_args
from vllm.engine.steering_options import (
    LIMITS,
    TOP_FIELDS,
)
from vllm.engine.steering_slot_options import SPARE_FIELDS
from vllm.entrypoints.serve.steering import api_router, metrics, preset_router

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "features" / "operating.md").read_text()
SERVE = ROOT / "vllm" / "entrypoints" / "serve" / "steering"


def rows() -> list[str]:
    return [line for line in PAGE.splitlines() if line.startswith("| ")]


def test_every_option_has_a_row_with_its_range() -> None:
    for field in set(TOP_FIELDS) - {"resolved"}:
        assert any(row.startswith(f"| `{field}`") for row in rows()), field
    for field, (default, least, most) in LIMITS.items():
        end = f"| {default} | {least} to {most} |"
        assert any(f"`{field}`" in row and row.endswith(end) for row in rows()), field
    for field in (*MODULE_OPTIONS, *SPARE_FIELDS):
        assert f"`{field}`" in PAGE or f'"{field}"' in PAGE, field


def test_every_flag_has_a_row() -> None:
    flags = [
        value
        for name, value in vars(steering_args).items()
        if name.endswith("FLAG") and isinstance(value, str)
    ]
    assert len(flags) >= 4
    for flag in flags:
        assert any(row.startswith(f"| `{flag} ") for row in rows()), flag


def test_every_route_is_named() -> None:
    routes = [*api_router.router.routes, *preset_router.router.routes]
    for path in {route.path for route in routes}:  # type: ignore[attr-defined]
        name = path.replace("/presets/{name}", "/presets[/{name}]")
        assert name in PAGE or name.removesuffix("/presets") in PAGE, path


def test_every_metric_has_a_row() -> None:
    source = Path(metrics.__file__).read_text()
    found = re.findall(r"_(gauge|counter)\(\s*\"(\w+)\"", source)
    assert len(found) >= 10
    for kind, name in found:
        full = f"vllm:steering_{name}" + ("_total" if kind == "counter" else "")
        assert any(row.startswith(f"| `{full}` |") for row in rows()), full


def test_every_environment_variable_has_a_row() -> None:
    sources = [*(ROOT / "vllm").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    texts = [source.read_text() for source in (*sources, ROOT / "setup.py")]
    found = {
        name for text in texts for name in re.findall(r"VLLM_STEERING_[A-Z_]+", text)
    }
    assert KEY_ENV in found
    for name in found - {DIRECTORY_ENV}:  # which processes set for their children
        assert any(row.startswith(f"| `{name}` |") for row in rows()), name
    named = set(re.findall(r"`(VLLM_STEERING_[A-Z_]+)[=`]", PAGE))
    assert named == found - {DIRECTORY_ENV}


def test_every_status_of_a_refusal_is_explained() -> None:
    sources = [file.read_text() for file in SERVE.glob("*.py")]
    statuses = {
        status
        for source in sources
        for status in re.findall(r"RequestRefused\(\s*(\d{3})", source)
    }
    assert {"400", "401", "403", "409"} <= statuses
    for status in statuses:
        assert any(row.startswith(f"| {status} |") for row in rows()), status


def test_the_messages_that_it_explains_are_written_so() -> None:
    section = PAGE.split("\n## When something is wrong\n")[1].split("\n## ")[0]
    spans = [
        span
        for row in re.findall(r"^\| (.*?) \|", section, re.MULTILINE)
        for span in re.findall(r"`(.*?)`", row)
        if " " in span and not span.startswith(("POST", "{", "unrecognized"))
    ]
    assert len(spans) >= 18
    files = [*(ROOT / "vllm").rglob("*.py")]
    # Without quotes, as Python joins the parts of a message.
    written = "".join(re.sub(r'"\s+f?["\']', "", file.read_text()) for file in files)
    for span in spans:
        parts = re.split(r"…|'[^']*'|\([^)]*\)|\w+\.\d+|\d+", span)
        longest = max(parts, key=len).strip(" :")
        assert len(longest) > 8 and longest in written, (span, longest)


def test_the_lines_that_it_shows_of_log_and_metrics_are_written_so() -> None:
    shown = re.findall(r"```text\n(Steering.*?)```", PAGE, re.DOTALL)
    (lines,) = [text.splitlines() for text in shown]
    sources = "".join(
        file.read_text() for file in (ROOT / "vllm").rglob("steering_*.py")
    )
    for line in lines:
        name, metric, _ = line.partition("{")
        if metric:
            assert any(row.startswith(f"| `{name}` |") for row in rows()), line
        else:
            start = " ".join(line.split()[: 2 if "module" in line else 1])
            assert f'"{start}' in sources, line
