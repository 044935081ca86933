# SPDX-License-Identifier: Apache-2.0
"""The file formats of SAEs and steering vectors, one small module each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vllm.config.steering_points import HookPoint
from vllm.model_executor.model_loader.sae_formats import (
    attention_z,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    llamascopium,
    native,
    sae_lens,
    sparsify,
    torch_files,
    transcoder_set,
    vectors,
)
from vllm.model_executor.model_loader.sae_formats.layout import (
    LayoutError,
    Location,
    ModuleLayout,
    SAELayout,
)
from vllm.model_executor.model_loader.sae_formats.tensor_types import why_no_file


@dataclass(frozen=True)
class Format:
    """One file format: how it is recognised and how its layout is read."""

    name: str
    files: str
    matches: Callable[[Location], bool]
    read: Callable[[Location], ModuleLayout]


# The first format that matches reads the module.
FORMATS = (
    Format("native", "manifest.json and safetensors", native.matches, native.read),
    Format(
        "sae_lens",
        f"{sae_lens.CONFIG} and {sae_lens.WEIGHTS}",
        sae_lens.matches,
        sae_lens.read,
    ),
    Format(
        "gemma_scope",
        gemma_scope.NPZ,
        gemma_scope.matches_npz,
        gemma_scope.read_npz,
    ),
    Format(
        "gemma_scope_2",
        f"{gemma_scope.SAFETENSORS} and {gemma_scope.CONFIG}",
        gemma_scope.matches_safetensors,
        gemma_scope.read_safetensors,
    ),
    Format(
        "llama_scope",
        f"{llama_scope.CONFIG} and {llama_scope.WEIGHTS}",
        llama_scope.matches,
        llama_scope.read,
    ),
    Format(
        "llamascopium",
        f"{llamascopium.CONFIG} and {llamascopium.WEIGHTS}",
        llamascopium.matches,
        llamascopium.read,
    ),
    Format(
        "sparsify",
        f"{sparsify.CONFIG} and {sparsify.WEIGHTS}",
        sparsify.matches,
        sparsify.read,
    ),
    Format(
        "dictionary_learning",
        f"{dictionary_learning.CONFIG} and {dictionary_learning.WEIGHTS}",
        dictionary_learning.matches,
        dictionary_learning.read,
    ),
    Format(
        "transcoder_set",
        f"layer_N.safetensors files beside {transcoder_set.CONFIG}",
        transcoder_set.matches,
        transcoder_set.read,
    ),
    Format(
        "attention_z",
        "NAME.pt and NAME_cfg.json",
        attention_z.matches,
        attention_z.read,
    ),
    Format(
        "bare_vectors",
        "one .npy, .pt or .safetensors tensor [D] or [sites, D], with sites",
        vectors.matches_bare,
        vectors.read_bare,
    ),
    Format(
        "qwen_scope",
        "layerN.sae.pt files",
        torch_files.matches_qwen,
        torch_files.read_qwen,
    ),
    Format(
        "goodfire",
        "one .pt or .pth file",
        torch_files.matches_goodfire,
        torch_files.read_goodfire,
    ),
    Format(
        "vectors",
        "a .safetensors file of steering vectors",
        vectors.matches_safetensors,
        vectors.read_safetensors,
    ),
    Format(
        "control_vector",
        "a .gguf control vector",
        vectors.matches_gguf,
        vectors.read_gguf,
    ),
)


def recognise(location: Location) -> Format:
    """The format of the files at a location, or of all its subdirectories.

    Raises:
        LayoutError: no known format; says what was found and what comes close.
    """
    for candidate in FORMATS:
        if candidate.matches(location):
            return candidate
    for candidate in FORMATS:
        if _children(candidate, location):
            return candidate
    _refuse_no_files(location.root)
    close = [f"{f.name} ({f.files})" for f in _closest(location)]
    expected = ", ".join(close) or ", ".join(f.name for f in FORMATS)
    raise LayoutError(
        f"no known format: found {location.listing()}, expected one of: {expected}; "
        "docs/features/formats.md lists the files of each format"
    )


def _refuse_no_files(root: Path) -> None:
    """Refuse a directory in which something else stands for a file of a format."""
    names = {name for f in FORMATS for name in f.files.split() if "." in name}
    for name in sorted(names):
        place = root / name
        if not place.is_file() and (place.exists() or place.is_symlink()):
            raise LayoutError(f"{name}: {why_no_file(place)}")


def _closest(location: Location) -> list[Format]:
    """The formats of which one file is there; none where names are not shown."""
    if not (location.listed and location.root.is_dir()):
        return []
    names = {path.name for path in location.entries() if "." in path.name}
    return [f for f in FORMATS if names & set(f.files.split())]


def _children(fmt: Format, location: Location) -> list[Location]:
    """The subdirectories that hold a one-site module of this format, by name."""
    if not location.root.is_dir():
        return []
    children = (
        replace(
            location,
            root=path,
            origin=f"{location.origin.rstrip('/')}/{path.name}",
            given=None,
            given_sites=(),
        )
        for path in location.entries()
        if path.is_dir()
    )
    return [child for child in children if fmt.matches(child)]


def read_layout(fmt: Format, location: Location) -> ModuleLayout:
    """The layout of a module: of its files, or of its subdirectories together.

    Raises:
        LayoutError: as the format's reader; or two subdirectories for one site.
    """
    if fmt.matches(location):
        return fmt.read(location)
    entries: dict[tuple[int, HookPoint], SAELayout] = {}
    for child in _children(fmt, location):
        name = child.root.name
        try:
            layout = fmt.read(child)
        except LayoutError as error:
            raise LayoutError(f"{name}/{error}") from error
        for entry in layout.sites:
            key = (entry.site.layer, entry.site.hook)
            if key in entries:
                raise LayoutError(
                    f"{name}: {entry.site.name} is also in {entries[key].file}; give "
                    "the path of one subdirectory"
                )
            assert isinstance(entry, SAELayout)
            entries[key] = replace(entry, file=f"{name}/{entry.file}")
    sites = [entries[key] for key in sorted(entries, key=lambda k: (k[0], k[1].value))]
    return ModuleLayout(kind="sae", sites=tuple(sites))
