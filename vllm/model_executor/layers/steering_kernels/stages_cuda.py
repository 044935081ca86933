# SPDX-License-Identifier: Apache-2.0
"""The stages of full reconstruction in CUDA C++ (csrc/steering), and when they fit."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from vllm.config.steering import Tier
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    StepState,
    VectorSlot,
)

from .bundles import (
    clamp_held,
    reading_bundles,
    step_bundle,
    stream_bundle,
    writing_bundles,
)
from .extension import Kernels, cuda_ops, kernels_for
from .plan import COMPACT_ENCODE_TOKENS, clamp_shared_bytes, sorts_ahead
from .run import Run
from .workspace import GuessBuffers, SteeringWorkspace

DTYPES = (torch.bfloat16, torch.float16)


@functools.cache
def shared_memory_of(device: torch.device) -> int:
    """Bytes of shared memory that a block of this GPU may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def runs(device: torch.device, kernels: Kernels) -> bool:
    """Whether these kernels of the extension run on the device."""
    return kernels in kernels_for(device)


def _fits_stream(hidden: torch.Tensor, residual: torch.Tensor | None) -> bool:
    """Whether the kernels can address the stream: 16-bit numbers, 16-byte rows."""
    if hidden.dtype not in DTYPES:
        return False
    streams = (hidden,) if residual is None else (hidden, residual)
    return all(
        x.dtype is hidden.dtype
        and x.device == hidden.device
        and x.shape[1] % 8 == 0
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
        for x in streams
    )


def _fits_weights(hidden: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether matrices have the stream's dtype and device, and aligned rows."""
    return all(
        w.dtype is hidden.dtype
        and w.device == hidden.device
        and w.is_contiguous()
        and w.data_ptr() % 16 == 0
        for w in weights
    )


def _fits_source(
    slot: SAESlot, hidden: torch.Tensor, source: torch.Tensor | None
) -> bool:
    """Whether the kernels can address what a transcoder reads; an SAE reads nothing."""
    if source is None:
        return slot.weights.d_in == slot.weights.d_out and not slot.reads_source
    return (
        slot.reads_source
        and _fits_stream(source, None)
        and (source.dtype is hidden.dtype)
    )


def takes_cuda(
    slot: SAESlot,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None = None,
) -> bool:
    """Whether the extension's stages fit this site, its stream, and its source."""
    w = slot.weights
    return (
        runs(hidden.device, Kernels.STAGES)
        and _fits_source(slot, hidden, source)
        and _fits_stream(hidden, residual)
        and _fits_weights(hidden, w.W_enc, w.W_dec)
    )


def takes_compact_encode(run: Run) -> bool:
    """Whether one launch does the first two stages: a decoding step."""
    tokens = run.hidden.shape[0]
    return tokens <= COMPACT_ENCODE_TOKENS and run.buffers.plan.num_chunks == 1


def compact_encode(run: Run) -> None:
    """`compact` and `encode` of a step of at most `COMPACT_ENCODE_TOKENS` tokens.

    Where the encoder has a copy in 10 bits, the device decides whether the step is
    screened.
    """
    copy = run.slot.weights.screen
    if copy is not None and not run.topk:
        screen = run.workspace.screen.bundle(copy)
        cuda_ops().screen_encode(*reading_bundles(run), screen, gate=run.gate)
        return
    cuda_ops().compact_encode(*reading_bundles(run), gate=run.gate, topk=run.topk)


def compact(run: Run, base: int) -> None:
    cuda_ops().compact(*reading_bundles(run), base=base, gate=run.gate)


def encode(run: Run, base: int) -> None:
    cuda_ops().encode(*reading_bundles(run), base=base, topk=run.topk)


def select(run: Run, base: int) -> None:
    cuda_ops().select(*reading_bundles(run), base=base)


def decode(run: Run, base: int) -> None:
    cuda_ops().decode(
        *writing_bundles(run),
        base=base,
        topk=run.topk,
        delta=run.tier is Tier.DELTA,
        many=sorts_ahead(run.buffers.plan.rows),
    )


def takes_guess(run: Run) -> bool:
    """Whether TopK may be guessed: nobody reads the lists on the way."""
    return run.topk and run.reads is None and not takes_compact_encode(run)


def guess(run: Run, buffers: GuessBuffers) -> Run:
    """All stages of the tokens whose TopK a guess finds; the run of the others."""
    guessed = replace(run, buffers=buffers.stages)
    buffers.failed.zero_()
    plan = buffers.stages.plan
    own = [buffers.samples, buffers.bars, buffers.failed]
    for base in range(0, plan.num_chunks * plan.rows, plan.rows):
        compact(guessed, base)
        cuda_ops().guess(*reading_bundles(guessed), own, base=base)
        cuda_ops().decode_chosen(
            *writing_bundles(guessed),
            base=base,
            delta=run.tier is Tier.DELTA,
            many=sorts_ahead(plan.rows),
        )
    return replace(run, own_index=buffers.failed)


def _fits_table(
    table: ClampTable, hidden: torch.Tensor, source: torch.Tensor | None = None
) -> bool:
    """Whether a block's shared memory holds the rows and the clamps."""
    d_out, clamps = hidden.shape[1], table.max_clamps
    d_in = None if source is None else source.shape[1]
    return (
        max(d_out, d_in or 0) <= 16384
        and 1 <= clamps <= 2048
        and clamp_shared_bytes(d_out, d_in, clamps) <= shared_memory_of(hidden.device)
    )


def takes_clamp(
    slot: SAESlot | VectorSlot,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None = None,
) -> bool:
    """Whether the clamp kernel fits: the delta tier of a slot, or its vectors."""
    if not runs(hidden.device, Kernels.CLAMPS) or not _fits_stream(hidden, residual):
        return False
    if isinstance(slot, SAESlot):
        w = slot.weights
        return (
            _fits_source(slot, hidden, source)
            and _fits_table(slot.delta, hidden, source)
            and _fits_weights(hidden, w.W_enc, w.W_dec)
        )
    d = slot.directions
    aligned = d.is_contiguous() and d.data_ptr() % 16 == 0
    return (
        _fits_table(slot.table, hidden)
        and aligned
        and d.dtype is torch.float32
        and d.device == hidden.device
    )


def clamp(
    slot: SAESlot,
    step: StepState,
    workspace: SteeringWorkspace,
    gated: bool,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    source: torch.Tensor | None,
) -> None:
    """The delta tier. With `gated`, a slot that holds a TopK module is skipped."""
    cuda_ops().clamp(
        clamp_held(slot, step, workspace).number,
        stream_bundle(hidden, residual),
        [] if source is None else [source],
        gated=gated,
    )


def add_vectors(
    slot: VectorSlot,
    step: StepState,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """The additive tier."""
    cuda_ops().add_vectors(
        step_bundle(step, step.index[Tier.ADDITIVE], slot.table, slot.saturated),
        slot.directions,
        stream_bundle(hidden, residual),
    )
