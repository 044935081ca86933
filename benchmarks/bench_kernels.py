# SPDX-License-Identifier: Apache-2.0
"""Times the steering kernels against the hardware's floor and two plain ports.

    python benchmarks/bench_kernels.py [--quick] [--out FILE]

Each figure is the median over graph replays of (restore, flush L2, op) minus that of
(restore, flush L2). So launch gaps inside the op count, and the rest does not. The
floor is max(bytes / copy bandwidth, flops / bf16 rate), both measured in this run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts import environment, results_file
from kernel_timing import BF16, DEVICE, Timer, measured_ceilings

from vllm.config.steering import Activation, SiteInfo, Tier
from vllm.config.steering_environment import BRANCHES_ENV
from vllm.config.steering_points import HookPoint
from vllm.config.steering_screening import screens
from vllm.model_executor.layers import sae_full_reconstruction_kernel as kernel
from vllm.model_executor.layers import steering_stream
from vllm.model_executor.layers.steering_kernel_backend import KernelBackend
from vllm.model_executor.layers.steering_kernels.screen import SCREEN_TOKENS, ScreenCopy
from vllm.model_executor.layers.steering_state import (
    ClampKind,
    SAESlot,
    SAEWeights,
    StepState,
    VectorSlot,
)

HERE = Path(__file__).resolve().parent
SHAPES = [(16384, 2304), (65536, 3584), (131072, 5376)]
TOKENS = [1, 8, 32, 64, 256, 1024, 2048, 8192]
L0 = 100
K = 64
DENSE_TOKENS = [1, 8, 64, 256, 2048, 8192]


def heavy_tail(d_sae: int) -> torch.Tensor:
    """How often each feature fires, `[d_sae]`, L0 in sum, most features rarely.

    The measured frequencies of a trained SAE (`smollm2_features.json`), by the share of
    the features that are more frequent.
    """
    measured = json.loads((HERE / "smollm2_features.json").read_text())["frequency"]
    place = np.linspace(0, len(measured) - 1, d_sae)
    share = torch.from_numpy(np.interp(place, range(len(measured)), measured))
    share = (share * (L0 / share.sum())).clamp(max=0.98)
    order = torch.randperm(d_sae, generator=torch.Generator().manual_seed(0))
    return share[order]


def make_slot(
    d_sae: int, d_model: int, activation: Activation, share: torch.Tensor | None = None
) -> SAESlot:
    """A random SAE on a standard normal stream; row 1 has no clamp.

    `share`: how often each feature fires; None: all alike, with L0 = 100.
    """
    weights = SAEWeights(d_sae, d_model, BF16, DEVICE)
    for w in (weights.W_enc, weights.W_dec):
        for part in w.split(8192):
            part.copy_(torch.randn(part.shape, device=DEVICE) / d_model**0.5)
    if share is None:
        share = torch.full((d_sae,), L0 / d_sae, dtype=torch.float64)
    weights.threshold.copy_(torch.special.ndtri(1 - share))
    weights.b_enc.zero_()
    weights.b_dec.normal_()
    site = SiteInfo(0, HookPoint.POST_BLOCK, d_model, d_sae, activation, K)
    weights.set_meta(site, 0, None)
    slot = SAESlot(weights, 9, 64, frozenset({activation}))
    for table in (slot.full, slot.delta):
        table.packed[1, 0] = 1
    return slot


def set_clamps(packed: torch.Tensor, features: list[int], kind: ClampKind) -> None:
    """Give row 1 of a packed table one clamp of value 3 per feature."""
    width = (packed.shape[1] - 2) // 3
    packed[1, 1] = len(features)
    packed[1, 2 : 2 + len(features)] = torch.tensor(features, dtype=torch.int32)
    packed[1, 2 + width : 2 + width + len(features)] = int(kind)
    value = torch.tensor([3.0] * len(features)).view(torch.int32)
    packed[1, 2 + 2 * width : 2 + 2 * width + len(features)] = value


class Stream:
    """A stream that an op edits, and the clean copy to restore it from."""

    def __init__(self, tokens: int, d_model: int) -> None:
        self.clean = torch.randn(2, tokens, d_model, device=DEVICE).mul(0.5**0.5)
        self.clean = self.clean.to(BF16)
        self.now = self.clean.clone()

    def restore(self) -> None:
        self.now.copy_(self.clean)


class Bench:
    """Collects rows of `{"case", "shape", "tokens", "us", "floor_us", ...}`."""

    def __init__(self) -> None:
        self.bandwidth, self.reading, self.flops = measured_ceilings()
        self.timer = Timer()
        self.rows: list[dict[str, Any]] = []

    def floor(self, d_sae: int, d_model: int, tokens: int, l0: int = L0,
              share: torch.Tensor | None = None) -> float:  # fmt: skip
        """The least time of a full reconstruction, in us."""
        fired = d_sae * (1 - (1 - l0 / d_sae) ** tokens)
        if share is not None:
            fired = float((1 - (1 - share) ** tokens).sum())
        data = 2 * d_model * (d_sae + fired + 4 * tokens)
        work = 2 * tokens * d_model * (d_sae + l0)
        return max(data / self.bandwidth, work / self.flops) * 1e6

    def add(self, case: str, shape: tuple[int, int], tokens: int, us: float,
            floor: float, **extra: Any) -> None:  # fmt: skip
        row = {
            "case": case,
            "shape": f"{shape[0]}x{shape[1]}",
            "tokens": tokens,
            "us": round(us, 2),
            "floor_us": round(floor, 2),
            "ratio": round(us / floor, 2),
            **extra,
        }
        self.rows.append(row)
        print(row, flush=True)

    def full(self, case: str, slot: SAESlot, tokens: int, active: int | None = None,
             l0: int = L0, share: torch.Tensor | None = None) -> None:  # fmt: skip
        """Times `full_reconstruction` with `active` (default: all) steered tokens."""
        w = slot.weights
        d_sae, d_model = w.W_enc.shape
        step = StepState(tokens, DEVICE)
        steered = tokens if active is None else active
        chosen = torch.randperm(tokens, device=DEVICE)[:steered]
        step.index[Tier.FULL, chosen] = 1
        workspace = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
        stream = Stream(tokens, d_model)
        hidden, residual = stream.now[0], stream.now[1]
        floor = self.floor(d_sae, d_model, steered, l0, share) if steered else 3.0

        def op() -> None:
            kernel.full_reconstruction(slot, step, workspace, hidden, residual)

        us = self.timer(op, stream.restore, floor * 1.5)
        self.add(case, (d_sae, d_model), tokens, us, floor, active=steered)

    def cublas_pair(self, slot: SAESlot, tokens: int) -> None:
        """Graphed dense bf16: encode, activation, decode, with rounded activations."""
        w = slot.weights
        d_sae, d_model = w.W_enc.shape
        stream = Stream(tokens, d_model)
        bar = w.threshold[0].to(BF16)

        def op() -> None:
            p = (stream.now[0] + stream.now[1]) @ w.W_enc.T
            f = torch.where(p > bar, p, 0)
            stream.now[1].copy_(f @ w.W_dec)

        floor = self.floor(d_sae, d_model, tokens)
        us = self.timer(op, stream.restore, floor * 4)
        self.add("cublas_pair", (d_sae, d_model), tokens, us, floor)

    def density(self, shape: tuple[int, int]) -> None:
        """Half of all features fire, then all of them; beside the dense pair."""
        slot = make_slot(*shape, Activation.RELU)
        slot.weights.threshold.zero_()
        for case, bias in (("half_fire", 0.0), ("all_fire", 30.0)):
            slot.weights.b_enc.fill_(bias)
            for tokens in DENSE_TOKENS:
                self.cublas_pair(slot, tokens)
                pair = self.rows[-1]["us"]
                count = shape[0] // 2 if case == "half_fire" else shape[0]
                self.full(case, slot, tokens, l0=count)
                row = self.rows[-1]
                print(case, row["shape"], tokens, "pairs:", round(row["us"] / pair, 2))

    def heavy_tailed(self, shape: tuple[int, int], sizes: list[int]) -> None:
        """Features that fire as unevenly as those of a trained SAE."""
        share = heavy_tail(shape[0])
        slot = make_slot(*shape, Activation.JUMPRELU, share)
        for tokens in sizes:
            self.full("heavy_tailed", slot, tokens, share=share)

    def several(self, shape: tuple[int, int], count: int, tokens: int = 64) -> None:
        """Modules at one site, of which no token, all tokens, or each some use one."""
        slots = [make_slot(*shape, Activation.JUMPRELU) for _ in range(count)]
        for at, slot in enumerate(slots):
            slot.full.packed[:, 0] = 0
            slot.full.packed[1 + at, 0] = 1
        step = StepState(tokens, DEVICE)
        backend = KernelBackend(step, slots, [], BF16)
        stream = Stream(tokens, shape[1])

        def op() -> None:
            backend.full_tier(slots, steering_stream.Stream(*stream.now))

        each = 1 + torch.arange(tokens, device=DEVICE) % count
        floor = self.floor(*shape, tokens)
        cases = (("none", 0 * each, 3.0), ("one", 0 * each + 2, floor),
                 ("all", each, count * floor))  # fmt: skip
        for case, rows, least in cases:
            step.index[Tier.FULL] = rows
            us = self.timer(op, stream.restore, 40.0 * count)
            self.add(f"{count}_modules_{case}", shape, tokens, us, least)

    def screened(self, slot: SAESlot) -> None:
        """Short steps with a copy of the encoder in 10 bits, if it would get one."""
        if screens("auto", *slot.weights.W_enc.shape, 2):
            copy = slot.weights.screen = ScreenCopy(*slot.weights.W_enc.shape, DEVICE)
            copy.fill(slot.weights.W_enc)
            for tokens in (n for n in TOKENS if n <= SCREEN_TOKENS):
                self.full("screened", slot, tokens)
            slot.weights.screen = None

    def torch_port(self, slot: SAESlot, tokens: int) -> None:
        """Eager: nonzero, float32 encoder, dense decode, index_put."""
        w = slot.weights
        d_sae, d_model = w.W_enc.shape
        w_enc, w_dec = w.W_enc.float(), w.W_dec
        stream = Stream(tokens, d_model)
        mask = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def once() -> float:
            stream.restore()
            self.timer.flush()
            start.record()
            rows = mask.nonzero()[:, 0]
            x = (stream.now[0] + stream.now[1])[rows]
            p = x.float() @ w_enc.T + w.b_enc
            f = torch.where(p > w.threshold, p, 0)
            out = (f.to(BF16) @ w_dec).float() + w.b_dec
            stream.now[1][rows] = out.to(BF16)
            stream.now[0][rows] = 0
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e3

        count = 31 if tokens <= 256 else 7
        us = statistics.median(once() for _ in range(count))
        self.add("torch_port", (d_sae, d_model), tokens, us,
                 self.floor(d_sae, d_model, tokens))  # fmt: skip

    def clamps(self, tokens: int = 256, d_model: int = 3584) -> None:
        """The delta tier with eight clamps, and the additive tier with one vector."""
        slot = make_slot(16384, d_model, Activation.JUMPRELU)
        features = torch.randperm(16384)[:8].tolist()
        stream = Stream(tokens, d_model)
        step = StepState(tokens, DEVICE)
        step.index[Tier.DELTA] = 1
        step.index[Tier.ADDITIVE] = 1
        workspace = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
        hidden, residual = stream.now[0], stream.now[1]
        floor = 2 * d_model * (4 * tokens + 16) / self.bandwidth * 1e6
        for kind in (ClampKind.ABSOLUTE, ClampKind.ADDITIVE):
            set_clamps(slot.delta.packed, features, kind)

            def delta() -> None:
                kernel.sae_clamp(slot, step, workspace, hidden, residual)

            us = self.timer(delta, stream.restore, 10)
            name = f"delta_{kind.name.lower()}"
            self.add(name, (16384, d_model), tokens, us, floor)
        step.index[Tier.DELTA] = 0
        us = self.timer(delta, stream.restore, 3)
        self.add("delta_idle", (16384, d_model), tokens, us, 3.0)
        vectors = VectorSlot(4, d_model, 9, 8, DEVICE)
        vectors.directions.normal_()
        vectors.table.packed[1, 0] = 1
        set_clamps(vectors.table.packed, [2], ClampKind.ADDITIVE)

        def additive() -> None:
            kernel.steering_vectors(vectors, step, hidden, residual)

        us = self.timer(additive, stream.restore, 5)
        self.add("additive", (4, d_model), tokens, us, floor)


def run(bench: Bench, quick: bool, baselines: bool, save: Callable[[], None]) -> None:
    """All cases; `quick` keeps the smallest shape and a few sizes. Baselines last."""
    bench.clamps()
    os.environ.setdefault(BRANCHES_ENV, "1")
    for count in (4, 8):
        bench.several(SHAPES[0], count)
    shapes = SHAPES[:1] if quick else SHAPES
    for shape in shapes:
        for activation in (Activation.JUMPRELU, Activation.TOPK):
            slot = make_slot(*shape, activation)
            l0 = K if activation is Activation.TOPK else L0
            for tokens in [1, 64, 256, 2048] if quick else TOKENS:
                bench.full(activation.value, slot, tokens, l0=l0)
            if activation is Activation.JUMPRELU:
                for tokens in (1, 256):
                    bench.full("idle", slot, tokens, active=0)
                bench.full("five_active", slot, 256, active=5)
                bench.screened(slot)
            else:
                bench.full("idle_topk", slot, 256, active=0)
            save()
            del slot
            torch.cuda.empty_cache()
        bench.heavy_tailed(shape, [64, 2048] if quick else TOKENS)
        save()
        torch.cuda.empty_cache()
    for shape in shapes if baselines else []:
        slot = make_slot(*shape, Activation.JUMPRELU)
        for tokens in TOKENS:
            bench.cublas_pair(slot, tokens)
            bench.torch_port(slot, tokens)
        save()
        del slot
        torch.cuda.empty_cache()


def main() -> None:
    """Runs, prints, and writes the JSON result file, anew after every SAE."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape, four sizes")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--density", action="store_true", help="only that, one shape")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    bench = Bench()
    facts = {
        **environment(),
        "copy_TBps": round(bench.bandwidth / 1e12, 3),
        "read_TBps": round(bench.reading / 1e12, 3),
        "bf16_TFLOPs": round(bench.flops / 1e12, 1),
    }
    print(facts, flush=True)
    out = args.out or results_file(facts["gpu"])
    out.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(out.read_text()) if out.exists() else {}

    def save() -> None:
        out.write_text(json.dumps({**old, **facts, "kernel": bench.rows}, indent=1))

    with torch.inference_mode():
        if args.density:
            bench.density(SHAPES[0])
            save()
            return
        run(bench, args.quick, not (args.quick or args.no_baselines), save)


if __name__ == "__main__":
    main()
