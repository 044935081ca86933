# SPDX-License-Identifier: Apache-2.0
"""Whether rounding decides which features are active in a request's reference.

An activation jumps where its pre-activation crosses its threshold, or the last place
of a TopK. A request whose pre-activation is closer to that than rounding may move it
has two right answers: one for each side. Such a request has no reference.

The error of a pre-activation `w . x` is that of a sum of D products, each rounded by
itself: about `unit / sqrt(D) * ||w|| ||x||`, where `unit` is the unit round-off of the
arithmetic that made `x`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering import SteeringBackend
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_reference import (
    select_tokens,
    within_norm,
)
from vllm.model_executor.layers.steering_state import (
    KIND_BITS,
    ONLY_IF_ACTIVE,
    ClampFlag,
    ClampKind,
    MetaField,
    SAESlot,
    SAEWeights,
    StepState,
    VectorSlot,
)
from vllm.model_executor.layers.steering_stream import Stream
from vllm.v1.worker.steering_index import BatchView
from vllm.v1.worker.steering_runtime import SteeringRuntime

# Unit round-off of the arithmetic in an engine's matrix products.
UNITS = {"exact": 2.0**-24, "tf32": 2.0**-11, "bfloat16": 2.0**-9}
# Errors of the layers before a site add up; this many of one product's.
LAYERS_OF_ERROR = 2.0
# A jump that is smaller than this share of the stream's norm shows in no
# log-probability.
HARMLESS = 2.0**-7


def pre_activations(weights: SAEWeights, x: torch.Tensor) -> torch.Tensor:
    """`p [n, F]` of `x [n, D]`, in float64."""
    return x.double() @ weights.W_enc.double().T + weights.b_enc.double()


def distances(weights: SAEWeights, pre: torch.Tensor) -> torch.Tensor:
    """`[n, F]`: how far each pre-activation is from its feature's being (in)active."""
    if not int(weights.meta[MetaField.USES_TOPK]):
        return (pre - weights.threshold.double().clamp(min=0)).abs()
    k = int(weights.meta[MetaField.K])
    if k >= int(weights.meta[MetaField.D_SAE]):
        return torch.full_like(pre, torch.inf)
    best = pre.sort(dim=1, descending=True).values
    last, first_out = best[:, k - 1 : k], best[:, k : k + 1]
    return torch.where(pre >= last, pre - first_out, last - pre)


def jumps(weights: SAEWeights, pre: torch.Tensor) -> torch.Tensor:
    """`[n, F]`: what each activation would jump by."""
    if not int(weights.meta[MetaField.USES_TOPK]):
        return weights.threshold.double().clamp(min=0).expand_as(pre)
    relu = int(weights.meta[MetaField.TOPK_RELU])
    return pre.clamp(min=0) if relu else pre.abs()


def undecided(
    weights: SAEWeights,
    x: torch.Tensor,
    unit: float,
    uses: torch.Tensor,
    conditions: torch.Tensor,
) -> torch.Tensor:
    """bool `[n]`: tokens for which rounding decides something that matters.

    Args:
        x: `[n, D]`, what the encoder reads.
        unit: unit round-off of the engine's products.
        uses: bool `[n, F]`, features whose activation is used.
        conditions: bool `[n, F]`, features that a clamp asks whether they are active.
    """
    pre = pre_activations(weights, x)
    size = x.double().norm(dim=1, keepdim=True)
    rows = weights.W_enc.double().norm(dim=1)
    error = LAYERS_OF_ERROR * unit / x.shape[1] ** 0.5 * rows * size
    close = distances(weights, pre) <= error
    matters = uses & (jumps(weights, pre) > HARMLESS * size)
    return (close & (matters | conditions)).any(dim=1)


def clamped_features(
    table: ClampTable, rows: torch.Tensor, features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """bool `[n, F]` twice: features that the rows' clamps read, and ask about."""
    place = torch.arange(table.max_clamps, device=rows.device)
    used = place < table.count[rows].unsqueeze(1)
    code, index = table.code[rows], table.feature[rows].long()
    reads = used & (code != ClampKind.ADDITIVE)
    asking = ONLY_IF_ACTIVE | ClampFlag.IF_ABOVE | ClampFlag.IF_BELOW
    asks = (code & asking) != 0
    asks |= (code & KIND_BITS) == ClampKind.CONDITION
    none = torch.zeros(len(rows), features, dtype=torch.int32, device=rows.device)
    found = (none.scatter_add(1, index, one.int()) > 0 for one in (reads, reads & asks))
    read, asked = found
    return read, asked


class WatchedBackend(SteeringBackend):
    """A site's backend that also says whether rounding decided something.

    Attributes:
        found: bool `[max_tokens]`, on the device: the tokens of which it did.
    """

    def __init__(
        self, stock: SteeringBackend, step: StepState, unit: float, found: torch.Tensor
    ):
        self.stock = stock
        self.step = step
        self.unit = unit
        self.found = found

    def write_flags(self, token_ids: torch.Tensor) -> None:
        self.stock.write_flags(token_ids)

    def full_reconstruction(self, slot: SAESlot, stream: Stream) -> None:
        self._look(slot, Tier.FULL, stream)
        self.stock.full_reconstruction(slot, stream)

    def sae_clamp(self, slot: SAESlot, stream: Stream) -> None:
        self._look(slot, Tier.DELTA, stream)
        self.stock.sae_clamp(slot, stream)

    def steering_vectors(self, slot: VectorSlot, stream: Stream) -> None:
        self.stock.steering_vectors(slot, stream)

    def read_features(self, slot: SAESlot, read: Stream) -> None:
        self._look_at_reading(slot, read)
        self.stock.read_features(slot, read)

    def _look(self, slot: SAESlot, tier: Tier, stream: Stream) -> None:
        table = slot.full if tier is Tier.FULL else slot.delta
        index = self.step.index[tier, : stream.hidden.shape[0]]
        tokens = select_tokens(table, index, self.step, slot.weights)
        x = stream.read.gather(tokens)
        rows = index[tokens].long()
        uses, asked = clamped_features(table, rows, slot.weights.d_sae_capacity)
        if tier is Tier.FULL:
            uses = torch.ones_like(uses)
        self._note(slot.weights, tokens, x, uses, asked)

    def _look_at_reading(self, slot: SAESlot, read: Stream) -> None:
        reads = slot.reads
        if reads is None or not self.step.reading:
            return
        index = self.step.read_index[: read.hidden.shape[0]].long()
        tokens = (reads.packed[index, 0] != 0).nonzero().squeeze(1)
        shape = (len(tokens), slot.weights.d_sae_capacity)
        uses = torch.zeros(shape, dtype=torch.bool, device=read.hidden.device)
        for at, row in enumerate(index[tokens].tolist()):
            _, _, top_k, count, *features = reads.packed[row].tolist()
            uses[at, features[:count]] = True
            uses[at] |= top_k > 0
        x = read.gather(tokens)
        self._note(slot.weights, tokens, x, uses, torch.zeros_like(uses))

    def _note(
        self,
        weights: SAEWeights,
        tokens: torch.Tensor,
        x: torch.Tensor,
        uses: torch.Tensor,
        asked: torch.Tensor,
    ) -> None:
        keep = within_norm(x.float(), weights.norm_limit)
        found = undecided(weights, x[keep], self.unit, uses[keep], asked[keep])
        self.found[tokens[keep]] |= found


class Choices:
    """Says of which requests of an engine rounding decided something.

    Args:
        steering: the runtime of an eager engine in this process: a captured graph does
            not call the backend.
        unit: as of `undecided`.

    Attributes:
        undecided: ids of these requests, as the engine's workers know them.
    """

    def __init__(self, steering: SteeringRuntime, unit: float):
        self.steering = steering
        self.unit = unit
        step = steering.step
        self.found = torch.zeros(
            step.max_tokens, dtype=torch.bool, device=step.index.device
        )
        self.undecided: set[str] = set()
        self._view: BatchView | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch what runs in the block, from a clean start."""
        self.undecided, self._view = set(), None
        self.found.zero_()
        sites = list(self.steering.modules.sites.values())
        stock = [site.backend for site in sites]
        prepare_step = self.steering.prepare_step

        def prepare(view: BatchView) -> None:
            self._attribute()
            self._view = view
            prepare_step(view)

        for site, backend in zip(sites, stock, strict=True):
            step = self.steering.step
            site.backend = WatchedBackend(backend, step, self.unit, self.found)
        self.steering.prepare_step = prepare
        try:
            yield
        finally:
            del self.steering.prepare_step
            for site, backend in zip(sites, stock, strict=True):
                site.backend = backend
        self._attribute()

    def _attribute(self) -> None:
        """Note whose tokens were found in the step before."""
        view, self._view = self._view, None
        if view is None:
            return
        found = self.found.cpu().clone().numpy()
        self.found.zero_()
        start = 0
        for at, req_id in enumerate(view.req_ids):
            stop = start + int(view.num_scheduled[at])
            if found[start:stop].any():
                self.undecided.add(req_id)
            start = stop
