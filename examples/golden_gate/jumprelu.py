# SPDX-License-Identifier: Apache-2.0
"""A JumpReLU SAE: training, the SAELens file layout, and a Hugging Face hook.

The hook is the same edit as the engine's full reconstruction, written as plain
dense mathematics; the demo's training and tests use it where no engine runs.
JumpReLU and its straight-through gradient: Rajamanoharan et al. 2024
(arXiv:2407.14435); L0 is driven to a target by a squared penalty.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

BANDWIDTH = 0.1


class _Gate(torch.autograd.Function):
    """Heaviside step of `p - threshold`, with a rectangle kernel for its gradient."""

    @staticmethod
    def forward(
        ctx: Any, pre_acts: torch.Tensor, threshold: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pre_acts, threshold = ctx.saved_tensors
        near = ((pre_acts - threshold).abs() < BANDWIDTH / 2).to(grad.dtype)
        slope = grad * near / BANDWIDTH
        return slope, -slope.sum(0)


class JumpReLUSAE(nn.Module):
    """`f = p [p > threshold]`, `p = (x - b_dec) W_enc + b_enc`, `x' = f W_dec + b_dec`.

    SAELens orientation: `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_in]` with unit rows;
    `b_enc`, `threshold` `[d_sae]`; `b_dec [d_in]`. All float32.
    """

    def __init__(self, d_in: int, d_sae: int):
        super().__init__()
        W_dec = nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_dec = nn.Parameter(W_dec)
        self.W_enc = nn.Parameter(W_dec.T.clone())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.threshold = nn.Parameter(torch.full((d_sae,), 0.3))

    def pre_acts(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., d_in]` -> pre-activations `[..., d_sae]`."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., d_in]` -> feature activations `[..., d_sae]`."""
        p = self.pre_acts(x)
        return p * (p > self.threshold.clamp(min=0))

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """`[..., d_sae]` -> reconstruction `[..., d_in]`."""
        return feature_acts @ self.W_dec + self.b_dec

    def loss(self, x: torch.Tensor, target_l0: float, sparsity: float) -> torch.Tensor:
        """Squared error per token plus `sparsity * (L0 / target_l0 - 1)^2`."""
        p = self.pre_acts(x)
        gate = _Gate.apply(p, self.threshold)
        error = (self.decode(p * gate) - x).pow(2).sum(-1).mean()
        excess = gate.sum(-1).mean() / target_l0 - 1
        return error + sparsity * excess.pow(2)

    @torch.no_grad()
    def project(self) -> None:
        """Keep decoder rows at unit norm and thresholds positive."""
        self.W_dec.copy_(nn.functional.normalize(self.W_dec, dim=1))
        self.threshold.clamp_(min=1e-3)

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        """From an SAE of `x / scale` to one of `x`; only the biases have units."""
        for bias in (self.b_enc, self.b_dec, self.threshold):
            bias.mul_(scale)

    def save(self, path: Path, metadata: Mapping[str, object]) -> None:
        """Write `cfg.json` and `sae_weights.safetensors` in the layout of SAELens 6."""
        path.mkdir(parents=True, exist_ok=True)
        d_in, d_sae = self.W_enc.shape
        cfg = {
            "d_in": d_in,
            "d_sae": d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": dict(metadata),
            "architecture": "jumprelu",
        }
        (path / "cfg.json").write_text(json.dumps(cfg, indent=2) + "\n")
        tensors = {k: v.detach().contiguous() for k, v in self.state_dict().items()}
        weights = path / "sae_weights.safetensors"
        save_file(tensors, weights)
        weights.chmod(0o644)

    @classmethod
    def load(cls, path: Path) -> JumpReLUSAE:
        """Read what `save` wrote."""
        cfg = json.loads((path / "cfg.json").read_text())
        sae = cls(cfg["d_in"], cfg["d_sae"])
        sae.load_state_dict(load_file(path / "sae_weights.safetensors"))
        return sae.requires_grad_(False)


def quality(sae: JumpReLUSAE, x: torch.Tensor) -> tuple[float, float]:
    """(L0, FVU) of `sae` on activations `x [T, d_in]`.

    L0 is the mean number of active features; FVU the share of the variance of `x`
    around its mean that the reconstruction does not explain.
    """
    with torch.no_grad():
        feature_acts = sae.encode(x)
        error = (sae.decode(feature_acts) - x).pow(2).sum()
        variance = (x - x.mean(0)).pow(2).sum()
        l0 = (feature_acts != 0).float().sum(-1).mean()
    return float(l0), float(error / variance)


@contextmanager
def reconstruct(
    model: nn.Module,
    sae: JumpReLUSAE,
    layer: int,
    clamps: Mapping[int, float],
    skip_token_ids: Sequence[int],
) -> Iterator[None]:
    """While open, `model` runs with `resid_post` of `layer` replaced by the SAE's.

    Args:
        model: a Hugging Face causal LM with `model.model.layers`.
        clamps: feature index -> absolute value, in the SAE's own units.
        skip_token_ids: tokens with these ids keep their residual stream.
    """
    state: dict[str, torch.Tensor] = {}

    def see_ids(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        state["skip"] = torch.isin(ids, torch.tensor(list(skip_token_ids)))[..., None]

    def edit(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        feature_acts = sae.encode(x)
        for feature, value in clamps.items():
            feature_acts[..., feature] = value
        new = torch.where(state["skip"], x, sae.decode(feature_acts))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    decoder: Any = model.get_submodule("model")
    handles = [
        decoder.register_forward_pre_hook(see_ids, with_kwargs=True),
        decoder.layers[layer].register_forward_hook(edit),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activations(
    model: nn.Module,
    layer: int,
    batches: Iterator[torch.Tensor],
    keep: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`resid_post` of `layer` and token ids, where `keep(ids)` is true.

    Returns:
        `x [T, d_in]` and `ids [T]`, over all batches of ids `[B, S]`.
    """
    kept_x, kept_ids = [], []
    for ids in batches:
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        mask = keep(ids)
        kept_x.append(hidden[layer + 1][mask])
        kept_ids.append(ids[mask])
    return torch.cat(kept_x), torch.cat(kept_ids)
