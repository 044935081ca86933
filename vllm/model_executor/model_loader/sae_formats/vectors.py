# SPDX-License-Identifier: Apache-2.0
"""Steering vectors: one direction `[D]` per site, added to the residual stream.

Safetensors: one file whose tensors are named `{hook}.{layer}`, for example
`post_block.20` (or any other spelling of a site); the string metadata may hold `format`
("vllm-steering-vectors") and `model`, the name of the model it was made for.

Bare tensors: one `.npy`, `.pt` or `.safetensors` file with one tensor, `[D]` for one
site or `[n, D]` for the n sites that the operator names, in that order.

GGUF: control vectors as repeng and llama.cpp write them (architecture
`controlvector`). `direction.{layer}` is added to the output of that decoder layer,
counted from zero, which is `post_block`. Source: https://github.com/vgel/repeng
"""

from __future__ import annotations

import re

from vllm.config.steering import SiteInfo
from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_formats.layout import (
    LayoutError,
    Location,
    ModuleLayout,
    VectorLayout,
)
from vllm.model_executor.model_loader.sae_formats.names import parse_site_name
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors
from vllm.model_executor.model_loader.sae_formats.tensor_types import TensorFile

SAFETENSORS_FORMAT = "vllm-steering-vectors"
GGUF_ARCHITECTURE = "controlvector"


def matches_safetensors(location: Location) -> bool:
    return location.root.is_file() and location.root.suffix == ".safetensors"


def matches_gguf(location: Location) -> bool:
    return location.root.is_file() and location.root.suffix == ".gguf"


def matches_bare(location: Location) -> bool:
    path = location.root
    if not path.is_file() or path.suffix not in (".npy", ".pt", ".pth", ".safetensors"):
        return False
    try:
        with open_tensors(path) as tensors:
            names = list(tensors.infos)
            return len(names) == 1 and parse_site_name(names[0]) is None
    except LayoutError:
        return False


def read_bare(location: Location) -> ModuleLayout:
    """Layout of one tensor whose name does not state its sites."""
    with open_tensors(location.root) as tensors:
        ((name, info),) = tensors.infos.items()
        shape = info.shape
        if len(shape) not in (1, 2) or 0 in shape:
            raise LayoutError(
                f"{tensors.label}: {name}: expected a steering vector [D], or [n, D] "
                f"for n sites, found shape {list(shape)}"
            )
        count = shape[0] if len(shape) == 2 else 1
        if len(location.given_sites) != count:
            raise LayoutError(
                f"{tensors.label}: a vector of shape {list(shape)} does not say its "
                f"site: expected {count} in the option sites (--site), such as "
                f"post_block.20, found {len(location.given_sites)}"
            )
        rows = [None] if len(shape) == 1 else range(count)
        sites = tuple(
            VectorLayout(SiteInfo(layer, hook, shape[-1], 1), tensors.label, name, row)
            for (layer, hook), row in zip(location.given_sites, rows, strict=True)
        )
    return ModuleLayout(kind="vectors", sites=sites)


def read_safetensors(location: Location) -> ModuleLayout:
    """Layout of a safetensors file of steering vectors."""
    with open_tensors(location.root) as tensors:
        stated = tensors.metadata.get("format", SAFETENSORS_FORMAT)
        # Libraries write "pt" there for a file of PyTorch tensors.
        if stated not in (SAFETENSORS_FORMAT, "pt"):
            raise LayoutError(
                f"{tensors.label}: metadata: format: expected {SAFETENSORS_FORMAT!r}, "
                f"found {stated!r}"
            )
        sites = {}
        for name in tensors.infos:
            if (site := parse_site_name(name)) is None or site in sites:
                raise LayoutError(
                    f"{tensors.label}: {name}: expected one tensor for each site, "
                    "named like post_block.20"
                )
            sites[site] = name
        return _layout(tensors, sites, tensors.metadata.get("model"))


def read_gguf(location: Location) -> ModuleLayout:
    """Layout of a GGUF control vector."""
    with open_tensors(location.root) as tensors:
        architecture = tensors.metadata.get("general.architecture")
        if architecture != GGUF_ARCHITECTURE:
            raise LayoutError(
                f"{tensors.label}: general.architecture: expected "
                f"{GGUF_ARCHITECTURE!r}, found {architecture!r}"
            )
        sites = {}
        for name in tensors.infos:
            if (match := re.fullmatch(r"direction\.([0-9]{1,9})", name)) is None:
                raise LayoutError(
                    f"{tensors.label}: {name}: expected tensors named direction.LAYER"
                )
            sites[int(match[1]), HookPoint.POST_BLOCK] = name
        return _layout(tensors, sites, tensors.metadata.get("controlvector.model_hint"))


def _layout(
    tensors: TensorFile, names: dict[tuple[int, HookPoint], str], model: str | None
) -> ModuleLayout:
    if not names:
        raise LayoutError(f"{tensors.label}: expected steering vectors, found none")
    sites = []
    for (layer, hook), name in sorted(names.items()):
        shape = tensors.infos[name].shape
        if len(shape) != 1 or not shape[0]:
            raise LayoutError(
                f"{tensors.label}: {name}: expected a vector, found shape {list(shape)}"
            )
        site = SiteInfo(layer=layer, hook=hook, d_in=shape[0], d_sae=1)
        sites.append(VectorLayout(site, tensors.label, name))
    return ModuleLayout(kind="vectors", sites=tuple(sites), model=model)
