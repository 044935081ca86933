# SPDX-License-Identifier: Apache-2.0
"""Read texts with a running `LLM`: which features are active on which tokens."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, SupportsIndex, cast

import numpy as np

from vllm.config.sae_features import SAEFeatures
from vllm.config.sae_labels import Labels, labels_of
from vllm.config.sae_readout_specs import DEFAULT_TOP_K
from vllm.config.sae_steering_presets import opt_out
from vllm.config.sae_steering_specs import READOUT_KEY
from vllm.config.steering import DEFAULT_MAX_READ_VALUES, SteeringConfig
from vllm.config.steering_checks import shown
from vllm.config.steering_json import Json, JsonView
from vllm.entrypoints.steering.encoded import EncodedText, EncodedTexts
from vllm.entrypoints.steering.offline import engine_config
from vllm.entrypoints.steering.pieces import token_pieces
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.tokenizers import TokenizerLike

Text = str | Sequence[int]
Site = str | tuple[str, int]
_PLACE = re.compile(r"^features\[(\d+)\]")
SPEC = f"{READOUT_KEY}[0]"  # where the engine finds what `encode` asks


def encode(
    llm: LLM,
    module: str,
    texts: Text | Sequence[Text],
    *,
    sites: Site | Sequence[Site] | Mapping[str, Sequence[int]] | None = None,
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
    if features is not None and len(features) == 0:
        raise ValueError("features: found none, expected at least one feature index")
    config = engine_config(llm)
    labels = labels_for(config, module, labels)
    # Not under the engine's default preset.
    steering = {**(opt_out(config) if config else {}), **(steering or {})}
    if top_k is None and features is None:
        top_k = DEFAULT_TOP_K
    spec: Json = {
        "module_name": module,
        "sites": _listed(sites),
        "phase": "prefill",
    }
    tokenizer = tokenizer_of(llm)
    ids = text_ids(llm, texts)
    if features is None:
        parts = [_read(llm, ids, {**spec, "top_k": top_k}, steering)]
    else:
        wanted, most = list(features), read_limit(config)
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
        found.append(EncodedText(own, pieces, merged, labels))
    return found


def read_limit(config: SteeringConfig | None) -> int:
    """How many values an engine reads of a token at a site, at most."""
    return DEFAULT_MAX_READ_VALUES if config is None else config.max_read_values


def _listed(sites: object) -> object:
    """Sites as JSON has them; the parser refuses what is none."""
    if isinstance(sites, Mapping):
        return {hook: _items(layers) for hook, layers in sites.items()}
    if isinstance(sites, str) or _is_pair(sites):
        return [site_text(sites)]
    listed = _items(sites)
    return [site_text(one) for one in listed] if isinstance(listed, list) else listed


def _items(given: object) -> object:
    """A list of what was given, as JSON has it; what cannot be one as it is."""
    return list(given) if isinstance(given, Iterable) else given


def _is_pair(site: object) -> bool:
    """Whether a site is given as `(hook, layer)`."""
    if not isinstance(site, Sequence) or len(site) != 2:
        return False
    return isinstance(site[0], str) and _is_index(site[1])


def site_text(site: object) -> object:
    """The name of a site that may be a pair; the reader refuses what is neither."""
    if isinstance(site, Sequence) and _is_pair(site):
        return f"{site[0]}.{operator.index(site[1])}"
    return site


def labels_for(
    config: SteeringConfig | None, module: str, given: Labels | None
) -> Labels:
    """The given labels, or those beside the module's files.

    Indices may be written as text, as in JSON.
    """
    if given is not None:
        return {_index(index): label for index, label in given.items()}
    info = None if config is None else config.modules.get(module)
    return {} if info is None else labels_of(info.path)


def tokenizer_of(llm: LLM) -> TokenizerLike | None:
    """The engine's tokenizer, or None if it was started without one."""
    skipped = llm.llm_engine.vllm_config.model_config.skip_tokenizer_init
    return None if skipped else llm.get_tokenizer()


def text_ids(llm: LLM, texts: Text | Sequence[Text]) -> list[list[int]]:
    """The token ids of each text, with the tokenizer's own special tokens.

    Raises:
        ValueError: a text is no text, has no tokens or is too long; or it is a string,
            and the engine has no tokenizer.
    """
    if not isinstance(texts, Sized):
        raise ValueError(f"texts: found {shown(texts)}, expected a text or a list")
    one = isinstance(texts, str) or (len(texts) > 0 and _is_index(texts[0]))
    tokenizer = tokenizer_of(llm)
    # One token is generated, because vLLM always generates.
    most = llm.llm_engine.vllm_config.model_config.max_model_len - 1
    found = []
    for at, text in enumerate(cast("Sequence[Text]", [texts] if one else texts)):
        own = _ids(f"texts[{at}]", text, tokenizer)
        if not 1 <= len(own) <= most:
            raise ValueError(
                f"texts[{at}]: found {len(own)} tokens, expected 1 to {most}, which is "
                "max_model_len - 1"
            )
        found.append(own)
    return found


def _index(given: object) -> int:
    """A feature's index in labels, where it may be text."""
    text = str(given)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"labels: found {shown(given)}, expected a feature index")
    return int(text)


def _is_index(value: object) -> bool:
    """Whether a value is a whole number: Python's, NumPy's or PyTorch's."""
    return isinstance(value, SupportsIndex) and not isinstance(value, np.ndarray)


def _ids(path: str, text: Text, tokenizer: TokenizerLike | None) -> list[int]:
    if isinstance(text, str) and tokenizer is not None:
        return list(tokenizer(text, verbose=False).input_ids)
    if isinstance(text, str):
        raise ValueError(
            f"{path}: found a string, but the engine has no tokenizer; expected a list "
            "of token ids"
        )
    try:
        return [operator.index(token) for token in text]
    except TypeError:
        raise ValueError(
            f"{path}: found {shown(text)}, expected a string or a list of token ids"
        ) from None


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
