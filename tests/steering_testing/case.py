# SPDX-License-Identifier: Apache-2.0
"""What a conformance case is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steering_testing import models
from steering_testing.requests import Site

LAST = models.LAYERS - 1
RESIDUAL = ("pre_attn", "post_attn", "post_block")
SUBLAYER = ("attn_z", "attn_out", "mlp_in", "mlp_out")


@dataclass(frozen=True)
class Case:
    """A tiny model, and the class of the decoder layer that runs it.

    `title` names the checkpoints that the class runs. `lacks` are the points that its
    layers do not have, and `lacks_at` those that single layers do not have; `z` is the
    width of `attn_z`. `others` are the classes of other layers. `linear` are the layers
    with linear attention, which have no `attn_z`; such models and `recurrent` ones keep
    a state. `environment` is set for the engine. `read_tolerance` is that of features.
    `tolerance` is that of log-probabilities where arithmetic is not exact; with it, a
    token may be any that is as likely within it. None: equal tokens, within 1e-4.
    """

    title: str
    family: str
    layer_class: str
    options: tuple[tuple[str, Any], ...] = ()
    lacks: tuple[str, ...] = ()
    z: int = models.HIDDEN
    linear: tuple[int, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    tolerance: float | None = None
    others: tuple[str, ...] = ()
    lacks_at: tuple[tuple[int, tuple[str, ...]], ...] = ()
    recurrent: bool = False
    read_tolerance: float = 1e-5

    @property
    def classes(self) -> set[str]:
        return {self.layer_class, *self.others}

    @property
    def hooks(self) -> list[str]:
        return [hook for hook in (*RESIDUAL, *SUBLAYER) if hook not in self.lacks]

    @property
    def rounds(self) -> bool:
        """Whether the engine computes in bfloat16."""
        return ("dtype", "bfloat16") in self.options

    def hooks_of(self, layer: int) -> list[str]:
        lacks = dict(self.lacks_at).get(layer, ())
        if layer in self.linear:
            lacks += ("attn_z",)
        return [hook for hook in self.hooks if hook not in lacks]

    def sites(self) -> list[Site]:
        """Residual points of three layers, the others of two."""
        return [
            (layer, hook)
            for layer in (0, 1, LAST)
            for hook in self.hooks_of(layer)
            if hook in RESIDUAL or layer > 0
        ]

    def width(self, hook: str) -> int:
        return self.z if hook == "attn_z" else models.HIDDEN
