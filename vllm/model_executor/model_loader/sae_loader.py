# SPDX-License-Identifier: Apache-2.0
"""Load SAEs and steering vectors from published file formats.

`inspect_module` reads configurations and headers, checks them and computes the
content digest; `load_site` and `load_vectors` read one site's tensors. Formats are
in `sae_formats/`; every one folds into the canonical SAE of `SAEWeights`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from vllm.config.steering import FeatureUnits, ModuleInfo, SiteInfo
from vllm.config.steering_reader import MAX_FLOAT32
from vllm.model_executor.model_loader.sae_formats import Format, recognise
from vllm.model_executor.model_loader.sae_formats import read_layout as read_files
from vllm.model_executor.model_loader.sae_formats.fold import (
    check_sae,
    check_vector,
    fold_sae,
    read_floats,
    read_vector,
    sae_bytes,
)
from vllm.model_executor.model_loader.sae_formats.fold_host import HostSAE, fold_host
from vllm.model_executor.model_loader.sae_formats.layout import (
    LayoutError,
    Location,
    ModuleLayout,
    SAELayout,
    VectorLayout,
)
from vllm.model_executor.model_loader.sae_formats.names import choose_sites, need_site
from vllm.model_executor.model_loader.sae_formats.native import (
    save_native as save_native,  # users import it from here
)
from vllm.model_executor.model_loader.sae_formats.tensor_files import open_tensors
from vllm.model_executor.model_loader.sae_formats.tensor_types import FloatType
from vllm.model_executor.model_loader.sae_location import (
    LocatedModule,
    locate,
    naming_module,
    resolve_path,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.steering_state import SAEWeights


DIGEST_DOMAIN = "vllm-steering-module-v1"
_HASH_BLOCK = 4 << 20


def site_file(location: Location, entry: SAELayout | VectorLayout) -> Path:
    """The file that holds a site's tensors."""
    return location.root / entry.file if location.root.is_dir() else location.root


def _read_layout(
    location: Location, sites: Sequence[str] | None
) -> tuple[Format, ModuleLayout]:
    """Recognise the format, read the layout, and check every header."""
    if sites is not None:
        given = tuple(need_site(name, "sites") for name in sites)
        only = given[0] if len(given) == 1 else None
        location = replace(location, given=only, given_sites=given)
    fmt = recognise(location)
    layout = choose_sites(read_files(fmt, location), sites, fmt.name)
    for entry in layout.sites:
        with open_tensors(site_file(location, entry)) as tensors:
            if isinstance(entry, SAELayout):
                check_sae(entry, tensors)
            else:
                check_vector(entry, tensors)
    return fmt, layout


def read_layout(
    name: str, path: str, sites: Sequence[str] | None = None
) -> ModuleLayout:
    """What the files of a module say, with every header checked.

    Raises:
        ValueError: as `inspect_module`.
    """
    with naming_module(name, path):
        return _read_layout(resolve_path(path)[0], sites)[1]


def inspect_module(
    name: str,
    path: str,
    *,
    feature_units: FeatureUnits = "native",
    skip_token_ids: Sequence[int] | None = None,
    norm_guard: float | None = None,
    reference_norm: float | None = None,
    sites: Sequence[str] | None = None,
) -> ModuleInfo:
    """Describe a module from its configurations and headers, without loading it.

    Args:
        name: the module's name, for messages.
        path: a local file or directory, `hf:owner/repo[/sub/path][@revision]`, or
            `saelens:RELEASE/SAE_ID[@revision]` for what is in SAELens's list.
        feature_units: what a clamp's value means; part of the digest.
        skip_token_ids: tokens to leave untouched; None for what the module states.
        norm_guard: multiple of the reference norm; None for what the module states.
        reference_norm: typical norm of what the SAE reads; None for what the module
            states.
        sites: e.g. `["post_block.20"]`. Names the site of a module whose files do not
            state it, or selects among the sites of a module that has several.

    Returns:
        The module; `path` has its Hub revision pinned, and `digest` is a SHA-256
        over the weight files and every option that changes their effect.

    Raises:
        ValueError: one line with module, file, tensor, expected and found.
    """
    options = ModuleOptions(
        feature_units, skip_token_ids, norm_guard, reference_norm, sites
    )
    return inspect_files(name, locate(name, path), options)


@dataclass(frozen=True)
class ModuleOptions:
    """What an operator says about a module; see `inspect_module`."""

    feature_units: FeatureUnits = "native"
    skip_token_ids: Sequence[int] | None = None
    norm_guard: float | None = None
    reference_norm: float | None = None
    sites: Sequence[str] | None = None

    def over(self, layout: ModuleLayout) -> ModuleOptions:
        """With what the module's files state where the operator says nothing."""
        found = self
        if self.skip_token_ids is None:
            found = replace(found, skip_token_ids=layout.skip_token_ids)
        if self.norm_guard is None:
            found = replace(found, norm_guard=layout.norm_guard)
        if self.reference_norm is None:
            found = replace(found, reference_norm=layout.reference_norm)
        return found


def inspect_files(
    name: str,
    found: LocatedModule,
    options: ModuleOptions,
    before_hashing: Callable[[int], None] = lambda size: None,
) -> ModuleInfo:
    """As `inspect_module`, for files that `locate` has found.

    Args:
        before_hashing: told the bytes of the weight files once all headers are checked.
    """
    with naming_module(name, found.path):
        location = found.location
        fmt, layout = _read_layout(location, options.sites)
        options = options.over(layout)
        _check_options(layout, options)
        ids = options.skip_token_ids
        hashed = {
            "feature_units": options.feature_units,
            "skip_token_ids": None if ids is None else list(ids),
            "norm_guard": options.norm_guard,
            "reference_norm": options.reference_norm,
        }
        before_hashing(sum(p.stat().st_size for p in _weight_files(location, layout)))
        return ModuleInfo(
            name=name,
            kind=layout.kind,
            path=found.pinned,
            format=fmt.name,
            digest=_digest(location, layout, hashed),
            sites=tuple(entry.site for entry in layout.sites),
            feature_units=options.feature_units,
            skip_token_ids=None if ids is None else tuple(ids),
            norm_guard=options.norm_guard,
            reference_norm=options.reference_norm,
        )


def _check_options(layout: ModuleLayout, options: ModuleOptions) -> None:
    units, ids = options.feature_units, options.skip_token_ids
    if units not in ("native", "unit_decoder"):
        raise LayoutError(
            f"feature_units: expected native or unit_decoder, found {units!r}"
        )
    if any(type(i) is not int or i < 0 for i in ids or ()):
        raise LayoutError(f"skip_token_ids: expected token ids, found {ids!r}")
    numbers = {
        "norm_guard": options.norm_guard,
        "reference_norm": options.reference_norm,
    }
    for name, value in numbers.items():
        if value is None:
            continue
        if type(value) not in (int, float) or not 0 < value <= MAX_FLOAT32:
            raise LayoutError(
                f"{name}: expected a positive number within the range of float32, "
                f"found {value!r}"
            )
    if options.norm_guard is None:
        return
    if layout.kind != "sae":
        raise LayoutError(
            "norm_guard: expected none for steering vectors, which act on every token"
        )
    if options.reference_norm is None:
        raise LayoutError(
            "norm_guard: expected a reference_norm beside it, which these files do not "
            "carry: the typical norm of what the SAE reads, as probe prints it"
        )


def _weight_files(location: Location, layout: ModuleLayout) -> list[Path]:
    return sorted({site_file(location, entry) for entry in layout.sites})


def _digest(location: Location, layout: ModuleLayout, options: dict) -> str:
    """SHA-256 of options, folds and weight files, each block prefixed by its length."""
    files = _weight_files(location, layout)
    folds = [asdict(entry) for entry in layout.sites]
    text = json.dumps({"options": options, "folds": folds}, sort_keys=True)
    digest = hashlib.sha256()
    for block in (DIGEST_DOMAIN, text):
        digest.update(len(block).to_bytes(8, "little") + block.encode())
    for path in files:
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as stream:
            while block_bytes := stream.read(_HASH_BLOCK):
                digest.update(block_bytes)
    return digest.hexdigest()


@contextmanager
def _open_site(
    module: ModuleInfo, site: SiteInfo, location: Location | None
) -> Iterator[tuple[Location, SAELayout | VectorLayout]]:
    """Read the layout of one site again from the files that were inspected."""
    with naming_module(module.name, module.path):
        location = location or resolve_path(module.path)[0]
        names = [s.name for s in module.sites]
        fmt, layout = _read_layout(location, names)
        for entry in layout.sites:
            if entry.site == site and fmt.name == module.format:
                yield location, entry
                return
        raise LayoutError(
            f"{site.name}: the files have changed and no longer hold the site that was "
            "inspected"
        )


def load_site(
    module: ModuleInfo,
    site: SiteInfo,
    into: SAEWeights,
    location: Location | None = None,
) -> None:
    """Stream one site's SAE into its buffers, folded to the canonical form.

    Args:
        module: as `inspect_module` returned it.
        site: one of `module.sites`.
        into: buffers of the site's widths with at least `d_sae` features, or a shard of
            them, on any device. Features past `d_sae` and `meta` keep their values.
        location: the module's files, if `locate` has found them; no progress is shown.

    Raises:
        ValueError: the files changed, do not fit `into`, or hold a NaN or infinity;
            `into` then holds a part of the module.
    """
    with _open_site(module, site, location) as (location, layout):
        if not isinstance(layout, SAELayout):
            raise LayoutError(f"{site.name}: expected an SAE, found a steering vector")
        _check_room(site, into)
        with (
            open_tensors(site_file(location, layout)) as tensors,
            tqdm(
                desc=f"Loading SAE {module.name} {site.name}",
                total=sae_bytes(layout, tensors),
                unit="B",
                unit_scale=True,
                disable=location is not None or not _is_first_rank(),
            ) as bar,
        ):
            fold_sae(layout, tensors, into, bar.update)


def read_site(
    module: ModuleInfo, site: SiteInfo, dtype: FloatType, *, keep: bool = True
) -> HostSAE:
    """As `load_site`, into host memory and without PyTorch.

    Args:
        dtype: of the matrices.
        keep: False to check them only, and so to need little memory.

    Raises:
        ValueError: the files changed, or hold a NaN or infinity.
    """
    with _open_site(module, site, None) as (location, layout):
        if not isinstance(layout, SAELayout):
            raise LayoutError(f"{site.name}: expected an SAE, found a steering vector")
        with open_tensors(site_file(location, layout)) as tensors:
            return fold_host(layout, tensors, dtype, keep=keep)


def check_weights(module: ModuleInfo) -> None:
    """Read every site as an engine would, to find values that are not finite.

    Raises:
        ValueError: as `read_site`.
    """
    for site in module.sites:
        if module.kind == "sae":
            read_site(module, site, FloatType.F32, keep=False)
            continue
        with _open_site(module, site, None) as (location, layout):
            assert isinstance(layout, VectorLayout)
            with open_tensors(site_file(location, layout)) as tensors:
                read_floats(tensors, layout.tensor, layout.row)


def _is_first_rank() -> bool:
    """Whether this process shows progress, as vLLM decides it for a model's weights."""
    distributed = torch.distributed
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _check_room(site: SiteInfo, into: SAEWeights) -> None:
    room = (into.d_in, into.d_out, into.W_skip is not None)
    found = (site.d_in, site.out_width, site.has_skip)
    if found != room or site.d_sae > into.d_sae_capacity:
        raise LayoutError(
            f"{site.name}: expected d_in {room[0]}, d_out {room[1]}, skip connection "
            f"{room[2]} and d_sae of at most {into.d_sae_capacity}, found d_in "
            f"{found[0]}, d_out {found[1]}, skip connection {found[2]} and d_sae "
            f"{site.d_sae}"
        )
    if not into.shard.is_whole and site.d_sae != into.d_sae_capacity:
        raise LayoutError(
            f"{site.name}: expected d_sae {into.d_sae_capacity}, the width of the "
            f"sharded slot, found {site.d_sae}"
        )


def load_vectors(
    module: ModuleInfo, site: SiteInfo, location: Location | None = None
) -> torch.Tensor:
    """The steering vector of one site, float32 `[D]` on the CPU.

    `location` is as of `load_site`.

    Raises:
        ValueError: the files changed, or hold a NaN or infinity.
    """
    with _open_site(module, site, location) as (location, layout):
        if not isinstance(layout, VectorLayout):
            raise LayoutError(f"{site.name}: expected a steering vector, found an SAE")
        with open_tensors(site_file(location, layout)) as tensors:
            return read_vector(tensors, layout.tensor, layout.row)
