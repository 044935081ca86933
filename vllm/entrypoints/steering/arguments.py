# SPDX-License-Identifier: Apache-2.0
"""What a notebook passes to the functions of this package, checked and made plain.

Whatever is refused is a `ValueError` that names the argument, what was found and what
is accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

import msgspec

from vllm.config.sae_labels import Labels, labels_of
from vllm.config.sae_readout_parser import sites_to_read
from vllm.config.sae_readout_specs import ReadSites
from vllm.config.sae_steering_specs import EXTRA_ARGS_KEYS, PRESET_KEY, READOUT_KEY
from vllm.config.steering import ModuleInfo, SiteInfo, SteeringConfig
from vllm.config.steering_checks import Array, listing, shown, whole
from vllm.config.steering_json import Json
from vllm.config.steering_points import site_text
from vllm.config.steering_reader import Reader
from vllm.exceptions import VLLMValidationError

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.tokenizers import TokenizerLike

Text = str | Sequence[int]
Site = str | tuple[str, int]
# Sites, one of them, or {hook: [layer, ...]}; None: every site of the module.
Sites = Site | Sequence[Site] | Mapping[str, Sequence[int]] | None
TEXTS = "a text, token ids, or a list of them"


@runtime_checkable
class _Frame(Protocol):
    """A table of pandas, polars and the like, which iterates over its columns."""

    @property
    def columns(self) -> object: ...


def tokenizer_of(llm: LLM) -> TokenizerLike | None:
    """The engine's tokenizer, or None if it was started without one."""
    skipped = llm.llm_engine.vllm_config.model_config.skip_tokenizer_init
    return None if skipped else llm.get_tokenizer()


def sae_named(config: SteeringConfig | None, module: object) -> ModuleInfo | None:
    """The SAE that a module's name means; None for an engine without steering.

    Raises:
        ValueError: there is no such SAE.
    """
    if config is None:
        return None
    info = config.modules.get(module) if isinstance(module, str) else None
    if info is None or info.kind != "sae":
        saes = [name for name, one in config.modules.items() if one.kind == "sae"]
        found = shown(module) + ("" if info is None else f' of kind "{info.kind}"')
        raise ValueError(
            f'module: found {found}, expected a module of kind "sae": {listing(saes)}'
        )
    return info


def text_ids(
    llm: LLM, texts: Text | Sequence[Text], path: str = "texts"
) -> list[list[int]]:
    """The token ids of each text, with the tokenizer's own special tokens.

    `path` is the argument's name.

    Raises:
        ValueError: a text is no text, has no tokens or is too long; or it is a string,
            and the engine has no tokenizer.
    """
    tokenizer = tokenizer_of(llm)
    model = llm.llm_engine.vllm_config.model_config
    # One token is generated, because vLLM always generates.
    most = model.max_model_len - 1
    largest = model.get_vocab_size() - 1
    if tokenizer is not None:
        largest = max(largest, tokenizer.max_token_id)
    found = []
    for at, text in enumerate(_texts(path, texts)):
        where = f"{path}[{at}]"
        own = _ids(where, text, tokenizer)
        if not 1 <= len(own) <= most:
            raise ValueError(
                f"{where}: found {len(own)} tokens, expected 1 to {most}, which is "
                "max_model_len - 1"
            )
        for token in own:
            if not 0 <= token <= largest:
                raise ValueError(
                    f"{where}: found the token {token}, expected token ids in "
                    f"0..{largest}"
                )
        found.append(own)
    return found


def some_text_ids(llm: LLM, texts: Text | Sequence[Text]) -> list[list[int]]:
    """`text_ids` of at least one text.

    Raises:
        ValueError: as `text_ids`, or there is no text.
    """
    ids = text_ids(llm, texts)
    if not ids:
        raise ValueError("texts: expected at least one text, found none")
    return ids


def _texts(path: str, texts: object) -> list[object]:
    """The texts, of which a single one may have been given."""
    if isinstance(texts, str):
        return [texts]
    hint = None
    if isinstance(texts, Mapping):
        named = next((key for key in ("input_ids", "text") if key in texts), None)
        hint = "" if named is None else f", such as its {named!r}"
    elif isinstance(texts, _Frame):
        hint = ", such as one of its columns"
    elif isinstance(texts, (bytes, bytearray)) or not isinstance(texts, Sized):
        hint = ""
    if hint is not None or not isinstance(texts, Iterable):
        raise ValueError(f"{path}: found {shown(texts)}, expected {TEXTS}{hint or ''}")
    listed = list(texts)
    return [listed] if listed and type(whole(listed[0])) is int else listed


def _ids(path: str, text: object, tokenizer: TokenizerLike | None) -> list[int]:
    if isinstance(text, str) and tokenizer is not None:
        return list(tokenizer(text, verbose=False).input_ids)
    if isinstance(text, str):
        raise ValueError(
            f"{path}: found a string, but the engine has no tokenizer; expected a list "
            "of token ids"
        )
    plain = isinstance(text, Iterable) and not isinstance(text, (bytes, Mapping))
    ids = [whole(token) for token in text] if plain else []  # type: ignore[attr-defined]
    if not plain or not all(type(token) is int for token in ids):
        chat = text if isinstance(text, Mapping) else next(iter(ids), None)
        is_chat = isinstance(chat, Mapping) and "role" in chat
        hint = (
            "; the token ids of a chat are "
            "llm.get_tokenizer().apply_chat_template(messages, return_dict=False)"
        )
        raise ValueError(
            f"{path}: found {shown(text)}, expected a string or a list of token ids"
            f"{hint if is_chat else ''}"
        )
    return ids  # type: ignore[return-value]


def labels_for(info: ModuleInfo | None, given: Labels | None) -> Labels:
    """The given labels, or those beside the module's files.

    Indices may be written as text, as in JSON.
    """
    if given is None:
        return {} if info is None else labels_of(info.path)
    if not isinstance(given, Mapping):
        raise ValueError(
            f"labels: found {shown(given)}, expected texts by feature index, such as "
            '{457: "the bridge"}'
        )
    return {_index(index): _label(index, label) for index, label in given.items()}


def _index(given: object) -> int:
    """A feature's index in labels, where it may be text."""
    text = str(given)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"labels: found {shown(given)}, expected a feature index")
    return int(text)


def _label(index: object, label: object) -> str:
    if not isinstance(label, str):
        raise ValueError(f"labels.{index}: found {shown(label)}, expected a text")
    return label


def feature_list(features: object) -> list[int]:
    """The features to read; the engine checks one by one that they are indices."""
    one = type(whole(features)) is int
    if (
        one
        or not isinstance(features, Iterable)
        or isinstance(features, (str, Mapping))
        or (isinstance(features, Array) and features.ndim == 0)
    ):
        hint = ": enclose it in [...]" if one else ""
        raise ValueError(
            f"features: found {shown(features)}, expected a list of feature "
            f"indices{hint}"
        )
    found = [whole(feature) for feature in features]
    if not found:
        raise ValueError("features: found none, expected at least one feature index")
    return cast("list[int]", found)


def steering_fields(given: object) -> Json:
    """The steering fields with which texts are read."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(
            f"steering: found {shown(given)}, expected steering fields, such as "
            '{"sae_clamp_specs": [spec]}'
        )
    accepted = [key for key in (*EXTRA_ARGS_KEYS, PRESET_KEY) if key != READOUT_KEY]
    for key in given:
        if key not in accepted:
            raise ValueError(
                f"steering: found the field {shown(key)}, expected only "
                f"{', '.join(accepted)}"
            )
    return dict(given)


class _Asked(msgspec.Struct):
    sites: ReadSites | None = None


_ASKED = Reader(_Asked)


def asked_sites(info: ModuleInfo, sites: Sites) -> list[SiteInfo]:
    """The sites of a module that a caller names, each once.

    Raises:
        ValueError: one is no site of the module, or is given twice.
    """
    try:
        given = _ASKED.read({"sites": site_list(sites)}).sites
        named = sites_to_read("sites", given, info)
    except VLLMValidationError as error:
        raise ValueError(str(error)) from None
    found: list[SiteInfo] = []
    for where, site in named:
        if site in found:
            raise ValueError(f"{where}: {site.name} is given twice, expected once")
        found.append(site)
    return found


def site_list(sites: object) -> object:
    """Sites as JSON has them; the parser refuses what is none."""
    if isinstance(sites, Mapping):
        return {hook: _items(layers) for hook, layers in sites.items()}
    named = site_text(sites)
    if isinstance(named, str):
        return [named]
    listed = _items(sites)
    return [site_text(one) for one in listed] if isinstance(listed, list) else listed


def _items(given: object) -> object:
    """A list of what was given, as JSON has it; what cannot be one as it is."""
    text = isinstance(given, (str, bytes))
    return list(given) if isinstance(given, Iterable) and not text else given
