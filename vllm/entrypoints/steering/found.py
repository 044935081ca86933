# SPDX-License-Identifier: Apache-2.0
"""What `find_features` returns, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from html import escape
from typing import TYPE_CHECKING, overload

import numpy as np

from vllm.config.steering_json import Json
from vllm.entrypoints.steering.encoded import shaded
from vllm.entrypoints.steering.frames import data_frame

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class TokenInContext:
    """A token on which a feature is strong, and the tokens around it."""

    before: str
    token: str
    after: str
    value: float


@dataclass(frozen=True)
class FoundFeature:
    """How well one feature tells texts A from texts B.

    Attributes:
        feature_idx: the feature.
        label: what it stands for, where that is known.
        mean_difference: mean activation on A's tokens minus that on B's.
        auroc: how often a text of A has a larger largest activation than one of B
            (0.5: no better than chance); None without B.
        frequency: share of A's tokens on which it is active.
        frequency_against: that of B's.
        max_activation: the largest on A.
        examples: A's tokens on which it is strongest, from different texts where
            possible.
    """

    feature_idx: int
    label: str
    mean_difference: float
    auroc: float | None
    frequency: float
    frequency_against: float
    max_activation: float
    examples: tuple[TokenInContext, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class FoundFeatures:
    """What `find_features` returns: features, the best first.

    Attributes:
        site: where they were read, `hook.layer`.
        features: the best first.
        warnings: what makes the result doubtful, one line each.
    """

    module: str
    site: str
    features: list[FoundFeature]
    warnings: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[FoundFeature]:
        return iter(self.features)

    def __len__(self) -> int:
        return len(self.features)

    @overload
    def __getitem__(self, at: int) -> FoundFeature: ...

    @overload
    def __getitem__(self, at: slice) -> FoundFeatures: ...

    def __getitem__(self, at: int | slice) -> FoundFeature | FoundFeatures:
        """One feature by its rank, or several."""
        if isinstance(at, slice):
            return replace(self, features=self.features[at])
        try:
            return self.features[at]
        except IndexError:
            raise IndexError(
                f"found {at}, expected a place in 0..{len(self) - 1}: features are "
                "listed by rank, and feature_idx says which they are"
            ) from None

    def to_json(self) -> Json:
        """JSON types."""
        return asdict(self)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a feature, without examples; needs pandas."""
        names = [one.name for one in fields(FoundFeature) if one.name != "examples"]
        rows = [{n: asdict(one)[n] for n in names} for one in self.features]
        return data_frame(rows, names)

    def __repr__(self) -> str:
        best = ", ".join(str(one.feature_idx) for one in self.features[:5])
        more = ", ..." if len(self) > 5 else ""
        return f"FoundFeatures({self.site}, {len(self)} features: {best}{more})"

    def __str__(self) -> str:
        """The table that `vllm-steering features` prints."""
        lines = [f"{self.site}: {len(self)} features, the best first"]
        names = ("feature", "A - B", "AUROC", "on A", "on B")
        lines.append(_row(*names) + "  strongest")
        for one in self.features:
            auroc = "" if one.auroc is None else f"{one.auroc:.3f}"
            numbers = (f"{one.mean_difference:.3f}", auroc, f"{one.frequency:.1%}")
            cells = (str(one.feature_idx), *numbers, f"{one.frequency_against:.1%}")
            lines.append(f"{_row(*cells)}  {one.label}".rstrip())
            for example in one.examples:
                text = f"{example.before}[{example.token}]{example.after}"
                words = " ".join(text.split())
                lines.append(f"{'':>40}{example.value:7.2f}  {words}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<p>{escape(line)}</p>" for line in self.warnings)
        names = ("feature", "label", "A - B", "AUROC", "on A", "on B", "examples")
        titles = "".join(f"<th>{name}</th>" for name in names)
        rows = "".join(_html_row(feature) for feature in self.features)
        return f"{head}<table><tr>{titles}</tr>{rows}</table>"


def _row(index: str, difference: str, auroc: str, on_a: str, on_b: str) -> str:
    return f"{index:>8} {difference:>9} {auroc:>6} {on_a:>6} {on_b:>6}"


def _html_row(found: FoundFeature) -> str:
    auroc = "" if found.auroc is None else f"{found.auroc:.3f}"
    cells = [
        str(found.feature_idx),
        escape(found.label),
        f"{found.mean_difference:.3f}",
        auroc,
        f"{found.frequency:.1%}",
        f"{found.frequency_against:.1%}",
        "".join(html_example(example) for example in found.examples),
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def html_example(example: TokenInContext) -> str:
    """A token in its context, shaded."""
    tokens = [example.before, example.token, example.after]
    strength: np.ndarray = np.array([0.0, example.value, 0.0])
    return shaded(tokens, strength, {1: f"{example.value:.2f}"})
