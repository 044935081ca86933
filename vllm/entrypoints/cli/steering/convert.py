# SPDX-License-Identifier: Apache-2.0
"""`vllm-steering convert`: writes an SAE in the native layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllm.config.steering import Activation, ModuleInfo, SiteInfo
from vllm.config.steering_json import Json, JsonView
from vllm.config.steering_points import HookPoint
from vllm.entrypoints.cli.steering.inputs import need_sae
from vllm.model_executor.model_loader.sae_formats.layout import ModuleLayout
from vllm.model_executor.model_loader.sae_formats.native import SITE_FLAGS, save_native
from vllm.model_executor.model_loader.sae_formats.tensor_types import FloatType
from vllm.model_executor.model_loader.sae_loader import (
    inspect_module,
    read_layout,
    read_site,
)

SiteName = tuple[int, HookPoint | str]


class LoadedSites(Mapping[SiteName, JsonView]):
    """The sites of a module, each read when it is asked for."""

    def __init__(self, module: ModuleInfo, layout: ModuleLayout, dtype: FloatType):
        self._module = module
        self._declared = layout.declared
        self._dtype = dtype
        self._sites: dict[SiteName, SiteInfo] = {
            (site.layer, site.hook): site for site in module.sites
        }

    def __iter__(self) -> Iterator[SiteName]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, key: SiteName) -> JsonView:
        site = self._sites[key]
        weights = read_site(self._module, site, self._dtype).tensors()
        if site.activation is not Activation.JUMPRELU:
            del weights["threshold"]
        content: Json = {
            **weights,
            "activation": site.activation,
            **self._declared.get(site.name, {}),
        }
        if site.is_transcoder:
            content["hook_out"] = site.out_hook
        for flag in SITE_FLAGS:
            if getattr(site, flag):
                content[flag] = True
        if site.activation is Activation.TOPK:
            content |= {"k": site.k, "topk_relu": site.topk_relu}
        return content


def write(
    folder: str | Path,
    sites: Mapping[SiteName, JsonView],
    module: ModuleInfo,
    layout: ModuleLayout,
) -> None:
    """Write sites as a native directory that keeps what the module's files say."""
    save_native(
        folder,
        sites,
        reference_norm=module.reference_norm,
        skip_token_ids=module.skip_token_ids,
        norm_guard=module.norm_guard,
        model=layout.model,
    )


def convert(path: str, out: str, sites: Sequence[str] | None, dtype: str) -> None:
    """Write an SAE, folded, as a native directory.

    Raises:
        ValueError: the module is refused, is not an SAE, or `out` has files in it.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        found = "files" if target.is_dir() else "a file"
        raise ValueError(f"{out}: found {found}, expected a new or empty directory")
    module = inspect_module("module", path, sites=sites)
    need_sae(path, module)
    layout = read_layout("module", path, sites)
    with _all_or_nothing(target):
        write(target, LoadedSites(module, layout, FloatType(dtype)), module, layout)
    print(f"wrote {len(module.sites)} site(s) to {target}")


@contextmanager
def _all_or_nothing(target: Path) -> Iterator[None]:
    """Leave nothing in a new or empty directory if the block fails.

    Raises:
        ValueError: the directory cannot be written.
    """
    was_there = target.exists()
    try:
        yield
    except BaseException as error:
        if target.is_dir():
            for file in target.iterdir():
                file.unlink()
            if not was_there:
                target.rmdir()
        if isinstance(error, OSError) and _is_of(target, error.filename):
            reason = error.strerror or str(error)
            raise ValueError(f"{target}: cannot be written: {reason}") from None
        raise


def _is_of(target: Path, file: object) -> bool:
    """Whether an error is about the target: the files that are read have names."""
    return file is None or Path(str(file)).is_relative_to(target)
