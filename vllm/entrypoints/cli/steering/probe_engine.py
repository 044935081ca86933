# SPDX-License-Identifier: Apache-2.0
"""The engine of a probe: the module configured as on a server, its sites recorded."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm.config.steering import (
    ModuleInfo,
    SiteInfo,
)
from vllm.config.steering_json import Json, JsonView
from vllm.model_executor.layers.steering import SiteKey, SteeringBackend, SteeringSite
from vllm.model_executor.layers.steering_attach import attach_site
from vllm.model_executor.layers.steering_families import (
    find_decoder_layers,
    missing_point,
)
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    SAEWeights,
    StepState,
    VectorSlot,
)
from vllm.model_executor.layers.steering_stream import Stream

if TYPE_CHECKING:
    from vllm import LLM

MODULE = "probed"
# Tokens of a prompt; long enough for context, short enough for any model.
WINDOW = 256
KV_CACHE_BYTES = 1 << 28


class _Recorder(SteeringBackend):
    """A site's backend that keeps what an encoder reads, and what its decoder is to
    match, and edits nothing."""

    def __init__(self) -> None:
        self.read: list[torch.Tensor] = []
        self.written: list[torch.Tensor] = []

    def write_flags(self, token_ids: torch.Tensor) -> None:
        """Plain requests have no use for the bypass flags."""

    def full_reconstruction(self, slot: SAESlot, stream: Stream) -> None:
        self._record(stream)

    def sae_clamp(self, slot: SAESlot, stream: Stream) -> None:
        """Records nothing: `full_reconstruction` records the same tensors."""

    def steering_vectors(self, slot: VectorSlot, stream: Stream) -> None:
        self._record(stream)

    def read_features(self, slot: SAESlot, read: Stream) -> None:
        """Records nothing: no request of a probe reads features."""

    def _record(self, stream: Stream) -> None:
        hidden, residual, source = stream
        written = hidden.clone() if residual is None else hidden + residual
        self.written.append(written)
        self.read.append(written if source is None else source.clone())


@dataclass(frozen=True)
class Recorded:
    """What was seen at a site: `read [T, d_in]`, and `written [T, d_out]` (for an SAE
    the same)."""

    read: torch.Tensor
    written: torch.Tensor

    def at(self, tokens: torch.Tensor) -> Recorded:
        """Of some tokens only; `tokens` is a mask or indices."""
        tokens = tokens.to(self.read.device)
        return Recorded(self.read[tokens], self.written[tokens])


@contextmanager
def probing_engine(path: str, model: str, options: JsonView) -> Iterator[LLM]:
    """An eager engine in this process, with the module loaded and nothing cached.

    Args:
        options: of the module in `additional_config.steering.modules`, and `dtype`.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    sites = options.get("sites")
    form = {"path": path} if sites is None else {"path": path, "sites": list(sites)}
    llm = LLM(
        model,
        dtype=options.get("dtype", "auto"),
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=WINDOW,
        max_num_seqs=1,
        max_num_batched_tokens=WINDOW,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        additional_config={"steering": {"modules": {MODULE: form}}},
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def _worker_state(llm: LLM) -> tuple[Json, torch.nn.Module]:
    """The forward context's modules by name, and the model, of the one worker."""
    # The callable runs in this process, where the worker is.
    (state,) = llm.collective_rpc(
        lambda worker: (
            worker.vllm_config.compilation_config.static_forward_context,
            worker.get_model(),
        )
    )
    return state


def install_recorders(
    llm: LLM, module: ModuleInfo
) -> tuple[dict[SiteKey, _Recorder], dict[SiteKey, SAEWeights]]:
    """Have the module's sites, and the points around them, record the stream.

    Returns:
        A recorder per point, and the weights (`SAEWeights`) of the module's sites.
    """
    context, model = _worker_state(llm)
    layers = find_decoder_layers(model)
    recorders: dict[SiteKey, _Recorder] = {}
    weights: dict[SiteKey, SAEWeights] = {}
    for info in module.sites:
        key = key_of(info)
        site = context[key.name]
        recorders[key] = site.backend = _Recorder()
        weights[key] = site.saes[0].weights
    device = weights[next(iter(weights))].W_enc.device
    neighbours = [(key, info.d_in) for info in module.sites for key in around(info)]
    for key, width in neighbours:
        if key in recorders or key.layer not in layers:
            continue
        if missing_point(layers[key.layer], key.hook):
            continue
        slot = VectorSlot(1, width, 1, 1, device)
        recorders[key] = _Recorder()
        step = StepState(1, device)
        site = SteeringSite(key, [], slot, step, recorders[key])
        context[key.name] = site
        attach_site(layers[key.layer], site)
    return recorders, weights


def key_of(info: SiteInfo) -> SiteKey:
    """The key of the engine's site that holds a module's site."""
    return SiteKey(info.layer, info.hook, info.hook_out)


def around(site: SiteInfo) -> list[SiteKey]:
    """The same point of up to two layers before and after a site; of a transcoder's
    site, none."""
    if site.is_transcoder:
        return []
    return [
        SiteKey(site.layer + step, site.hook)
        for step in (-2, -1, 1, 2)
        if site.layer + step >= 0
    ]


def record(
    llm: LLM, recorders: Mapping[SiteKey, _Recorder], prompts: Sequence[list[int]]
) -> dict[SiteKey, Recorded]:
    """What every site saw of all prompts' tokens, in order."""
    from vllm import SamplingParams

    kept: dict[SiteKey, list[Recorded]] = {key: [] for key in recorders}
    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    for prompt in prompts:
        for recorder in recorders.values():
            recorder.read.clear()
            recorder.written.clear()
        llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        for key, recorder in recorders.items():
            # The prompt's tokens come first; the rest is padding.
            seen = Recorded(torch.cat(recorder.read), torch.cat(recorder.written))
            kept[key].append(seen.at(torch.arange(len(prompt))))
    return {
        key: Recorded(
            torch.cat([part.read for part in parts]),
            torch.cat([part.written for part in parts]),
        )
        for key, parts in kept.items()
    }
