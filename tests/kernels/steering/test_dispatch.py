# SPDX-License-Identifier: Apache-2.0
"""Which sites and streams the CUDA extension takes: decided on the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vllm.config.steering import Activation
from vllm.model_executor.layers.steering_kernels import stages_cuda
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    SAEWeights,
    VectorSlot,
)

CPU = torch.device("cpu")
BF16 = torch.bfloat16
CARD = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device counts as one that the machine code is for."""
    monkeypatch.setattr(stages_cuda, "is_hopper", lambda device: True)


def make(
    d_in: int = 64,
    d_out: int | None = None,
    dtype: torch.dtype = BF16,
    skip: bool = False,
    source: bool = False,
) -> SAESlot:
    weights = SAEWeights(32, d_in, dtype, CPU, d_out, skip)
    kinds = frozenset({Activation.RELU})
    return SAESlot(weights, 3, 4, kinds, reads_source=source)


def rows(width: int = 64, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(5, width, dtype=dtype)


@pytest.mark.parametrize(
    ("hip", "capability", "taken"),
    [(None, (9, 0), True), (None, (10, 0), False), (None, (8, 0), False),
     ("6.4", (9, 0), False)],
)  # fmt: skip
def test_only_nvidias_compute_capability_9_0_is_hopper(
    monkeypatch: pytest.MonkeyPatch,
    hip: str | None,
    capability: tuple[int, int],
    taken: bool,
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    stages_cuda.is_hopper.cache_clear()
    assert stages_cuda.is_hopper(CARD) is taken
    assert stages_cuda.is_hopper(CPU) is False
    stages_cuda.is_hopper.cache_clear()


def test_an_sae_of_the_streams_dtype_is_taken(hopper: None) -> None:
    assert stages_cuda.takes_cuda(make(), rows(), rows())
    assert stages_cuda.takes_clamp(make(), rows(), None)
    assert stages_cuda.takes_clamp(VectorSlot(4, 64, 3, 4, CPU), rows(), rows())


@pytest.mark.parametrize("takes", [stages_cuda.takes_cuda, stages_cuda.takes_clamp])
@pytest.mark.parametrize("widths", [(48, 64), (64, 64)])
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_taken(
    hopper: None, takes: Callable[..., bool], widths: tuple[int, int], skip: bool
) -> None:
    slot = make(*widths, skip=skip, source=True)
    assert takes(slot, rows(widths[1]), None, rows(widths[0]))


@pytest.mark.parametrize("takes", [stages_cuda.takes_cuda, stages_cuda.takes_clamp])
@pytest.mark.parametrize(
    ("slot", "source"),
    [
        (make(48, 64, source=True), None),
        (make(), rows()),
        (make(44, 64, source=True), rows(44)),
        (make(64, 64, source=True), rows(72)[:, 4:68]),
        (make(48, 64, source=True), rows(48, torch.float16)),
    ],
    ids=["missing", "unwanted", "odd width", "not aligned", "other dtype"],
)
def test_a_source_that_the_kernels_cannot_read_is_left_to_triton(
    hopper: None,
    takes: Callable[..., bool],
    slot: SAESlot,
    source: torch.Tensor | None,
) -> None:
    assert not takes(slot, rows(), None, source)


REFUSED: dict[str, tuple[SAESlot, torch.Tensor, torch.Tensor | None]] = {
    "residual of another dtype": (make(), rows(), rows(dtype=torch.float16)),
    "weights of another dtype": (make(dtype=torch.float16), rows(), rows()),
    "float32": (make(dtype=torch.float32), rows(dtype=torch.float32), None),
    "a width that is no multiple of 8": (make(36), rows(36), None),
    "rows that are not aligned": (make(), rows(72)[:, 4:68], None),
    "rows with an odd stride": (make(), rows(68)[:, :64], None),
    "another output width": (make(48, 64, source=True), rows(), None),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("takes", [stages_cuda.takes_cuda, stages_cuda.takes_clamp])
def test_what_the_kernels_cannot_address_is_left_to_triton(
    hopper: None, why: str, takes: Callable[..., bool]
) -> None:
    assert not takes(*REFUSED[why])


def test_vectors_on_another_dtype_or_layout_are_left_to_triton(hopper: None) -> None:
    slot = VectorSlot(4, 64, 3, 4, CPU)
    slot.directions = slot.directions.double()
    assert not stages_cuda.takes_clamp(slot, rows(), None)
    slot = VectorSlot(4, 64, 3, 4, CPU)
    slot.directions = torch.zeros(64, 4).T
    assert not stages_cuda.takes_clamp(slot, rows(), None)
