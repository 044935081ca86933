# SPDX-License-Identifier: Apache-2.0
"""A module on its way from its files into host memory, while the engine goes on.

A client named the files, so another process reads them, with limits on time and memory
(`ModuleInspector`); a thread of the worker takes what it sends. The thread that runs
the model only asks whether the module is there.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from vllm.config.steering import ModuleInfo, SiteInfo
from vllm.model_executor.layers.steering_state import SAEWeights
from vllm.model_executor.model_loader.sae_inspector import module_inspector
from vllm.v1.worker.steering_modules import SiteModules
from vllm.v1.worker.steering_tables import unit_scale

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LoadedSite:
    """What one site's slot gets; `scale` is `BoundTable.unit_scale`."""

    weights: SAEWeights | torch.Tensor
    scale: np.ndarray | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that the files fill."""
        if isinstance(self.weights, SAEWeights):
            return self.weights.tensors()
        return [self.weights]


class ModuleLoad:
    """One module that this rank loads.

    Args:
        module: what to load; the slots do not matter.
        modules: this rank's sites.
    """

    def __init__(self, module: ModuleInfo, modules: SiteModules):
        self.module = module.unplaced()
        self.modules = modules
        self._given_up = False
        self._loaded: Future[dict[SiteInfo, LoadedSite]] = Future()
        name = f"steering-load-{module.name}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def done(self) -> bool:
        """Whether the module is in host memory, or cannot be loaded."""
        return self._loaded.done()

    def result(self) -> dict[SiteInfo, LoadedSite]:
        """What each of this rank's sites gets; `done` is true.

        Raises:
            ValueError: the files are not as they were inspected, hold what is not
                finite, or take more than the limits allow.
        """
        return self._loaded.result(timeout=0)

    def give_up(self) -> None:
        """Load no further site."""
        self._given_up = True

    def _run(self) -> None:
        try:
            self._loaded.set_result(self._read_all())
        except Exception as error:
            self._loaded.set_exception(error)

    def _read_all(self) -> dict[SiteInfo, LoadedSite]:
        layers = self.modules.layers
        own = [site for site in self.module.sites if site.layer in layers]
        if not own:
            return {}
        for site in own:
            self.modules.check_layer(site)
        inspector = module_inspector()
        inspector.warm_up()
        empty = {site: self._empty(site) for site in own}
        size = sum(t.nbytes for one in empty.values() for t in one.tensors)
        # One allowance for the whole module, however many sites it has.
        left = inspector.limits.seconds_for(size)
        found = {}
        for site, loaded in empty.items():
            if self._given_up:
                break
            seconds = max(left, 0.0)
            shard = self.modules.shard_of(self.module.is_sharded(site))
            tensors = loaded.tensors
            left -= inspector.load(self.module, site, tensors, seconds, shard)
            found[site] = self._finished(site, loaded)
        return found

    def _empty(self, site: SiteInfo) -> LoadedSite:
        if self.module.kind == "vectors":
            return LoadedSite(torch.empty(site.d_in))
        shard = self.modules.shard_of(self.module.is_sharded(site))
        weights = SAEWeights.for_site(site, self.modules.shape.dtype, CPU, shard)
        return LoadedSite(weights)

    def _finished(self, site: SiteInfo, loaded: LoadedSite) -> LoadedSite:
        weights = loaded.weights
        if not isinstance(weights, SAEWeights):
            return loaded
        self.modules.fit(site, weights)
        return LoadedSite(weights, unit_scale(self.module, weights))


def start_reading() -> None:
    """Start the process that reads files, and do not wait for it."""
    threading.Thread(target=module_inspector().warm_up, daemon=True).start()
