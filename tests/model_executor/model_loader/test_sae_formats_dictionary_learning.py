# SPDX-License-Identifier: Apache-2.0
"""dictionary_learning's classes against their own mathematics in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from example_weights import (
    W_dec,
    W_enc,
    b_dec,
    b_enc,
    decode,
    pre_activations,
    threshold,
)
from sae_reference import (
    D,
    F,
    K,
    close,
    inputs,
    reconstruct,
    tensor,
    topk_mask,
    write_json,
)

from vllm.model_executor.model_loader.sae_loader import inspect_module

LINEAR = {
    "encoder.weight": W_enc,
    "encoder.bias": b_enc,
    "decoder.weight": W_dec.T.contiguous(),
}
PLAIN = {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
r_mag, b_mag, b_gate = tensor(F, seed=15), tensor(F, seed=16), tensor(F, seed=17)
SCALAR = {"threshold": torch.tensor(0.8), "k": torch.tensor(K, dtype=torch.int)}


def dictionary(
    path: Path,
    dict_class: str | None,
    state: dict[str, torch.Tensor],
    io: str = "out",
    **trainer: Any,
) -> Path:
    config = {"dict_class": dict_class, "layer": 8, "activation_dim": D, **trainer}
    write_json(path / "config.json", {"trainer": config, "buffer": {"io": io}})
    torch.save(state, path / "ae.pt")
    return path


def test_dictionary_autoencoder_centres_on_its_bias(tmp_path: Path) -> None:
    path = dictionary(tmp_path, "AutoEncoder", {**LINEAR, "bias": b_dec})
    close(reconstruct(path), decode(pre_activations(subtract=True).relu()))


def test_dictionary_new_autoencoder_has_two_plain_linear_layers(tmp_path: Path) -> None:
    state = {**LINEAR, "decoder.bias": b_dec}
    path = dictionary(tmp_path, "AutoEncoderNew", state)
    close(reconstruct(path), decode(pre_activations(subtract=False).relu()))


def test_dictionary_topk_ignores_its_threshold(tmp_path: Path) -> None:
    state = {**LINEAR, "b_dec": b_dec, **SCALAR}
    path = dictionary(tmp_path, "AutoEncoderTopK", state, k=K)
    p = pre_activations(subtract=True).relu()
    close(reconstruct(path), decode(p * topk_mask(p, K)))


def test_dictionary_batch_topk_uses_its_threshold(tmp_path: Path) -> None:
    path = dictionary(tmp_path, "BatchTopKSAE", {**LINEAR, "b_dec": b_dec, **SCALAR})
    p = pre_activations(subtract=True).relu()
    close(reconstruct(path), decode(p * (p > 0.8)))


def test_dictionary_matryoshka_uses_its_threshold(tmp_path: Path) -> None:
    state = {**PLAIN, **SCALAR, "group_sizes": torch.tensor([8, F - 8])}
    path = dictionary(tmp_path, "MatryoshkaBatchTopKSAE", state)
    p = pre_activations(subtract=True).relu()
    close(reconstruct(path), decode(p * (p > 0.8)))


def test_dictionary_jumprelu_does_not_centre(tmp_path: Path) -> None:
    path = dictionary(
        tmp_path, "JumpReluAutoEncoder", {**PLAIN, "threshold": threshold}
    )
    p = pre_activations(subtract=False)
    close(reconstruct(path), decode((p * (p > threshold.double())).relu()))


def test_dictionary_gated_multiplies_gate_and_magnitude(tmp_path: Path) -> None:
    state = {
        "encoder.weight": W_enc,
        "decoder.weight": W_dec.T.contiguous(),
        "decoder_bias": b_dec,
        "r_mag": r_mag,
        "mag_bias": b_mag,
        "gate_bias": b_gate,
    }
    path = dictionary(tmp_path, "GatedAutoEncoder", state)
    u = (inputs() - b_dec.double()) @ W_enc.double().T
    magnitude = (u * r_mag.double().exp() + b_mag.double()).relu()
    close(reconstruct(path), decode((u + b_gate.double() > 0) * magnitude))


def test_a_dictionary_without_a_layer_needs_a_site(tmp_path: Path) -> None:
    state = {**LINEAR, "bias": b_dec}
    path = dictionary(tmp_path, "AutoEncoder", state, layer=None)
    with pytest.raises(ValueError, match="expected a layer, found none; name the site"):
        inspect_module("m", str(path))
    module = inspect_module("m", str(path), sites=["blocks.3.hook_resid_pre"])
    assert module.sites[0].name == "pre_attn.3"


@pytest.mark.parametrize("layer", [8, None])
def test_a_dictionary_from_one_point_to_another_is_refused(
    tmp_path: Path, layer: int | None
) -> None:
    state = {**LINEAR, "bias": b_dec}
    path = dictionary(tmp_path, "AutoEncoder", state, io="in_and_out", layer=layer)
    with pytest.raises(ValueError, match="buffer: io: expected out or in .it reads"):
        inspect_module("m", str(path), sites=["mlp_out.8"])


@pytest.mark.parametrize("name", ["CrossCoder", "IdentityDict", None])
def test_a_dictionary_class_that_does_not_fold_is_refused(
    tmp_path: Path, name: Any
) -> None:
    path = dictionary(tmp_path, name, {**LINEAR, "bias": b_dec})
    with pytest.raises(ValueError, match="dict_class: expected one of AutoEncoder, "):
        inspect_module("m", str(path))


@pytest.mark.parametrize("point", ["mlp_out", "attn_out", "resid_post"])
def test_a_dictionary_says_its_point_by_its_submodule(
    tmp_path: Path, point: str
) -> None:
    state = {**LINEAR, "bias": b_dec}
    name = f"{point}_layer_8"
    path = dictionary(tmp_path, "AutoEncoder", state, submodule_name=name)
    site = inspect_module("m", str(path)).sites[0]
    assert site.name == ("post_block.8" if point == "resid_post" else f"{point}.8")
    # The library records what the module returns, before a norm behind it.
    assert site.raw_output == (point != "resid_post")


@pytest.mark.parametrize(
    "name", ["q_proj_layer_8", "mlp_out_layer_7", "mlp_out_layer_80"]
)
def test_a_submodule_that_is_no_point_of_the_layer_is_refused(
    tmp_path: Path, name: str
) -> None:
    state = {**LINEAR, "bias": b_dec}
    path = dictionary(tmp_path, "AutoEncoder", state, submodule_name=name)
    with pytest.raises(ValueError, match="submodule_name: expected resid_post_layer_8"):
        inspect_module("m", str(path))


@pytest.mark.parametrize(
    ("name", "extra"), [("AutoEncoder", "r_mag"), ("AutoEncoder", "threshold")]
)
def test_weights_of_another_class_than_the_stated_are_refused(
    tmp_path: Path, name: str, extra: str
) -> None:
    state = {**LINEAR, "bias": b_dec, extra: threshold}
    path = dictionary(tmp_path, name, state)
    message = f"ae.pt: {extra}: expected no such tensor, since config.json says {name}"
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(path))
