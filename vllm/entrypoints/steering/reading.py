# SPDX-License-Identifier: Apache-2.0
"""Read texts with a running `LLM`: which features are active on which tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vllm.config.sae_features import SAEFeatures
from vllm.config.sae_labels import Labels
from vllm.config.sae_readout_specs import DEFAULT_TOP_K
from vllm.config.sae_steering_presets import opt_out
from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.config.steering import DEFAULT_MAX_READ_VALUES, SteeringConfig
from vllm.config.steering_json import Json, JsonView
from vllm.entrypoints.steering.arguments import (
    Sites,
    Text,
    feature_list,
    labels_for,
    sae_named,
    site_list,
    steering_fields,
    text_ids,
    tokenizer_of,
)
from vllm.entrypoints.steering.encoded import EncodedText, EncodedTexts
from vllm.entrypoints.steering.offline import engine_config
from vllm.entrypoints.steering.pieces import token_pieces
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllm import LLM

_PLACE = re.compile(r"^features\[(\d+)\]")
SPEC = f"{READOUT_KEY}[0]"  # where the engine finds what `encode` asks


def encode(
    llm: LLM,
    module: str,
    texts: Text | Sequence[Text],
    *,
    sites: Sites = None,
    top_k: int | None = None,
    features: Sequence[int] | None = None,
    steering: JsonView | None = None,
    labels: Labels | None = None,
) -> EncodedTexts:
    """The features of every token of some texts.

    Args:
        llm: an engine that was started with the module.
        module: its name.
        texts: texts, or lists of token ids, or one of them.
        sites: sites (`"hook.layer"` or `(hook, layer)`), one of them, or `{hook:
            [layer, ...]}`; every site of the module if not given.
        top_k: how many of the largest activations of each token, at most the engine's
            `max_read_values` (64); 16 if neither this nor `features` is given.
        features: the features to read instead; any number of them.
        steering: steering fields of the request, such as `sae_clamp_specs`, to read
            what a steered model sees. Without it the model is not steered, not by the
            engine's default preset either, unless that is locked.
        labels: what features stand for, for display; if None, `labels.json` beside the
            module.

    Raises:
        ValueError: no such module, site or feature, both `top_k` and `features`, or a
            text that is no text, has no tokens or is too long.
        VLLMValidationError: a bad field of `steering`.
    """
    if top_k is not None and features is not None:
        raise ValueError("top_k: found both top_k and features, expected one of them")
    wanted = None if features is None else feature_list(features)
    config = engine_config(llm)
    labels = labels_for(sae_named(config, module), labels)
    # Not under the engine's default preset.
    steering = {**(opt_out(config) if config else {}), **steering_fields(steering)}
    if top_k is None and features is None:
        top_k = DEFAULT_TOP_K
    spec: Json = {
        "module_name": module,
        "sites": site_list(sites),
        "phase": "prefill",
    }
    tokenizer = tokenizer_of(llm)
    ids = text_ids(llm, texts)
    if wanted is None:
        parts = [_read(llm, ids, {**spec, "top_k": top_k}, steering)]
    else:
        most = read_limit(config)
        parts = [
            _read(llm, ids, {**spec, "features": wanted[at : at + most]}, steering, at)
            for at in range(0, len(wanted), most)
        ]
    found = EncodedTexts()
    for at, own in enumerate(ids):
        records = [part[at].get(module, {}) for part in parts]
        merged = {
            site: beside([record[site] for record in records]) for site in records[0]
        }
        pieces = token_pieces(tokenizer, own) if tokenizer else [str(i) for i in own]
        found.append(EncodedText(own, pieces, merged, labels, wanted))
    return found


def read_limit(config: SteeringConfig | None) -> int:
    """How many values an engine reads of a token at a site, at most."""
    return DEFAULT_MAX_READ_VALUES if config is None else config.max_read_values


def _read(
    llm: LLM,
    ids: Sequence[list[int]],
    spec: Json,
    steering: JsonView,
    first: int = 0,
) -> list[dict[str, dict[str, SAEFeatures]]]:
    """What the prompts' tokens read, by module and site.

    `first` is the place of the spec's first feature in what the caller gave.
    """
    params = SamplingParams(
        max_tokens=1,
        temperature=0,
        detokenize=False,
        extra_args={**steering, READOUT_KEY: [spec]},
    )
    prompts = [{"prompt_token_ids": own} for own in ids]
    try:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    except VLLMValidationError as error:
        if not (error.parameter or "").startswith(SPEC):
            raise
        # The caller gave arguments, not a spec.
        text = error.args[0].replace(f"{SPEC}.", "")
        text = _PLACE.sub(lambda place: f"features[{int(place[1]) + first}]", text)
        raise ValueError(text) from None
    return [output.prompt_sae_features or {} for output in outputs]


def beside(records: Sequence[SAEFeatures]) -> SAEFeatures:
    """Records of the same tokens and other features, side by side."""
    if len(records) == 1:
        return records[0]
    return SAEFeatures(
        records[0].positions,
        np.concatenate([record.features for record in records], axis=1),
        np.concatenate([record.values for record in records], axis=1),
        sum(record.counts for record in records),  # type: ignore[arg-type]
        records[0].num_active,
        records[0].d_sae,
    )
