# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel once or twice on small inputs, for compute-sanitizer:

    PYTHONPATH=tests compute-sanitizer --tool memcheck --error-exitcode 9 \\
        python tests/kernels/steering/small_cases.py [WORD]

and with `--tool racecheck` and `--tool synccheck`. Prints each case before it runs;
with WORD, those whose names contain it. Exits with 1 where a result is not finite.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from lockstep import Lockstep
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
from steering_testing.shards import shared_slot
from test_shared_gpu import Case as SharedCase
from test_shared_gpu import make_case, steered

from vllm.config.steering import Activation, Tier
from vllm.model_executor.layers import sae_full_reconstruction_kernel as kernel
from vllm.model_executor.layers import sae_readout_kernel as readout
from vllm.model_executor.layers.steering_kernels.extension import Kernels, kernels_for
from vllm.model_executor.layers.steering_kernels.screen import (
    SCREEN_TOKENS,
    STATE_MOST,
    ScreenCopy,
)
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_shards import Shard
from vllm.model_executor.layers.steering_state import (
    CONDITION_SHIFT,
    ClampFlag,
    ClampKind,
    SAESlot,
    StepState,
    VectorSlot,
)

JUMPRELU, TOPK = Activation.JUMPRELU, Activation.TOPK
Run = Callable[[], torch.Tensor]
Case = tuple[str, Run]


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


def screened(d_sae: int, d_model: int) -> SAESlot:
    """An SAE whose encoder has an 8-bit copy."""
    slot = sae(d_sae, JUMPRELU, 20, d_model)
    copy = ScreenCopy(d_sae, d_model, DEVICE)
    copy.fill(slot.weights.W_enc)
    copy.state[STATE_MOST] = SCREEN_TOKENS
    slot.weights.screen = copy
    return slot


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


def edit(make: Callable[[], SAESlot | VectorSlot], tier: Tier, tokens: int) -> Run:
    """`run`, with a slot that is made when it is wanted."""
    return lambda: run(make(), tier, tokens)


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


def shared(case: SharedCase) -> torch.Tensor:
    """The streams of ranks that share an SAE; they take turns on this device."""
    slot, step = make_case(case)
    hidden, residual = make_stream(case.tokens, case.d_model, DTYPE)
    assert residual is not None

    def on_rank(shard: Shard) -> torch.Tensor:
        own = StepState(step.max_tokens, DEVICE)
        own.index.copy_(step.index)
        own.flags.copy_(step.flags)
        found = steered(shared_slot(slot, shard), own, [hidden, residual])
        return torch.cat([x for x in found if x.is_floating_point()])

    return torch.stack(Lockstep(case.ranks).run(on_rank, DEVICE))


def full_cases() -> Iterator[Case]:
    """Full reconstruction, from lists and of dense tokens, and the delta tier."""
    for activation in (JUMPRELU, TOPK):
        name = activation.value
        lists = partial(sae, 1000, activation, 40)
        for tokens in (1, 9, 70, 140, 260, 600):
            yield f"full {name} lists {tokens}", edit(lists, Tier.FULL, tokens)
        dense = partial(sae, 700, activation, 640)
        for tokens in (2, 40, 300):
            yield f"full {name} dense {tokens}", edit(dense, Tier.FULL, tokens)
        for tokens in (3, 40):
            yield f"delta {name} {tokens}", edit(lists, Tier.DELTA, tokens)
    for d_sae in (34000, 68000):
        wide = partial(sae, d_sae, JUMPRELU, 60)
        for tokens in (420, 520):  # three in four are active
            yield f"full wide {d_sae} {tokens}", edit(wide, Tier.FULL, tokens)
    pairs = partial(sae, 65536, JUMPRELU, 60)
    yield "pairs 65536", edit(pairs, Tier.FULL, 250)
    guessed = partial(sae, 65536, TOPK, 40)
    yield "guess 65536", edit(guessed, Tier.FULL, 520)
    yield "delta wide", edit(partial(sae, 64, JUMPRELU, 30, 4104), Tier.DELTA, 4)


def cases() -> Iterator[Case]:
    """Every case: its name, and what runs it and returns the stream."""
    yield from full_cases()
    for d_model in (72, 4104):
        slot = partial(vectors, d_model)
        yield f"vectors {d_model}", edit(slot, Tier.ADDITIVE, 5)
    for d_sae, d_model in ((300, 72), (5000, 576)):
        slot = partial(screened, d_sae, d_model)
        for tokens in (1, 33, 90) if Kernels.STAGES in kernels_for(DEVICE) else ():
            yield f"screen {d_sae} {tokens}", edit(slot, Tier.FULL, tokens)
    for activation in (JUMPRELU, TOPK):
        for tokens, l0 in ((4, 30), (70, 30), (5, 640)):
            for full in (False, True):
                name = f"read {activation.value} {tokens} {l0} full {full}"
                yield name, partial(read, activation, tokens, l0, full)
        for tokens, d_sae, l0 in ((5, 512, 12), (3, 2048, 700), (600, 1024, 30)):
            case = SharedCase(tokens, d_sae, 64, activation, l0)
            yield f"shared {activation.value} {tokens} {l0}", partial(shared, case)


def main() -> None:
    """Run every case, or those that the command line names."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    torch.manual_seed(0)
    bad = []
    for name, run_case in cases():
        if word in name:
            print(name, flush=True)
            if not run_case().isfinite().all():
                bad.append(name)
    sys.exit(f"not finite: {bad}" if bad else 0)


if __name__ == "__main__":
    main()
