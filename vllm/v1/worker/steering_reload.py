# SPDX-License-Identifier: Apache-2.0
"""Loads new weights of the model while its steering modules stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from vllm.config.steering import ModuleInfo
from vllm.model_executor.layers.steering import SteeringSite
from vllm.v1.worker.steering_modules import SiteModules
from vllm.v1.worker.steering_places import SAEPlace


@contextmanager
def sites_out_of(model: nn.Module) -> Iterator[None]:
    """Take the sites out of the model's tree of modules inside the block.

    vLLM empties the buffers of every module that is not in the checkpoint.
    """
    held = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, SteeringSite)
    ]
    for owner, name, _ in held:
        delattr(owner, name)
    try:
        yield
    finally:
        for owner, name, site in held:
            setattr(owner, name, site)


def fold_again(sites: SiteModules, modules: Iterable[ModuleInfo]) -> None:
    """Fit the SAEs that depend on the model's weights to the new ones.

    Raises:
        ValueError: as `SiteModules.load`.
    """
    for module in modules:
        folded = False
        for site, at in sites.own_sites(module):
            place = sites.places[at]
            fitted = site.before_gain or site.before_value_bias
            if fitted and isinstance(place, SAEPlace):
                sites.load(module, site, place.slot.weights)
                folded = True
        if folded:
            sites.set_meta(module)
