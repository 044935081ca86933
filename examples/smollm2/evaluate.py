# SPDX-License-Identifier: Apache-2.0
"""What an SAE costs and what its features do, on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from data import WIDTH, Corpus, residuals
from sae import JumpReLU
from torch import nn
from torch.nn import functional

ROWS = 32
CONTEXTS = 8
PROMOTED = 8

Edit = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def cross_entropies(
    model: nn.Module, layer: int, corpus: Corpus, edits: Mapping[str, Edit | None]
) -> dict[str, float]:
    """Mean next-token cross-entropy (nats) under each edit, where both tokens count.

    An edit maps the stream `[n, D]` after `layer` of the tokens that count; None
    changes nothing. The layers before it run once for all edits.
    """
    device = next(model.parameters()).device
    totals, number = dict.fromkeys(edits, 0.0), 0
    for i in range(0, len(corpus), ROWS):
        tokens = corpus.tokens[i : i + ROWS].long().to(device)
        counts = corpus.counts[i : i + ROWS].to(device)

        def branch(
            module: nn.Module,
            args: Any,
            output: torch.Tensor,
            counts: torch.Tensor = counts,
        ) -> torch.Tensor:
            edited = output.repeat(len(edits), 1, 1)
            for copy, edit in zip(
                edited.chunk(len(edits)), edits.values(), strict=True
            ):
                if edit is not None:
                    copy[counts] = edit(output[counts]).to(output.dtype)
            return edited

        hook = model.model.layers[layer].register_forward_hook(branch)
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        hook.remove()
        judged = counts[:, :-1] & counts[:, 1:]
        number += int(judged.sum())
        for name, part in zip(edits, hidden.chunk(len(edits)), strict=True):
            logits = model.lm_head(part[:, :-1][judged]).float()
            targets = tokens[:, 1:][judged]
            totals[name] += functional.cross_entropy(
                logits, targets, reduction="sum"
            ).item()
    return {name: total / max(1, number) for name, total in totals.items()}


@torch.no_grad()
def quality(
    sae: JumpReLU, model: nn.Module, layer: int, corpus: Corpus, mean: torch.Tensor
) -> dict[str, float]:
    """FVU, L0 and the cross-entropies: plain, reconstructed, mean-ablated."""
    kept = [x[counts] for x, counts in residuals(model, layer, corpus, ROWS)]
    center = torch.cat(kept).float().mean(0)
    error = spread = active = tokens = 0.0
    for x in (x.float() for x in kept):
        f = sae.encode(x)
        error += (x - sae.decode(f)).pow(2).sum().item()
        spread += (x - center).pow(2).sum().item()
        active += (f > 0).sum().item()
        tokens += len(x)
    edits: dict[str, Edit | None] = {
        "plain": None,
        "reconstructed": lambda x: sae.decode(sae.encode(x)),
        "mean_ablated": lambda x: mean.expand_as(x),
    }
    found = cross_entropies(model, layer, corpus, edits)
    return {
        "tokens": tokens,
        "fvu": error / spread,
        "l0": active / tokens,
        **{f"ce_{name}": value for name, value in found.items()},
        "ce_recovered": recovered(found, "reconstructed"),
    }


def recovered(found: Mapping[str, float], name: str) -> float:
    """The share of what mean ablation costs that an edit does not cost."""
    lost = found["mean_ablated"] - found[name]
    return lost / (found["mean_ablated"] - found["plain"])


@torch.no_grad()
def evidence(
    sae: JumpReLU, model: nn.Module, layer: int, corpus: Corpus
) -> dict[str, torch.Tensor]:
    """What is known of each feature, on `corpus`.

    `frequency [F]`, and of the activations where it is active: `mean`, `p50`, `p99`,
    `max` `[F]`. `context_values`, `context_places [F, CONTEXTS]`: the strongest
    activations, at most one of a row, and `row * WIDTH + position` of each.
    `promoted [F, PROMOTED]`: the tokens whose logits the decoder row raises most.
    """
    F = len(sae.b_enc)
    device = sae.b_enc.device
    values, features, tokens = [], [], 0
    top = torch.full((CONTEXTS, F), 0.0, device=device)
    places = torch.zeros(CONTEXTS, F, dtype=torch.int64, device=device)
    for i, (x, counts) in enumerate(residuals(model, layer, corpus, ROWS)):
        f = sae.encode(x.flatten(0, 1)) * counts.flatten().unsqueeze(1)
        tokens += int(counts.sum())
        found = f.nonzero(as_tuple=True)
        features.append(found[1])
        values.append(f[found])
        best, where = f.view(len(x), WIDTH, F).max(1)
        rows = torch.arange(len(x), device=device).unsqueeze(1) + i * ROWS
        merged = torch.cat([top, best])
        top, chosen = merged.topk(CONTEXTS, dim=0)
        places = torch.cat([places, rows * WIDTH + where]).gather(0, chosen)
    feature, value = torch.cat(features), torch.cat(values)
    value, order = value.sort()
    feature, by_feature = feature[order].sort(stable=True)
    value = value[by_feature]
    count = torch.bincount(feature, minlength=F)
    ends = count.cumsum(0)

    def quantile(q: float) -> torch.Tensor:
        at = (ends - count + (q * (count - 1)).long()).clamp(0, len(value) - 1)
        return value[at] * (count > 0)

    sums = torch.zeros(F, device=device).index_add_(0, feature, value)
    return {
        "frequency": count / max(1, tokens),
        "mean": sums / count.clamp(min=1),
        "p50": quantile(0.5),
        "p99": quantile(0.99),
        "max": quantile(1.0),
        "context_values": top.T,
        "context_places": places.T,
        "promoted": _promoted(sae, model),
    }


def _promoted(sae: JumpReLU, model: nn.Module) -> torch.Tensor:
    """Tokens that each decoder row promotes, through the last norm's weight."""
    rows = sae.W_dec.float() * model.model.norm.weight.float()
    unembed = model.lm_head.weight.float()
    logits = rows @ (unembed - unembed.mean(0)).T
    return logits.topk(PROMOTED, dim=1).indices
