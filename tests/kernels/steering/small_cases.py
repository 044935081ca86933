# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel once or twice on small inputs, for compute-sanitizer:

    compute-sanitizer --tool memcheck --error-exitcode 9 python small_cases.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python small_cases.py

Prints each case before it runs; `python small_cases.py WORD` runs the cases whose name
contains the word. Exits with 1 where a result is not finite.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from steering_reference import (
    DEVICE,
    DTYPE,
    fill_slot,
    make_slot,
    make_step,
    make_stream,
    random_clamps,
    set_row,
)

from vllm.config.steering import Activation, Tier
from vllm.model_executor.layers import sae_full_reconstruction_kernel as kernel
from vllm.model_executor.layers import sae_readout_kernel as readout
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_state import (
    CONDITION_SHIFT,
    ClampFlag,
    ClampKind,
    SAESlot,
    VectorSlot,
)

JUMPRELU, TOPK = Activation.JUMPRELU, Activation.TOPK
Case = tuple[str, SAESlot | VectorSlot, Tier, int]


def sae(d_sae: int, activation: Activation, l0: float, d_model: int = 72) -> SAESlot:
    """An SAE whose row 1 has no clamps, row 2 all kinds, row 3 a condition."""
    slot = make_slot(d_sae, d_model, activation, k=int(l0), l0=l0, max_clamps=24)
    needs = 2 << CONDITION_SHIFT
    condition = ClampKind.CONDITION | ClampFlag.IF_ABOVE
    for table in (slot.full, slot.delta):
        set_row(table, 1, [])
        set_row(table, 2, random_clamps(d_sae, 20))
        linked = [(5, ClampKind.SCALE | needs, 2.0, False), (7, condition, 0.1, False)]
        set_row(table, 3, linked)  # type: ignore[arg-type]
    return slot


def vectors(d_model: int) -> VectorSlot:
    """Directions that are added (row 1), bounded (row 2), relative (row 3)."""
    slot = VectorSlot(20, d_model, 4, 16, DEVICE)
    slot.directions.normal_()
    along = ClampKind.ABSOLUTE | ClampFlag.PROJECTION
    bound = [(3, along | ClampFlag.IF_BELOW, -0.1, False)]
    bound += [(3, along | ClampFlag.IF_ABOVE, 0.1, False)]
    set_row(slot.table, 1, [(i, ClampKind.ADDITIVE, 1.0, False) for i in range(16)])
    set_row(slot.table, 2, bound)  # type: ignore[arg-type]
    far = ClampKind.ADDITIVE | ClampFlag.PROJECTION | ClampFlag.RELATIVE
    set_row(slot.table, 3, [(9, far, 0.5, False)])  # type: ignore[list-item]
    return slot


def cases() -> Iterator[Case]:
    """Name, slot, tier and tokens of every case."""
    for activation in (JUMPRELU, TOPK):
        name = activation.value
        lists = sae(1000, activation, 40)
        for tokens in (1, 9, 70, 140, 260, 600):
            yield f"full {name} lists {tokens}", lists, Tier.FULL, tokens
        full = sae(700, activation, 640)
        for tokens in (2, 40, 300):
            yield f"full {name} dense {tokens}", full, Tier.FULL, tokens
        for tokens in (3, 40):
            yield f"delta {name} {tokens}", lists, Tier.DELTA, tokens
    for d_sae in (34000, 68000):
        yield f"full wide {d_sae}", sae(d_sae, JUMPRELU, 60), Tier.FULL, 520
    yield "guess 65536", sae(65536, TOPK, 40), Tier.FULL, 520
    yield "delta wide", sae(64, JUMPRELU, 30, 4104), Tier.DELTA, 4
    for d_model in (72, 4104):
        yield f"vectors {d_model}", vectors(d_model), Tier.ADDITIVE, 5


def run(slot: SAESlot | VectorSlot, tier: Tier, tokens: int) -> torch.Tensor:
    """The op of a tier, with and without steered tokens; the stream afterwards."""
    step = make_step(tokens, tokens, [1, 0, 2, 3], tier)
    hidden, residual = make_stream(tokens, width(slot), DTYPE)
    for active in (False, True):
        rows = step.index.clone()
        if not active:
            step.index.zero_()
        if isinstance(slot, VectorSlot):
            kernel.steering_vectors(slot, step, hidden, residual)
        else:
            workspace = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
            op = kernel.full_reconstruction if tier is Tier.FULL else kernel.sae_clamp
            op(slot, step, workspace, hidden, residual)
        step.index.copy_(rows)
    assert residual is not None
    return residual


def width(slot: SAESlot | VectorSlot) -> int:
    return (
        slot.directions.shape[1] if isinstance(slot, VectorSlot) else slot.weights.d_in
    )


def read(activation: Activation, tokens: int, l0: float, full: bool) -> torch.Tensor:
    """Reading, alone or beside full reconstruction of some of the tokens."""
    slot = sae(700, activation, l0)
    fill_slot(slot, 700, activation, k=int(l0), l0=l0)
    reads = ReadBuffers(3, slot.full.max_clamps, tokens, 700, DEVICE)
    slot.reads = reads
    reads.packed[1, :6] = torch.tensor([1, 0, 16, 2, 3, 600], dtype=torch.int32)
    step = make_step(tokens, tokens, [1, 0, 2] if full else [0], Tier.FULL)
    step.read_index[:tokens] = 1
    workspace = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
    hidden, residual = make_stream(tokens, 72, DTYPE)
    step.reading = True
    readout.read_and_reconstruct(slot, step, workspace, hidden, residual)
    assert residual is not None
    assert (reads.out[:, 0] >= 0).all()
    return residual


def main() -> None:
    """Run every case, or those that the command line names."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    torch.manual_seed(0)
    bad = 0
    for name, slot, tier, tokens in cases():
        if word in name:
            print(name, flush=True)
            bad += int(not run(slot, tier, tokens).isfinite().all())
    for activation in (JUMPRELU, TOPK):
        for tokens, l0 in ((4, 30), (70, 30), (5, 640)):
            for full in (False, True):
                name = f"read {activation.value} {tokens} {l0} full {full}"
                if word in name:
                    print(name, flush=True)
                    out = read(activation, tokens, l0, full)
                    bad += int(not out.isfinite().all())
    torch.cuda.synchronize()
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
