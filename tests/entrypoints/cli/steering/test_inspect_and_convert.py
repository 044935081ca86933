# SPDX-License-Identifier: Apache-2.0
"""The command line: `inspect` and `convert`."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm.config.steering import Activation, SiteInfo
from vllm.config.steering_points import HookPoint
from vllm.entrypoints.cli.steering import convert
from vllm.entrypoints.cli.steering.inspect import ranks_of, show_ranks
from vllm.model_executor.model_loader.sae_formats.native import save_native
from vllm.model_executor.model_loader.sae_loader import inspect_module
from vllm_steering_cli.main import main

D, F = 8, 24
EXAMPLES = Path(__file__).parents[4] / "examples"


def gated(path: Path) -> Path:
    """A SAELens directory whose every fold is used."""
    path.mkdir()
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "W_enc": tensor(D, F),
        "W_dec": tensor(F, D),
        "b_dec": tensor(D),
        "r_mag": tensor(F),
        "b_mag": tensor(F),
        "b_gate": tensor(F),
    }
    save_file(tensors, path / "sae_weights.safetensors")
    cfg: dict[str, Any] = {
        "architecture": "gated",
        "metadata": {"hook_name": "blocks.2.hook_resid_mid", "model_name": "tiny"},
    }
    (path / "cfg.json").write_text(json.dumps(cfg))
    return path


def test_inspect_shows_sites_folds_and_digest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = gated(tmp_path / "sae")
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert inspect_module("m", str(path)).digest in out
    assert "post_attn.2" in out
    assert "d_in 8, d_sae 24, jumprelu" in out
    assert "gate into threshold and W_enc" in out
    assert "input bias into b_enc" in out


def test_inspect_shows_the_memory_of_each_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(gated(tmp_path / "sae"))
    assert main(["inspect", path, "--tp", "4"]) == 0
    assert (
        "on each of 4 ranks: 0.0 MiB replicated; it cannot be sharded: "
        f"found {F} features and {D} columns, expected multiples of 64\n"
    ) in capsys.readouterr().out
    wide = {"W_enc": torch.ones(64, 32), "W_dec": torch.ones(64, 32)}
    wide |= {"b_enc": torch.zeros(64), "b_dec": torch.zeros(32)}
    save_native(tmp_path / "wide", {(2, "post_block"): wide})
    assert main(["inspect", str(tmp_path / "wide"), "--tp", "2", "--json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["sites"][0]["ranks"]
    assert ranks == {
        "tp": 2,
        "can_shard": True,
        "unit": 32,
        "auto": dict.fromkeys(("16_bit", "32_bit", "16_bit_peer_memory"), "replicate"),
        "bytes_16_bit_replicated": 2 * 2 * 64 * 32 + 4 * (2 * 64 + 32),
        "bytes_16_bit_sharded": 2 * 64 * 32 + 2 * (2 * 64 + 32) + 4 * 64,
        "bytes_32_bit_replicated": 2 * 4 * 64 * 32 + 4 * (2 * 64 + 32),
        "bytes_32_bit_sharded": 4 * 64 * 32 + 2 * (2 * 64 + 32) + 4 * 64,
        "bytes_exchange": 0,
    }


def test_inspect_adds_up_what_ranks_hold_of_several_sites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In units of 64 features, so that MiB have one decimal."""
    features, width = 16384, 32
    one = {"W_enc": torch.ones(features, width), "W_dec": torch.ones(features, width)}
    one |= {"b_enc": torch.zeros(features), "b_dec": torch.zeros(width)}
    save_native(tmp_path / "two", {(at, "post_block"): one for at in (2, 5)})
    assert main(["inspect", str(tmp_path / "two"), "--tp", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("on each of 2 ranks: 2.1 MiB replicated, 1.1 MiB sharded") == 2
    total = "on each of 2 ranks: 4.3 MiB replicated, 2.3 MiB sharded"
    assert f"all sites      {total}\n" in said
    assert "once an engine" not in said  # `auto` copies both


@pytest.mark.parametrize(
    ("d_sae", "auto", "room"),
    [
        (116736, "shard", 59.8),  # each rank reads 256.5 MiB less
        (116736 - 512, "replicate", 0.0),  # 255.4 MiB
        (116736 + 256, "replicate", 0.0),  # what the exchanging kernels cannot divide
    ],
)
def test_inspect_shows_memory_for_an_exchange_only_where_auto_shares(
    d_sae: int, auto: str, room: float, capsys: pytest.CaptureFixture[str]
) -> None:
    site = SiteInfo(2, HookPoint.POST_BLOCK, 2304, d_sae, Activation.JUMPRELU)
    ranks = ranks_of(site, 2)
    assert ranks["can_shard"]
    assert ranks["auto"]["16_bit_peer_memory"] == auto
    assert round(ranks["bytes_exchange"] / 2**20, 1) == room
    show_ranks(ranks, {})
    said = capsys.readouterr().out
    assert ("MiB more, once an engine" in said) == (auto == "shard")


def test_inspect_says_what_ranks_take_to_store(
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = SiteInfo(2, HookPoint.POST_BLOCK, 5376, 131072, Activation.JUMPRELU)
    for tp, auto, room in (
        (2, "with VLLM_STEERING_PEER_MEMORY=0", "on GPUs"),
        (4, "with VLLM_STEERING_PEER_MEMORY=0", "on GPUs"),
        (8, "without VLLM_STEERING_PEER_MEMORY=1", "with VLLM_STEERING_PEER_MEMORY=1"),
    ):
        show_ranks(ranks_of(site, tp), {})
        said = capsys.readouterr().out
        assert f"(auto: shard, on GPUs {auto} replicate)" in said
        assert f"{'':15}{room} " in said and "MiB more, once an engine" in said


def test_a_transcoder_from_before_the_gain_stays_one_when_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "gemma-scope-2b-pt-transcoders/layer_3"
    source.mkdir(parents=True)
    ones = np.ones(F, np.float32)
    matrix = np.eye(F, D, dtype=np.float32)
    arrays = {"W_enc": matrix.T, "W_dec": matrix, "b_dec": ones[:D]}
    np.savez(source / "params.npz", b_enc=ones, threshold=ones, **arrays)
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    for path in (source, tmp_path / "out"):
        assert main(["inspect", str(path)]) == 0
        out = capsys.readouterr().out
        assert f"writes mlp_out, d_out {D}" in out
        assert "folds gain of the norm before the MLP" in out


def test_inspect_shows_a_vector_as_a_vector(capsys: pytest.CaptureFixture[str]) -> None:
    vector = EXAMPLES / "smollm2" / "cheerful.safetensors"
    assert main(["inspect", str(vector)]) == 0
    assert "post_block.15  a vector of 576 numbers" in capsys.readouterr().out


def test_inspect_shows_the_guard_that_a_manifest_sets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", str(EXAMPLES / "smollm2" / "sae")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "reference_norm 168.19" in lines and "norm_guard     10.0" in lines


def test_inspect_prints_json_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(gated(tmp_path / "sae")), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["format"] == "sae_lens"
    assert data["model"] == "tiny"
    (site,) = data["sites"]
    assert site["bytes_32_bit"] == 4 * (2 * F * D + 2 * F + D)


def test_a_refused_module_is_one_line_and_status_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {tmp_path / 'nothing'}: ")
    assert captured.err.count("\n") == 1


def test_convert_writes_the_folded_sae(tmp_path: Path) -> None:
    path = gated(tmp_path / "sae")
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    source = load_file(path / "sae_weights.safetensors")
    found = load_file(tmp_path / "out/post_attn.2.safetensors")
    gain = source["r_mag"].exp()
    torch.testing.assert_close(found["W_enc"], source["W_enc"].T * gain[:, None])
    torch.testing.assert_close(
        found["threshold"], (source["b_mag"] - gain * source["b_gate"]).clamp(min=0)
    )
    assert torch.equal(found["W_dec"], source["W_dec"])
    assert inspect_module("m", str(tmp_path / "out")).sites == (
        inspect_module("m", str(path)).sites
    )


def test_convert_to_16_bit_changes_the_matrices_only(tmp_path: Path) -> None:
    path = gated(tmp_path / "sae")
    out = tmp_path / "out"
    arguments = ["convert", str(path), str(out), "--dtype", "bfloat16"]
    assert main(arguments) == 0
    found = load_file(out / "post_attn.2.safetensors")
    kinds = {name: value.dtype for name, value in found.items()}
    assert kinds.pop("W_enc") == kinds.pop("W_dec") == torch.bfloat16
    assert set(kinds.values()) == {torch.float32}


def test_convert_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = gated(tmp_path / "sae")
    assert main(["convert", str(path), str(path)]) == 1
    assert "expected a new or empty directory" in capsys.readouterr().err


def test_convert_to_a_file_says_that_it_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = gated(tmp_path / "sae")
    assert main(["convert", str(path), str(path / "cfg.json")]) == 1
    assert "found a file, expected a new or empty" in capsys.readouterr().err


@pytest.mark.parametrize("is_there", [False, True])
def test_convert_to_a_full_disk_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_there: bool,
) -> None:
    path, out = gated(tmp_path / "sae"), tmp_path / "out"
    if is_there:
        out.mkdir()

    def save(target: Path, *args: Any, **options: Any) -> None:
        save_native(target, *args, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(convert, "save_native", save)
    assert main(["convert", str(path), str(out)]) == 1
    error = f"error: {out}: cannot be written: No space left on device\n"
    assert capsys.readouterr().err == error
    assert out.exists() == is_there and not any(tmp_path.glob("out/*"))


def test_inspect_finds_what_is_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = gated(tmp_path / "sae")
    file = path / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["W_enc"][2, 7] = torch.nan
    save_file(tensors, file)
    assert main(["inspect", str(path)]) == 1
    assert "W_enc" in capsys.readouterr().err


def test_a_hub_path_without_hf_is_told_how_to_write_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", "google/gemma-scope-2b-pt-res/layer_20/width_16k"]) == 1
    said = capsys.readouterr().err
    assert "hf:google/gemma-scope-2b-pt-res/layer_20/width_16k" in said


@pytest.mark.parametrize("model", ["/nope", "./nope", "a/b/c", "{here}", "{file}"])
def test_probe_says_what_a_model_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    path = gated(tmp_path / "sae")
    file = path / "cfg.json"
    given = model.format(here=tmp_path, file=file)
    assert main(["probe", str(path), "--model", given]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: --model {given}: ")
    assert "google/gemma-2-2b" in said
