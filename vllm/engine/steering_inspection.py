# SPDX-License-Identifier: Apache-2.0
"""Describes a module by its files and checks it against the model that it steers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from vllm.config.steering import ModuleInfo
from vllm.config.steering_checks import SteeringConfigError, shown
from vllm.config.steering_points import point_widths
from vllm.config.steering_screening import DEFAULT_SCREENING
from vllm.config.steering_sharding import Ranks
from vllm.config.steering_slots import undivided
from vllm.engine.steering_options import module_form
from vllm.engine.steering_site_checks import (
    check_dtype,
    check_sharded,
    check_transcoder,
)
from vllm.engine.steering_topology import ranks_of
from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(__name__)

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def inspect_for_model(
    name: object,
    given: object,
    vllm_config: VllmConfig,
    inspect: Callable[..., ModuleInfo] | None = None,
) -> ModuleInfo:
    """The module as described by its files, checked against the model.

    Args:
        name: the module's name.
        given: its path, or an object with `path` and `MODULE_OPTIONS`.
        vllm_config: vLLM's `VllmConfig`.
        inspect: None for `inspect_module`, which reads the files in this process.
    """
    from vllm.model_executor.model_loader.sae_loader import inspect_module

    path, options = module_form(name, given)
    assert isinstance(name, str)  # checked there
    sharding = options.pop("sharding", "auto")
    screening = options.pop("screening", DEFAULT_SCREENING)
    model_config = vllm_config.model_config
    try:
        module = (inspect or inspect_module)(name, path, **options)
    except ValueError as error:
        # A mistake at start-up should end in one line, without a traceback of causes.
        raise SteeringConfigError(str(error)) from None
    check_against_model(module, model_config)
    ranks = ranks_of(vllm_config)
    if sharding == "shard":
        check_shards(module, ranks)
    if ranks.size > 1:
        module = dataclasses.replace(module, sharding=sharding)
    if module.kind == "sae":
        module = dataclasses.replace(module, screening=screening)
    for site in undivided(module, ranks):
        logger.warning(
            "Steering module %s: %s: every rank holds a copy, because %d features and "
            "%d columns are no multiples of %d and %d",
            name,
            site.name,
            site.d_sae,
            site.out_width,
            ranks.auto_unit,
            ranks.unit,
        )
    if module.skip_token_ids is None:
        ids = special_token_ids(model_config)
        module = dataclasses.replace(module, skip_token_ids=ids)
    return module


def check_against_model(module: ModuleInfo, model_config: ModelConfig) -> None:
    """Raise unless every site of the module exists in the model, at its width."""
    num_layers = model_config.get_total_num_hidden_layers()
    widths = point_widths(model_config)
    prefix = f"steering module {shown(module.name)} ({module.path})"
    if not module.sites:
        raise SteeringConfigError(f"{prefix}: has no sites, expected at least one")
    for site in module.sites:
        where = f"{prefix}: site {site.name}"
        if not 0 <= site.layer < num_layers:
            raise SteeringConfigError(
                f"{where}: found layer {site.layer}, expected "
                f"0..{num_layers - 1} ({model_config.model})"
            )
        for hook in (site.hook, site.out_hook):
            check_dtype(where, hook, model_config)
        if site.is_transcoder:
            check_transcoder(where, site.hook, site.out_hook)
        ends = {
            "d_in": (site.hook, site.d_in),
            "d_out": (site.out_hook, site.out_width),
        }
        for name, (hook, width) in ends.items():
            if width != widths.of(hook):
                raise SteeringConfigError(
                    f"{where}: found {name} {width}, expected {widths.of(hook)}, the "
                    f"width of {hook.value} in {model_config.model}"
                )


def check_shards(module: ModuleInfo, ranks: Ranks) -> None:
    """Raise unless the ranks can share every SAE of the module."""
    where = f"steering module {shown(module.name)}: sharding"
    if module.kind == "vectors":
        raise SteeringConfigError(
            f'{where}: found "shard" for steering vectors, expected "replicate": every '
            "rank holds a copy of a vector"
        )
    for site in module.sites:
        check_sharded(where, site.d_sae, site.out_width, ranks)


def special_token_ids(model_config: ModelConfig) -> tuple[int, ...]:
    """Ids of the model's bos, eos and pad tokens, sorted.

    They come from the model's two configurations. The tokenizer is asked only for what
    both leave out, and not with `skip_tokenizer_init`.
    """
    generation = model_config.try_get_generation_config()
    ids: set[int] = set()
    missing = []
    for name in SPECIAL_TOKENS:
        known: set[int] = set()
        for config in (model_config.hf_config, model_config.hf_text_config):
            known |= _ids(config.to_dict().get(name))
        known |= _ids(generation.get(name))
        ids |= known
        if not known:
            missing.append(name)
    if missing and not model_config.skip_tokenizer_init:
        ids |= _tokenizer_ids(model_config, missing)
    return tuple(sorted(ids))


def _tokenizer_ids(model_config: ModelConfig, names: Iterable[str]) -> set[int]:
    from vllm.tokenizers import cached_tokenizer_from_config

    try:
        tokenizer = cached_tokenizer_from_config(model_config)
    except Exception as error:
        logger.warning(
            "Steering: %s are not skipped, the tokenizer cannot be read: %s",
            names,
            error,
        )
        return set()
    ids: set[int] = set()
    for name in names:
        ids |= _ids(getattr(tokenizer, name, None))
    return ids


def _ids(value: object) -> set[int]:
    """A token id, a list of them, or nothing."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return {item for item in values if type(item) is int and item >= 0}


def describe(module: ModuleInfo) -> str:
    """One line for the log: kind, sites, widths and digest."""
    sites = ", ".join(f"{s.name} ({s.d_sae} x {s.d_in})" for s in module.sites)
    return f"{module.kind}, {sites}, digest {module.digest[:12]}, from {module.path}"
