# SPDX-License-Identifier: Apache-2.0
"""A module's digest: over its content, not its name or place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from native_modules import edit_manifest, native, rewrite, sae_tensors

from vllm.model_executor.model_loader.sae_loader import inspect_module


def digest(path: Path, **options: Any) -> str:
    return inspect_module("m", str(path), **options).digest


def test_the_digest_is_of_the_content_and_not_of_name_or_place(tmp_path: Path) -> None:
    first = inspect_module("a", str(native(tmp_path / "one")))
    second = inspect_module("b", str(native(tmp_path / "two")))
    assert first.digest == second.digest
    assert len(bytes.fromhex(first.digest)) == 32


def test_the_digest_changes_with_one_bit_of_any_tensor(tmp_path: Path) -> None:
    seen = {digest(native(tmp_path / "original"))}
    for name, value in sae_tensors().items():
        path = native(tmp_path / name)
        value.view(torch.int32).reshape(-1)[3] ^= 1
        rewrite(path, name, value)
        seen.add(digest(path))
    assert len(seen) == 6


def test_the_digest_changes_with_every_option_that_has_an_effect(
    tmp_path: Path,
) -> None:
    path = native(tmp_path, reference_norm=3.0)
    options: list[dict[str, Any]] = [
        {},
        {"feature_units": "unit_decoder"},
        {"skip_token_ids": []},
        {"skip_token_ids": [1]},
        {"norm_guard": 2.0},
        {"norm_guard": 2.0, "reference_norm": 2.0},
    ]
    assert len({digest(path, **option) for option in options}) == len(options)
    edit_manifest(path, lambda m: m.update(reference_norm=4.0))
    assert digest(path) != digest(native(tmp_path / "again", reference_norm=3.0))


def test_what_an_author_claims_does_not_change_the_digest(tmp_path: Path) -> None:
    path = native(tmp_path)
    before = digest(path)
    edit_manifest(path, lambda m: m["sites"][0].update(fvu=0.5))
    assert digest(path) == before
