# SPDX-License-Identifier: Apache-2.0
"""Small native modules, and edits of their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_reference import D, F, tensor, write_json
from safetensors.torch import load_file, save_file

from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_formats.native import save_native

SITE = (3, HookPoint.POST_BLOCK)


def sae_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        "W_enc": tensor(F, D, seed=seed),
        "b_enc": tensor(F, seed=seed + 1),
        "threshold": tensor(F, seed=seed + 2),
        "W_dec": tensor(F, D, seed=seed + 3),
        "b_dec": tensor(D, seed=seed + 4),
    }


def native(path: Path, **metadata: Any) -> Path:
    save_native(path, {SITE: sae_tensors()}, **metadata)
    return path


def rewrite(path: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace or drop one tensor of a native directory's only file."""
    file = path / "post_block.3.safetensors"
    tensors = load_file(file)
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    save_file(tensors, file)


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    write_json(path / "manifest.json", manifest)
