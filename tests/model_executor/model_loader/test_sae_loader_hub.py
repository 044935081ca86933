# SPDX-License-Identifier: Apache-2.0
"""Modules named by a Hugging Face Hub path, from an offline cache."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from sae_reference import D, F, loaded, tensor

from vllm.model_executor.model_loader.sae_formats import saelens_list
from vllm.model_executor.model_loader.sae_formats.native import save_native
from vllm.model_executor.model_loader.sae_loader import inspect_module

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


# SAELens's list

RELEASE = "gemma-scope-2b-pt-res-canonical"
SAE_ID = "layer_0/width_16k/canonical"


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline Hub cache with one SAE of SAELens's list; returns its directory."""
    repo = tmp_path / "models--google--gemma-scope-2b-pt-res"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    path = repo / "snapshots" / COMMIT / "layer_0/width_16k/average_l0_105"
    path.mkdir(parents=True)
    arrays = {name: value.numpy() for name, value in TENSORS.items()}
    arrays["W_enc"] = arrays["W_enc"].T
    np.savez(path / "params.npz", threshold=arrays["b_enc"], **arrays)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return path


def test_a_listed_sae_is_found_by_release_and_id(listed: Path) -> None:
    module = inspect_module("m", f"saelens:{RELEASE}/{SAE_ID}")
    assert module.path == f"saelens:{RELEASE}/{SAE_ID}@{COMMIT}"
    assert [site.name for site in module.sites] == ["post_block.0"]
    assert torch.equal(loaded(module).W_enc, TENSORS["W_enc"])
    again = inspect_module("m", module.path)
    assert again.digest == module.digest


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gemma-scope-2b-pt-re/x", "of SAELens's list; did you mean gemma-scope-2b-"),
        (f"{RELEASE}/layer_99", "no SAE layer_99, expected an id like layer_0/width_1"),
        (
            "temporal-sae-gemma-2-2b/blocks.12.hook_resid_post",
            "a temporal SAE reads ea",
        ),
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_0", "cross-layer transcoder"),
        ("mistral-7b-res-wg/blocks.8.hook_resid_pre", "cannot be fetched from the Hub"),
    ],
)
def test_a_name_that_is_not_in_the_list_is_refused(
    listed: Path, path: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_module("m", f"saelens:{path}")


def test_every_release_of_the_list_has_a_path_for_its_own_ids() -> None:
    for name, row in saelens_list.releases().items():
        for pattern, template in row.get("rules", ()):
            places = range(pattern.count("{}"))
            numbers = [str(100 + i) for i in places]
            sae_id = pattern.replace("{}", "%s") % tuple(numbers)
            if row["loader"] == "temporal" or "clt" in name:
                continue
            found = saelens_list.find(name, sae_id)
            assert found.path == template.format(*numbers)
