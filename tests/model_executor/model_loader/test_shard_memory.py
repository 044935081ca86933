# SPDX-License-Identifier: Apache-2.0
"""A rank that shares an SAE loads it with the memory of its part and a few slices."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_scope_files import save_llama_scope
from sae_reference import write_json
from safetensors.torch import save_file

from vllm.model_executor.model_loader.sae_formats.native import save_native

F, D, K, RANKS = 16384, 256, 32, 4
MATRIX = 4 * F * D  # bytes
CHUNK = MATRIX // 16
# Chunks that are alive at once, with what Python and the allocator need beside them.
SPARE = 8 * CHUNK + (2 << 20)
PER_FEATURE = {"b_enc": torch.zeros(F), "threshold": torch.ones(F)}

generator = torch.Generator().manual_seed(1)
W_enc, W_dec = torch.randn(2, F, D, generator=generator)
SKIP = torch.randn(D, D, generator=generator)
b_dec = torch.ones(D)
PLAIN = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec, **PER_FEATURE}
TURNED = {**PLAIN, "W_enc": W_enc.T.contiguous()}


def native(path: Path) -> None:
    save_native(path, {(3, "post_block"): {**PLAIN, "activation": "jumprelu"}})


def skip_transcoder(path: Path) -> None:
    content = {**PLAIN, "W_skip": SKIP, "activation": "jumprelu", "hook_out": "mlp_out"}
    save_native(path, {(3, "mlp_in"): content})


def sae_lens(path: Path) -> None:
    save_file(TURNED, path / "sae_weights.safetensors")
    config = {"architecture": "jumprelu", "d_in": D, "d_sae": F, "dtype": "float32"}
    hook = {"hook_name": "blocks.5.hook_resid_post", "model_name": "tiny"}
    write_json(path / "cfg.json", {**config, "metadata": hook})


def gemma_scope(path: Path, save: Callable[..., None] = np.savez) -> None:
    save(path / "params.npz", **{name: t.numpy() for name, t in TURNED.items()})


def compressed(path: Path) -> None:
    gemma_scope(path, np.savez_compressed)


def llama_scope(path: Path) -> None:
    save_llama_scope(path, W_enc, PER_FEATURE["b_enc"], W_dec, b_dec, top_k=K)


def dictionary_learning(path: Path) -> None:
    state = {
        "encoder.weight": W_enc,
        "encoder.bias": PER_FEATURE["b_enc"],
        "decoder.weight": W_dec.T.contiguous(),
        "bias": b_dec,
    }
    config = {"dict_class": "AutoEncoder", "layer": 8, "activation_dim": D}
    write_json(path / "config.json", {"trainer": config, "buffer": {"io": "out"}})
    torch.save(state, path / "ae.pt")


def qwen_scope(path: Path) -> None:
    names = ("W_enc", "b_enc", "b_dec")
    state = {"W_dec": W_dec.T, **{name: PLAIN[name] for name in names}}
    torch.save(state, path / "layer5.sae.pt")


WRITERS: dict[str, Callable[[Path], None]] = {
    "native": native,
    "skip transcoder": skip_transcoder,
    "SAELens": sae_lens,
    "Gemma Scope": gemma_scope,
    "Llama Scope": llama_scope,
    "dictionary_learning": dictionary_learning,
    "Qwen-Scope": qwen_scope,
    "compressed npz": compressed,
}
# Every kind of file, and of matrix: features first, last, and transposed when saved.
QUICK = ("native", "SAELens", "Gemma Scope", "Qwen-Scope", "compressed npz")
FOLDERS = {
    "Gemma Scope": "gemma-scope-2b-pt-res/layer_20/width_16k/l0_71",
    "compressed npz": "gemma-scope-2b-pt-res/layer_21/width_16k/l0_71",
    "Qwen-Scope": f"SAE-Res-Qwen3-1.7B-Base-W16K-L0_{K}",
}


def measure(names: tuple[str, ...], root: Path) -> dict[str, Any]:
    """What `load_memory` finds for these formats."""
    modules = []
    for name in names:
        path = root / FOLDERS.get(name, name.replace(" ", "-"))
        path.mkdir(parents=True)
        WRITERS[name](path)
        modules.append([name, str(path), None])
    numbers = [str(number) for number in (RANKS, SPARE, CHUNK)]
    script = Path(__file__).with_name("load_memory.py")
    command = [sys.executable, str(script), json.dumps(modules), *numbers]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(
            tuple(name for name in WRITERS if name not in QUICK),
            id="other",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_part_is_loaded_with_its_own_memory(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    assert SPARE < MATRIX  # whoever reads a matrix whole exceeds the limit
    found = measure(names, tmp_path)
    for name, outcome in found.items():
        # A compressed member can only be inflated whole.
        assert outcome["part"] == (name != "compressed npz"), (name, outcome)
        assert not outcome["whole"], (name, outcome)
