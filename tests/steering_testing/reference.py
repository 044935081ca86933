# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the three tiers, dense and in float64: the tests' oracle.

Written apart from the project's own reference, one token at a time and with loops
where the project has gathers, so that the two can disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from steering_testing import models


@dataclass
class DenseSAE:
    """An SAE in float64: `W_enc [F, D]`, `b_enc [F]`, `W_dec [F, D]`, `b_dec [D]`.

    A transcoder writes `hook_out` and may have `W_skip [d_out, d_in]`.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    activation: str = "relu"
    threshold: torch.Tensor | None = None
    k: int | None = None
    topk_relu: bool = True
    skip_token_ids: tuple[int, ...] = ()
    norm_limit: float = float("inf")
    hook_out: str | None = None
    W_skip: torch.Tensor | None = None

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Activations `[F]` of one token `x [D]`."""
        pre = self.W_enc @ x + self.b_enc
        if self.activation == "topk":
            assert self.k is not None
            order = sorted(range(len(pre)), key=lambda i: (-float(pre[i]), i))
            acts = torch.zeros_like(pre)
            for i in order[: self.k]:
                acts[i] = max(pre[i], 0.0) if self.topk_relu else pre[i]
            return acts
        threshold = torch.zeros_like(pre)
        if self.activation == "jumprelu":
            assert self.threshold is not None
            threshold = self.threshold.clamp(min=0)
        return torch.where(pre > threshold, pre, torch.zeros_like(pre))

    def bypasses(self, x: torch.Tensor, token_id: int) -> bool:
        """Whether this token is left untouched."""
        return token_id in self.skip_token_ids or float(x.norm()) > self.norm_limit


@dataclass
class Clamp:
    """`g` for one feature."""

    feature: int
    kind: str
    value: float
    only_if_active: bool = False

    def target(self, f: float) -> float:
        """What the feature's activation `f` becomes."""
        if self.only_if_active and f == 0:
            return f
        return {
            "absolute": self.value,
            "additive": f + self.value,
            "scale": f * self.value,
        }[self.kind]


def clamped(acts: torch.Tensor, clamps: list[Clamp]) -> torch.Tensor:
    """Activations with the clamps applied."""
    out = acts.clone()
    for clamp in clamps:
        out[clamp.feature] = clamp.target(float(acts[clamp.feature]))
    return out


def full(sae: DenseSAE, clamps: list[Clamp], x: torch.Tensor) -> torch.Tensor:
    """The SAE's reconstruction of `x [D]` with clamps."""
    out = clamped(sae.encode(x), clamps) @ sae.W_dec + sae.b_dec
    return out if sae.W_skip is None else out + sae.W_skip @ x


def delta(
    sae: DenseSAE,
    clamps: list[Clamp],
    x: torch.Tensor,
    read: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x [D]` moved by what the clamps change in the features of `read`, or of `x`."""
    acts = sae.encode(x if read is None else read)
    return x + (clamped(acts, clamps) - acts) @ sae.W_dec


@dataclass
class Edit:
    """What one request does at one site, per tier and phase.

    `phase` is prefill, decode or both; tiers run additive, delta, full.
    """

    tier: str
    sae: DenseSAE | None = None
    clamps: list[Clamp] = field(default_factory=list)
    vector: torch.Tensor | None = None
    scale: float = 1.0
    phase: str = "both"

    def apply(
        self,
        x: torch.Tensor,
        token_id: int,
        in_prompt: bool,
        source: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The edit of one token's `x [D]`; `source` is what a transcoder reads."""
        if self.phase != "both" and (self.phase == "prefill") != in_prompt:
            return x
        if self.tier == "additive":
            assert self.vector is not None
            return x + self.scale * self.vector
        assert self.sae is not None
        read = x if source is None else source
        if self.sae.bypasses(read, token_id):
            return x
        if self.tier == "full":
            return full(self.sae, self.clamps, read)
        return delta(self.sae, self.clamps, x, read)


ORDER = ("additive", "delta", "full")


def edit_token(
    edits: list[Edit],
    x: torch.Tensor,
    token_id: int,
    in_prompt: bool,
    source: torch.Tensor | None = None,
) -> torch.Tensor:
    """All of a site's edits of one token, in tier order (stable within a tier)."""
    for edit in sorted(edits, key=lambda e: ORDER.index(e.tier)):
        x = edit.apply(x, token_id, in_prompt, source)
    return x


def random_sae(
    d_sae: int, d_model: int, activation: str, seed: int, k: int = 8
) -> DenseSAE:
    """A random SAE whose reconstruction stays near the scale of a small stream."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        # float32 values, so that a float32 file holds exactly the oracle's weights.
        values = torch.randn(*shape, generator=rng, dtype=torch.float32) * scale
        return values.double()

    decoder = normal(d_sae, d_model, scale=1.0)
    decoder = (decoder / decoder.norm(dim=1, keepdim=True)).float().double()
    encoder = (decoder * 0.7).float().double() + normal(d_sae, d_model, scale=0.05)
    return DenseSAE(
        W_enc=encoder.float().double(),
        b_enc=normal(d_sae, scale=0.05),
        W_dec=decoder,
        b_dec=normal(d_model, scale=0.1),
        activation=activation,
        threshold=normal(d_sae, scale=0.1).abs() if activation == "jumprelu" else None,
        k=k if activation == "topk" else None,
    )


def random_transcoder(d_sae: int, activation: str, seed: int, skip: bool) -> DenseSAE:
    """A random transcoder of a tiny model's MLP, with or without a skip connection."""
    width = models.HIDDEN
    one = random_sae(d_sae, width, activation, seed, k=6)
    one.hook_out = "mlp_out"
    if skip:
        rng = torch.Generator().manual_seed(seed + 1)
        values = torch.randn(width, width, generator=rng) * (0.3 / width**0.5)
        one.W_skip = values.double()
    return one
