# SPDX-License-Identifier: Apache-2.0
"""Bare torch files: Qwen-Scope (`layer{N}.sae.pt`) and Goodfire (`...-l{N}.pt`).

Neither subtracts `b_dec`. Both store the encoder as `[F, D]` and the decoder as
`[D, F]`. Qwen-Scope is TopK with ReLU; `k` is in the repository's name
(`SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`). Goodfire's are ReLU SAEs.
Source: https://huggingface.co/collections/Qwen/qwen-scope, huggingface.co/Goodfire
"""

from __future__ import annotations

import re
from pathlib import Path

from vllm.config.steering import Activation, SiteInfo
from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_formats.fold import matrix_shape
from vllm.model_executor.model_loader.sae_formats.layout import (
    LayoutError,
    Location,
    Matrix,
    ModuleLayout,
    SAELayout,
)
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors
from vllm.model_executor.model_loader.sae_formats.tensor_types import TensorFile

_QWEN_FILE = re.compile(r"layer([0-9]{1,9})\.sae\.pt")
_GOODFIRE_FILE = re.compile(r".*-l([0-9]{1,9})\.pth?")
_PARTS = ("weight", "bias")
_GOODFIRE_PREFIXES = (("encoder_linear", "decoder_linear"), ("encoder", "decoder"))


def _torch_files(location: Location) -> list[Path]:
    files = location.entries()
    return [p for p in files if p.suffix in (".pt", ".pth") and p.is_file()]


def matches_qwen(location: Location) -> bool:
    files = _torch_files(location)
    return bool(files) and all(_QWEN_FILE.fullmatch(p.name) for p in files)


def matches_goodfire(location: Location) -> bool:
    return len(_torch_files(location)) == 1


def read_qwen(location: Location) -> ModuleLayout:
    """Layout of one Qwen-Scope file, or of a repository with one file per layer."""
    if (match := re.search(r"L0_([1-9][0-9]{0,8})(?![0-9])", location.origin)) is None:
        raise LayoutError(
            f"{location.origin}: expected a path with the repository's name and k in "
            "it, such as ...-L0_50, found none"
        )
    k = int(match[1])
    layouts = []
    for path in _torch_files(location):
        name = _QWEN_FILE.fullmatch(path.name)
        assert name is not None
        W_dec = Matrix("W_dec", features_last=True)
        with open_tensors(path) as tensors:
            F, D = matrix_shape(tensors, W_dec)
        if k > F:
            raise LayoutError(f"{location.origin}: L0_{k}: expected at most {F}")
        layouts.append(
            SAELayout(
                site=SiteInfo(
                    int(name[1]), HookPoint.POST_BLOCK, D, F, Activation.TOPK, k
                ),
                file=path.name,
                W_enc=Matrix("W_enc"),
                W_dec=W_dec,
            )
        )
    layouts.sort(key=lambda entry: entry.site.layer)
    return ModuleLayout(kind="sae", sites=tuple(layouts))


def read_goodfire(location: Location) -> ModuleLayout:
    """Layout of a Goodfire file, or of a directory with one."""
    (path,) = _torch_files(location)
    match = _GOODFIRE_FILE.fullmatch(path.name)
    stated = (int(match[1]), HookPoint.POST_BLOCK) if match else None
    with open_tensors(path) as tensors:
        encoder, decoder = _goodfire_names(tensors)
        W_dec = Matrix(f"{decoder}.weight", features_last=True)
        F, D = matrix_shape(tensors, W_dec)
    layer, hook = location.site(stated, f"{path.name}: -lN in the file's name")
    layout = SAELayout(
        site=SiteInfo(layer, hook, D, F, Activation.RELU),
        file=path.name,
        W_enc=Matrix(f"{encoder}.weight"),
        W_dec=W_dec,
        b_enc=f"{encoder}.bias",
        b_dec=f"{decoder}.bias",
    )
    return ModuleLayout(kind="sae", sites=(layout,))


def _goodfire_names(tensors: TensorFile) -> tuple[str, str]:
    for encoder, decoder in _GOODFIRE_PREFIXES:
        wanted = {f"{n}.{part}" for n in (encoder, decoder) for part in _PARTS}
        if wanted == set(tensors.infos):
            return encoder, decoder
    found = ", ".join(sorted(tensors.infos)[:12]) or "no tensors"
    raise LayoutError(
        f"{tensors.label}: expected weight and bias of encoder_linear and "
        f"decoder_linear, or of encoder and decoder, found {found}"
    )
