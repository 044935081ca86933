# SPDX-License-Identifier: Apache-2.0
"""One site without an engine: the ops on random streams whose arithmetic is exact.

Weights, streams and values are small multiples of powers of two, so float32 holds
every intermediate result: a result may be compared bit for bit, in any order of
summation, and ties between pre-activations do happen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from steering_testing.reference import Clamp, DenseSAE

from vllm.config import VllmConfig
from vllm.config.sae_steering_edits import SiteEdit
from vllm.config.sae_steering_types import SAEClampEntry
from vllm.config.steering import Activation, SiteInfo, Tier
from vllm.config.steering_points import HookPoint
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.steering import SiteKey, SteeringSite
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_reference_backend import ReferenceBackend
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    SAEWeights,
    StepState,
    VectorSlot,
)
from vllm.v1.worker.steering_tables import BoundTable

CPU = torch.device("cpu")
ROWS, MAX_CLAMPS = 6, 8
KEY = SiteKey(3, HookPoint.POST_BLOCK)


def multiples(
    rng: np.random.Generator, shape: Sequence[int], limit: int, unit: float
) -> torch.Tensor:
    """float64 multiples of `unit` in `-limit..limit` units."""
    return torch.from_numpy(rng.integers(-limit, limit + 1, tuple(shape)) * unit)


def exact_sae(
    rng: np.random.Generator, d_sae: int, d_model: int, activation: str, k: int = 3
) -> DenseSAE:
    """A random SAE of small multiples of a quarter."""
    return DenseSAE(
        W_enc=multiples(rng, (d_sae, d_model), 3, 0.25),
        b_enc=multiples(rng, (d_sae,), 4, 0.125),
        W_dec=multiples(rng, (d_sae, d_model), 3, 0.25),
        b_dec=multiples(rng, (d_model,), 3, 0.25),
        activation=activation,
        threshold=(
            multiples(rng, (d_sae,), 6, 0.125) if activation == "jumprelu" else None
        ),
        k=min(k, d_sae) if activation == "topk" else None,
    )


def exact_clamps(rng: np.random.Generator, d_sae: int, most: int) -> list[Clamp]:
    """Up to `most` clamps of distinct features, of every kind and condition."""
    count = int(rng.integers(0, min(most, d_sae) + 1))
    features = rng.permutation(d_sae)[:count]
    kinds = ("absolute", "additive", "scale")
    return [
        Clamp(
            int(feature),
            kinds[int(rng.integers(3))],
            float(rng.integers(-4, 5)) * 0.5,
            bool(rng.integers(2)),
        )
        for feature in features
    ]


def load_slot(
    sae: DenseSAE,
    dtype: torch.dtype = torch.float32,
    spare: int = 0,
    skip_mask: int = 0,
    norm_limit: float | None = None,
) -> SAESlot:
    """The SAE in a slot with room for `spare` more features."""
    d_sae, d_model = sae.W_enc.shape
    activation = Activation(sae.activation)
    weights = SAEWeights(d_sae + spare, d_model, dtype, CPU)
    weights.W_enc[:d_sae] = sae.W_enc
    weights.b_enc[:d_sae] = sae.b_enc
    weights.W_dec[:d_sae] = sae.W_dec
    weights.b_dec.copy_(sae.b_dec)
    weights.threshold[:d_sae] = 0 if sae.threshold is None else sae.threshold
    info = SiteInfo(
        KEY.layer, KEY.hook, d_model, d_sae, activation, sae.k, sae.topk_relu
    )
    weights.set_meta(info, skip_mask, norm_limit)
    return SAESlot(weights, ROWS, MAX_CLAMPS, frozenset({activation}))


def set_row(table: ClampTable, row: int, clamps: Sequence[Clamp]) -> None:
    """Make `row` edit with `clamps`, through the production writer."""
    entries = [
        SAEClampEntry(c.feature, c.kind, c.value, c.only_if_active) for c in clamps
    ]
    bound, terms = BoundTable(table), []
    bound.add_terms(terms, SiteEdit("sae", KEY.hook, KEY.layer, tuple(entries)))
    bound.upload({row: terms})


def steer_every_tier(slot: SAESlot, d_model: int) -> VectorSlot:
    """Make rows 1 and 2 of every tier do something; the vectors that go with them."""
    vectors = VectorSlot(2, d_model, ROWS, MAX_CLAMPS, CPU)
    vectors.directions[:, :4] = 1.5
    for row in (1, 2):
        set_row(slot.delta, row, [Clamp(row, "additive", 2.0)])
        set_row(slot.full, row, [Clamp(3 + row, "absolute", -1.0)])
        set_row(vectors.table, row, [Clamp(row - 1, "additive", 0.5)])
    return vectors


@dataclass
class Bench:
    """One site, the step that its ops read, and the stream that enters them."""

    site: SteeringSite
    step: StepState
    hidden: torch.Tensor
    residual: torch.Tensor | None

    @property
    def stream(self) -> torch.Tensor:
        """The residual stream `[T, D]`."""
        return self.hidden if self.residual is None else self.hidden + self.residual

    def run(self, op: str) -> None:
        """Call one tier's op at this site."""
        with self.forward():
            getattr(torch.ops.vllm, op)(self.hidden, self.residual, self.site.name)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward context that knows the site."""
        config = VllmConfig()
        config.compilation_config.static_forward_context[self.site.name] = self.site
        with set_forward_context(None, config):
            yield


def bench(
    rng: np.random.Generator,
    num_tokens: int,
    d_model: int,
    saes: Sequence[SAESlot] = (),
    vectors: VectorSlot | None = None,
    rows: Mapping[Tier, Sequence[int]] | None = None,
    dtype: torch.dtype = torch.float32,
    single_stream: bool = False,
    flags: Sequence[int] | None = None,
) -> Bench:
    """A step of `num_tokens` whose tokens have the given rows."""
    step = StepState(num_tokens + 3, CPU)
    for tier, of_tokens in (rows or {}).items():
        step.index[tier, :num_tokens] = torch.tensor(of_tokens, dtype=torch.int32)
    if flags is not None:
        step.flags[:num_tokens] = torch.tensor(flags, dtype=torch.int32)
    site = SteeringSite(KEY, saes, vectors, step, ReferenceBackend(step))
    hidden = multiples(rng, (num_tokens, d_model), 4, 0.125).to(dtype)
    residual = multiples(rng, (num_tokens, d_model), 4, 0.125).to(dtype)
    return Bench(site, step, hidden, None if single_stream else residual)
