# SPDX-License-Identifier: Apache-2.0
"""Measures how well an SAE reconstructs a site of a running engine.

A measurement wraps the site's backend. It counts the tokens that full reconstruction
edits and sums the error. With `ablates`, the tokens get the mean of what was measured.
While it lasts, the engine replays no CUDA graph, so that the site's ops are called.
"""

from __future__ import annotations

import torch

from vllm.config.steering import Tier
from vllm.config.steering_checks import WITHOUT_STEERING, one_line
from vllm.config.steering_json import Json
from vllm.config.steering_points import HookPoint
from vllm.logger import init_logger
from vllm.model_executor.layers.steering import SiteKey, SteeringBackend, SteeringSite
from vllm.model_executor.layers.steering_reference import (
    large_norms,
    select_tokens,
    within_norm,
    write_stream,
)
from vllm.model_executor.layers.steering_state import SAESlot, StepState, VectorSlot
from vllm.model_executor.layers.steering_stream import Stream
from vllm.v1.worker.steering_runtime import SteeredRunner

logger = init_logger(__name__)


class MeasuringBackend(SteeringBackend):
    """A backend that watches full reconstruction of one slot.

    Attributes:
        ablates: give edited tokens the mean instead of their reconstruction.
        tokens, error, squares, total: sums over the tokens that were edited, of 1,
            `|y - y'|^2`, `|y|^2` and `y` `[d_out]`, in float64.
        norms: of what the SAE read at those tokens, one tensor a step.
    """

    def __init__(self, inner: SteeringBackend, slot: SAESlot, step: StepState):
        self.inner, self.slot, self.step = inner, slot, step
        self.ablates = False
        self.tokens = 0
        self.error = self.squares = 0.0
        self.total = torch.zeros(slot.weights.d_out, dtype=torch.float64)
        self.norms: list[torch.Tensor] = []

    @property
    def mean(self) -> torch.Tensor:
        """float32 `[d_out]`, the mean over the tokens that were measured."""
        return (self.total / max(self.tokens, 1)).float()

    def sums(self) -> dict[str, float]:
        """What was measured: tokens, error, the variance around the mean, and norms."""
        variance = self.squares - float(self.total @ self.total) / max(self.tokens, 1)
        found = {"tokens": self.tokens, "error": self.error, "variance": variance}
        if self.tokens:
            median, large = large_norms(torch.cat(self.norms))
            found |= {"median_norm": median, "large": int(large.sum())}
        return found

    def write_flags(self, token_ids: torch.Tensor) -> None:
        self.inner.write_flags(token_ids)

    def read_features(self, slot: SAESlot, read: Stream) -> None:
        self.inner.read_features(slot, read)

    def sae_clamp(self, slot: SAESlot, stream: Stream) -> None:
        self.inner.sae_clamp(slot, stream)

    def steering_vectors(self, slot: VectorSlot, stream: Stream) -> None:
        self.inner.steering_vectors(slot, stream)

    def full_reconstruction(self, slot: SAESlot, stream: Stream) -> None:
        if slot is not self.slot:
            self.inner.full_reconstruction(slot, stream)
            return
        hidden, residual, _ = stream
        index = self.step.index[Tier.FULL, : hidden.shape[0]]
        tokens = select_tokens(slot.full, index, self.step, slot.weights)
        read = stream.read.gather(tokens).float()
        kept = within_norm(read, slot.weights.norm_limit)
        tokens = tokens[kept]
        before = stream.gather(tokens).double()
        if self.ablates:
            mean = self.mean.to(hidden.device).expand(len(tokens), -1)
            write_stream(tokens, mean, hidden, residual)
            return
        self.inner.full_reconstruction(slot, stream)
        after = stream.gather(tokens).double()
        self.tokens += len(tokens)
        self.norms.append(read[kept].norm(dim=1).cpu())
        self.error += float((before - after).square().sum())
        self.squares += float(before.square().sum())
        self.total += before.sum(0).cpu()


class SteeringMeasureMixin:
    """Gives a worker the method by which `evaluate` measures a site."""

    model_runner: SteeredRunner
    _steering_measured: tuple[SteeringSite, MeasuringBackend] | None = None

    def measure_steering(
        self, verb: str, module: str = "", hook: str = "", layer: int = 0
    ) -> Json:
        """Run one verb; never raises.

        Args:
            verb: start, ablate or stop. `start` names the site by the point that it
                reads.

        Returns:
            `ok`, and `error`, one line, when not; for stop, what was measured, or
            nothing on a rank that does not own the site.
        """
        try:
            if verb == "start":
                self._start_measuring(module, SiteKey(layer, HookPoint(hook)))
            elif verb == "ablate":
                if self._steering_measured is not None:
                    self._steering_measured[1].ablates = True
            else:
                return {"ok": True, **self._stop_measuring()}
        except Exception as error:
            # A worker that raises would end the engine.
            logger.warning("Steering: measuring failed: %s", error)
            return {"ok": False, "error": one_line(error)}
        return {"ok": True}

    def _start_measuring(self, module: str, key: SiteKey) -> None:
        runtime = self.model_runner.steering
        if runtime is None:
            raise ValueError(WITHOUT_STEERING)
        self._stop_measuring()
        self.model_runner.use_steering_graphs(False)
        slot = runtime.modules.sae_slot(module, key)
        if slot is None:
            return  # another pipeline stage's
        # A transcoder's site also has the point that it writes in its key.
        site = next(
            site
            for site in runtime.modules.sites.values()
            if any(own is slot for own in site.saes)
        )
        measuring = MeasuringBackend(site.backend, slot, runtime.step)
        site.backend = measuring
        self._steering_measured = site, measuring

    def _stop_measuring(self) -> dict[str, float]:
        self.model_runner.use_steering_graphs(True)
        if self._steering_measured is None:
            return {}
        site, measuring = self._steering_measured
        site.backend = measuring.inner
        self._steering_measured = None
        return measuring.sums()
