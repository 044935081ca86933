# SPDX-License-Identifier: Apache-2.0
"""The points of a decoder layer that can be read and edited, and how they are spelled.

A site is one point of one layer. Its canonical spelling is `hook.layer`, for example
`post_block.20`; `parse_site` also accepts `layer.hook` and the names that
TransformerLens gives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from vllm.config.steering_checks import whole

if TYPE_CHECKING:
    from vllm.config import ModelConfig


class HookPoint(str, Enum):
    """A point of a decoder layer.

    Each is exactly the tensor that a Hugging Face model shows there:

    - `pre_attn`, `post_attn`, `post_block`: the residual stream `[T, D]` at the block's
      input, after attention is added, and at the block's output.
    - `attn_z`: input of attention's output projection, `[T, heads * head_dim]`.
    - `attn_out`, `mlp_out`: what the sublayer adds to the stream, `[T, D]`; after the
      sublayer's post-norm in families that have one.
    - `mlp_in`: what the MLP reads, after its norm, `[T, D]`.
    """

    PRE_ATTN = "pre_attn"
    POST_ATTN = "post_attn"
    POST_BLOCK = "post_block"
    ATTN_Z = "attn_z"
    ATTN_OUT = "attn_out"
    MLP_IN = "mlp_in"
    MLP_OUT = "mlp_out"


RESIDUAL_HOOKS = frozenset(
    {HookPoint.PRE_ATTN, HookPoint.POST_ATTN, HookPoint.POST_BLOCK}
)

# Every accepted spelling. The names with "hook" in them are TransformerLens's. Two of
# its names are not accepted, because they are other tensors than `mlp_in`:
# `hook_mlp_in` (the stream before the norm) and `ln2.hook_normalized` (the norm's
# output before its gain).
HOOK_ALIASES: dict[str, HookPoint] = {
    **{hook.value: hook for hook in HookPoint},
    "post_mlp": HookPoint.POST_BLOCK,
    "resid_pre": HookPoint.PRE_ATTN,
    "resid_mid": HookPoint.POST_ATTN,
    "resid_post": HookPoint.POST_BLOCK,
    "hook_resid_pre": HookPoint.PRE_ATTN,
    "hook_resid_mid": HookPoint.POST_ATTN,
    "hook_resid_post": HookPoint.POST_BLOCK,
    "hook_in": HookPoint.PRE_ATTN,
    "hook_out": HookPoint.POST_BLOCK,
    "z": HookPoint.ATTN_Z,
    "hook_z": HookPoint.ATTN_Z,
    "attn.hook_z": HookPoint.ATTN_Z,
    "hook_attn_out": HookPoint.ATTN_OUT,
    "attn.hook_out": HookPoint.ATTN_OUT,
    "mlp.hook_in": HookPoint.MLP_IN,
    "hook_mlp_out": HookPoint.MLP_OUT,
    "mlp.hook_out": HookPoint.MLP_OUT,
}

# For messages: the canonical names, without the aliases.
HOOK_NAMES = ", ".join(hook.value for hook in HookPoint)

_LAYER = re.compile(r"[0-9]{1,9}")


def site_name(hook: HookPoint, layer: int) -> str:
    """The canonical spelling of a site, `hook.layer`."""
    return f"{hook.value}.{layer}"


def site_text(site: object) -> object:
    """`hook.layer` of a site that is given as `(hook, layer)`; all else as it is."""
    if isinstance(site, (tuple, list)) and len(site) == 2 and isinstance(site[0], str):
        layer = whole(site[1])
        if type(layer) is int:
            hook = site[0].value if isinstance(site[0], HookPoint) else site[0]
            return f"{hook}.{layer}"
    return site


def named_sites(given: object) -> object:
    """Sites in a list, or as the keys of a dict, by name where they are pairs.

    All else stays as it is, and so does a dict that would lose a key.
    """
    if type(given) is dict and any(type(key) is tuple for key in given):
        named = {site_text(key): value for key, value in given.items()}
        return named if len(named) == len(given) else given
    if type(given) is list and any(type(one) is tuple for one in given):
        return [site_text(one) for one in given]
    return given


def parse_site(text: str) -> tuple[int, HookPoint] | None:
    """`(layer, hook)` of a site's name, or None if it names no site.

    Accepts `post_block.20`, `20.post_block`, `layers.20.post_block` and
    `blocks.20.hook_resid_post`, with any alias of the hook.
    """
    name = text.removeprefix("layers.").removeprefix("blocks.")
    layer, _, hook = name.partition(".")
    if not _LAYER.fullmatch(layer):
        hook, _, layer = name.rpartition(".")
    if not _LAYER.fullmatch(layer) or hook not in HOOK_ALIASES:
        return None
    return int(layer), HOOK_ALIASES[hook]


def place_of(site: object) -> tuple[int, HookPoint] | None:
    """`(layer, hook)` of a site's name or of `(hook, layer)`; None for all else."""
    text = site_text(site)
    return parse_site(text) if isinstance(text, str) else None


def plain_name(site: object) -> str | None:
    """A site as descriptions print it, from any form of `place_of`; None for others."""
    place = place_of(site)
    return None if place is None else site_name(place[1], place[0])


@dataclass(frozen=True)
class PointWidths:
    """Widths of a model's points: of the stream, and of attention's `z`."""

    hidden: int
    z: int

    def of(self, hook: HookPoint) -> int:
        """Width of a point, unsharded."""
        return self.z if hook is HookPoint.ATTN_Z else self.hidden


def point_widths(model_config: ModelConfig) -> PointWidths:
    """The widths of a model's points, from its configuration."""
    architecture = model_config.model_arch_config
    # Models with latent attention have a field of its own for the size of a head's
    # value.
    value_size = model_config.hf_text_config.to_dict().get("v_head_dim")
    head = value_size or model_config.get_head_size()
    heads = architecture.total_num_attention_heads
    return PointWidths(model_config.get_hidden_size(), heads * head)
