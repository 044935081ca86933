# SPDX-License-Identifier: Apache-2.0
"""A server of the example, for all tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from steering_testing.golden_gate import (
    EXAMPLE,
    KEY,
    MAX_ANSWER_VALUES,
    MODES,
    MODULE,
    READ,
    TOKENS,
    example_server,
)
from steering_testing.server import Server


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key and the presets `clamped` and `reader`."""
    root = tmp_path_factory.mktemp("server")
    hints = {"temperature": 0, "max_tokens": TOKENS}
    presets = {"clamped": {**MODES["clamped"], "sampling": hints}, "reader": READ}
    steering = {"max_answer_values": MAX_ANSWER_VALUES}
    options = ["--steering-modules", f"{MODULE}={EXAMPLE / 'sae'}"]
    options += ["--steering-api-key", KEY]
    options += ["--enable-scale-out", "--steering-presets"]
    for name, preset in presets.items():
        file = root / f"{name}.json"
        file.write_text(json.dumps(preset))
        options.append(f"{name}={file}")
    with example_server(root / "log", *options, steering=steering) as running:
        yield running


@pytest.fixture(scope="package")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
