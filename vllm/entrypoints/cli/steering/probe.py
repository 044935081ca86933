# SPDX-License-Identifier: Apache-2.0
"""`probe`: how well an SAE reconstructs its model, measured in a real engine.

The engine is started in this process with the module configured, so the module is
checked, loaded and placed exactly as a server would. Each site then records the
stream that the tiers would edit, for plain prompts, and the reconstruction is
computed by the reference from the weights that the engine holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from vllm.config.steering import Activation, SiteInfo, get_steering_config
from vllm.config.steering_points import site_name
from vllm.entrypoints.cli.steering.fit import Fit, judge, measure
from vllm.entrypoints.cli.steering.inputs import (
    check_model_path,
    need_sae,
    quiet_engine,
    read_text,
)
from vllm.entrypoints.cli.steering.probe_engine import (
    MODULE,
    WINDOW,
    Recorded,
    around,
    install_recorders,
    key_of,
    probing_engine,
    record,
)
from vllm.entrypoints.cli.steering.probe_site import at_asked_site
from vllm.model_executor.layers.steering import SiteKey
from vllm.model_executor.layers.steering_state import SAEWeights
from vllm.model_executor.model_loader.sae_loader import inspect_module, read_layout

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


@dataclass(frozen=True)
class ProbedSite:
    """What was measured at one site, beside what its author declares.

    `bypassed` counts the tokens that the module leaves untouched. FVU and L0 are over
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
    """What the files claim of a site: `fvu` and `l0`. A TopK SAE's L0 is its k."""
    found = dict(claims.get(site.name, {}))
    if site.activation is Activation.TOPK and site.k is not None:
        found.setdefault("l0", float(site.k))
    return found


def windows(ids: Sequence[int], bos: int | None, max_tokens: int) -> list[list[int]]:
    """The text's first `max_tokens` tokens, cut into prompts.

    If the tokenizer puts a bos before a text, each prompt gets one.
    """
    prefix = [bos] if bos is not None and ids[:1] == [bos] else []
    body = list(ids[len(prefix) : max_tokens])
    step = WINDOW - 1 - len(prefix)  # one place is for the token that is generated
    return [prefix + body[at : at + step] for at in range(0, len(body), step)]


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
        path, sites: as for `inspect_module`; an SAE of one site may be measured at
            another one than its files say.
        model: a name or directory, as for vLLM.
        text: what the model reads; nothing is generated.
        max_tokens: of the text, at most.
        dtype: of the model and of the SAE's matrices, as in vLLM.

    Raises:
        ValueError: the module or the model is refused, is no SAE, or the text has
            no token that the module does not leave untouched.
    """
    check_model_path(model)
    with at_asked_site(path, sites) as (place, asked):
        return _probe(place, model, text, max_tokens, asked, dtype)


def _probe(
    path: str,
    model: str,
    text: str,
    max_tokens: int,
    sites: Sequence[str] | None,
    dtype: str,
) -> list[ProbedSite]:
    need_sae(path, inspect_module(MODULE, path, sites=sites))
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
    weights: Mapping[SiteKey, SAEWeights],
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
    quiet_engine()
    text = DEFAULT_TEXT if text_file is None else read_text("--text", text_file)
    if not text.strip():
        raise ValueError(f"--text {text_file}: expected at least one word, found none")
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
