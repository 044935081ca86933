# SPDX-License-Identifier: Apache-2.0
"""The three custom ops on CUDA tensors: their contract, and what they compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from steering_testing.sites import (
    Bench,
    bench,
    exact_sae,
    load_slot,
    steer_every_tier,
)

from vllm.config.steering import Tier
from vllm.model_executor.layers import (  # noqa: F401 (they register the ops)
    sae_full_reconstruction,
    sae_steering,
)
from vllm.model_executor.layers.steering_families import FAMILIES  # noqa: F401
from vllm.model_executor.layers.steering_kernel_backend import KernelBackend
from vllm.model_executor.layers.steering_state import SAESlot
from vllm.model_executor.layers.steering_stream import Stream

OPS = {
    Tier.ADDITIVE: "apply_steering_vectors",
    Tier.DELTA: "apply_sae_clamp",
    Tier.FULL: "apply_sae_full_reconstruction",
}
CUDA = torch.device("cuda")
D, F, T = 64, 96, 7
INDEX = [0, 1, 2, 0, 1, 0, 2]
# float32 runs in Triton, bfloat16 in the CUDA extension where it is built.
DTYPES = [torch.float32, torch.bfloat16]


def on_host(activation: str, dtype: torch.dtype, single_stream: bool) -> Bench:
    """A site where rows 1 and 2 of every tier do something."""
    rng = np.random.default_rng(0)
    slot = load_slot(exact_sae(rng, F, D, activation), dtype)
    vectors = steer_every_tier(slot, D)
    rows = dict.fromkeys(Tier, INDEX)
    return bench(
        rng, T, D, [slot], vectors, rows, dtype=dtype, single_stream=single_stream
    )


def on_device(activation: str, dtype: torch.dtype, single_stream: bool) -> Bench:
    """The same site with the kernels."""
    case = on_host(activation, dtype, single_stream)
    site = case.site.to(CUDA)
    case.hidden = case.hidden.to(CUDA)
    case.residual = None if case.residual is None else case.residual.to(CUDA)
    [slot] = site.saes
    assert isinstance(slot, SAESlot) and site.vectors is not None
    site.backend = KernelBackend(case.step, [slot], [site.vectors], dtype)
    return case


def edit(case: Bench, tier: Tier) -> None:
    """What the tier's op does, without the op."""
    site, backend = case.site, case.site.backend
    stream = Stream(case.hidden, case.residual)
    if tier is Tier.ADDITIVE:
        backend.steering_vectors(site.vectors, stream)
    elif tier is Tier.DELTA:
        backend.sae_clamp(site.saes[0], stream)
    else:
        backend.full_reconstruction(site.saes[0], stream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("single_stream", [False, True])
@pytest.mark.parametrize("tier", list(Tier))
def test_every_op_passes_opcheck(
    tier: Tier, single_stream: bool, dtype: torch.dtype
) -> None:
    case = on_device("jumprelu", dtype, single_stream)
    op = getattr(torch.ops.vllm, OPS[tier]).default
    with case.forward():
        torch.library.opcheck(op, (case.hidden, case.residual, case.site.name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
@pytest.mark.parametrize("tier", list(Tier))
def test_an_op_says_what_the_reference_says(
    tier: Tier, activation: str, dtype: torch.dtype
) -> None:
    host = on_host(activation, dtype, single_stream=False)
    device = on_device(activation, dtype, single_stream=False)
    assert device.residual is not None
    before = device.hidden.clone(), device.residual.clone()
    edit(host, tier)
    device.run(OPS[tier])
    # The sums are exact in float32, and rounded once.
    torch.testing.assert_close(device.stream.cpu(), host.stream, rtol=0, atol=0)
    for at, row in enumerate(INDEX):
        if row == 0:
            assert torch.equal(device.hidden[at], before[0][at])
            assert torch.equal(device.residual[at], before[1][at])
