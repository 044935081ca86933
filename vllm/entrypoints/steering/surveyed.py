# SPDX-License-Identifier: Apache-2.0
"""What `survey` returns, how it is shown, and the `evidence.json` that it becomes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vllm.config.sae_labels import EVIDENCE_NAME, MAX_EVIDENCE, Labels
from vllm.config.steering_json import Json
from vllm.config.steering_written_files import whole_file
from vllm.entrypoints.steering.encoded import feature_index
from vllm.entrypoints.steering.found import TokenInContext, html_example
from vllm.entrypoints.steering.frames import frame_of_columns

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class SurveyedFeature:
    """One feature on a corpus.

    Attributes:
        feature_idx: the feature.
        label: what it stands for, where that is known.
        max, p99, p50: the largest activation, and quantiles of those that are not 0.
        frequency: share of the tokens on which it is active.
        examples: tokens on which it is strongest, each from another text.
    """

    feature_idx: int
    label: str
    max: float
    p99: float
    p50: float
    frequency: float
    examples: tuple[TokenInContext, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"feature {self.feature_idx}: max {self.max:.2f}, p99 {self.p99:.2f}, "
            f"p50 {self.p50:.2f}, on {self.frequency:.2%} of the tokens"
            + (f"  {self.label}" if self.label else "")
        ]
        for one in self.examples:
            words = " ".join(f"{one.before}[{one.token}]{one.after}".split())
            lines.append(f"{one.value:8.2f}  {words}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = escape(str(self).splitlines()[0])
        lines = "".join(html_example(one) for one in self.examples)
        return f"<p>{head}</p>{lines}"


@dataclass(eq=False, repr=False)
class Survey:
    """The features of an SAE on a corpus, in the module's units.

    Attributes:
        module, site: what was read.
        tokens: how many tokens were read; bos and the like are not.
        l0: mean number of active features of a token.
        max: float32 `[F]`, the largest activation; 0 for a feature that was never
            active.
        p99, p50: float32 `[F]`, quantiles of the activations that are not 0.
        frequency: float32 `[F]`, share of the tokens on which the feature is active.
        labels: what features stand for, where it is known.
        warnings: what makes the figures doubtful, one line each.
        examples: by feature, the tokens on which it is strongest.
        of_several: whether the module has other sites, whose features are others.
    """

    module: str
    site: str
    tokens: int
    l0: float
    max: np.ndarray
    p99: np.ndarray
    p50: np.ndarray
    frequency: np.ndarray
    labels: Labels = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    examples: dict[int, tuple[TokenInContext, ...]] = field(default_factory=dict)
    of_several: bool = False

    def __len__(self) -> int:
        return len(self.max)

    def __getitem__(self, feature: int) -> SurveyedFeature:
        """One feature.

        Raises:
            IndexError: the SAE has no such feature.
        """
        feature = feature_index(feature, len(self), IndexError)
        return SurveyedFeature(
            feature,
            self.labels.get(feature, ""),
            max=float(self.max[feature]),
            p99=float(self.p99[feature]),
            p50=float(self.p50[feature]),
            frequency=float(self.frequency[feature]),
            examples=self.examples.get(feature, ()),
        )

    def __repr__(self) -> str:
        return f"Survey({self.site}, {self.tokens} tokens, {len(self)} features)"

    def __str__(self) -> str:
        """What `vllm-steering survey` prints."""
        dead, dense = (self.frequency == 0).mean(), (self.frequency > 0.1).mean()
        return (
            f"{self.site}: {self.tokens} tokens, L0 {self.l0:.1f}; of {len(self)} "
            f"features, {dead:.1%} were never active, and {dense:.1%} were active on "
            "more than 10% of the tokens"
        )

    def _repr_html_(self) -> str:
        return "".join(f"<p>{escape(line)}</p>" for line in (str(self), *self.warnings))

    def to_pandas(self) -> pandas.DataFrame:
        """One row a feature, without examples; needs pandas."""
        columns: dict[str, np.ndarray] = {"feature_idx": np.arange(len(self))}
        columns |= self._statistics()
        labels = [self.labels.get(feature, "") for feature in range(len(self))]
        columns["label"] = np.array(labels, dtype=object)
        return frame_of_columns(columns)

    def _statistics(self) -> dict[str, np.ndarray]:
        """What is known of every feature, as `evidence.json` names it."""
        return {
            "max": self.max,
            "p99": self.p99,
            "p50": self.p50,
            "frequency": self.frequency,
        }

    def to_evidence(self, examples: int | None = None) -> Json:
        """The content of an `evidence.json`; at most so many examples a feature.

        Of a module with several sites, the lists belong to the site.
        """
        lists: Json = {
            name: [float(f"{value:.4g}") for value in values.tolist()]
            for name, values in self._statistics().items()
        }
        lists["contexts"] = {
            str(feature): [_parts(one) for one in found[:examples]]
            for feature, found in self.examples.items()
        }
        l0 = round(self.l0, 2)
        if self.of_several:
            return {"sites": {self.site: {"l0": l0, **lists}}}
        return {"sites": {self.site: {"l0": l0}}, **lists}

    def save(self, path: str | Path) -> None:
        """Write `evidence.json`, which the playground reads beside a module's files.

        Other keys of a file that is there (`card`, `neuronpedia`) are kept, and so is
        what it has of the module's other sites. If the file would be larger than a
        server reads, features get fewer examples.

        Args:
            path: the file, or the directory of the module.

        Raises:
            ValueError: the file that is there holds no JSON object, or the file would
                be too large without any examples.
            OSError: it cannot be read or written; what is there stays.
        """
        file = Path(path)
        file = file / EVIDENCE_NAME if file.is_dir() else file
        kept = _object(file) if file.exists() else {}
        most = max(map(len, self.examples.values()), default=0)
        for examples in range(most, -1, -1):
            own = self.to_evidence(examples)
            sites = kept.get("sites")
            for site, told in (sites if isinstance(sites, dict) else {}).items():
                here = own["sites"].get(site, {})
                own["sites"][site] = {**told, **here} if here else told
            text = json.dumps({**kept, **own}, ensure_ascii=False)
            if len(text.encode()) <= MAX_EVIDENCE:
                break
        else:
            raise ValueError(
                f"{file}: found {len(text.encode())} bytes without examples, expected "
                f"at most {MAX_EVIDENCE}, which a server reads: save the survey of "
                f"{self.site} in another file"
            )
        with whole_file(file) as stream:
            stream.write(f"{text}\n".encode())


def _parts(one: TokenInContext) -> Sequence[str]:
    """A context without halves of characters, which JSON cannot hold."""
    return [
        part.encode(errors="replace").decode()
        for part in (one.before, one.token, one.after)
    ]


def _object(file: Path) -> Json:
    """The JSON object in a file."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(
            f"{file}: found no JSON object, expected the evidence.json of a module or "
            "no such file"
        )
    return content
