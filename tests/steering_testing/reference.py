# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the three tiers, dense and in float64: the tests' oracle.

It is independent of the project's own reference: it handles one token at a time, with
loops instead of gathers. So the two can disagree.
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
    # Feature, "above" or "below", bound.
    when: tuple[int, str, float] | None = None

    def target(self, acts: torch.Tensor) -> float:
        """What the feature's activation becomes, given all of them."""
        f = float(acts[self.feature])
        if self.only_if_active and f == 0:
            return f
        if self.when is not None:
            read, which, bound = self.when
            seen = float(acts[read])
            if not (seen > bound if which == "above" else seen < bound):
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
        out[clamp.feature] = clamp.target(acts)
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
    kind: str = "add"
    value: float = 0.0
    bounds: tuple[float, float] = (0.0, 0.0)
    relative: bool = False
    # ("prompt" or "generated", start, stop): instead of the phase.
    spans: list[tuple[str, int, int | None]] | None = None

    def acts_at(self, position: int, prompt_len: int) -> bool:
        """Whether the edit applies to the token there."""
        in_prompt = position < prompt_len
        if self.spans is None:
            return self.phase == "both" or (self.phase == "prefill") == in_prompt
        for of, start, stop in self.spans:
            if of == "prompt" and position in range(prompt_len)[start:stop]:
                return True
            at = position - prompt_len
            if of == "generated" and at >= start and (stop is None or at < stop):
                return True
        return False

    def moved(self, x: torch.Tensor) -> torch.Tensor:
        """What a vector adds to `x [D]`, which all vectors read."""
        assert self.vector is not None
        unit = self.vector / self.vector.norm()
        size = float(x.norm()) if self.relative else 1.0
        projection = float(x @ unit)
        if self.kind == "add":
            return self.scale * (size * unit if self.relative else self.vector)
        low, high = (size * bound for bound in self.bounds)
        target = {
            "set": size * self.value,
            "scale": self.scale * projection,
            "bound": min(max(projection, low), high),
        }[self.kind]
        return (target - projection) * unit

    def apply(
        self, x: torch.Tensor, token_id: int, source: torch.Tensor | None = None
    ) -> torch.Tensor:
        """An SAE tier's edit of one token's `x [D]`; a transcoder reads `source`."""
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
    position: int,
    prompt_len: int,
    source: torch.Tensor | None = None,
) -> torch.Tensor:
    """All of a site's edits of one token, in tier order (stable within a tier)."""
    here = [edit for edit in edits if edit.acts_at(position, prompt_len)]
    vectors = [edit.moved(x) for edit in here if edit.tier == "additive"]
    if vectors:
        x = x + torch.stack(vectors).sum(0)
    for edit in sorted(here, key=lambda e: ORDER.index(e.tier)):
        if edit.tier != "additive":
            x = edit.apply(x, token_id, source)
    return x


def random_sae(
    d_sae: int, d_model: int, activation: str, seed: int, k: int = 8
) -> DenseSAE:
    """A random SAE whose reconstruction stays near the scale of a small stream.

    It bypasses what a module does by default.
    """
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
        skip_token_ids=models.SPECIAL,
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
