# SPDX-License-Identifier: Apache-2.0
"""The loader's contract: native round trips, buffers, errors, memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_modules import SITE, edit_manifest, native, rewrite, sae_tensors
from sae_reference import D, F, loaded, new_weights, write_json
from safetensors.torch import load_file, save_file

from vllm.config.steering import Activation, ModuleInfo, SiteInfo
from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers import steering_chunks
from vllm.model_executor.layers.steering_state import SAEWeights
from vllm.model_executor.model_loader.sae_formats import FORMATS, fold
from vllm.model_executor.model_loader.sae_formats.native import save_native
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors
from vllm.model_executor.model_loader.sae_loader import (
    inspect_module,
    load_site,
    read_layout,
)

# Native directories


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_native_directory_round_trips_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = {
        name: value.to(dtype) if name.startswith("W") else value
        for name, value in sae_tensors().items()
    }
    save_native(tmp_path, {SITE: tensors})
    module = inspect_module("m", str(tmp_path))
    weights = SAEWeights(F, D, dtype, torch.device("cpu"))
    load_site(module, module.sites[0], weights)
    for name, value in tensors.items():
        assert torch.equal(getattr(weights, name), value), name
    stored = load_file(tmp_path / "post_block.3.safetensors")
    assert {name: value.dtype for name, value in stored.items()} == {
        name: value.dtype for name, value in tensors.items()
    }


def test_a_native_directory_states_all_that_was_written(tmp_path: Path) -> None:
    topk = {**sae_tensors(), "activation": "topk", "k": 4, "topk_relu": False}
    topk.pop("threshold")
    plain = {k: v for k, v in sae_tensors(9).items() if k != "threshold"}
    save_native(
        tmp_path,
        {(7, "resid_pre"): topk, SITE: {**plain, "fvu": 0.2, "l0": 31}},
        reference_norm=12.5,
        skip_token_ids=[0, 2],
        norm_guard=4.0,
        model="tiny",
    )
    module = inspect_module("m", str(tmp_path))
    assert module.sites == (
        SiteInfo(7, HookPoint.PRE_ATTN, D, F, Activation.TOPK, 4, False),
        SiteInfo(3, HookPoint.POST_BLOCK, D, F, Activation.RELU),
    )
    assert (module.reference_norm, module.norm_guard) == (12.5, 4.0)
    assert module.skip_token_ids == (0, 2)
    layout = read_layout("m", str(tmp_path))
    assert layout.model == "tiny"
    assert layout.declared["post_block.3"] == {"fvu": 0.2, "l0": 31}


def test_each_site_loads_its_own_tensors(tmp_path: Path) -> None:
    other = (9, HookPoint.PRE_ATTN)
    save_native(tmp_path, {SITE: sae_tensors(0), other: sae_tensors(50)})
    module = inspect_module("m", str(tmp_path))
    for site, seed in zip(module.sites, (0, 50), strict=True):
        weights = new_weights(site)
        load_site(module, site, weights)
        assert torch.equal(weights.W_dec, sae_tensors(seed)["W_dec"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format="other"), "format: expected 'vllm-sae'"),
        (lambda m: m.update(version=2), "version: expected 1, found 2"),
        (lambda m: m.update(extra=1), "extra: unknown key"),
        (lambda m: m.update(sites=[]), "sites: expected a list of at least one"),
        (lambda m: m["sites"].append(m["sites"][0]), "post_block.3 appears twice"),
        (lambda m: m["sites"][0].update(hook="mlp"), "hook: expected one of pre_attn"),
        (lambda m: m["sites"][0].update(layer=-1), "layer: expected an integer >= 0"),
        (lambda m: m["sites"][0].update(layer=True), "layer: expected an integer >= 0"),
        (lambda m: m["sites"][0].update(d_sae=F + 1), "W_enc: expected shape"),
        (lambda m: m["sites"][0].update(activation="gelu"), "activation: expected one"),
        (lambda m: m["sites"][0].update(activation="topk"), "k: expected an integer"),
        (lambda m: m["sites"][0].update(file="../x.safetensors"), "file: expected a"),
        (lambda m: m["sites"][0].update(file="gone.safetensors"), "gone.*: missing"),
        (lambda m: m.update(skip_token_ids=[1.5]), "skip_token_ids: expected a list"),
        (lambda m: m.update(norm_guard=0), "norm_guard: expected a finite positive"),
        (lambda m: m.update(reference_norm=float("nan")), "reference_norm: expected a"),
    ],
)
def test_a_bad_manifest_is_refused_with_the_path_of_its_field(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_manifest(native(tmp_path), edit)
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(tmp_path))


def test_save_native_takes_tied_weights(tmp_path: Path) -> None:
    tensors = sae_tensors()
    tensors["W_enc"] = tensors["W_dec"]
    save_native(tmp_path, {SITE: tensors})
    weights = loaded(inspect_module("m", str(tmp_path)))
    assert torch.equal(weights.W_enc, tensors["W_dec"])
    assert torch.equal(weights.W_dec, tensors["W_dec"])


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_save_native_refuses_a_threshold_that_would_not_apply(
    tmp_path: Path, activation: str
) -> None:
    content = {**sae_tensors(), "activation": activation, "k": 2}
    with pytest.raises(ValueError, match="threshold: expected with jumprelu and noth"):
        save_native(tmp_path, {SITE: content})


def test_save_native_refuses_a_tensor_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"post_block.3: b_dec: expected floating \[8"):
        save_native(tmp_path, {SITE: {**sae_tensors(), "b_dec": torch.zeros(D + 1)}})


# Errors


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("b_enc", None, "b_enc: expected a tensor, found none"),
        ("W_dec", torch.zeros(D, F), r"W_dec: expected shape \[24, 8\], found \[8, 24"),
        ("b_dec", torch.zeros(D + 1), r"b_dec: expected shape \[8\], found \[9\]"),
        ("W_enc", torch.zeros(F, D, dtype=torch.int8), "W_enc: expected a floating"),
    ],
)
def test_headers_are_checked_without_loading(
    tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    rewrite(native(tmp_path), name, value)
    prefix = rf"^steering module 'm' \(.*\): post_block.3.safetensors: {message}"
    with pytest.raises(ValueError, match=prefix) as error:
        inspect_module("m", str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "threshold", "W_dec", "b_dec"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(
    tmp_path: Path, name: str, bad: float
) -> None:
    value = sae_tensors()[name]
    value[5] = bad
    rewrite(native(tmp_path), name, value)
    module = inspect_module("m", str(tmp_path))
    with pytest.raises(ValueError, match=f"{name}: expected finite") as error:
        loaded(module)
    if name.startswith("W"):
        assert "feature 5" in str(error.value)


def test_a_weight_that_overflows_the_buffers_dtype_is_refused(tmp_path: Path) -> None:
    rewrite(native(tmp_path), "W_dec", torch.full((F, D), 1e6))
    module = inspect_module("m", str(tmp_path))
    weights = SAEWeights(F, D, torch.float16, torch.device("cpu"))
    with pytest.raises(ValueError, match="finite values in float16"):
        load_site(module, module.sites[0], weights)


def test_an_unknown_format_lists_the_known_ones_and_what_was_found(
    tmp_path: Path,
) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="found a directory with weights.bin") as error:
        inspect_module("m", str(tmp_path))
    for fmt in FORMATS:
        assert fmt.name in str(error.value)


def test_a_path_with_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or directory"):
        inspect_module("m", str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_units": "percent"}, "feature_units: expected native or unit_dec"),
        ({"skip_token_ids": [-1]}, "skip_token_ids: expected token ids"),
        ({"skip_token_ids": [True]}, "skip_token_ids: expected token ids"),
        ({"norm_guard": 0}, "norm_guard: expected a positive number within"),
        ({"norm_guard": 3.0}, "norm_guard: expected a reference_norm beside it"),
        ({"reference_norm": -1.0}, "reference_norm: expected a positive number with"),
        ({"reference_norm": 10**400}, "reference_norm: expected a positive number"),
        ({"sites": ["mlp.3"]}, "sites: expected a point of a layer"),
        ({"sites": []}, "sites: expected distinct sites"),
    ],
)
def test_a_bad_option_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(native(tmp_path)), **options)


# Buffers


def test_features_past_the_sae_and_meta_are_left_alone(tmp_path: Path) -> None:
    module = inspect_module("m", str(native(tmp_path)))
    weights = new_weights(module.sites[0], spare=5)
    before = {name: value.clone() for name, value in weights.named_buffers()}
    load_site(module, module.sites[0], weights)
    for name in ("W_enc", "b_enc", "threshold", "W_dec"):
        assert torch.equal(getattr(weights, name)[F:], before[name][F:])
        assert torch.equal(getattr(weights, name)[:F], sae_tensors()[name])
    assert torch.equal(weights.meta, before["meta"])
    assert torch.equal(weights.norm_limit, before["norm_limit"])


@pytest.mark.parametrize(("d_sae", "d_model"), [(F - 1, D), (F, D + 1)])
def test_buffers_that_do_not_fit_are_refused(
    tmp_path: Path, d_sae: int, d_model: int
) -> None:
    module = inspect_module("m", str(native(tmp_path)))
    weights = SAEWeights(d_sae, d_model, torch.float32, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=f"expected d_in {d_model}, d_out {d_model}, .* d_sae of at"
    ):
        load_site(module, module.sites[0], weights)


def test_the_input_bias_folds_through_the_rounded_encoder(tmp_path: Path) -> None:
    tensors = {k: v for k, v in sae_tensors().items() if k != "threshold"}
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    metadata = {"hook_name": "blocks.0.hook_resid_post"}
    write_json(tmp_path / "cfg.json", {"metadata": metadata})
    module = inspect_module("m", str(tmp_path))
    weights = SAEWeights(F, D, torch.bfloat16, torch.device("cpu"))
    load_site(module, module.sites[0], weights)
    # At x = b_dec the SAE as trained has the pre-activation b_enc, exactly.
    p = weights.W_enc.float() @ tensors["b_dec"] + weights.b_enc
    torch.testing.assert_close(p, tensors["b_enc"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 5, F])
def test_the_size_of_a_chunk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    path = native(tmp_path)
    whole = loaded(inspect_module("m", str(path)))
    monkeypatch.setattr(steering_chunks, "CHUNK_BYTES", 4 * D * rows)
    chunked = loaded(inspect_module("m", str(path)))
    for name, value in whole.named_buffers():
        assert torch.equal(value, getattr(chunked, name)), name


def resident_bytes() -> int:
    """Anonymous memory of this process: mapped files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("no RssAnon in /proc/self/status")


def test_loading_holds_a_few_chunks_and_no_second_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering_chunks, "CHUNK_BYTES", 2 << 20)
    d_sae, d_model = 16384, 1024
    largest = 4 * d_sae * d_model
    tensors = {
        "W_enc": torch.ones(d_model, d_sae),
        "b_enc": torch.zeros(d_sae),
        "W_dec": torch.ones(d_sae, d_model),
        "b_dec": torch.ones(d_model),
    }
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    del tensors
    metadata = {"hook_name": "blocks.0.hook_resid_post"}
    write_json(tmp_path / "cfg.json", {"metadata": metadata})
    layout = read_layout("m", str(tmp_path)).sites[0]
    assert isinstance(layout, fold.SAELayout)
    weights = new_weights(layout.site)
    gc.collect()
    before, grown = resident_bytes(), []
    copy = torch.ones(largest // 4)
    assert resident_bytes() - before > 0.9 * largest, "the measure sees no copy"
    del copy

    def sample(_: int) -> None:
        grown.append(resident_bytes() - before)

    with open_tensors(tmp_path / "sae_weights.safetensors") as file:
        fold.fold_sae(layout, file, weights, sample)
    assert len(grown) > 1
    # None if the chunks fit into memory that was freed before.
    assert max(grown) < 0.4 * largest


def test_a_module_that_changed_since_it_was_inspected_is_refused(
    tmp_path: Path,
) -> None:
    path = native(tmp_path)
    module = inspect_module("m", str(path))
    edit_manifest(path, lambda m: m["sites"][0].update(activation="relu"))
    with pytest.raises(ValueError, match="no longer hold the site that was inspected"):
        loaded(module)


def test_a_module_survives_json_and_still_loads(tmp_path: Path) -> None:
    module = inspect_module("m", str(native(tmp_path)), sites=["resid_post.3"])
    again = ModuleInfo.from_json(json.loads(json.dumps(module.to_json())))
    assert again == module
    assert torch.equal(loaded(again).W_dec, sae_tensors()["W_dec"])


@pytest.mark.parametrize(
    "key", ["post_block.3", "blocks.3.hook_resid_post", ("resid_post", 3)]
)
def test_save_native_takes_arrays_and_the_names_of_sites(
    tmp_path: Path, key: Any
) -> None:
    tensors = {name: value.numpy() for name, value in sae_tensors().items()}
    save_native(tmp_path / "named", {key: tensors})
    save_native(tmp_path / "placed", {(3, HookPoint.POST_BLOCK): sae_tensors()})
    for file in (tmp_path / "placed").iterdir():
        assert (tmp_path / "named" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"post_blok.3": {}}, "^sites: found 'post_blok.3', expected HOOK.LAYER"),
        ({(3, "resid"): {}}, "^sites: found 'resid.3', expected HOOK.LAYER"),
        ({3: {}}, "^sites: found 3, expected HOOK.LAYER"),
        (
            {"post_block.3": sae_tensors(), (3, "post_block"): sae_tensors()},
            "^sites: found post_block.3 twice",
        ),
        (
            {"post_block.3": {**sae_tensors(), "b_dec": [0.0]}},
            "^post_block.3: b_dec: expected a floating tensor, found a list",
        ),
        (
            {"post_block.3": {**sae_tensors(), "activation": "gelu"}},
            "^post_block.3: activation: found 'gelu', expected one of relu, jumprelu",
        ),
    ],
)
def test_save_native_refuses_by_name(tmp_path: Path, sites: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_native(tmp_path, sites)
