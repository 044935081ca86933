# SPDX-License-Identifier: Apache-2.0
"""Builds a worker's sites at start-up and loads the configured modules into them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from vllm.config.steering import ModuleInfo, SteeringConfig
from vllm.config.steering_sharding import Ranks
from vllm.config.steering_slots import module_bytes, slots_of
from vllm.logger import init_logger
from vllm.model_executor.layers.steering_families import find_decoder_layers
from vllm.model_executor.layers.steering_shards import WHOLE, tensor_parallel_shard
from vllm.model_executor.model_loader.sae_loader import load_vectors
from vllm.v1.worker.steering_memory import naming_memory
from vllm.v1.worker.steering_modules import SiteModules
from vllm.v1.worker.steering_places import SAEPlace, VectorPlace
from vllm.v1.worker.steering_shape import SteeringShape
from vllm.v1.worker.steering_tables import unit_scale

logger = init_logger(__name__)


def build_site_modules(
    config: SteeringConfig, model: nn.Module, shape: SteeringShape
) -> SiteModules:
    """Build this rank's slots, load every module into its own, attach the sites.

    All modules are loaded and checked before the first layer is touched.

    Raises:
        ValueError: a module cannot be loaded, or the model's layers are unknown.
    """
    layers = find_decoder_layers(model)
    shard = WHOLE if config.ranks.size == 1 else tensor_parallel_shard()
    modules = SiteModules(layers, shape, shard)
    with naming_memory(config, layers, shape):
        modules.places = modules.make_places(slots_of(config), config.inline_sites)
    for module in config.modules.values():
        _load(modules, module)
    modules.write_skip_bits()
    modules.attach(modules.places)
    for module in config.modules.values():
        _log(module, shape.dtype, config.ranks)
    logger.info("Steering buffers take %.1f MiB", modules.nbytes / 2**20)
    return modules


def _load(modules: SiteModules, module: ModuleInfo) -> None:
    """Load a module into this rank's slots for it."""
    scales: dict[int, np.ndarray | None] = {}
    for site, at in modules.own_sites(module):
        place = modules.places[at]
        if isinstance(place, VectorPlace):
            place.fill(load_vectors(module, site))
        elif isinstance(place, SAEPlace):
            modules.load(module, site, place.slot.weights)
            scales[at] = unit_scale(module, place.slot.weights)
    modules.set_meta(module)
    modules.bind(module, scales)


def _log(module: ModuleInfo, dtype: torch.dtype, ranks: Ranks) -> None:
    """Say what was loaded, and how large it is on this rank."""
    sites = ", ".join(
        f"{site.name} F={site.d_sae}"
        + (f" on {ranks.size} ranks" if module.is_sharded(site) else "")
        for site in module.sites
    )
    logger.info(
        "Steering module %s: %d site(s) [%s], %.1f MiB, digest %s",
        module.name,
        len(module.sites),
        sites,
        module_bytes(module, dtype.itemsize, ranks) / 2**20,
        module.digest[:12],
    )
