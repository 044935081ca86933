# SPDX-License-Identifier: Apache-2.0
"""The scratch memory through which the stages of full reconstruction pass data."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from vllm.config.steering import Activation
from vllm.config.steering_sharding import EXTENSION_FEATURES
from vllm.model_executor.layers.steering_state import SAESlot

from .extension import Kernels, kernels_for
from .held import Held
from .kept import Kept
from .peers import (
    EXCHANGE_ROWS,
    MAX_RANKS,
    Peers,
    can_exchange,
    exchange_limits,
    plan_arena,
)
from .plan import (
    CHUNK_ALIGN,
    ENTRY_BYTES,
    GUESS_CAPACITY,
    GUESS_SAMPLE,
    MIB,
    RECORD_INTS,
    ChunkPlan,
    ExchangeLimits,
    align,
    cdiv,
    decodes_at_once,
    dense_row_bytes,
    most_guessed,
    most_rows,
    plan_chunks,
    plan_guess,
    short_lists_bytes,
)
from .screen import ScreenScratch

logger = logging.getLogger(__name__)

LIMIT_BYTES = 256 * MIB


@dataclass(frozen=True, eq=False)
class StageBuffers:
    """Views of the workspace for one slot and one step.

    x: model's dtype `[rows, d_in]`, gathered activations.
    skip: float32 `[rows, d_out]`, `b_dec + W_skip x` (else one unused element).
    scores: float32 `[rows, F]`, TopK only (else one unused element); the entries of
        a threshold chunk take the same memory.
    entries: int64 `[rows, capacity]`, feature in the high half, activation in the low.
    dense: uint8 `[dense_rows, bytes]`, scratch of the tokens that no list holds. In a
        short step it follows the lists, where there is room. Otherwise it takes their
        memory, and they have been read by then.
    coef: float32 `[rows, K]`, `g - f` of every clamp.
    """

    plan: ChunkPlan
    x: torch.Tensor
    skip: torch.Tensor
    scores: torch.Tensor
    entries: torch.Tensor
    dense: torch.Tensor
    coef: torch.Tensor


@dataclass(frozen=True)
class GuessBuffers:
    """Views of the workspace for TopK by guess and verify (`guess_kernel.cuh`).

    stages: as for a threshold SAE; lists hold candidates, later what is chosen.
    samples: int16 `[rows, GUESS_SAMPLE]`, coarse scores of some features.
    bars: float32 `[rows, up to a whole tile]`, what candidates of a token reach.
    failed: int32 `[T]`, the rows of tokens whose guess failed, else 0.
    """

    stages: StageBuffers
    samples: torch.Tensor
    bars: torch.Tensor
    failed: torch.Tensor


def uses_threshold(slot: SAESlot) -> bool:
    """Whether the slot may hold a ReLU or JumpReLU module."""
    return bool(slot.activations - {Activation.TOPK})


def uses_topk(slot: SAESlot) -> bool:
    """Whether the slot may hold a TopK module."""
    return Activation.TOPK in slot.activations


def _widths(slot: SAESlot) -> tuple[int, int, int, int, int]:
    """d_in, d_out, d_sae, max_clamps and the bytes of an element of a matrix."""
    w = slot.weights
    item = w.W_enc.element_size()
    return w.d_in, w.d_out, w.d_sae_capacity, slot.full.max_clamps, item


def _has_skip(slot: SAESlot) -> bool:
    return slot.weights.W_skip is not None


def why_gathers(slot: SAESlot) -> str:
    """Why the extension's kernels cannot share the slot's SAE among ranks; else ""."""
    w = slot.weights
    if w.shard.is_whole:
        return "it is not shared"
    if w.shard.allocate is None:
        return w.shard.gathers
    if Kernels.STAGES not in kernels_for(w.W_enc.device):
        return "the extension's kernels need to be built, and Hopper GPUs"
    if not can_exchange(w.shard, w.d_sae_capacity, w.d_out):
        return (
            f"{w.d_sae_capacity} features x {w.d_out} cannot be cut into multiples of "
            f"{EXTENSION_FEATURES} x 8 for {w.shard.size} of at most {MAX_RANKS} ranks"
        )
    if w.W_skip is not None:
        return "it has a skip connection"
    return "" if w.W_enc.dtype.itemsize == 2 else "its weights are not 16-bit"


def exchanges(slot: SAESlot) -> bool:
    """Whether the extension's kernels can share the slot's SAE among ranks."""
    return not why_gathers(slot)


def exchange_of(slot: SAESlot) -> ExchangeLimits | None:
    """How much of the slot's ranks exchange at a time, if they do."""
    if not exchanges(slot):
        return None
    held = slot.weights.W_enc.shape[0]
    return exchange_limits(held)


def _log_exchange(slots: list[SAESlot], stored: int) -> None:
    """Say how the ranks exchange what belongs to shared SAEs; the first rank does."""
    all_shared = [slot for slot in slots if not slot.weights.shard.is_whole]
    if not all_shared or all_shared[0].weights.shard.rank:
        return
    gathered = sorted(set(map(why_gathers, all_shared)) - {""})
    logger.info(
        "Steering: of %d shared SAEs, ranks exchange %d through each other's memory "
        "and %d by all_gather%s",
        len(all_shared),
        stored,
        len(all_shared) - stored,
        f" ({'; '.join(gathered)})" if gathered else "",
    )


def _make_peers(
    max_tokens: int, slots: list[SAESlot], device: torch.device
) -> Peers | None:
    """The memory through which ranks share SAEs; None if there is none to share."""
    shared = [slot for slot in slots if exchanges(slot)]
    _log_exchange(slots, len(shared))
    if not shared:
        return None
    width = max(slot.weights.d_out for slot in shared)
    clamps = max(slot.delta.max_clamps for slot in shared)
    shard = shared[0].weights.shard
    rows = min(max_tokens, EXCHANGE_ROWS)
    return Peers(shard, plan_arena(shard.size, rows, width, clamps), device)


class SteeringWorkspace:
    """Scratch memory of all sites of a worker, which run one after another.

    Build it before the KV cache is sized. `nbytes` is at most 256 MiB for any number of
    tokens, because long steps run in chunks.

    Args:
        max_tokens: the most tokens of a step.
        slots: every SAE slot that will use it.
        device: where the slots live.
    """

    def __init__(
        self, max_tokens: int, slots: Iterable[SAESlot], device: torch.device
    ) -> None:
        slots = list(slots)
        self.max_tokens = max_tokens
        self.peers = _make_peers(max_tokens, slots, device)
        self._views: Kept[tuple[SAESlot, int, bool, int | None], StageBuffers] = Kept()
        self._guesses: Kept[tuple[SAESlot, int], GuessBuffers] = Kept()
        self.held: Kept[Hashable, Held] = Kept()
        x_bytes = shared_bytes = coef_bytes = 16
        rows = guessed = 1
        for slot in slots:
            w = slot.weights
            for topk in (False, True):
                if not (uses_topk(slot) if topk else uses_threshold(slot)):
                    continue
                # A longer step has equal chunks, which may be shorter than this one.
                plan = self.plan(slot, self._longest(slot, max_tokens, topk), topk)
                rows = max(rows, plan.rows)
                item = w.W_enc.element_size()
                skip_bytes = 4 * w.d_out if w.W_skip is not None else 0
                gathered = align(plan.rows * w.d_in * item) + plan.rows * skip_bytes
                x_bytes = max(x_bytes, gathered)
                coef_bytes = max(coef_bytes, plan.rows * slot.full.max_clamps * 4)
                shared = self._shared_bytes(slot, max_tokens, topk)
                shared_bytes = max(shared_bytes, shared)
            if self.guess_plan(slot, max_tokens) is not None:
                most = min(max_tokens, most_guessed(*_widths(slot)))
                rows = max(rows, most)
                x_bytes = max(x_bytes, align(most * w.d_in * w.W_enc.element_size()))
                coef_bytes = max(coef_bytes, most * slot.full.max_clamps * 4)
                shared_bytes = max(shared_bytes, sum(self._guess_bytes(most)))
                guessed = max_tokens
        u8 = torch.uint8
        self._x = torch.empty(align(x_bytes), dtype=u8, device=device)
        self._shared = torch.empty(align(shared_bytes), dtype=u8, device=device)
        self._coef = torch.empty(align(coef_bytes), dtype=u8, device=device)
        i32 = torch.int32
        self.count = torch.zeros(1, dtype=i32, device=device)
        self.tokens = torch.zeros(rows, dtype=i32, device=device)
        self.records = torch.zeros(rows, RECORD_INTS, dtype=i32, device=device)
        self.kth = torch.zeros(rows, dtype=torch.int64, device=device)
        screened = [slot.weights for slot in slots if slot.weights.screen is not None]
        self.screen = ScreenScratch([w.W_enc.shape for w in screened], device)
        self.failed = torch.zeros(guessed, dtype=i32, device=device)
        # What screening needs grows with the widest SAE, and comes with its copy.
        own = self.nbytes - self.screen.nbytes
        if own > LIMIT_BYTES:
            raise ValueError(f"steering workspace: {own} bytes, at most {LIMIT_BYTES}")

    @staticmethod
    def plan(slot: SAESlot, tokens: int, topk: bool) -> ChunkPlan:
        """The chunks in which `slot` processes a step of `tokens` tokens."""
        return plan_chunks(
            tokens, *_widths(slot), topk, _has_skip(slot), exchanged=exchange_of(slot)
        )

    @staticmethod
    def guess_plan(slot: SAESlot, tokens: int) -> ChunkPlan | None:
        """The chunks of a step whose TopK is guessed; None: all scores are stored."""
        if not uses_topk(slot) or _has_skip(slot) or not slot.weights.shard.is_whole:
            return None
        return plan_guess(tokens, *_widths(slot))

    @staticmethod
    def _guess_bytes(rows: int) -> tuple[int, int, int]:
        """Bytes of samples, bars and lists of a chunk."""
        bars = cdiv(rows, CHUNK_ALIGN) * CHUNK_ALIGN
        lists = rows * GUESS_CAPACITY * ENTRY_BYTES
        return align(rows * GUESS_SAMPLE * 2), align(bars * 4), align(lists)

    @staticmethod
    def _longest(slot: SAESlot, max_tokens: int, topk: bool) -> int:
        """The longest step of at most `max_tokens` tokens that is one chunk."""
        most = most_rows(
            *_widths(slot), topk, _has_skip(slot), exchanged=exchange_of(slot)
        )
        return min(max_tokens, most)

    @classmethod
    def _shared_bytes(cls, slot: SAESlot, max_tokens: int, topk: bool) -> int:
        """The largest size of scores and entries of any step with `max_tokens`."""
        sizes = [max_tokens, *(2**i for i in range(max_tokens.bit_length()))]
        sizes.append(cls._longest(slot, max_tokens, topk))
        most = 0
        for plan in (cls.plan(slot, tokens, topk) for tokens in sizes):
            scores = plan.rows * slot.weights.d_sae_capacity * 4 if topk else 0
            entries = plan.rows * plan.capacity * ENTRY_BYTES
            dense = plan.dense_rows * cls._dense_bytes(slot)
            apart = short_lists_bytes(plan)
            most = max(most, align(scores) + align(max(entries, dense + apart)))
        return most

    @staticmethod
    def _dense_bytes(slot: SAESlot) -> int:
        """Scratch bytes of one dense token."""
        w = slot.weights
        return dense_row_bytes(w.d_in, w.d_out, w.d_sae_capacity)

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        tensors = (
            self._x,
            self._shared,
            self._coef,
            self.count,
            self.tokens,
            self.records,
            self.kth,
            self.failed,
        )
        return sum(t.nbytes for t in tensors) + self.screen.nbytes

    def buffers(
        self, slot: SAESlot, tokens: int, topk: bool, capacity: int | None = None
    ) -> StageBuffers:
        """Views for `slot` and a step of `tokens` tokens; allocates nothing.

        `capacity`: the most that a list needs to hold (None: as much as fits).
        """
        key = (slot, tokens, topk, capacity)
        return self._views.get(key, lambda: self._make_buffers(*key))

    def _make_buffers(
        self, slot: SAESlot, tokens: int, topk: bool, capacity: int | None
    ) -> StageBuffers:
        w = slot.weights
        plan = self.plan(slot, tokens, topk)
        scores_bytes = plan.rows * w.d_sae_capacity * 4 if topk else 0
        entries = self._shared[align(scores_bytes) :]
        fit = entries.numel() // (ENTRY_BYTES * plan.rows)
        row_bytes = self._dense_bytes(slot)
        capacity = min(plan.capacity, fit, capacity or fit)
        lists = align(plan.rows * capacity * ENTRY_BYTES)
        apart = decodes_at_once(plan.rows, entries.numel() - lists, row_bytes)
        dense = entries[lists:] if apart else entries
        plan = replace(
            plan,
            capacity=capacity,
            dense_rows=min(plan.dense_rows, dense.numel() // row_bytes),
        )

        def view(arena: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return arena.view(dtype)[: shape[0] * shape[1]].view(shape)

        x_bytes = align(plan.rows * w.d_in * w.W_enc.element_size())
        skip_shape = (1, 1) if w.W_skip is None else (plan.rows, w.d_out)
        if w.W_skip is None:
            x_bytes = 0
        scores_shape = (plan.rows, w.d_sae_capacity) if topk else (1, 1)
        return StageBuffers(
            plan,
            view(self._x, w.W_enc.dtype, plan.rows, w.d_in),
            view(self._x[x_bytes:], torch.float32, *skip_shape),
            view(self._shared, torch.float32, *scores_shape),
            view(entries, torch.int64, plan.rows, plan.capacity),
            dense[: plan.dense_rows * row_bytes].view(plan.dense_rows, row_bytes),
            view(self._coef, torch.float32, plan.rows, slot.full.max_clamps),
        )

    def guess_buffers(self, slot: SAESlot, tokens: int) -> GuessBuffers | None:
        """Views for a TopK step that is guessed; None where it is not."""
        plan = self.guess_plan(slot, tokens)
        if plan is None:
            return None
        make = partial(self._make_guess_buffers, slot, tokens, plan)
        return self._guesses.get((slot, tokens), make)

    def _make_guess_buffers(
        self, slot: SAESlot, tokens: int, plan: ChunkPlan
    ) -> GuessBuffers:
        w, rows = slot.weights, plan.rows
        sample_bytes, bar_bytes, _ = self._guess_bytes(rows)
        samples = self._shared[: rows * GUESS_SAMPLE * 2].view(torch.int16)
        bars = self._shared[sample_bytes : sample_bytes + bar_bytes]
        lists = self._shared[sample_bytes + bar_bytes :].view(torch.int64)
        f32 = self._coef.view(torch.float32)
        unused = f32[:1].view(1, 1)
        stages = StageBuffers(
            plan,
            x=self._x.view(w.W_enc.dtype)[: rows * w.d_in].view(rows, w.d_in),
            skip=unused,
            scores=unused,
            entries=lists[: rows * plan.capacity].view(rows, plan.capacity),
            dense=self._shared[:0].view(0, 1),
            coef=f32[: rows * slot.full.max_clamps].view(rows, slot.full.max_clamps),
        )
        return GuessBuffers(
            stages,
            samples.view(rows, GUESS_SAMPLE),
            bars.view(torch.float32),
            self.failed[:tokens],
        )
