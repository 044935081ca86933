# SPDX-License-Identifier: Apache-2.0
"""The reference pages list every field of a request, with its default and limit."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import msgspec
import pytest

from vllm.config import sae_readout_specs as readout
from vllm.config import sae_steering_parser as parser
from vllm.config.sae_steering_presets import (
    MAX_DESCRIPTION,
    MAX_PRESETS,
    SamplingHints,
    SteeringPreset,
)
from vllm.config.sae_steering_spans import MAX_SPANS, SteeringSpan
from vllm.config.sae_steering_specs import (
    EXTRA_ARGS_KEYS,
    PRESET_KEY,
    RESERVED_KEYS,
    SAEClampEntry,
    SAEClampSpec,
    SAECondition,
    SAEFullReconstructionSpec,
    SteeringVectorSpec,
)
from vllm.config.steering import (
    DEFAULT_MAX_ANSWER_VALUES,
    DEFAULT_MAX_CLAMPS,
    DEFAULT_MAX_PIECES,
    DEFAULT_MAX_READ_VALUES,
    DEFAULT_MAX_SPECS,
    MAX_READ_VALUES,
)
from vllm_steering_cli.main import make_parser

ROOT = Path(__file__).parents[2]
FEATURES = ROOT / "docs" / "features"
REQUESTS = (FEATURES / "requests.md").read_text()
READING = (FEATURES / "reading.md").read_text()
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
PAGES += (ROOT / "examples").rglob("*.md")


def rows(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(
    ("struct", "page"),
    [
        (SAEFullReconstructionSpec, REQUESTS),
        (SAEClampSpec, REQUESTS),
        (SteeringVectorSpec, REQUESTS),
        (SAEClampEntry, REQUESTS),
        (SteeringSpan, REQUESTS),
        (SteeringPreset, REQUESTS),
        (readout.SAEReadoutSpec, READING),
    ],
)
def test_every_field_has_a_row(struct: type[msgspec.Struct], page: str) -> None:
    for field in msgspec.structs.fields(struct):
        named = [row for row in rows(page) if f"`{field.name}`" in row]
        assert named, field.name
        if isinstance(field.default, (str, int, float)) and field.default != "":
            default = str(field.default).lower()
            assert any(default in row.lower() for row in named), field.name


def test_every_key_is_named() -> None:
    for key in (*EXTRA_ARGS_KEYS, PRESET_KEY):
        assert any(row.startswith(f"| `{key}` |") for row in rows(REQUESTS)), key
    for name in (*RESERVED_KEYS, *SamplingHints.__struct_fields__):
        assert f"`{name}`" in REQUESTS, name
    for name in SAECondition.__struct_fields__:
        assert f'"{name}"' in REQUESTS or f"`{name}`" in REQUESTS, name
    for name in readout.SAEStopEntry.__struct_fields__:
        assert f'"{name}"' in READING, name


def test_the_limits_are_those_of_the_code() -> None:
    limits = {
        "specs in a request": DEFAULT_MAX_SPECS,
        "clamps of one tier at one site": DEFAULT_MAX_CLAMPS,
        "pieces of a request (": DEFAULT_MAX_PIECES,
        "sites that a request lists": parser.MAX_SITES,
        "clamps that a request lists": parser.MAX_CLAMPS,
    }
    for words, limit in limits.items():
        assert any(
            row.startswith(f"| {words}") and f"| {limit} |" in row
            for row in rows(REQUESTS)
        ), words
    assert f"list of 1 to {MAX_SPANS} [spans]" in REQUESTS
    assert f"at most {MAX_PRESETS} presets" in REQUESTS
    assert f"at most {MAX_DESCRIPTION} characters" in REQUESTS
    assert f"| 1 to {DEFAULT_MAX_READ_VALUES}; " in READING
    assert f"allows up to {MAX_READ_VALUES} |" in READING
    assert f"to up to {MAX_READ_VALUES}" in READING
    assert f"at most {readout.MAX_STOPS} |" in READING
    most = readout.SITES_IN_FULL * DEFAULT_MAX_READ_VALUES
    assert f"at most {most} values" in READING
    assert f"at most {DEFAULT_MAX_ANSWER_VALUES} values" in READING


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (
        action
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(found.choices)


def test_the_commands_on_the_pages_are_those_of_the_parser() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    known = commands()
    said = re.findall(r"vllm-steering ([a-z]+)((?:\\\n|[^\n`])*)", text)
    for command, arguments in said:
        assert command in known, command
        for option in re.findall(r"(?<![\w-])--[a-z-]+", arguments.split(" #")[0]):
            assert option in known[command]._option_string_actions, (command, option)
    assert {command for command, _ in said} >= set(known)
