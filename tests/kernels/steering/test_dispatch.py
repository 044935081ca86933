# SPDX-License-Identifier: Apache-2.0
"""Which sites and streams the CUDA extension takes: decided on the host."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from vllm.config.steering import Activation
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_kernels import extension, stages_cuda
from vllm.model_executor.layers.steering_kernels.extension import Kernels
from vllm.model_executor.layers.steering_kernels.plan import clamp_shared_bytes
from vllm.model_executor.layers.steering_state import (
    SAESlot,
    SAEWeights,
    VectorSlot,
)

CPU = torch.device("cpu")
BF16 = torch.bfloat16
CARD = torch.device("cuda", 0)


HOPPER_BYTES, L40S_BYTES = 227 << 10, 99 << 10  # shared memory of a block


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device counts as one that the machine code is for."""
    monkeypatch.setattr(stages_cuda, "kernels_for", lambda device: Kernels.ALL)
    monkeypatch.setattr(stages_cuda, "shared_memory_of", lambda device: HOPPER_BYTES)


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


class Card:
    """A GPU as torch and the extension describe it."""

    def __init__(self, capability: tuple[int, int], compiled: bool = True):
        self.capability, self.compiled = capability, compiled

    def has_clamps(self, on: torch.Tensor) -> bool:
        return self.compiled

    def install(self, monkeypatch: pytest.MonkeyPatch, built: bool = True) -> None:
        monkeypatch.setattr(extension, "extension_is_built", lambda: built)
        monkeypatch.setattr(extension, "cuda_ops", lambda: self)
        # No device here can hold a tensor, nor become the current one.
        monkeypatch.setattr(torch, "empty", lambda *sizes, device: rows())
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        cuda = {"capability": self.capability, "name": "Card"}
        for what, value in cuda.items():
            monkeypatch.setattr(
                torch.cuda, f"get_device_{what}", lambda device, value=value: value
            )


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    extension.kernels_for.cache_clear()
    yield
    extension.kernels_for.cache_clear()


TRITON = (
    "Card (sm_{}): Triton; the CUDA extension is for sm_90, and "
    "VLLM_STEERING_OTHER_GPUS=1 asks for what others have of it"
)
CLAMPS = (
    "Card (sm_{}): delta clamps and steering vectors in the CUDA extension, full "
    "reconstruction and reading in Triton"
)


@pytest.mark.parametrize(
    ("capability", "kernels", "said"),
    [
        ((7, 5), Kernels.NONE, TRITON.format(75)),
        ((8, 0), Kernels.CLAMPS, CLAMPS.format(80)),
        ((8, 9), Kernels.CLAMPS, CLAMPS.format(89)),
        ((9, 0), Kernels.ALL, "Card (sm_90): the CUDA extension"),
        ((10, 0), Kernels.CLAMPS, CLAMPS.format(100)),
        ((11, 0), Kernels.NONE, TRITON.format(110)),
        ((12, 0), Kernels.CLAMPS, CLAMPS.format(120)),
    ],
)
def test_a_card_gets_the_kernels_that_run_on_it(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    kernels: Kernels,
    said: str,
) -> None:
    Card(capability).install(monkeypatch)
    monkeypatch.setenv(extension.OTHER_GPUS_ENV, "1")
    assert extension.kernels_for(CARD) is kernels
    assert extension.describe_kernels(CARD) == said
    assert extension.kernels_for(CPU) is Kernels.NONE


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_cards_run_triton_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    Card(capability).install(monkeypatch)
    monkeypatch.delenv(extension.OTHER_GPUS_ENV, raising=False)
    assert extension.kernels_for(CARD) is Kernels.NONE
    major, minor = capability
    assert extension.describe_kernels(CARD) == TRITON.format(f"{major}{minor}")


def test_a_card_that_the_build_left_out_runs_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Card((8, 0), compiled=False).install(monkeypatch)
    monkeypatch.setenv(extension.OTHER_GPUS_ENV, "1")
    assert extension.kernels_for(CARD) is Kernels.NONE
    assert extension.describe_kernels(CARD) == TRITON.format(80)


@pytest.mark.parametrize(
    ("turned_off", "why"),
    [("0", "is not built"), ("1", "is turned off by VLLM_STEERING_NO_CUDA=1")],
)
def test_without_the_extension_every_card_runs_triton(
    monkeypatch: pytest.MonkeyPatch, turned_off: str, why: str
) -> None:
    monkeypatch.setenv("VLLM_STEERING_NO_CUDA", turned_off)
    Card((9, 0)).install(monkeypatch, built=False)
    assert extension.kernels_for(CARD) is Kernels.NONE
    said = f"Card (sm_90): Triton; the CUDA extension {why}"
    assert extension.describe_kernels(CARD) == said


def test_an_amd_gpu_runs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    Card((9, 0)).install(monkeypatch)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert extension.kernels_for(CARD) is Kernels.NONE


def test_the_build_has_code_for_every_card_that_is_promised_some() -> None:
    text = (Path(__file__).parents[3] / "CMakeLists.txt").read_text()
    named = {int(n) // 10 for n in re.findall(r'"(\d+)a?-real"', text)}
    assert named == {*extension.CLAMP_MAJORS, extension.HOPPER[0]}


def test_clamps_alone_run_where_stages_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages_cuda, "kernels_for", lambda device: Kernels.CLAMPS)
    monkeypatch.setattr(stages_cuda, "shared_memory_of", lambda device: L40S_BYTES)
    assert not stages_cuda.takes_cuda(make(), rows(), rows())
    assert stages_cuda.takes_clamp(make(), rows(), None)
    assert stages_cuda.takes_clamp(VectorSlot(4, 64, 3, 4, CPU), rows(), rows())


@pytest.mark.parametrize(
    ("width", "clamps", "bytes_"), [(64, 8, L40S_BYTES), (16384, 2048, HOPPER_BYTES)]
)
def test_a_row_that_a_block_cannot_hold_is_left_to_triton(
    monkeypatch: pytest.MonkeyPatch, width: int, clamps: int, bytes_: int
) -> None:
    needed = clamp_shared_bytes(width, width, clamps)
    assert needed <= bytes_
    monkeypatch.setattr(stages_cuda, "kernels_for", lambda device: Kernels.CLAMPS)
    for room in (needed, needed - 1):
        monkeypatch.setattr(stages_cuda, "shared_memory_of", lambda _, room=room: room)
        table = ClampTable(1, clamps, CPU)
        fits = stages_cuda._fits_table(table, rows(width), rows(width))
        assert fits is (room == needed)


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
