# SPDX-License-Identifier: Apache-2.0
"""Files that two readers would understand differently are refused by name."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_reference import D, F, tensor, write_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vllm.model_executor.model_loader.sae_loader import inspect_module, save_native

STATE = {
    "W_enc": tensor(D, F, seed=0),
    "W_dec": tensor(F, D, seed=1),
    "b_enc": tensor(F, seed=2),
    "b_dec": tensor(D, seed=3),
}
CONFIG: dict[str, Any] = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": F,
    "dtype": "float32",
    "apply_b_dec_to_input": False,
    "normalize_activations": "none",
    "metadata": {"hook_name": "blocks.1.hook_resid_post", "sae_lens_version": "6.0.0"},
}
FILE = "sae_weights.safetensors"


def module(path: Path) -> Path:
    """An SAE in SAELens's format."""
    path.mkdir(exist_ok=True)
    write_json(path / "cfg.json", CONFIG)
    (path / FILE).write_bytes(save(STATE))
    return path


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def joined(header: str, data: bytes) -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + data


def overlapping(header: dict[str, Any], data: bytes) -> bytes:
    header["W_dec"]["data_offsets"] = header["W_enc"]["data_offsets"]
    return joined(json.dumps(header), data)


def with_a_hole(header: dict[str, Any], data: bytes) -> bytes:
    for entry in header.values():
        entry["data_offsets"] = [8 + at for at in entry["data_offsets"]]
    return joined(json.dumps(header), bytes(8) + data)


def with_more_behind(header: dict[str, Any], data: bytes) -> bytes:
    return joined(json.dumps(header), data + bytes(8))


def with_a_name_twice(header: dict[str, Any], data: bytes) -> bytes:
    again = json.dumps({"W_dec": header["W_dec"]})
    return joined(f"{json.dumps(header)[:-1]}, {again[1:]}", data)


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_module("m", str(path))


def test_the_file_itself_is_read(tmp_path: Path) -> None:
    assert inspect_module("m", str(module(tmp_path / "m"))).sites[0].d_sae == F


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overlapping, r"W_\w+: begins at byte \d+ of the data, expected \d+"),
        (with_a_hole, r": begins at byte 8 of the data, expected 0"),
        (with_more_behind, r"found \d+ bytes of data, expected \d+"),
        (with_a_name_twice, "'W_dec' is given twice, expected once"),
    ],
)
def test_a_safetensors_file_gives_each_byte_to_one_tensor(
    tmp_path: Path, change: Any, message: str
) -> None:
    path = module(tmp_path / "m") / FILE
    path.write_bytes(change(*parts(path.read_bytes())))
    if change is not with_a_name_twice:
        with pytest.raises(SafetensorError), safe_open(path, "pt"):
            pass
    refused(path.parent, f"{FILE}: .*{message}")


def test_a_configuration_has_each_key_once(tmp_path: Path) -> None:
    path = module(tmp_path / "m") / "cfg.json"
    for text in (
        json.dumps(CONFIG)[:-1] + ', "architecture": "jumprelu"}',
        json.dumps(CONFIG).replace('{"hook', '{"hook_name": "blocks.0.x", "hook'),
    ):
        path.write_text(text)
        refused(path.parent, "cfg.json: .*'(architecture|hook_name)' is given twice")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_file_has_each_member_once(tmp_path: Path) -> None:
    dictionary = tmp_path / "dictionary"
    dictionary.mkdir()
    config = {"dict_class": "AutoEncoder", "layer": 1}
    write_json(dictionary / "config.json", {"trainer": config})
    state = {
        "encoder.weight": STATE["W_enc"].T,
        "encoder.bias": STATE["b_enc"],
        "decoder.weight": STATE["W_dec"].T,
        "bias": STATE["b_dec"],
    }
    torch.save(state, dictionary / "ae.pt")
    inspect_module("m", str(dictionary))
    with zipfile.ZipFile(dictionary / "ae.pt", "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data/0"))
        archive.writestr(name, archive.read(name)[::-1])
    refused(dictionary, "ae.pt: '.*data/0' is there twice, expected once")


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("standard", "threshold"),
        ("standard", "r_mag"),
        ("topk", "threshold"),
        ("jumprelu", "W_skip"),
        ("jumprelu", "log_threshold"),
    ],
)
def test_weights_of_another_architecture_than_the_stated_are_refused(
    architecture: str, name: str, tmp_path: Path
) -> None:
    path = module(tmp_path)
    write_json(path / "cfg.json", {**CONFIG, "architecture": architecture, "k": 3})
    own = {"threshold": torch.ones(F)} if architecture == "jumprelu" else {}
    (path / FILE).write_bytes(save({**STATE, **own}))
    inspect_module("m", str(path))
    (path / FILE).write_bytes(save({**STATE, **own, name: torch.ones(F)}))
    refused(path, f"{FILE}: {name}: expected no such tensor, since cfg.json says")


@pytest.mark.parametrize(
    ("key", "hook"),
    [
        ("center_writing_weights", "hook_resid_post"),
        ("center_writing_weights", "hook_mlp_out"),
        ("refactor_factored_attn_matrices", "attn.hook_z"),
    ],
)
def test_an_sae_of_changed_weights_of_the_model_is_refused(
    key: str, hook: str, tmp_path: Path
) -> None:
    path = module(tmp_path)
    for value in (False, True):
        metadata = {
            "hook_name": f"blocks.1.{hook}",
            "model_from_pretrained_kwargs": {key: value, "fold_ln": True},
        }
        write_json(path / "cfg.json", {**CONFIG, "metadata": metadata})
        if not value:
            inspect_module("m", str(path))
    refused(path, f"model_from_pretrained_kwargs: {key}: expected false")


def test_a_transcoder_that_subtracts_the_output_bias_is_refused(tmp_path: Path) -> None:
    path = module(tmp_path)
    points = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.mlp_out"}
    kind = {"architecture": "transcoder", "d_out": D, "metadata": points}
    write_json(path / "cfg.json", {**CONFIG, **kind})
    inspect_module("m", str(path))
    write_json(path / "cfg.json", {**CONFIG, **kind, "apply_b_dec_to_input": True})
    refused(path, "apply_b_dec_to_input: expected false for a transcoder, found True")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bfloat16])
def test_k_is_the_same_number_in_any_type(dtype: torch.dtype, tmp_path: Path) -> None:
    path = module(tmp_path)
    write_json(path / "cfg.json", {**CONFIG, "architecture": "topk", "k": 3})
    (path / FILE).write_bytes(save({**STATE, "k": torch.tensor(3, dtype=dtype)}))
    assert inspect_module("m", str(path)).sites[0].k == 3
    (path / FILE).write_bytes(save({**STATE, "k": torch.tensor(4, dtype=dtype)}))
    refused(path, f"cfg.json: k: expected 4, which {FILE} has for k, found 3")


def test_k_is_at_most_the_number_of_features(tmp_path: Path) -> None:
    path = module(tmp_path)
    old = {"activation_fn": "topk", "metadata": CONFIG["metadata"]}
    for k in (F, F + 1):
        kwargs = {"activation_fn_kwargs": {"k": k}}
        write_json(path / "cfg.json", {**CONFIG, **old, **kwargs})
        if k == F:
            assert inspect_module("m", str(path)).sites[0].k == k
    refused(path, f"k: expected at most {F}, found {F + 1}")
    native = {**STATE, "W_enc": tensor(F, D, seed=0), "activation": "topk", "k": F + 1}
    with pytest.raises(ValueError, match=f"k: expected at most {F}, found {F + 1}"):
        save_native(tmp_path / "native", {"post_block.1": native})
