# SPDX-License-Identifier: Apache-2.0
"""`probe`: how well an SAE reconstructs its model, measured in a real engine.

The engine is started in this process with the module configured, so the module is
checked, loaded and placed exactly as a server would. Each site then records the
stream that the tiers would edit, for plain prompts, and the reconstruction is
computed by the reference from the weights that the engine holds.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm.config.steering import (
    Activation,
    ModuleInfo,
    SiteInfo,
    get_steering_config,
    site_name,
)
from vllm.entrypoints.cli.steering.fit import Fit, judge, measure
from vllm.model_executor.layers.steering import (
    SAESlot,
    SiteKey,
    SteeringSite,
    StepState,
    VectorSlot,
)
from vllm.model_executor.layers.steering_attach import attach_site
from vllm.model_executor.layers.steering_families import (
    find_decoder_layers,
    missing_point,
)
from vllm.model_executor.model_loader.sae_loader import inspect_module, read_layout

MODULE = "probed"
# Tokens of a prompt; long enough for context, short enough for any model.
WINDOW = 256
KV_CACHE_BYTES = 1 << 28

DEFAULT_TEXT = """\
The river had risen in the night, and by morning the lower road was gone. Martha stood
at the kitchen window with her coffee and counted the fence posts that were still above
the water. There had been twelve of them when her father built the barn; she could see
seven. "It will go down by Thursday," said her brother, who was reading the newspaper
from the wrong end, as he always did. "It went down by Thursday in 1987."

Why does a river flood at all? Rain that falls on a dry hill sinks into the soil. When
the soil is full, or frozen, or paved, the same rain runs over the surface, and what
used to reach the valley in a week arrives in an afternoon. Engineers describe this
with a simple balance: the change in the stored volume equals inflow minus outflow. A
town 40 kilometres downstream may have six hours to move its cars, its cattle and its
grandmothers to higher ground.

To measure the flow, drop an orange from a bridge and time it over a known distance. If
it needs 25 seconds for 50 metres, the water moves at 2 m/s. Multiply by the width and
the mean depth, take off a fifth because the bed slows the water down, and you have the
discharge in cubic metres per second. def discharge(width, depth, speed): return 0.8 *
width * depth * speed. It is not precise, but it is better than a guess, and nobody
minds the loss of one orange.

On Thursday the road came back, covered in mud and small stones. The council sent two
men, a tractor and a letter of apology in three languages. Martha found a shoe, a
garden chair and, in the top of the willow, somebody's kite. She hung it on the wall of
the barn, wrote the date beneath it in chalk, and went to see about the fence.
"""


class _Recorder:
    """A site's backend that keeps what an encoder reads, and what its decoder is to
    match, and edits nothing."""

    def __init__(self) -> None:
        self.read: list[torch.Tensor] = []
        self.written: list[torch.Tensor] = []

    def write_flags(self, token_ids: torch.Tensor) -> None:
        """Plain requests have no use for the bypass flags."""

    def full_reconstruction(
        self,
        slot: SAESlot,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        source: torch.Tensor | None = None,
    ) -> None:
        self._record(hidden, residual, source)

    def sae_clamp(
        self,
        slot: SAESlot,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        source: torch.Tensor | None = None,
    ) -> None:
        """Sees what `full_reconstruction` sees."""

    def steering_vectors(
        self, slot: VectorSlot, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        self._record(hidden, residual)

    def read_features(
        self,
        slot: SAESlot,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        source: torch.Tensor | None = None,
    ) -> None:
        """Nobody reads features of a probe."""

    def _record(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        source: torch.Tensor | None = None,
    ) -> None:
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


@dataclass(frozen=True)
class ProbedSite:
    """What was measured at one site, beside what its author declares.

    `bypassed` tokens are those that the module leaves untouched; FVU and L0 are over
    the others. `nearby` is the FVU of the same SAE at the same hook of the layers
    around it, by site name.
    """

    name: str
    fit: Fit
    bypassed: int
    declared: Mapping[str, float]
    nearby: Mapping[str, float] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        return judge(self.name, self.fit, self.declared, self.nearby)


def declared_values(
    site: SiteInfo, claims: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """What the files claim of a site: `fvu`, `l0`; a TopK SAE's k is its L0."""
    found = dict(claims.get(site.name, {}))
    if site.activation is Activation.TOPK and site.k is not None:
        found.setdefault("l0", float(site.k))
    return found


def windows(ids: Sequence[int], bos: int | None, max_tokens: int) -> list[list[int]]:
    """The text's tokens, at most `max_tokens`, as prompts that begin as it does.

    Where the tokenizer puts a bos before a text, each prompt gets one.
    """
    prefix = [bos] if bos is not None and ids[:1] == [bos] else []
    body = list(ids[len(prefix) : max_tokens])
    step = WINDOW - 1 - len(prefix)  # one place is for the token that is generated
    return [prefix + body[at : at + step] for at in range(0, len(body), step)]


@contextmanager
def probing_engine(path: str, model: str, options: Mapping[str, Any]) -> Iterator[Any]:
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


def _worker_state(llm: Any) -> tuple[dict[str, Any], torch.nn.Module]:
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
    llm: Any, module: ModuleInfo
) -> tuple[dict[SiteKey, _Recorder], dict[SiteKey, Any]]:
    """Have the module's sites, and the points around them, record the stream.

    Returns:
        A recorder per point, and the weights (`SAEWeights`) of the module's sites.
    """
    context, model = _worker_state(llm)
    layers = find_decoder_layers(model)
    recorders: dict[SiteKey, _Recorder] = {}
    weights: dict[SiteKey, Any] = {}
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
    """The site of a running engine that holds a module's site."""
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
    llm: Any, recorders: Mapping[SiteKey, _Recorder], prompts: Sequence[list[int]]
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


def check_model_path(model: str) -> None:
    """Raise `ValueError` for a path that is no model, before vLLM takes it for a name.

    A name of the Hugging Face Hub is not looked up here.
    """
    place = Path(model).expanduser()
    looks_local = model.startswith(("/", ".", "~")) or model.count("/") > 1
    if place.is_dir() and not (place / "config.json").is_file():
        found = "a directory without config.json"
    elif place.exists() and not place.is_dir() and place.suffix != ".gguf":
        found = "a file"
    elif looks_local and not place.exists():
        found = "no such directory"
    else:
        return
    raise ValueError(
        f"--model {model}: {found}; expected the directory of a model, or a name on "
        "the Hugging Face Hub such as google/gemma-2-2b"
    )


def probe_module(
    path: str,
    model: str,
    text: str,
    max_tokens: int,
    *,
    sites: Sequence[str] | None = None,
    dtype: str = "auto",
) -> list[ProbedSite]:
    """Run `model` on `text` and measure the SAE at `path` at each of its sites.

    Args:
        path, sites: as for `inspect_module`.
        model: a name or directory, as for vLLM.
        text: what the model reads; nothing is generated.
        max_tokens: of the text, at most.
        dtype: of the model and of the SAE's matrices, as in vLLM.

    Raises:
        ValueError: the module or the model is refused, is no SAE, or the text has
            no token that the module does not leave untouched.
    """
    check_model_path(model)
    if inspect_module(MODULE, path, sites=sites).kind != "sae":
        raise ValueError(f"{path}: expected an SAE, found steering vectors")
    claims = read_layout(MODULE, path, sites).declared
    options = {"sites": sites, "dtype": dtype}
    with probing_engine(path, model, options) as llm:
        tokenizer = llm.get_tokenizer()
        # Not verbose: a text longer than the model's context is meant.
        ids = list(tokenizer(text, verbose=False).input_ids)
        prompts = windows(ids, tokenizer.bos_token_id, max_tokens)
        if not prompts:
            raise ValueError("text: expected at least one token, found none")
        config = get_steering_config(llm.llm_engine.vllm_config.additional_config)
        assert config is not None
        module = config.modules[MODULE]
        recorders, weights = install_recorders(llm, module)
        streams = record(llm, recorders, prompts)
        token_ids = torch.tensor([token for prompt in prompts for token in prompt])
        skipped = torch.tensor(module.skip_token_ids or (), dtype=torch.long)
        read = ~torch.isin(token_ids, skipped)
        if not read.any():
            raise ValueError(
                "text: expected tokens beside those that the module leaves "
                f"untouched ({module.skip_token_ids}), found none"
            )
        return [
            _probe_site(site, weights, streams, read, declared_values(site, claims))
            for site in module.sites
        ]


def _probe_site(
    info: SiteInfo,
    weights: Mapping[SiteKey, Any],
    streams: Mapping[SiteKey, Recorded],
    read: torch.Tensor,
    declared: Mapping[str, float],
) -> ProbedSite:
    own = key_of(info)
    seen = {key: stream.at(read) for key, stream in streams.items()}
    fits = {
        key: measure(weights[own], seen[key].read, seen[key].written)
        for key in (own, *around(info))
        if key in seen
    }
    fit = fits.pop(own)
    return ProbedSite(
        name=info.name,
        fit=fit,
        bypassed=read.numel() - fit.tokens,
        declared=declared,
        nearby={site_name(key.hook, key.layer): near.fvu for key, near in fits.items()},
    )


def probe(
    path: str,
    model: str,
    text_file: str | None,
    max_tokens: int,
    sites: Sequence[str] | None,
    dtype: str,
    as_json: bool,
) -> int:
    """Print what `probe_module` finds.

    Returns:
        The exit status: 0 when nothing disagrees, 1 when there is a warning.

    Raises:
        ValueError, OSError: as `probe_module`, or the text cannot be read.
    """
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        # The engine's log would go where the table does. The engine reads the
        # variable again; what runs before it has read it already.
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        logging.getLogger("vllm").setLevel(logging.ERROR)
    text = DEFAULT_TEXT if text_file is None else Path(text_file).read_text("utf-8")
    found = probe_module(path, model, text, max_tokens, sites=sites, dtype=dtype)
    warnings = [warning for site in found for warning in site.warnings]
    if as_json:
        shown = [{**asdict(site), "warnings": site.warnings} for site in found]
        print(json.dumps({"path": path, "model": model, "sites": shown}, indent=2))
    else:
        _print_table(found)
        for warning in warnings:
            print(f"warning: {warning}")
    return int(bool(warnings))


def _print_table(found: Sequence[ProbedSite]) -> None:
    columns = ("tokens", "bypassed", "FVU", "declared", "L0", "declared")
    print(f"{'site':16}" + "".join(f"{name:>10}" for name in columns))
    for site in found:
        cells = [f"{site.fit.tokens}", f"{site.bypassed}", f"{site.fit.fvu:.4f}"]
        cells += [_declared(site, "fvu"), f"{site.fit.l0:.1f}", _declared(site, "l0")]
        print(f"{site.name:16}" + "".join(f"{cell:>10}" for cell in cells))


def _declared(site: ProbedSite, name: str) -> str:
    return f"{site.declared[name]:g}" if name in site.declared else "-"
