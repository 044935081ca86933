# SPDX-License-Identifier: Apache-2.0
"""The names that files give to points of a model, and which site each of them is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm.config.steering import Activation, SiteInfo
from vllm.config.steering_points import HOOK_NAMES, HookPoint, parse_site, site_name
from vllm.model_executor.model_loader.sae_formats.layout import (
    LayoutError,
    Location,
    ModuleLayout,
)

Site = tuple[int, HookPoint]

_HF_POINT = re.compile(
    r"(?:model\.|transformer\.|language_model\.|gpt_neox\.)*(?:layers|h)\."
    r"([0-9]{1,9})((?:\.[a-z_]+)*)"
)
# What a Hugging Face name says after the layer. Names that mean different points in
# different families (post_attention_layernorm, mlp.output) are not here.
_HF_POINTS = {
    "": HookPoint.POST_BLOCK,
    ".output": HookPoint.POST_BLOCK,
    ".input": HookPoint.PRE_ATTN,
    ".self_attn.o_proj.input": HookPoint.ATTN_Z,
    ".attn.c_proj.input": HookPoint.ATTN_Z,
    ".attention.dense.input": HookPoint.ATTN_Z,
    ".mlp.input": HookPoint.MLP_IN,
    ".pre_feedforward_layernorm.output": HookPoint.MLP_IN,
    ".post_feedforward_layernorm.output": HookPoint.MLP_OUT,
}
# The output of the norm before the MLP, before its gain.
_BEFORE_GAIN = re.compile(r"blocks\.([0-9]{1,9})\.ln2\.hook_normalized")
# A module's own output in TransformerLens 3, where `hook_attn_out` and `hook_mlp_out`
# are after the norm behind it.
OWN_OUTPUTS = ("attn.hook_out", "mlp.hook_out")
# TransformerLens points that are not supported, and why.
_REFUSED = {
    "hook_mlp_in": "TransformerLens's name for the stream before the norm, which "
    "others use for what the MLP reads; say which it is with post_attn or mlp_in",
}


@dataclass(frozen=True)
class Points:
    """What one SAE reads and, for a transcoder, what it writes (`hook_out`).

    `before_gain`: it reads `mlp_in` before the gain of the norm. `raw_output` and
    `before_value_bias`: see `SiteInfo`.
    """

    layer: int
    hook: HookPoint
    hook_out: HookPoint | None = None
    before_gain: bool = False
    raw_output: bool = False
    before_value_bias: bool = False

    def site(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        k: int | None = None,
        d_out: int | None = None,
        has_skip: bool = False,
    ) -> SiteInfo:
        """The site at these points. `d_out` and `has_skip` are a transcoder's."""
        site = SiteInfo(
            layer=self.layer,
            hook=self.hook,
            d_in=d_in,
            d_sae=d_sae,
            activation=activation,
            k=k,
            before_gain=self.before_gain,
            raw_output=self.raw_output,
            before_value_bias=self.before_value_bias,
        )
        if self.hook_out is None:
            return site
        d_out = d_in if d_out is None else d_out
        return replace(site, hook_out=self.hook_out, d_out=d_out, has_skip=has_skip)


def transcoder_points(layer: int, before_gain: bool = False) -> Points:
    """What a transcoder of a layer's MLP reads and writes."""
    return Points(layer, HookPoint.MLP_IN, HookPoint.MLP_OUT, before_gain)


def choose_points(location: Location, stated: Points | None, where: str) -> Points:
    """The points that the files state, else the site that the operator named.

    Raises:
        LayoutError: neither, or the two differ.
    """
    if stated is None:
        return Points(*location.site(None, where))
    location.site((stated.layer, stated.hook), where)
    return stated


def parse_site_name(text: str) -> Site | None:
    """`(layer, hook)` from any of the names in use, or None.

    Takes what `parse_site` takes, and Hugging Face's names: `model.layers.20` is the
    output of that block, `model.layers.20.self_attn.o_proj.input` is `attn_z`.
    """
    if (match := _HF_POINT.fullmatch(text)) and match[2] in _HF_POINTS:
        return int(match[1]), _HF_POINTS[match[2]]
    return parse_site(text)


def need_site(text: str, where: str) -> Site:
    """As `parse_site_name`, but a name that is no point of a layer is an error."""
    if (site := parse_site_name(text)) is not None:
        return site
    for name, reason in _REFUSED.items():
        if text.endswith(name):
            raise LayoutError(f"{where}: {text!r} is not supported: it is {reason}")
    raise LayoutError(
        f"{where}: expected a point of a layer such as post_block.5 or "
        f"blocks.5.hook_resid_post (points: {HOOK_NAMES}), found {text!r}"
    )


def need_points(name_in: str, name_out: str | None, where: str) -> Points:
    """The points that an SAE reads and writes, from the names of both.

    Raises:
        LayoutError: a name that is no point; or a pair that no site can have: of two
            layers, or any other than the MLP's input and output.
    """
    names = (name_in, name_out or name_in)
    raw_output = any(name.endswith(OWN_OUTPUTS) for name in names)
    before_gain = False
    if match := _BEFORE_GAIN.fullmatch(name_in):
        before_gain, name_in = True, f"mlp_in.{match[1]}"
        name_out = name_in if name_out == match[0] else name_out
    layer, hook = need_site(name_in, where)
    if name_out is None or name_out == name_in:
        return Points(layer, hook, None, before_gain, raw_output)
    layer_out, hook_out = need_site(name_out, where)
    if (layer_out, hook_out) == (layer, hook):
        return Points(layer, hook, None, before_gain, raw_output)
    pair = (hook, hook_out)
    if layer != layer_out or pair != (HookPoint.MLP_IN, HookPoint.MLP_OUT):
        raise LayoutError(
            f"{where}: expected an SAE, or a transcoder from mlp_in to mlp_out of one "
            f"layer, found {site_name(hook, layer)} to {site_name(hook_out, layer_out)}"
        )
    return Points(layer, hook, hook_out, before_gain, raw_output)


def choose_sites(
    layout: ModuleLayout, names: Sequence[str] | None, where: str
) -> ModuleLayout:
    """Select the sites that the operator listed. A format whose files do not state
    their site has read it from the list before.
    """
    if names is None:
        return layout
    wanted = [need_site(name, "sites") for name in names]
    if not wanted or len(set(wanted)) != len(wanted):
        raise LayoutError(f"sites: expected distinct sites, found {list(names)!r}")
    if len(layout.sites) == 1 and len(wanted) != 1:
        raise LayoutError(
            f"sites: {where} holds one site, found {len(wanted)} in {list(names)!r}"
        )
    by_key = {(entry.site.layer, entry.site.hook): entry for entry in layout.sites}
    for name, key in zip(names, wanted, strict=True):
        if key not in by_key:
            have = ", ".join(entry.site.name for entry in layout.sites)
            raise LayoutError(f"sites: expected one of {have}, found {name!r}")
    return replace(layout, sites=tuple(by_key[key] for key in wanted))
