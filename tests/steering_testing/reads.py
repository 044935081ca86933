# SPDX-License-Identifier: Apache-2.0
"""What a request should read, by Hugging Face with hooks around the float64 SAE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from steering_testing.oracle import follow
from steering_testing.reference import DenseSAE, Edit

from vllm.config.sae_features import SAEFeatures


@dataclass
class Capture(Edit):
    """Sees what full reconstruction would see, and changes nothing.

    Its tier is the delta tier's, as the last of its list: it runs after all deltas.
    `seen` holds the activations `[F]` of each token, None for one left alone.
    """

    tier: str = "delta"
    seen: list[torch.Tensor | None] = field(default_factory=list)

    def apply(
        self, x: torch.Tensor, token_id: int, source: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert self.sae is not None
        read = x if source is None else source
        left_alone = self.sae.bypasses(read, token_id)
        self.seen.append(None if left_alone else self.sae.encode(read))
        return x


def activations(
    model: Any,
    prompt: list[int],
    answer: list[int],
    saes: dict[tuple[int, str], DenseSAE],
    edits: dict[tuple[int, str], list[Edit]] | None = None,
) -> dict[tuple[int, str], list[torch.Tensor | None]]:
    """Activations at each site of every token that the model is given."""
    captures = {at: Capture(sae=sae) for at, sae in saes.items()}
    edits = edits or {}
    sites = {
        at: [*edits.get(at, []), *([captures[at]] if at in captures else [])]
        for at in {*edits, *captures}
    }
    follow(model, prompt, sites, answer)
    return {at: capture.seen for at, capture in captures.items()}


def assert_reads(
    record: SAEFeatures,
    expected: list[torch.Tensor | None],
    first: int,
    *,
    top_k: int | None = None,
    features: list[int] | None = None,
    tolerance: float = 1e-5,
    scale: torch.Tensor | None = None,
    label: str = "",
    flips: int = 1,
) -> None:
    """The record holds what it should of the tokens from position `first` on.

    Args:
        expected: activations of these tokens; None: no entry.
        tolerance: relative to the largest activation of the token.
        scale: `[F]`, what a native activation is multiplied by.
        label: what is read, for the message.
        flips: features next to their thresholds, which may fall either way.
    """
    wanted = [first + at for at, acts in enumerate(expected) if acts is not None]
    assert record.positions.tolist() == wanted
    for row, position in enumerate(wanted):
        acts = expected[position - first]
        assert acts is not None
        values = acts if scale is None else acts * scale
        near = tolerance * max(float(values.abs().max()), 1.0)
        count = int(record.counts[row])
        index = record.features[row, :count]
        found = record.values[row, :count]
        assert (record.features[row, count:] == -1).all()
        np.testing.assert_allclose(
            found, values[index], rtol=0, atol=near, err_msg=label
        )
        active = int((acts != 0).sum())
        assert abs(int(record.num_active[row]) - active) <= flips
        if features is not None:
            assert index.tolist() == sorted(features)
            continue
        assert top_k is not None
        assert abs(count - min(top_k, active)) <= 1
        assert (np.diff(found) <= 0).all()
        assert len(set(index.tolist())) == count
        listed = values.clone()
        listed[acts == 0] = -torch.inf
        best = listed.sort(descending=True).values[:count]
        best[best == -torch.inf] = 0
        np.testing.assert_allclose(found, best, rtol=0, atol=near)


def first_rise(dense: np.ndarray) -> tuple[int, int, float]:
    """(token, feature, bound): the feature first exceeds the bound there, and late.

    Args:
        dense: `[tokens, F]`, activations of an answer.
    """
    gain = dense[1:] - np.maximum.accumulate(dense, axis=0)[:-1]
    gain[:3] = 0  # so that some tokens come before
    at, feature = np.unravel_index(gain.argmax(), gain.shape)
    return int(at) + 1, int(feature), float(dense[at + 1, feature] - gain.max() / 2)
