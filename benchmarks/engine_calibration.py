# SPDX-License-Identifier: Apache-2.0
"""Makes the SAE modules: the directions that streams are made of, and thresholds.

The streams come from an eager engine that gets the kinds of tokens of the benchmark:
prompts of 32 tokens, the tokens generated after them, and prompts of 1024 tokens. A
module's later sites are calibrated with its earlier ones reconstructed, as they are in
the benchmark. Then active features are counted on fresh tokens, for prompts and for
generated tokens: about 100.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from engine_modes import (
    FEATURES,
    L0,
    PREFILL_COUNT,
    PREFILL_LENGTH,
    PROMPT,
    SITE_LAYERS,
    dictionary,
    model_runner,
    random_prompts,
    sampling,
)
from engine_timing import Engine

SEQUENCES, GENERATED = 64, 33  # decoding steps have SEQUENCES rows, prompts more
ROWS = 2048  # of each kind of token

Site = dict[str, Any]
Streams = dict[str, list[torch.Tensor]]


def scores(site: Site, x: torch.Tensor) -> torch.Tensor:
    """Pre-activations in float32."""
    return x @ site["W_enc"].float().T + site["b_enc"]


def reconstruct(site: Site, x: torch.Tensor) -> torch.Tensor:
    """The SAE's reconstruction of the stream, in float32."""
    p = scores(site, x)
    return (p * (p > site["threshold"])) @ site["W_dec"].float() + site["b_dec"]


@contextmanager
def hooked(layers: Any, hooks: dict[int, Any]) -> Iterator[None]:
    """Calls `hooks[layer](x)` after each layer; a result replaces the stream."""

    def adapt(function: Any) -> Any:
        def hook(module: Any, args: Any, out: Any) -> Any:
            new = function(out[0].float() + out[1].float())
            if new is None:
                return None
            return torch.zeros_like(out[0]), new.to(out[1].dtype)

        return hook

    handles = [layers[at].register_forward_hook(adapt(fn)) for at, fn in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def phase_of(x: torch.Tensor) -> str:
    return "decode" if x.shape[0] <= SEQUENCES else "prefill"


def run_tokens(llm: Any, seed: int) -> None:
    """Sends the benchmark's kinds of tokens through the model."""
    short = random_prompts(seed, SEQUENCES, PROMPT)
    llm.generate(short, sampling(GENERATED), use_tqdm=False)
    long = random_prompts(seed + 1, PREFILL_COUNT, PREFILL_LENGTH)
    llm.generate(long, sampling(1), use_tqdm=False)


def streams_at(llm: Any, layer: int, earlier: dict[int, Site]) -> torch.Tensor:
    """The stream at a layer, equal parts of every kind of token, `[N, D]`."""
    layers = model_runner(llm).get_model().model.layers
    kept: Streams = {"decode": [], "short": [], "long": []}

    def keep(x: torch.Tensor) -> None:
        long = x.shape[0] > SEQUENCES * PROMPT
        kind = "long" if long else "short"
        kept["decode" if phase_of(x) == "decode" else kind].append(x)

    hooks: dict[int, Any] = {at: replace_by(site) for at, site in earlier.items()}
    with hooked(layers, {**hooks, layer: keep}):
        run_tokens(llm, seed=100 + layer)
    parts = []
    for rows in (torch.cat(tensors) for tensors in kept.values() if tensors):
        some = torch.linspace(0, len(rows) - 1, min(len(rows), ROWS)).long()
        parts.append(rows[some.to(rows.device)])
    return torch.cat(parts)


def replace_by(site: Site) -> Any:
    return lambda x: reconstruct(site, x)


def make_site(x: torch.Tensor) -> Site:
    """An SAE of the dictionary's directions that finds those which `x` is made of."""
    W = dictionary(x.device, x.shape[1])
    mean = x.mean(0)
    site: Site = {
        "W_enc": W,
        "b_enc": -(W.float() @ mean),
        "W_dec": W,
        "b_dec": mean,
        "activation": "jumprelu",
    }
    # Directions in the sum score much higher than the others.
    typical = scores(site, x).topk(L0 // 2).values[:, -1].median()
    site["threshold"] = (0.8 * typical).repeat(FEATURES)
    return site


def count_fired(llm: Any, module: str, sites: dict[int, Site]) -> list[dict[str, Any]]:
    """Active features per token on fresh tokens, as the module will meet them."""
    layers = model_runner(llm).get_model().model.layers
    counts: dict[tuple[int, str], list[torch.Tensor]] = {}

    def count(at: int, site: Site) -> Any:
        def hook(x: torch.Tensor) -> torch.Tensor:
            fired = (scores(site, x) > site["threshold"]).sum(1)
            counts.setdefault((at, phase_of(x)), []).append(fired)
            return reconstruct(site, x)

        return hook

    with hooked(layers, {at: count(at, site) for at, site in sites.items()}):
        run_tokens(llm, seed=1)
    rows = []
    for (at, phase), parts in counts.items():
        fired = sorted(torch.cat(parts).tolist())
        row = {"mode": "calibration", "module": module, "layer": at, "phase": phase}
        row |= {"l0": round(statistics.mean(fired), 1), "l0_max": fired[-1]}
        rows.append({**row, "l0_p99": fired[int(0.99 * len(fired))]})
    return rows


@torch.inference_mode()
def calibrate(root: Path, engine: Engine) -> list[dict[str, Any]]:
    """Write the modules under `root`; how many features fire, by site and phase."""
    from vllm.model_executor.model_loader.sae_formats.native import save_native

    rows = []
    for module, chosen in SITE_LAYERS.items():
        sites: dict[int, Site] = {}
        for layer in chosen:
            sites[layer] = make_site(streams_at(engine.llm, layer, sites))
        save_native(
            root / module, {(at, "post_block"): site for at, site in sites.items()}
        )
        rows += count_fired(engine.llm, module, sites)
    return rows
