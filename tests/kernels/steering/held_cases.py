# SPDX-License-Identifier: Apache-2.0
"""Tensors that the extension holds, on a machine without a GPU: `test_held.py` runs it.

    LD_PRELOAD=RECORDER python held_cases.py EXTENSION

The recorder (`launch_recorder.cpp`) makes a CPU's tensors count as a GPU's.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm.model_executor.layers.steering_kernels import bundles

CPU = torch.device("cpu")
F, D, ROWS, CLAMPS, TOKENS = 1024, 64, 256, 8, 256
BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32


@dataclass
class Site:
    """Tensors by name, as an SAE of `F` features and steps of `TOKENS` tokens have."""

    step: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    workspace: dict[str, torch.Tensor]

    @property
    def all(self) -> dict[str, torch.Tensor]:
        return self.step | self.weights | self.workspace

    def replaced(self, name: str, tensor: torch.Tensor) -> Site:
        """The same tensors but one."""
        parts = (self.step, self.weights, self.workspace)
        return Site(
            *({k: tensor if k == name else t for k, t in p.items()} for p in parts)
        )

    def held(self) -> bundles.Held:
        return bundles.Held(
            list(self.step.values()),
            list(self.weights.values()),
            list(self.workspace.values()),
        )


def make_site(apart: bool = False) -> Site:
    """`apart`: the scratch of dense tokens is behind the lists, not in their place."""

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    step = (
        zeros(TOKENS, dtype=I32),
        zeros(TOKENS, dtype=I32),
        zeros(5, 2 + 3 * CLAMPS, dtype=I32),
        zeros(1, dtype=torch.int64),
    )
    weights = (
        zeros(F, D, dtype=BF16),
        zeros(F, dtype=F32),
        zeros(F, dtype=F32),
        zeros(F, D, dtype=BF16),
        zeros(D, dtype=F32),
        zeros(8, dtype=I32),
        zeros(1, dtype=F32),
    )
    row_bytes, list_bytes = 2 * D + 4 * F + 4 * 7 * D, 8 * ROWS * 512
    block = zeros(list_bytes + 4 * row_bytes, dtype=torch.uint8)
    dense = block[list_bytes:] if apart else block[: 4 * row_bytes]
    workspace = (
        zeros(ROWS, D, dtype=BF16),
        zeros(ROWS, 32, dtype=I32),
        zeros(1, dtype=I32),
        zeros(8, dtype=I32),
        block[:list_bytes].view(torch.int64).view(ROWS, 512),
        zeros(ROWS, F, dtype=F32),
        zeros(ROWS, dtype=torch.int64),
        zeros(ROWS, CLAMPS, dtype=F32),
        dense.view(4, row_bytes),
    )
    return Site(
        dict(zip(bundles.STEP_FIELDS, step, strict=False)),
        dict(zip(bundles.WEIGHTS_FIELDS, weights, strict=False)),
        dict(zip(bundles.WORKSPACE_FIELDS, workspace, strict=False)),
    )


def stream(tokens: int = 8, dtype: torch.dtype = BF16) -> list[torch.Tensor]:
    return [torch.zeros(tokens, D, dtype=dtype) for _ in range(2)]


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """The message of what a call raises, without its place; empty if it does not."""
    try:
        call(*args, **kwargs)
    except RuntimeError as error:
        return str(error)[str(error).index("steering: ") :].splitlines()[0]
    return ""


class Cases:
    def __init__(self, ops: Any, recorder: ctypes.CDLL) -> None:
        self.ops, self.recorder = ops, recorder
        self.on_host: list[torch.Tensor] = []  # whose addresses the recorder knows

    def taken(self) -> list[str]:
        return self.recorder.recorder_take().decode().splitlines()

    def select(self, site: Site) -> str:
        """The refusal of an op that uses all tensors but `dense`."""
        held = site.held()
        return refusal(self.ops.select, held.number, stream(), base=0)

    def test_each_wrong_tensor_is_refused_by_name(self) -> None:
        site = make_site()
        assert self.select(site) == ""
        for name, t in site.all.items():
            if name == "dense":
                continue
            other = torch.int16 if t.dtype != torch.int16 else F32
            found = self.select(site.replaced(name, t.to(other)))
            assert found.startswith(f"steering: {name} has dtype "), (name, found)
            found = self.select(site.replaced(name, t[None]))
            assert found == f"steering: {name} has an unexpected shape", (name, found)
            if t.numel() == 1:
                continue
            spread = torch.zeros(*t.shape, 2, dtype=t.dtype)[..., 0]
            found = self.select(site.replaced(name, spread))
            assert found.startswith(f"steering: {name} ") and "contiguous" in found

    def test_a_tensor_of_the_host_is_refused(self) -> None:
        for name, t in make_site().all.items():
            if name == "dense":
                continue
            own = t.clone()
            self.on_host.append(own)
            self.recorder.recorder_keep_on_host(ctypes.c_void_p(own.data_ptr()))
            found = self.select(make_site().replaced(name, own))
            assert found == f"steering: {name} is not on CUDA device 0", found

    def test_what_changes_from_op_to_op_is_checked_in_each(self) -> None:
        held = make_site().held()
        call = self.ops.compact
        assert refusal(call, held.number, stream(), base=0, gate=-1) == ""
        for x, base, message in (
            (stream(), -1, "steering: base -1 is negative"),
            (stream(TOKENS + 1), 0, f"steering: index has {TOKENS} elements, "),
            (stream(dtype=torch.float16), 0, "steering: W_enc has dtype "),
            (stream(dtype=F32), 0, "steering: the CUDA kernels take bfloat16 and "),
            ([stream()[0][:, :32]], 0, "steering: hidden has an unexpected shape"),
            ([stream()[0], stream(7)[0]], 0, "steering: residual has an unexpected "),
            (
                [torch.zeros(8 * D + 1, dtype=BF16)[1:].view(8, D)],
                0,
                "steering: hidden ",
            ),
        ):
            found = refusal(call, held.number, x, base=base, gate=-1)
            assert found.startswith(message), (found, message)
        assert refusal(call, held.number, stream(), base=0, gate=-1) == ""

    def test_a_tensor_that_changes_is_checked_again(self) -> None:
        site = make_site()
        held = site.held()

        def call() -> str:
            return refusal(self.ops.encode, held.number, stream(), 0, False)

        assert call() == ""
        maps = self.recorder.recorder_maps()
        assert call() == ""
        assert self.recorder.recorder_maps() == maps
        site.weights["W_enc"].set_(torch.zeros(F, D, dtype=BF16))  # another place
        assert call() == ""
        assert self.recorder.recorder_maps() > maps
        site.weights["b_enc"].resize_(F - 1)  # the same place, another size
        assert call() == "steering: b_enc has an unexpected shape"
        assert call() == "steering: b_enc has an unexpected shape"
        site.weights["b_enc"].resize_(F)
        assert call() == ""

    def test_scores_are_checked_where_they_are_used(self) -> None:
        site = make_site().replaced("scores", torch.zeros(1, 1))
        held = site.held()
        compact, select = self.ops.compact, self.ops.select
        for _ in range(2):
            assert not refusal(compact, held.number, stream(), base=0, gate=-1)
            found = refusal(select, held.number, stream(), base=0)
            assert found == "steering: scores has an unexpected shape"

    def test_only_what_is_held_can_be_used(self) -> None:
        held = make_site().held()
        number = held.number
        inner = weakref.ref(held.weights[0])
        del held
        gc.collect()
        found = refusal(self.ops.compact, number, stream(), base=0, gate=-1)
        assert found == f"steering: nothing is held as {number}"
        assert inner() is None
        self.ops.release(number)  # nothing happens

    def test_the_extension_keeps_what_it_holds(self) -> None:
        site = make_site()
        number = self.ops.hold(
            *([*p.values()] for p in (site.step, site.weights, site.workspace))
        )
        place = site.weights["W_enc"].data_ptr()
        del site
        gc.collect()
        others = [torch.zeros(F, D, dtype=BF16) for _ in range(8)]
        assert place not in [t.data_ptr() for t in others]
        assert not refusal(self.ops.compact, number, stream(), base=0, gate=-1)
        self.ops.release(number)

    def test_launches_do_not_depend_on_what_was_called_before(self) -> None:
        # Where dense tokens have memory of their own, one launch decodes all.
        assert len(self.launches(apart=True)) == 3 * 3
        assert len(self.launches(apart=False)) == 4 + 4 + 5

    def launches(self, apart: bool) -> list[str]:
        """What steps of three lengths launch, the same three times over."""
        held = make_site(apart).held()
        self.taken()
        seen = []
        for again in (held, held, make_site(apart).held()):
            for tokens in (1, 64, TOKENS):
                x = stream(tokens)
                self.ops.compact(again.number, x, base=0, gate=-1)
                self.ops.encode(again.number, x, base=0, topk=False)
                self.ops.decode(
                    again.number, x, base=0, topk=False, delta=False, many=tokens > 64
                )
            seen.append(self.taken())
        assert seen[0] == seen[1] == seen[2]
        return seen[0]


def main() -> None:
    recorder = ctypes.CDLL(os.environ["LD_PRELOAD"])
    recorder.recorder_take.restype = ctypes.c_char_p
    torch.ops.load_library(sys.argv[1])
    cases = Cases(torch.ops.vllm_steering, recorder)
    names = [name for name in dir(cases) if name.startswith("test_")]
    for name in names:
        print(name, flush=True)
        getattr(cases, name)()
    print(f"{len(names)} cases passed")


if __name__ == "__main__":
    main()
