# SPDX-License-Identifier: Apache-2.0
"""What each feature of an SAE does on a corpus: statistics and strongest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm.config.sae_labels import Labels
from vllm.config.steering_checks import integer_in_range
from vllm.entrypoints.steering.arguments import (
    Site,
    Text,
    labels_for,
    sae_named,
    some_text_ids,
    tokenizer_of,
)
from vllm.entrypoints.steering.encoded import EncodedText
from vllm.entrypoints.steering.finder import chosen_site, only_site
from vllm.entrypoints.steering.found import TokenInContext
from vllm.entrypoints.steering.offline import engine_config
from vllm.entrypoints.steering.pieces import token_pieces
from vllm.entrypoints.steering.reading import encode, read_limit
from vllm.entrypoints.steering.surveyed import Survey

if TYPE_CHECKING:
    from vllm import LLM

TEXTS_AT_ONCE = 256
CONTEXT, EXAMPLES, MAX_EXAMPLES = 8, 5, 50


def survey(
    llm: LLM,
    module: str,
    texts: Text | Sequence[Text],
    *,
    site: Site | None = None,
    examples: int = EXAMPLES,
    labels: Labels | None = None,
) -> Survey:
    """How often and how strongly each feature of an SAE is active on some texts.

    The 64 largest activations of every token are counted, or `max_read_values` of
    them. They take 12 bytes each in memory, and the texts are read in parts.

    Args:
        llm: an engine that was started with the module.
        module: its name.
        texts: ordinary texts, or their token ids; the more, the better.
        site: `"hook.layer"` or `(hook, layer)`; the only one of the module if not
            given.
        examples: how many tokens to keep on which a feature is strongest, 0 to 50, each
            from another text.
        labels: as for `encode`.

    Raises:
        ValueError: no texts, a bad text or `examples`, or several sites and none
            chosen.
    """
    integer_in_range("examples", examples, 0, MAX_EXAMPLES)
    config = engine_config(llm)
    info = sae_named(config, module)
    sites = chosen_site(info, site)
    labels = labels_for(info, labels)
    ids = some_text_ids(llm, texts)
    most = read_limit(config)
    counts = _Counts(ids)
    for start in range(0, len(ids), TEXTS_AT_ONCE):
        part = ids[start : start + TEXTS_AT_ONCE]
        read = encode(llm, module, part, sites=sites, top_k=most, labels={})
        for at, text in enumerate(read, start):
            counts.add(at, text)
    name = only_site(counts.sites, module)
    tokenizer = tokenizer_of(llm)

    def context(token: int, value: float) -> TokenInContext:
        text, at = counts.place(token)
        low = max(at - CONTEXT, 0)
        own = ids[text][low : at + 1 + CONTEXT]
        pieces = token_pieces(tokenizer, own) if tokenizer else [f" {i}" for i in own]
        at -= low
        before, after = "".join(pieces[:at]), "".join(pieces[at + 1 :])
        return TokenInContext(before, pieces[at], after, value)

    ranked = counts.ranked()
    found = counts.result(module, name, ranked, labels)
    found.of_several = info is not None and len(info.sites) > 1
    found.warnings += counts.doubts(most)
    for feature in np.flatnonzero(ranked.number).tolist() if examples else []:
        strongest = counts.strongest(ranked, feature, examples)
        found.examples[feature] = tuple(context(*one) for one in strongest)
    return found


@dataclass(frozen=True, eq=False)
class _Ranked:
    """Activations feature after feature, the largest of each first.

    Attributes:
        values: float32 `[m]`, activations.
        at: int32 `[m]`, their tokens.
        number: int64 `[F]`, how many are of each feature.
        first: int64 `[F]`, where those of each feature begin.
    """

    values: np.ndarray
    at: np.ndarray
    number: np.ndarray
    first: np.ndarray

    def quantile(self, q: float) -> np.ndarray:
        """float32 `[F]`; 0 for a feature without activations."""
        found: np.ndarray = np.zeros(len(self.number), dtype=np.float32)
        some = np.flatnonzero(self.number)
        place = np.floor((self.number[some] - 1) * (1 - q)).astype(int)
        found[some] = self.values[self.first[some] + place]
        return found


class _Counts:
    """Every listed activation of a corpus: feature, value and token.

    A token is counted through the whole corpus, text after text.
    """

    def __init__(self, ids: Sequence[Sequence[int]]):
        self.ids = ids
        self.starts = np.cumsum([0, *(len(own) for own in ids)])
        self.sites: set[str] = set()
        self.d_sae = self.tokens = self.active = self.cut = 0
        self.features: list[np.ndarray] = [np.zeros(0, dtype=np.int32)]
        self.values: list[np.ndarray] = [np.zeros(0, dtype=np.float32)]
        self.at: list[np.ndarray] = [np.zeros(0, dtype=np.int32)]

    def add(self, text: int, read: EncodedText) -> None:
        """What was read of one text."""
        for site, record in read.features.items():
            self.sites.add(site)
            positions, features, values = record.listed()
            self.features.append(features.astype(np.int32))
            self.values.append(values)
            self.at.append((self.starts[text] + positions).astype(np.int32))
            self.d_sae = record.d_sae
            self.tokens += len(record)
            self.active += int(record.num_active.sum())
            self.cut += int((record.counts < record.num_active).sum())

    def place(self, token: int) -> tuple[int, int]:
        """The text and the position in it of a token of the corpus."""
        text = int(np.searchsorted(self.starts, token, side="right")) - 1
        return text, int(token - self.starts[text])

    def ranked(self) -> _Ranked:
        """The activations by feature, the largest first."""
        columns = (self.features, self.values, self.at)
        features, values, at = (np.concatenate(column) for column in columns)
        order = np.lexsort((at, -values, features))
        number = np.bincount(features, minlength=self.d_sae)
        return _Ranked(values[order], at[order], number, np.cumsum(number) - number)

    def result(self, module: str, site: str, ranked: _Ranked, labels: Labels) -> Survey:
        """The statistics."""
        return Survey(
            module=module,
            site=site,
            tokens=self.tokens,
            l0=self.active / self.tokens,
            max=ranked.quantile(1.0),
            p99=ranked.quantile(0.99),
            p50=ranked.quantile(0.5),
            frequency=(ranked.number / self.tokens).astype(np.float32),
            labels=labels,
        )

    def strongest(
        self, ranked: _Ranked, feature: int, most: int
    ) -> list[tuple[int, float]]:
        """The tokens on which a feature is strongest, each of another text."""
        found: dict[int, tuple[int, float]] = {}
        seen: set[tuple[int, ...]] = set()
        start = int(ranked.first[feature])
        for place in range(start, start + int(ranked.number[feature])):
            if len(found) == most:
                break
            token = int(ranked.at[place])
            text, at = self.place(token)
            # Texts that begin alike have the same activation there.
            like = tuple(self.ids[text][max(at - CONTEXT, 0) : at + 1])
            if text not in found and like not in seen:
                seen.add(like)
                found[text] = (token, float(ranked.values[place]))
        return list(found.values())

    def doubts(self, most: int) -> list[str]:
        """A warning if tokens have more active features than the engine lists."""
        if not self.cut:
            return []
        line = (
            f"{self.cut} of {self.tokens} tokens have more than {most} active "
            f"features; only the {most} largest of each were counted"
        )
        return [line]
