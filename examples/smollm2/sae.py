# SPDX-License-Identifier: Apache-2.0
"""A BatchTopK SAE (Bussmann et al. 2024, arXiv:2412.06410), served as a JumpReLU.

During training, the `k * tokens` largest activations of a batch are kept. The running
mean of the smallest kept activation becomes the threshold afterwards. Dead features
learn from the residual of the others (Gao et al. 2024, arXiv:2406.04093, section A.2).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

BATCH = 8192  # tokens of a step
LEARNING_RATE = 6e-4
WARMUP, DECAY = 0.02, 0.25  # shares of the training
DEAD_AFTER = 400  # steps without firing
AUX_FEATURES, AUX_WEIGHT = 256, 1 / 32


class BatchTopKSAE(nn.Module):
    """Works on `(x - mean) / scale`; `W_dec` has unit rows.

    `W_enc [D, F]`, `b_enc [F]`, `W_dec [F, D]`, `b_dec [D]`, float32.
    """

    def __init__(self, mean: torch.Tensor, scale: float, d_sae: int, k: int):
        super().__init__()
        d_in = len(mean)
        W_dec = functional.normalize(torch.randn(d_sae, d_in), dim=1).to(mean.device)
        self.W_dec = nn.Parameter(W_dec)
        self.W_enc = nn.Parameter(W_dec.T.clone())
        self.b_enc = nn.Parameter(mean.new_zeros(d_sae))
        self.b_dec = nn.Parameter(mean.new_zeros(d_in))
        self.mean, self.scale, self.k = mean, scale, k
        self.threshold = mean.new_zeros(())
        self.idle = torch.zeros(d_sae, dtype=torch.int32, device=mean.device)

    @classmethod
    def unfolded(
        cls, folded: JumpReLU, mean: torch.Tensor, scale: float, k: int
    ) -> BatchTopKSAE:
        """The SAE that `folded` was made of, up to the rounding of its weights."""
        sae = cls(mean, scale, len(folded.b_enc), k)
        with torch.no_grad():
            sae.W_enc.copy_(folded.W_enc)
            sae.b_enc.copy_(folded.b_enc / scale)
            sae.W_dec.copy_(folded.W_dec)
            sae.b_dec.copy_((folded.b_dec - mean) / scale)
        sae.threshold = folded.threshold[0] / scale
        return sae

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Stream in the model's units -> the SAE's, float32."""
        return (x.float() - self.mean) / self.scale

    def pre_acts(self, x: torch.Tensor) -> torch.Tensor:
        """`[n, D]` -> `[n, F]`, in bfloat16 on a GPU."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return (x - self.b_dec) @ self.W_enc + self.b_enc

    def select(self, p: torch.Tensor) -> torch.Tensor:
        """Keep the `k * n` largest of `[n, F]`; moves the threshold."""
        f = p.float().relu()
        cut = f.detach().flatten().topk(self.k * len(p)).values[-1]
        started = self.threshold > 0
        self.threshold = torch.where(started, self.threshold.lerp(cut, 0.01), cut)
        return f * (f > cut)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """`[n, F]` -> `[n, D]`, float32."""
        with torch.autocast(f.device.type, torch.bfloat16, enabled=f.is_cuda):
            y = f @ self.W_dec
        return y.float() + self.b_dec

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """Squared error per token of normalised `x [n, D]`, plus the aux loss."""
        p = self.pre_acts(x)
        f = self.select(p)
        error = x - self.decode(f)
        fired = (f > 0).any(0)
        self.idle = torch.where(fired, 0, self.idle + 1)
        loss = error.pow(2).sum(1).mean()
        dead = self.idle > DEAD_AFTER
        if count := int(dead.sum()):
            spare = p.float().masked_fill(~dead, 0).relu()
            top = spare.topk(min(AUX_FEATURES, count), dim=1)
            aux = torch.zeros_like(spare).scatter(1, top.indices, top.values)
            left = error.detach() - (self.decode(aux) - self.b_dec)
            loss = loss + AUX_WEIGHT * left.pow(2).sum(1).mean()
        return loss

    @torch.no_grad()
    def project(self) -> None:
        """Keep decoder rows at unit norm."""
        self.W_dec.copy_(functional.normalize(self.W_dec, dim=1))

    @torch.no_grad()
    def folded(self, dtype: torch.dtype) -> JumpReLU:
        """The same SAE in the model's own units, with rounded weights."""
        return JumpReLU(
            W_enc=self.W_enc.to(dtype),
            b_enc=self.b_enc * self.scale,
            W_dec=self.W_dec.to(dtype),
            b_dec=self.b_dec * self.scale + self.mean,
            threshold=(self.threshold * self.scale).expand(len(self.b_enc)).clone(),
        )


@dataclass
class JumpReLU:
    """SAELens' `jumprelu`: `p = (x - b_dec) W_enc + b_enc`.

    In the model's units; an activation is a length along a unit decoder row.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    threshold: torch.Tensor

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """`[n, D]` in the model's units -> `[n, F]` float32."""
        p = (x.float() - self.b_dec) @ self.W_enc.float() + self.b_enc
        return p * (p > self.threshold)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """`[n, F]` -> `[n, D]` float32."""
        return f @ self.W_dec.float() + self.b_dec

    def save(self, folder: Path, hook_name: str, model_name: str, width: int) -> None:
        """Write the SAELens layout."""
        folder.mkdir(parents=True, exist_ok=True)
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        tensors = {n: getattr(self, n).detach().cpu().contiguous() for n in names}
        save_file(tensors, folder / "sae_weights.safetensors")
        d_sae, d_in = self.W_dec.shape
        cfg = {
            "architecture": "jumprelu",
            "d_in": d_in,
            "d_sae": d_sae,
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                "model_name": model_name,
                "hook_name": hook_name,
                "context_size": width,
                "prepend_bos": False,
                "sae_lens_version": "6.0.0",
            },
        }
        (folder / "cfg.json").write_text(json.dumps(cfg, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> JumpReLU:
        """Read what `save` wrote."""
        return cls(**load_file(folder / "sae_weights.safetensors"))


def fit(
    acts: torch.Tensor, d_sae: int, k: int, steps: int, seconds: float
) -> tuple[BatchTopKSAE, int]:
    """Train on `acts [n, D]`; `steps` steps, fewer when `seconds` are over.

    Returns the SAE and the number of steps taken.
    """
    torch.manual_seed(k)
    sae = BatchTopKSAE(*mean_and_scale(acts), d_sae, k)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    batch = min(BATCH, len(acts))
    order = torch.randperm(len(acts), device=acts.device)
    start, at, step = time.perf_counter(), 0, 0
    while True:
        done = max(step / steps, (time.perf_counter() - start) / seconds)
        if done >= 1:
            return sae, step
        if at + batch > len(acts):
            order, at = torch.randperm(len(acts), device=acts.device), 0
        x = sae.normalize(acts[order[at : at + batch]])
        at += batch
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule(done)
        optimizer.zero_grad()
        sae.loss(x).backward()
        optimizer.step()
        sae.project()
        step += 1


def mean_and_scale(acts: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What `normalize` subtracts from rows of `acts [n, D]`, and what it divides by."""
    some = acts[: 1 << 18].float()
    mean = some.mean(0)
    scale = ((some - mean).pow(2).sum(1).mean() / acts.shape[1]).sqrt().item()
    return mean, scale


def schedule(done: float) -> float:
    """Factor of the learning rate at a share `done` of the training."""
    return min(1.0, done / WARMUP, (1 - done) / DECAY) if done else 1e-3
