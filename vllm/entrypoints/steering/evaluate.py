# SPDX-License-Identifier: Apache-2.0
"""How much of its model an SAE explains: FVU, L0 and the loss that it recovers."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from vllm.config.sae_steering_specs import FULL_KEY, PRESET_KEY, READOUT_KEY
from vllm.config.steering import SteeringConfig
from vllm.config.steering_json import Json
from vllm.entrypoints.steering.arguments import (
    Sites,
    Text,
    asked_sites,
    sae_named,
    text_ids,
)
from vllm.entrypoints.steering.frames import data_frame
from vllm.entrypoints.steering.offline import engine_config
from vllm.entrypoints.steering.results import Results
from vllm.entrypoints.steering.sinks import warnings_of_large_norms
from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    import pandas

    from vllm import LLM

MEASURE_METHOD = "measure_steering"
# Above this share of unexplained variance the features mean little.
BAD_FVU = 0.6


class TooShortError(ValueError):
    """The texts have too few tokens for a loss, or for a variance."""


@dataclass(frozen=True)
class SiteEvaluation:
    """An SAE at one site, over some texts.

    Attributes:
        site: `hook.layer`.
        tokens: number of reconstructed tokens; bos and the like are not.
        fvu: fraction of variance unexplained, `sum |y - y'|^2 / sum |y - mean|^2`.
        l0: mean number of active features of a token.
        ce_plain: cross-entropy in nats of the texts' tokens, without edits.
        ce_reconstructed: the same with every token reconstructed at this site.
        ce_ablated: the same with every such token replaced by the mean.
        median_norm: the median norm of what the SAE reads.
        large: how many tokens have a norm above ten times the median.
    """

    site: str
    tokens: int
    fvu: float
    l0: float
    ce_plain: float
    ce_reconstructed: float
    ce_ablated: float
    median_norm: float = 0.0
    large: int = 0

    @property
    def warnings(self) -> list[str]:
        """What makes the figures doubtful, one line each."""
        found = warnings_of_large_norms(
            self.site, self.tokens, self.large, self.median_norm
        )
        return found if self.fit_warning is None else [self.fit_warning, *found]

    @property
    def fit_warning(self) -> str | None:
        """What a high FVU means; None where it is not high."""
        if self.fvu <= BAD_FVU:
            return None
        return (
            f"FVU {self.fvu:.2f}: the SAE explains little of this site on these texts; "
            "is it of this model, layer and hook?"
        )

    @property
    def recovered(self) -> float:
        """Share of the loss that is recovered: 1 for the plain model, 0 for the ablated
        one."""
        lost = self.ce_ablated - self.ce_plain
        return (self.ce_ablated - self.ce_reconstructed) / lost if lost else 1.0


class Evaluation(Results[SiteEvaluation]):
    """What `evaluate` returns, one `SiteEvaluation` for each site."""

    def to_pandas(self) -> pandas.DataFrame:
        """One row a site; needs pandas."""
        rows = [{**asdict(one), "recovered": one.recovered} for one in self]
        names = [one.name for one in fields(SiteEvaluation)]
        return data_frame(rows, (*names, "recovered"))

    def _repr_html_(self) -> str:
        names = ("site", "tokens", "FVU", "L0", "CE", "reconstructed", "ablated")
        head = "".join(f"<th>{name}</th>" for name in (*names, "recovered"))
        rows = []
        for one in self:
            losses = (one.ce_plain, one.ce_reconstructed, one.ce_ablated)
            numbers = (one.fvu, one.l0, *losses, one.recovered)
            cells = [one.site, str(one.tokens), *(f"{n:.3f}" for n in numbers)]
            rows.append("".join(f"<td>{cell}</td>" for cell in cells))
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        lines = [f"<p>{escape(line)}</p>" for one in self for line in one.warnings]
        return f"{''.join(lines)}<table><tr>{head}</tr>{body}</table>"


def evaluate(
    llm: LLM, module: str, texts: Text | Sequence[Text], *, sites: Sites = None
) -> Evaluation:
    """Evaluate a module at its sites, one site at a time.

    Args:
        llm: an engine that was started with the module, compiled or not.
        module: its name.
        texts: what the model reads; at least two tokens each.
        sites: as for `encode`; every site of the module if not given.

    Raises:
        ValueError: no such SAE module or site, or a text that is none, has no tokens or
            is too long.
        TooShortError: no text of two tokens, or fewer than two tokens that the module
            reconstructs.
        VLLMValidationError: the engine's default preset is locked, so no text can be
            read without steering.
    """
    info = sae_named(engine_config(llm) or SteeringConfig(), module)
    assert info is not None
    asked = asked_sites(info, sites)
    ids = [own for own in text_ids(llm, texts) if len(own) > 1]
    if not ids:
        raise TooShortError(
            "texts: expected at least one text of two or more tokens, found none"
        )
    plain = _loss(llm, ids, None)[0]
    found = Evaluation()
    for site in asked:
        where: Json = {site.hook.value: {str(site.layer): []}}
        read = {"sites": {site.hook.value: [site.layer]}, "top_k": 1}
        specs = {
            FULL_KEY: [{"module_name": module, "clamps": where}],
            READOUT_KEY: [{"module_name": module, **read, "phase": "prefill"}],
        }
        _measure(llm, "start", module, site.hook.value, site.layer)
        try:
            reconstructed, l0 = _loss(llm, ids, specs)
            _measure(llm, "ablate")
            ablated, _ = _loss(llm, ids, specs)
        finally:
            sums = _measure(llm, "stop")
        if sums.get("tokens", 0) < 2:
            raise TooShortError(
                "texts: expected at least two tokens that the module reconstructs (bos "
                f"and the like are left alone), found {int(sums.get('tokens', 0))}"
            )
        found.append(
            SiteEvaluation(
                site=site.name,
                tokens=int(sums["tokens"]),
                fvu=sums["error"] / max(sums["variance"], 1e-30),
                l0=l0,
                ce_plain=plain,
                ce_reconstructed=reconstructed,
                ce_ablated=ablated,
                median_norm=sums["median_norm"],
                large=int(sums["large"]),
            )
        )
    return found


def _measure(llm: LLM, verb: str, *args: object) -> dict[str, float]:
    """Run one verb on every rank; returns what the rank with the site measured."""
    replies = llm.collective_rpc(MEASURE_METHOD, args=(verb, *args))
    for reply in replies:
        if not reply["ok"]:
            raise ValueError(reply["error"])
    return next((reply for reply in replies if "tokens" in reply), {})


def _loss(
    llm: LLM, ids: Sequence[list[int]], specs: Json | None
) -> tuple[float, float]:
    """(mean cross-entropy of the prompts' tokens, mean L0 of those that were read)."""
    params = SamplingParams(
        max_tokens=1,
        temperature=0,
        prompt_logprobs=0,
        detokenize=False,
        # Under no preset, whatever the engine's default is.
        extra_args={PRESET_KEY: None, **(specs or {})},
    )
    # The salt keeps other requests from these blocks: an ablated block would have the
    # key of a reconstructed one.
    salt = uuid.uuid4().hex
    prompts = [{"prompt_token_ids": own, "cache_salt": salt} for own in ids]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    losses, active = [], []
    for own, output in zip(ids, outputs, strict=True):
        for token, scores in zip(own[1:], output.prompt_logprobs[1:], strict=True):
            losses.append(-scores[token].logprob)
        for sites in (output.prompt_sae_features or {}).values():
            active += [record.num_active for record in sites.values()]
    l0 = float(np.concatenate(active).mean()) if active else 0.0
    return float(np.mean(losses)), l0
