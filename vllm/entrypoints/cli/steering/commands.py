# SPDX-License-Identifier: Apache-2.0
"""The commands on steering modules: `inspect` and `convert`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from vllm.config.steering import Activation, HookPoint, ModuleInfo, SiteInfo
from vllm.config.steering_json import Json, JsonView
from vllm.config.steering_slots import site_bytes as sae_bytes
from vllm.model_executor.layers.steering import SAEWeights
from vllm.model_executor.model_loader.sae_formats.layout import (
    ModuleLayout,
    SAELayout,
)
from vllm.model_executor.model_loader.sae_loader import (
    inspect_module,
    load_site,
    load_vectors,
    read_layout,
    save_native,
)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SiteName = tuple[int, HookPoint | str]


def describe_folds(layout: SAELayout) -> list[str]:
    """One phrase for each change that loading makes to the stored tensors."""
    folds = []
    if layout.gate is not None:
        folds.append("gate into threshold and W_enc")
    if layout.subtract_b_dec:
        folds.append("input bias into b_enc")
    scales = {
        "W_enc": layout.W_enc_scale,
        "b_enc": layout.b_enc_scale,
        "W_dec": layout.W_dec_scale,
        "b_dec": layout.b_dec_scale,
        "threshold": layout.threshold_scale,
    }
    for name, scale in scales.items():
        if scale != 1:
            folds.append(f"{name} x {scale:.6g}")
    if layout.unit_decoder_rows:
        folds.append("decoder norms into W_enc and b_enc")
    if layout.centre_input:
        folds.append("mean of the input into W_enc")
    if layout.site.before_gain:
        folds.append("gain of the norm before the MLP into W_enc (in the worker)")
    if layout.threshold_is_log:
        folds.append("exp(threshold)")
    return folds


def site_bytes(site: SiteInfo, kind: str, itemsize: int) -> int:
    """Memory of one site's weights with matrices of `itemsize` bytes an element."""
    return 4 * site.d_in if kind == "vectors" else sae_bytes(site, itemsize)


def report(module: ModuleInfo, layout: ModuleLayout) -> Json:
    """All that `inspect` shows, as JSON types."""
    data = module.to_json()
    data["model"] = layout.model
    for site, entry, shown in zip(
        module.sites, layout.sites, data["sites"], strict=True
    ):
        shown["name"] = site.name
        shown["folds"] = describe_folds(entry) if isinstance(entry, SAELayout) else []
        shown["declared"] = dict(layout.declared.get(site.name, {}))
        shown["bytes_16_bit"] = site_bytes(site, module.kind, 2)
        shown["bytes_32_bit"] = site_bytes(site, module.kind, 4)
    return data


def check_weights(module: ModuleInfo) -> None:
    """Load each site once, as an engine would, to find values that are not finite."""
    cpu = torch.device("cpu")
    for site in module.sites:
        if module.kind == "vectors":
            load_vectors(module, site)
        else:
            load_site(module, site, SAEWeights.for_site(site, torch.float32, cpu))


def inspect(path: str, sites: Sequence[str] | None, as_json: bool) -> None:
    """Print what a module is.

    Raises:
        ValueError: the module is refused; one line says why.
    """
    module = inspect_module("module", path, sites=sites)
    data = report(module, read_layout("module", path, sites))
    check_weights(module)
    if as_json:
        print(json.dumps(data, indent=2))
        return
    for key in ("path", "format", "kind", "model", "digest", "reference_norm"):
        if data[key] is not None:
            print(f"{key:15}{data[key]}")
    for shown in data["sites"]:
        activation = shown["activation"] + (f" k={shown['k']}" if shown["k"] else "")
        size = shown["bytes_16_bit"] / 2**20
        print(
            f"{shown['name']:15}d_in {shown['d_in']}, d_sae {shown['d_sae']}, "
            f"{activation}, {size:.1f} MiB in 16 bit"
        )
        if shown["hook_out"] is not None:
            skip = " with W_skip" if shown["has_skip"] else ""
            print(f"{'':15}writes {shown['hook_out']}, d_out {shown['d_out']}{skip}")
        for fold in shown["folds"]:
            print(f"{'':15}folds {fold}")
        for name, value in shown["declared"].items():
            print(f"{'':15}declared {name} {value:g}")


class LoadedSites(Mapping[SiteName, JsonView]):
    """The sites of a module, each loaded when it is asked for."""

    def __init__(self, module: ModuleInfo, layout: ModuleLayout, dtype: torch.dtype):
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
        cpu = torch.device("cpu")
        weights = SAEWeights.for_site(site, self._dtype, cpu)
        load_site(self._module, site, weights)
        content: Json = {
            "W_enc": weights.W_enc,
            "b_enc": weights.b_enc,
            "W_dec": weights.W_dec,
            "b_dec": weights.b_dec,
            "activation": site.activation,
            **self._declared.get(site.name, {}),
        }
        if site.is_transcoder:
            content["hook_out"] = site.out_hook
        if site.before_gain:
            content["before_gain"] = True
        if site.raw_output:
            content["raw_output"] = True
        if weights.W_skip is not None:
            content["W_skip"] = weights.W_skip
        if site.activation is Activation.JUMPRELU:
            content["threshold"] = weights.threshold
        if site.activation is Activation.TOPK:
            content |= {"k": site.k, "topk_relu": site.topk_relu}
        return content


def convert(path: str, out: str, sites: Sequence[str] | None, dtype: str) -> None:
    """Write an SAE, folded, as a native directory.

    Raises:
        ValueError: the module is refused, is not an SAE, or `out` has files in it.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out}: expected a new or empty directory")
    module = inspect_module("module", path, sites=sites)
    if module.kind != "sae":
        raise ValueError(f"{path}: expected an SAE, found steering vectors")
    layout = read_layout("module", path, sites)
    save_native(
        target,
        LoadedSites(module, layout, DTYPES[dtype]),
        reference_norm=module.reference_norm,
        skip_token_ids=module.skip_token_ids,
        norm_guard=module.norm_guard,
        model=layout.model,
    )
    print(f"wrote {len(module.sites)} site(s) to {target}")
