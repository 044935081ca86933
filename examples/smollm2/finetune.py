# SPDX-License-Identifier: Apache-2.0
"""A short end-to-end fine-tuning of a trained SAE (Karvonen 2025, arXiv:2503.17272).

The reconstruction replaces the stream and the divergence of the model's next-token
distributions is minimised beside the squared error, at equal weight.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from data import Corpus
from sae import BatchTopKSAE, schedule
from torch import nn
from torch.nn import functional

LEARNING_RATE = 1e-4
ROWS = 32


def fine_tune(
    sae: BatchTopKSAE,
    model: nn.Module,
    layer: int,
    corpus: Corpus,
    steps: int,
    seconds: float,
) -> int:
    """Tune `sae` in place; the number of steps taken, at most `steps`."""
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    pick = torch.Generator().manual_seed(1)
    start, step = time.perf_counter(), 0
    while (done := max(step / steps, (time.perf_counter() - start) / seconds)) < 1:
        rows = torch.randint(len(corpus), (min(ROWS, len(corpus)),), generator=pick)
        part = corpus.rows(rows)
        tokens, counts = part.tokens.long().to(device), part.counts.to(device)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule(done)
        optimizer.zero_grad()
        _loss(sae, model, layer, tokens, counts).backward()
        optimizer.step()
        sae.project()
        step += 1
    return step


def _loss(
    sae: BatchTopKSAE,
    model: nn.Module,
    layer: int,
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """KL divergence plus squared error, scaled to the same value."""
    with torch.no_grad():
        target = model(tokens, use_cache=False).logits[counts].float().log_softmax(-1)
    errors = []

    def replace(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        x = sae.normalize(output[counts])
        y = sae.decode(sae.select(sae.pre_acts(x)))
        errors.append((x - y).pow(2).sum(1).mean())
        edited = output.clone()
        edited[counts] = (y * sae.scale + sae.mean).to(output.dtype)
        return edited

    hook = model.model.layers[layer].register_forward_hook(replace)
    try:
        logits = model(tokens, use_cache=False).logits[counts].float()
    finally:
        hook.remove()
    kl = functional.kl_div(
        logits.log_softmax(-1), target, log_target=True, reduction="batchmean"
    )
    error = errors[0]
    return kl + error * (kl.detach() / error.detach())
