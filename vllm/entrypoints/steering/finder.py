# SPDX-License-Identifier: Apache-2.0
"""Find the features that tell some texts from others."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vllm.config.sae_features import SAEFeatures
from vllm.config.sae_labels import Labels
from vllm.config.steering import ModuleInfo
from vllm.config.steering_checks import integer_in_range, listing, shown
from vllm.config.steering_points import plain_name, site_text
from vllm.entrypoints.steering.arguments import (
    Site,
    Text,
    labels_for,
    sae_named,
    some_text_ids,
    text_ids,
    tokenizer_of,
)
from vllm.entrypoints.steering.encoded import EncodedText, EncodedTexts
from vllm.entrypoints.steering.found import (
    FoundFeature,
    FoundFeatures,
    TokenInContext,
)
from vllm.entrypoints.steering.offline import engine_config
from vllm.entrypoints.steering.reading import encode, read_limit

if TYPE_CHECKING:
    from vllm import LLM

# How many candidates the second pass reads exactly.
CANDIDATES = 256
CONTEXT, EXAMPLES = 8, 3
# No SAE has a larger share of its features active where it fits.
DENSE = 0.2
# Only an attention sink has activations above so many times those of other tokens.
SINK = 10


def find_features(
    llm: LLM,
    module: str,
    texts: Text | Sequence[Text],
    against: Text | Sequence[Text] | None = None,
    *,
    site: Site | None = None,
    top: int = 20,
    labels: Labels | None = None,
) -> FoundFeatures:
    """The features that tell texts A from texts B.

    A first pass reads the largest activations of every token (64, or as many as the
    engine's `max_read_values`) and picks up to 256 candidates. Texts that have a token
    with more active features are read again for the candidates alone. Features are
    sorted by AUROC, then by mean difference; without B, by mean activation.

    Args:
        llm: an engine that was started with the module.
        module: its name.
        texts: A: texts of what is looked for, or their token ids; several short ones
            are best.
        against: B: texts without it.
        site: `"hook.layer"` or `(hook, layer)`; the only one of the module if not
            given.
        top: how many features to return, 1 to 256.
        labels: as for `encode`.

    Raises:
        ValueError: no texts, a bad `top` or `site`, or several sites and none chosen.
    """
    check_top("top", top)
    config = engine_config(llm)
    info = sae_named(config, module)
    sites = chosen_site(info, site)
    labels = labels_for(info, labels)
    own_ids = some_text_ids(llm, texts)
    other_ids = [] if against is None else text_ids(llm, against, "against")

    def read(
        texts: Sequence[Text], features: Sequence[int] | None = None
    ) -> EncodedTexts:
        top_k = read_limit(config) if features is None else None
        return encode(
            llm,
            module,
            texts,
            sites=sites,
            top_k=top_k,
            features=features,
            labels=labels,
        )

    first, other = read(own_ids), read(other_ids)
    name = only_site({name for text in first for name in text.features}, module)
    candidates = _candidates(first, other, name)[:CANDIDATES]
    if not candidates:
        return FoundFeatures(module, name, [], doubts(first, other, name))
    exact = _completed(first, name, lambda more: read(more, candidates))
    exact_other = _completed(other, name, lambda more: read(more, candidates))
    warnings = doubts(first, other, name) + _unknown(llm, first, other)
    a, b = _Values(exact, name, candidates), _Values(exact_other, name, candidates)
    found = [
        _statistics(feature, at, a, b, labels) for at, feature in enumerate(candidates)
    ]
    found.sort(key=_order)
    best = [
        replace(one, examples=_examples(one.feature_idx, exact, name))
        for one in found[:top]
    ]
    return FoundFeatures(module, name, best, warnings)


def check_top(path: str, top: object) -> None:
    """Raise `ValueError` unless so many features can be found."""
    integer_in_range(path, top, 1, CANDIDATES)


def check_one_site(path: str, names: Sequence[str]) -> None:
    """Raise `ValueError` if a module has several sites, and none is chosen."""
    if len(names) > 1:
        raise ValueError(
            f"{path}: the module has several sites, expected one: {listing(names)}"
        )


def chosen_site(info: ModuleInfo | None, site: Site | None) -> list[str] | None:
    """The site as `encode` takes it; None for a module's only one.

    Raises:
        ValueError: no site, or none of the module's; or none is chosen of several.
    """
    names = [] if info is None else [one.name for one in info.sites]
    if site is None:
        check_one_site("site", names)
        return None
    found = plain_name(site)
    if found is None or (info is not None and found not in names):
        accepted = "a site such as post_block.20"
        if info is not None:
            accepted = f"a site of module {shown(info.name)}: {listing(names)}"
        raise ValueError(f"site: found {shown(site_text(site))}, expected {accepted}")
    return [found]


def _order(found: FoundFeature) -> tuple[float, float, int]:
    auroc = 0.5 if found.auroc is None else found.auroc
    return (-round(auroc, 3), -found.mean_difference, found.feature_idx)


def only_site(names: Set[str], module: str) -> str:
    """The one site that was read.

    Raises:
        ValueError: several were, or none.
    """
    if len(names) != 1:
        listed = (
            ", ".join(sorted(names))
            or "no site, because every token was left unchanged"
        )
        raise ValueError(
            f"site: module {module!r} was read at {listed}; expected one site"
        )
    (name,) = names
    return name


def _candidates(a: EncodedTexts, b: EncodedTexts, site: str) -> list[int]:
    """Features by mean difference of what the first pass listed."""
    sides = [
        [text.features[site] for text in texts if site in text.features]
        for texts in (a, b)
    ]
    gains: np.ndarray = np.zeros(next(one.d_sae for side in sides for one in side))
    for records, sign in zip(sides, (1.0, -1.0), strict=True):
        tokens = sum(len(record) for record in records)
        for record in records:
            _, features, values = record.listed()
            np.add.at(gains, features, sign * values.astype(np.float64) / tokens)
    order = np.argsort(-gains, kind="stable")
    return order[gains[order] > 0].tolist()


def _completed(
    texts: EncodedTexts, site: str, read: Callable[[Sequence[Text]], EncodedTexts]
) -> EncodedTexts:
    """The texts; those with features that were not listed, as `read` reads them."""
    found = EncodedTexts(texts)
    again = [
        at
        for at, text in enumerate(texts)
        if site in text.features
        and (text.features[site].counts < text.features[site].num_active).any()
    ]
    for at, text in zip(
        again, read([texts[at].token_ids for at in again]), strict=True
    ):
        found[at] = text
    return found


class _Values:
    """Activations of the candidates on some texts: `[tokens, candidates]` each."""

    def __init__(self, texts: EncodedTexts, site: str, features: Sequence[int]):
        width = len(features)
        self.by_text = [
            _columns(text.features[site], features)
            for text in texts
            if site in text.features
        ]
        empty: np.ndarray = np.zeros((0, width), dtype=np.float32)
        self.tokens = np.concatenate([*self.by_text, empty])
        self.maxima = np.array([rows.max(axis=0) for rows in self.by_text if len(rows)])
        self.maxima = self.maxima.reshape(-1, width)


def _columns(record: SAEFeatures, features: Sequence[int]) -> np.ndarray:
    """float32 `[tokens, features]`: 0 for a feature that is not listed."""
    place: np.ndarray = np.full(record.d_sae, -1)
    place[list(features)] = np.arange(len(features))
    _, listed, values = record.listed()
    rows: np.ndarray = np.repeat(np.arange(len(record)), record.counts)
    columns = place[listed]
    found: np.ndarray = np.zeros((len(record), len(features)), dtype=np.float32)
    wanted = columns >= 0
    found[rows[wanted], columns[wanted]] = values[wanted]
    return found


def _statistics(
    feature: int,
    at: int,
    a: _Values,
    b: _Values,
    labels: Labels,
) -> FoundFeature:
    own, other = a.tokens[:, at], b.tokens[:, at]
    against = float(other.mean()) if len(other) else 0.0
    return FoundFeature(
        feature_idx=feature,
        label=labels.get(feature, ""),
        mean_difference=float(own.mean()) - against,
        auroc=auroc(a.maxima[:, at], b.maxima[:, at]) if len(b.maxima) else None,
        frequency=float((own != 0).mean()),
        frequency_against=float((other != 0).mean()) if len(other) else 0.0,
        max_activation=float(own.max()),
    )


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """How often a positive value exceeds a negative one; ties count half."""
    greater = (positive[:, None] > negative[None, :]).mean()
    equal = (positive[:, None] == negative[None, :]).mean()
    return float(greater + equal / 2)


def _examples(
    feature: int, texts: EncodedTexts, site: str
) -> tuple[TokenInContext, ...]:
    best: dict[tuple[int, ...], tuple[float, EncodedText, int]] = {}
    for text in texts:
        if site not in text.features:
            continue
        values = text.activations(feature, site)
        at = int(values.argmax())
        if values[at] > 0:
            # Texts that begin alike have the same activation there: one is enough.
            best.setdefault(
                tuple(text.token_ids[: at + 1]), (float(values[at]), text, at)
            )
    strongest = sorted(best.values(), key=lambda found: -found[0])[:EXAMPLES]
    return tuple(
        TokenInContext(
            "".join(text.tokens[max(at - CONTEXT, 0) : at]),
            text.tokens[at],
            "".join(text.tokens[at + 1 : at + 1 + CONTEXT]),
            value,
        )
        for value, text, at in strongest
    )


def _unknown(llm: LLM, a: EncodedTexts, b: EncodedTexts) -> list[str]:
    """A warning when the tokenizer does not know many of the texts' words."""
    tokenizer = tokenizer_of(llm)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if tokenizer is None or unknown is None:
        return []
    ids: np.ndarray = np.concatenate([text.token_ids for text in (*a, *b)])
    share = float((ids == unknown).mean())
    if share < 0.05:
        return []
    return [
        f"{share:.0%} of the tokens are {tokenizer.unk_token}: unknown to the model"
    ]


def doubts(a: EncodedTexts, b: EncodedTexts, site: str) -> list[str]:
    """What makes a result doubtful that compares texts `a` and `b`, one line each."""
    found = []
    records = [t.features[site] for t in (*a, *b) if site in t.features]
    active = np.concatenate([record.num_active for record in records])
    listed = max(record.features.shape[1] for record in records)
    share = float((active > listed).mean())
    if share > 0.1:
        found.append(
            f"{share:.0%} of the tokens have more than {listed} active features; "
            f"only the {listed} largest of each were looked at"
        )
    if float(active.mean()) > DENSE * records[0].d_sae:
        found.append(
            f"a token has {active.mean():.0f} of {records[0].d_sae} features active: "
            "does the SAE fit this site?"
        )
    if float((active == 0).mean()) > 0.5:
        found.append("most tokens have no active feature: does the SAE fit this site?")
    peaks = np.concatenate([r.values.max(axis=1, initial=0.0) for r in records])
    peaks = peaks[peaks > 0]
    large = int((peaks > SINK * np.median(peaks)).sum()) if len(peaks) else 0
    if large:
        found.append(
            f"{large} of {len(peaks)} tokens have activations above {SINK} times those "
            "of the median token, as attention sinks have: set the module's norm_guard "
            "to leave them out"
        )
    if b and min(len(a), len(b)) < 3:
        found.append("AUROC compares texts: give at least three of each kind")
    return found
