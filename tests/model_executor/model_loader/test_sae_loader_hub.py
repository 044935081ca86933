# SPDX-License-Identifier: Apache-2.0
"""Modules named by a Hugging Face Hub path, from an offline cache."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from sae_reference import D, F, loaded, tensor

from vllm.model_executor.model_loader.sae_loader import inspect_module, save_native

TENSORS = {
    "W_enc": tensor(F, D, seed=0),
    "b_enc": tensor(F, seed=1),
    "W_dec": tensor(F, D, seed=2),
    "b_dec": tensor(D, seed=3),
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline Hub cache with one repository; returns its snapshot."""
    repo = tmp_path / "models--owner--repo"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    (repo / "refs/v1").write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT
    save_native(snapshot / "layer_3/wide", {(3, "resid_post"): TENSORS})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_a_hub_path_is_read_from_the_cache_and_pinned(hub: Path, revision: str) -> None:
    module = inspect_module("m", f"hf:owner/repo/layer_3/wide{revision}")
    assert module.path == f"hf:owner/repo/layer_3/wide@{COMMIT}"
    assert module.digest == inspect_module("x", str(hub / "layer_3/wide")).digest
    assert torch.equal(loaded(module).W_enc, TENSORS["W_enc"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf:owner", r"expected hf:owner/repo\["),
        ("hf:owner/repo/../x", r"expected hf:owner/repo\["),
        ("hf:owner/repo//etc", r"expected hf:owner/repo\[.* relative sub-path"),
        ("hf:owner/repo/layer_3//etc", r"expected hf:owner/repo\["),
        ("hf:owner/repo/./layer_3", r"expected hf:owner/repo\["),
        ("hf:owner/repo/layer_*", r"expected hf:owner/repo\["),
        ("hf:../repo/layer_3", r"expected hf:owner/repo\["),
        ("hf:owner/repo/layer_3@../../x", r"expected hf:owner/repo\["),
        ("owner/repo", "a repository of the Hugging Face Hub is written hf:owner/repo"),
        ("hf:owner/missing", "cannot be fetched from the Hub"),
        ("hf:owner/repo/layer_4", "the repository has no layer_4"),
        ("hf:owner/repo@gone", "cannot be fetched from the Hub"),
    ],
)
def test_a_hub_path_that_gives_nothing_is_refused(
    hub: Path, path: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_module("m", path)


def test_a_link_that_leaves_the_repository_is_not_followed(
    hub: Path, tmp_path: Path
) -> None:
    save_native(tmp_path / "elsewhere", {(3, "resid_post"): TENSORS})
    (hub / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="the repository has no out"):
        inspect_module("m", "hf:owner/repo/out")
