# SPDX-License-Identifier: Apache-2.0
"""Requests declared once, for the engine (specs) and for the oracle (edits)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from steering_testing import models
from steering_testing.engine import (
    DELTA,
    FULL,
    VECTORS,
    coverage,
    sae_spec,
    save_sae,
)
from steering_testing.reference import Clamp, DenseSAE, Edit

from vllm.config.sae_inline_vectors import vector_text

Site = tuple[int, str]


@dataclass
class Ask:
    """One spec: a tier, a module, and the clamps per site (or the scale).

    With `vector`, the request brings it to `site` instead of naming a module.
    """

    tier: str
    module: str = ""
    clamps: Mapping[Site, list[Clamp]] = field(default_factory=dict)
    scale: float = 1.0
    phase: str = "both"
    kind: str = "add"
    value: float | None = None
    bounds: tuple[float, float] | None = None
    relative: bool = False
    spans: list[tuple[str, int, int | None]] | None = None
    vector: torch.Tensor | None = None
    site: Site = (1, "post_block")

    def named(self) -> dict[str, Any]:
        """The vector's module, or the vector itself."""
        if self.vector is None:
            return {"module_name": self.module}
        layer, hook = self.site
        return {"vector": vector_text(self.vector), "layer": layer, "hook": hook}

    def spec(self) -> dict[str, Any]:
        """As a client writes it."""
        if self.tier != "additive":
            return sae_spec(self.module, self.clamps, self.phase, self.spans)
        return {
            **self.named(),
            "scale": self.scale,
            **coverage(self.phase, self.spans),
            "kind": self.kind,
            "value": self.value,
            "bounds": None if self.bounds is None else list(self.bounds),
            "relative": self.relative,
        }


KEYS = {"additive": VECTORS, "delta": DELTA, "full": FULL}


def specs(*asks: Ask) -> dict[str, Any]:
    """The `extra_args` of a request."""
    found: dict[str, Any] = {}
    for ask in asks:
        found.setdefault(KEYS[ask.tier], []).append(ask.spec())
    return found


@dataclass
class Modules:
    """Modules of an engine: oracle SAEs and vectors per site, by name."""

    saes: dict[str, dict[Site, DenseSAE]] = field(default_factory=dict)
    vectors: dict[str, dict[Site, torch.Tensor]] = field(default_factory=dict)

    def save(self, root: Path) -> dict[str, str]:
        """Write every module; name -> path, SAEs first, in the order given here."""
        paths = {name: save_sae(root / name, at) for name, at in self.saes.items()}
        for name, at in self.vectors.items():
            path = root / f"{name}.safetensors"
            save_file(
                {f"layers.{layer}.{hook}": v for (layer, hook), v in at.items()}, path
            )
            paths[name] = str(path)
        return paths

    def edits(self, *asks: Ask) -> dict[Site, list[Edit]]:
        """What the oracle does for a request; delta in registration order."""
        order = [*self.saes, *self.vectors, ""]
        found: dict[Site, list[Edit]] = {}
        for ask in sorted(asks, key=lambda ask: order.index(ask.module)):
            if ask.tier == "additive":
                brought = {} if ask.vector is None else {ask.site: ask.vector}
                for site, vector in (brought or self.vectors[ask.module]).items():
                    edit = Edit(
                        "additive",
                        vector=vector.double(),
                        scale=ask.scale,
                        phase=ask.phase,
                        kind=ask.kind,
                        value=ask.value or 0.0,
                        bounds=ask.bounds or (0.0, 0.0),
                        relative=ask.relative,
                        spans=ask.spans,
                    )
                    found.setdefault(site, []).append(edit)
                continue
            saes = self.saes[ask.module]
            for site in ask.clamps or saes:
                clamps = list(ask.clamps.get(site, []))
                edit = Edit(
                    ask.tier, saes[site], clamps, phase=ask.phase, spans=ask.spans
                )
                found.setdefault(site, []).append(edit)
        return found


def vector(seed: int, norm: float = 2.0, width: int = models.HIDDEN) -> torch.Tensor:
    """A random direction `[D]` of a tiny model, float32."""
    rng = torch.Generator().manual_seed(seed)
    direction = torch.randn(width, generator=rng)
    return direction * (norm / direction.norm())


def prompt(seed: int, length: int) -> list[int]:
    """A bos and random ordinary tokens."""
    rng = random.Random(seed)
    return [models.BOS, *(rng.randrange(3, models.VOCAB) for _ in range(length - 1))]
