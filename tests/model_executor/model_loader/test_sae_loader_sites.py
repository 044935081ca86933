# SPDX-License-Identifier: Apache-2.0
"""The sites of a module: their names, which are chosen, and where they come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from native_modules import SITE, native, sae_tensors
from sae_reference import loaded, new_weights, write_json
from safetensors.torch import save_file

from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_formats.names import parse_site_name
from vllm.model_executor.model_loader.sae_formats.native import save_native
from vllm.model_executor.model_loader.sae_loader import inspect_module, load_site


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("post_block.20", (20, HookPoint.POST_BLOCK)),
        ("20.post_block", (20, HookPoint.POST_BLOCK)),
        ("blocks.3.attn.hook_z", (3, HookPoint.ATTN_Z)),
        ("blocks.3.mlp.hook_in", (3, HookPoint.MLP_IN)),
        ("blocks.3.hook_in", (3, HookPoint.PRE_ATTN)),
        ("blocks.3.hook_out", (3, HookPoint.POST_BLOCK)),
        ("blocks.3.ln2.hook_normalized", None),
        ("blocks.3.hook_mlp_in", None),
        ("gpt_neox.layers.3", (3, HookPoint.POST_BLOCK)),
        ("model.language_model.layers.3", (3, HookPoint.POST_BLOCK)),
        ("model.layers.3.self_attn.o_proj.input", (3, HookPoint.ATTN_Z)),
        ("model.layers.3.pre_feedforward_layernorm.output", (3, HookPoint.MLP_IN)),
        ("model.layers.3.post_feedforward_layernorm.output", (3, HookPoint.MLP_OUT)),
        ("model.layers.3.post_attention_layernorm.output", None),
        ("mlp_out.3", (3, HookPoint.MLP_OUT)),
        ("layers.0.resid_mid", (0, HookPoint.POST_ATTN)),
        ("blocks.7.hook_resid_pre", (7, HookPoint.PRE_ATTN)),
        ("model.language_model.layers.9.output", (9, HookPoint.POST_BLOCK)),
        ("transformer.h.3", (3, HookPoint.POST_BLOCK)),
        ("blocks.7.hook_mlp_out", (7, HookPoint.MLP_OUT)),
        ("blocks.7.mlp.hook_post", None),
        ("layers.5.mlp", None),
        ("-1.post_block", None),
        ("٣.post_block", None),
        ("", None),
    ],
)
def test_a_site_has_several_names(
    text: str, site: tuple[int, HookPoint] | None
) -> None:
    assert parse_site_name(text) == site


def test_a_site_that_the_files_do_not_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of .*post_block.*, found '4.re"):
        inspect_module("m", str(native(tmp_path)), sites=["4.resid_pre"])


def test_a_list_of_sites_selects_among_several(tmp_path: Path) -> None:
    other = (9, HookPoint.PRE_ATTN)
    save_native(tmp_path, {SITE: sae_tensors(0), other: sae_tensors(50)})
    module = inspect_module("m", str(tmp_path), sites=["resid_pre.9"])
    assert [site.name for site in module.sites] == ["pre_attn.9"]
    assert torch.equal(loaded(module).b_dec, sae_tensors(50)["b_dec"])
    with pytest.raises(
        ValueError, match="sites: expected one of post_block.3, pre_attn.9"
    ):
        inspect_module("m", str(tmp_path), sites=["post_block.4"])


def save_sae_lens(path: Path, layer: int, seed: int) -> None:
    path.mkdir(parents=True)
    tensors = sae_tensors(seed)
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    save_file(tensors, path / "sae_weights.safetensors")
    metadata = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    cfg = {"architecture": "jumprelu", "metadata": metadata}
    write_json(path / "cfg.json", {**cfg, "apply_b_dec_to_input": False})


def test_subdirectories_of_one_format_are_the_sites_of_one_module(
    tmp_path: Path,
) -> None:
    save_sae_lens(tmp_path / "b", layer=2, seed=0)
    save_sae_lens(tmp_path / "a", layer=6, seed=50)
    module = inspect_module("m", str(tmp_path))
    assert [site.name for site in module.sites] == ["post_block.2", "post_block.6"]
    weights = new_weights(module.sites[1])
    load_site(module, module.sites[1], weights)
    assert torch.equal(weights.W_enc, sae_tensors(50)["W_enc"])


def test_two_subdirectories_for_one_site_are_refused(tmp_path: Path) -> None:
    save_sae_lens(tmp_path / "a", layer=2, seed=0)
    save_sae_lens(tmp_path / "b", layer=2, seed=50)
    with pytest.raises(ValueError, match="b: post_block.2 is also in a/sae_weights"):
        inspect_module("m", str(tmp_path))
