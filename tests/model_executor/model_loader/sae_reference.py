# SPDX-License-Identifier: Apache-2.0
"""Dense float64 mathematics of the canonical SAE, and helpers of the loader tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from steering_testing.shards import shard_of

from vllm.config.steering import Activation, ModuleInfo, SiteInfo
from vllm.model_executor.layers.steering_shards import WHOLE, Shard
from vllm.model_executor.layers.steering_state import SAEWeights
from vllm.model_executor.model_loader.sae_loader import inspect_module, load_site

D, F, K, TOKENS = 8, 24, 5, 32


def tensor(*shape: int, seed: int, scale: float = 0.5) -> torch.Tensor:
    """Reproducible normal float32 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * scale


def inputs() -> torch.Tensor:
    """float64 `[TOKENS, D]` with a mean away from zero."""
    return tensor(TOKENS, D, seed=99, scale=1.0).double() + 0.3


def topk_mask(values: torch.Tensor, k: int) -> torch.Tensor:
    """True at the k largest of each row."""
    chosen = values.topk(k, dim=-1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, chosen, True)


def canonical(weights: SAEWeights, site: SiteInfo, x: torch.Tensor) -> torch.Tensor:
    """Reconstruction by the canonical SAE, float64 `[T, D]`."""
    n = site.d_sae
    p = x @ weights.W_enc[:n].double().T + weights.b_enc[:n].double()
    if site.activation is Activation.TOPK:
        assert site.k is not None
        f = p * topk_mask(p, site.k)
        f = f.relu() if site.topk_relu else f
    else:
        f = p * (p > weights.threshold[:n].double().clamp(min=0))
    y = f @ weights.W_dec[:n].double() + weights.b_dec.double()
    return y if weights.W_skip is None else y + x @ weights.W_skip.double().T


def new_weights(site: SiteInfo, spare: int = 0, shard: Shard = WHOLE) -> SAEWeights:
    """Empty fp32 buffers for a site."""
    cpu = torch.device("cpu")
    return SAEWeights(
        site.d_sae + spare,
        site.d_in,
        torch.float32,
        cpu,
        d_out=site.out_width,
        has_skip=site.has_skip,
        shard=shard,
    )


def loaded(module: ModuleInfo) -> SAEWeights:
    """The only site of a module, loaded; what two ranks load are its parts."""
    (site,) = module.sites
    weights = new_weights(site)
    load_site(module, site, weights)
    check_shards(module, weights)
    return weights


def check_shards(module: ModuleInfo, whole: SAEWeights) -> None:
    """Assert that ranks which share the SAE load the bits of their parts."""
    (site,) = module.sites
    for rank in range(2):
        shard = Shard(rank, 2)
        found = new_weights(site, shard=shard)
        load_site(module, site, found)
        expected = shard_of(whole, shard)
        for at, (own, part) in enumerate(
            zip(found.tensors(), expected.tensors(), strict=True)
        ):
            assert torch.equal(own, part), f"tensor {at} of rank {rank}"


def reconstruct(path: Path, **options: Any) -> torch.Tensor:
    """Inspect and load a one-site module, and reconstruct `inputs()` with it."""
    module = inspect_module("m", str(path), **options)
    return canonical(loaded(module), module.sites[0], inputs())


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to fp32 storage of the weights, and not trivially."""
    assert expected.dtype == torch.float64
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a configuration file, making its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
