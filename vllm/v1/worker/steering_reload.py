# SPDX-License-Identifier: Apache-2.0
"""Loads new weights of the model while its steering modules stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from vllm.config.steering import ModuleInfo, SiteInfo
from vllm.model_executor.layers.steering import SteeringSite
from vllm.model_executor.model_loader.sae_loader import inspect_module
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


def _depends_on_model(site: SiteInfo) -> bool:
    """Whether an SAE was fitted to weights of the model when it was loaded."""
    return site.before_gain or site.before_value_bias


def refuse_changed_files(modules: Iterable[ModuleInfo]) -> None:
    """Refuse modules that would be read again, and whose files are others by now.

    Raises:
        ValueError: the name of a module stands for what its files held before.
    """
    for module in modules:
        if any(map(_depends_on_model, module.sites)) and not _is_unchanged(module):
            raise ValueError(
                f"steering module {module.name!r} ({module.path}): found other files "
                "than those that were loaded, expected the same, because the module "
                "is fitted to the new weights: register it again first"
            )


def _is_unchanged(module: ModuleInfo) -> bool:
    """Whether a module's files and options still have its digest."""
    # Without ids of its own, a module has those of the model, which no digest covers.
    return any(
        inspect_module(
            module.name,
            module.path,
            feature_units=module.feature_units,
            skip_token_ids=ids,
            norm_guard=module.norm_guard,
            reference_norm=module.reference_norm,
            sites=[site.name for site in module.sites],
        ).digest
        == module.digest
        for ids in (None, module.skip_token_ids)
    )


def fold_again(sites: SiteModules, modules: Iterable[ModuleInfo]) -> None:
    """Fit the SAEs that depend on the model's weights to the new ones.

    Raises:
        ValueError: as `SiteModules.load`.
    """
    for module in modules:
        folded = False
        for site, at in sites.own_sites(module):
            place = sites.places[at]
            if _depends_on_model(site) and isinstance(place, SAEPlace):
                sites.load(module, site, place.slot.weights)
                folded = True
        if folded:
            sites.set_meta(module)
