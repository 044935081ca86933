# SPDX-License-Identifier: Apache-2.0
"""The command that describes a module: `inspect`.

It does not import PyTorch, which would take longer than reading most modules.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from vllm.config.steering import ModuleInfo, SiteInfo
from vllm.config.steering_environment import PEER_MEMORY_ENV, stores_unasked
from vllm.config.steering_json import Json
from vllm.config.steering_screening import screen_bytes, screens
from vllm.config.steering_sharding import Ranks, exchange_bytes
from vllm.config.steering_slots import shard_bytes
from vllm.config.steering_slots import site_bytes as sae_bytes
from vllm.model_executor.model_loader.sae_formats.layout import (
    ModuleLayout,
    SAELayout,
)
from vllm.model_executor.model_loader.sae_loader import (
    check_weights,
    inspect_module,
    read_layout,
)

# What `show` prints of a module, where it is known.
SHOWN = (
    "path",
    "format",
    "kind",
    "model",
    "digest",
    "skip_token_ids",
    "reference_norm",
    "norm_guard",
)


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
    if layout.site.before_value_bias:
        folds.append("bias of attention's values into b_enc and b_dec (in the worker)")
    if layout.threshold_is_log:
        folds.append("exp(threshold)")
    return folds


def site_bytes(site: SiteInfo, kind: str, itemsize: int) -> int:
    """Memory of one site's weights with matrices of `itemsize` bytes an element."""
    return 4 * site.d_in if kind == "vectors" else sae_bytes(site, itemsize)


def how(shared: bool) -> str:
    """What `auto` does."""
    return "shard" if shared else "replicate"


def ranks_of(site: SiteInfo, tp: int) -> Json:
    """Memory of a site on each of `tp` tensor-parallel ranks, in bytes."""
    found: Json = {"tp": tp, "can_shard": False, "unit": Ranks(tp).unit, "auto": {}}
    for name, itemsize in (("16_bit", 2), ("32_bit", 4)):
        ranks = Ranks(tp, itemsize)
        found[f"bytes_{name}_replicated"] = sae_bytes(site, itemsize)
        if ranks.can_shard(site.d_sae, site.out_width):
            found["can_shard"] = True
            found[f"bytes_{name}_sharded"] = shard_bytes(site, ranks)
        widths = (site.d_sae, site.d_in, site.out_width)
        found["auto"][name] = how(ranks.shards("auto", *widths))
    stores = Ranks(tp, 2, stores=True).shards("auto", *widths, site.has_skip)
    found["auto"]["16_bit_peer_memory"] = how(stores)
    # Memory for an exchange is allocated only if an SAE is shared.
    found["bytes_exchange"] = exchange_bytes(tp, site.out_width) if stores else 0
    return found


def report(module: ModuleInfo, layout: ModuleLayout, tp: int = 1) -> Json:
    """All that `inspect` shows, as JSON types."""
    data = module.described()
    data["model"] = layout.model
    for site, entry, shown in zip(
        module.sites, layout.sites, data["sites"], strict=True
    ):
        shown["folds"] = describe_folds(entry) if isinstance(entry, SAELayout) else []
        shown["declared"] = dict(layout.declared.get(site.name, {}))
        shown["bytes_16_bit"] = site_bytes(site, module.kind, 2)
        shown["bytes_32_bit"] = site_bytes(site, module.kind, 4)
        if module.kind == "sae" and screens("auto", site.d_sae, site.d_in, 2):
            shown["bytes_screening"] = screen_bytes(site.d_sae, site.d_in)
        if tp > 1 and module.kind == "sae":
            shown["ranks"] = ranks_of(site, tp)
    return data


def inspect(
    path: str, sites: Sequence[str] | None, tp: int = 1, *, as_json: bool
) -> None:
    """Print what a module is.

    Args:
        tp: of so many tensor-parallel ranks; the memory of each is shown if more
            than one.

    Raises:
        ValueError: the module is refused; one line says why.
    """
    module = inspect_module("module", path, sites=sites)
    layout = read_layout("module", path, sites)
    data = report(module, layout, tp)
    check_weights(module)
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        show(data)


def what(site: Json, kind: str) -> str:
    """The size of a site in one line."""
    if kind == "vectors":
        return f"a vector of {site['d_in']} numbers"
    activation = site["activation"] + (f" k={site['k']}" if site["k"] else "")
    size = site["bytes_16_bit"] / 2**20
    return (
        f"d_in {site['d_in']}, d_sae {site['d_sae']}, {activation}, "
        f"{size:.1f} MiB in 16 bit"
    )


def show(data: Json) -> None:
    """Print a report as text."""
    for key in SHOWN:
        if data[key] is not None:
            print(f"{key:15}{data[key]}")
    for shown in data["sites"]:
        print(f"{shown['name']:15}{what(shown, data['kind'])}")
        if shown["hook_out"] is not None:
            skip = " with W_skip" if shown["has_skip"] else ""
            print(f"{'':15}writes {shown['hook_out']}, d_out {shown['d_out']}{skip}")
        if "ranks" in shown:
            show_ranks(shown["ranks"], shown)
        for fold in shown["folds"]:
            print(f"{'':15}folds {fold}")
        for name, value in shown["declared"].items():
            print(f"{'':15}declared {name} {value:g}")
    if len(data["sites"]) > 1 and "ranks" in data["sites"][0]:
        show_total(data["sites"])


def show_ranks(ranks: Json, site: Json) -> None:
    """Print the memory of each tensor-parallel rank."""
    copied = ranks["bytes_16_bit_replicated"] / 2**20
    text = f"on each of {ranks['tp']} ranks: {copied:.1f} MiB replicated"
    if ranks["can_shard"]:
        text += f", {ranks['bytes_16_bit_sharded'] / 2**20:.1f} MiB sharded"
        auto, stored = (ranks["auto"][n] for n in ("16_bit", "16_bit_peer_memory"))
        if auto == "shard":
            copied = "with {}=0" if stores_unasked(ranks["tp"]) else "without {}=1"
            only = f" {copied.format(PEER_MEMORY_ENV)}" if stored == auto else ""
            auto += f", on GPUs{only} replicate"
        text += f" (auto: {auto})"
    else:
        d_out = site["d_out"] or site["d_in"]
        text += (
            f"; it cannot be sharded: found {site['d_sae']} features and {d_out} "
            f"columns, expected multiples of {ranks['unit']}"
        )
    print(f"{'':15}{text}")
    if ranks["bytes_exchange"]:
        room = ranks["bytes_exchange"] / 2**20
        text = f"{room:.1f} MiB more, once an engine, through which ranks exchange"
        unasked = stores_unasked(ranks["tp"])
        when = "on GPUs" if unasked else f"with {PEER_MEMORY_ENV}=1"
        print(f"{'':15}{when} {text}")


def show_total(sites: Sequence[Json]) -> None:
    """Print what a rank holds of all sites, if it shares none or all that it can."""
    copied = shared = 0
    for ranks in (site["ranks"] for site in sites):
        whole = ranks["bytes_16_bit_replicated"]
        copied += whole
        shared += ranks["bytes_16_bit_sharded"] if ranks["can_shard"] else whole
    text = f"on each of {sites[0]['ranks']['tp']} ranks: {copied / 2**20:.1f} MiB "
    print(f"{'all sites':15}{text}replicated, {shared / 2**20:.1f} MiB sharded")
