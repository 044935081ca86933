# SPDX-License-Identifier: Apache-2.0
"""What was read of texts: features by token, as arrays, frames and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from vllm.config.sae_features import SAEFeatures
from vllm.config.sae_labels import Labels
from vllm.config.steering_checks import MAX_LISTED, integer_in_range, listing, shown
from vllm.config.steering_json import Json
from vllm.config.steering_points import plain_name, site_text
from vllm.entrypoints.steering.frames import frame_of_columns
from vllm.entrypoints.steering.results import Results

if TYPE_CHECKING:
    import pandas

SHOWN_TEXT = 60  # characters of a text in its `repr`


def feature_index(
    feature: object, d_sae: int, error: type[Exception] = ValueError
) -> int:
    """`feature`, which must be one of an SAE's.

    Raises:
        error: it is something else.
    """
    return integer_in_range("feature", feature, 0, d_sae - 1, error)


@dataclass(frozen=True, eq=False, repr=False)
class EncodedText:
    """One text, and what was read of it.

    Attributes:
        token_ids: of the text, with the tokenizer's special tokens.
        tokens: the text of each token.
        features: by site (`hook.layer`). Tokens that the module bypasses have no entry.
        labels: what features stand for, where it is known.
        asked: the features that were asked for; None: the largest were read.
    """

    token_ids: list[int]
    tokens: list[str]
    features: dict[str, SAEFeatures]
    labels: Labels = field(default_factory=dict, repr=False)
    asked: Sequence[int] | None = None

    def __repr__(self) -> str:
        text = "".join(self.tokens)
        text = text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}..."
        sites = ", ".join(self.features) or "no token was read"
        return f"EncodedText({text!r}, {len(self.tokens)} tokens, {sites})"

    def site(self, name: str | tuple[str, int] | None = None) -> SAEFeatures:
        """The record of a site, by any of its names; the only one, if none is given.

        The site may be `(hook, layer)`, too.

        Raises:
            KeyError: no such site, or several and no name.
        """
        if name is None and len(self.features) == 1:
            return next(iter(self.features.values()))
        if not self.features:
            raise KeyError("no token of this text was read: the module skips all")
        own = plain_name(name)
        if own not in self.features:
            found = "none" if name is None else shown(site_text(name))
            raise KeyError(
                f"site: found {found}, expected one of {listing(list(self.features))}"
            )
        return self.features[own]

    def activations(
        self, feature: int, site: str | tuple[str, int] | None = None
    ) -> np.ndarray:
        """float32 `[tokens]`: one feature on each token; 0 where it was not listed.

        Raises:
            KeyError: as `site`.
            ValueError: no feature of the SAE, or none of those that were asked for.
        """
        found: np.ndarray = np.zeros(len(self.tokens), dtype=np.float32)
        if not self.features:
            return found
        record = self.site(site)
        feature = feature_index(feature, record.d_sae)
        if self.asked is not None and feature not in self.asked:
            raise ValueError(
                f"feature: found {feature}, which was not read, expected one of "
                f"{', '.join(map(str, self.asked[:MAX_LISTED]))}"
                + (", ..." if len(self.asked) > MAX_LISTED else "")
            )
        rows, places = np.nonzero(record.features == feature)
        found[record.positions[rows]] = record.values[rows, places]
        return found

    def to_pandas(self) -> pandas.DataFrame:
        """One row for each token, site and listed feature; needs pandas."""
        columns = _columns([self])
        del columns["text"]
        return frame_of_columns(columns)

    def rows(self) -> list[Json]:
        """One object for each token, site and listed feature."""
        return [
            {
                "position": position,
                "token": self.tokens[position],
                "site": site,
                "feature_idx": feature,
                "value": value,
                "label": self.labels.get(feature, ""),
            }
            for site, record in self.features.items()
            for position, feature, value in entries(record)
        ]

    def to_html(
        self, feature: int | None = None, site: str | tuple[str, int] | None = None
    ) -> str:
        """The tokens, shaded by a feature's activation; without one, by the largest.

        Hovering over a token shows its features. Without `site`, they are the first
        site's.
        """
        site = site or next(iter(self.features), None)
        if site is None:
            return shaded(self.tokens, np.zeros(len(self.tokens)), {})
        record = self.site(site)
        titles: dict[int, str] = {}
        strongest: np.ndarray = np.zeros(len(self.tokens), dtype=np.float32)
        for position, index, value in entries(record):
            label = self.labels.get(index)
            line = f"{index}: {value:.2f}" + (f" {label}" if label else "")
            titles[position] = "\n".join(filter(None, (titles.get(position), line)))
            strongest[position] = max(strongest[position], value)
        if feature is not None:
            strongest = self.activations(feature, site)
        return shaded(self.tokens, strongest, titles)

    def _repr_html_(self) -> str:
        return self.to_html()


class EncodedTexts(Results[EncodedText]):
    """What `encode` returns, one `EncodedText` for each text."""

    def to_pandas(self) -> pandas.DataFrame:
        """`EncodedText.to_pandas` of all texts, with a column `text`: its index."""
        return frame_of_columns(_columns(self))

    def _repr_html_(self) -> str:
        return "".join(one.to_html() for one in self)


def entries(record: SAEFeatures) -> list[tuple[int, int, float]]:
    """`(position, feature, value)` of everything that a record lists."""
    columns = (column.tolist() for column in record.listed())
    return list(zip(*columns, strict=True))


def _columns(texts: Sequence[EncodedText]) -> dict[str, np.ndarray]:
    """The columns of a frame: a row for each text, site, token and listed feature."""
    parts = [
        _columns_of(at, one, site)
        for at, one in enumerate(texts)
        for site in one.features
    ]
    # The first one gives an empty frame its columns and their types.
    parts.insert(0, _columns_of(0, EncodedText([], [], {}), ""))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _columns_of(at: int, text: EncodedText, site: str) -> dict[str, np.ndarray]:
    empty: np.ndarray = np.zeros(0, dtype=np.int32)
    listed = text.features[site].listed() if site else (empty, empty, empty)
    positions, features, values = listed
    tokens: np.ndarray = np.array(text.tokens, dtype=object)
    labels = [text.labels.get(feature, "") for feature in features.tolist()]
    return {
        "position": positions.astype(np.int64),
        "token": tokens[positions],
        "site": np.full(len(values), site, dtype=object),
        "feature_idx": features.astype(np.int64),
        "value": values.astype(np.float64),
        "label": np.array(labels, dtype=object),
        "text": np.full(len(values), at, dtype=np.int64),
    }


def shaded(
    tokens: Sequence[str], strength: np.ndarray, titles: Mapping[int, str]
) -> str:
    """HTML of tokens, the background of each as strong as its activation."""
    most = max(float(strength.max(initial=0.0)), 1e-9)
    spans = []
    for at, token in enumerate(tokens):
        alpha = max(float(strength[at]), 0.0) / most
        title = escape(titles.get(at, ""), quote=True)
        style = f"background:rgba(255,140,0,{alpha:.2f});white-space:pre-wrap"
        spans.append(f'<span style="{style}" title="{title}">{escape(token)}</span>')
    return f"<p>{''.join(spans)}</p>"
