# SPDX-License-Identifier: Apache-2.0
"""Makes a `SteeringConfig` from what a user writes in `additional_config["steering"]`.

`steering_options.py` checks the options. This module inspects the steering modules,
checks them against the model, and refuses features of vLLM under which steering would
be wrong. Every refusal is one line: the field or the module, what was found and what
would be accepted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

import vllm.envs as envs
from vllm.config.steering import (
    DEFAULT_MAX_CLAMPS,
    DEFAULT_MAX_PIECES,
    DEFAULT_MAX_SPECS,
    ModuleInfo,
    Ranks,
    SteeringConfig,
    point_widths,
)
from vllm.config.steering_checks import SteeringConfigError, shown
from vllm.config.steering_private_directory import make_private_directory
from vllm.config.steering_screening import DEFAULT_SCREENING
from vllm.config.steering_slots import start_up_slots, undivided
from vllm.engine.steering_kv_connectors import (
    BLOCK_HASH_CONNECTORS,
    MULTI_CONNECTOR,
    unsafe_kv_connector,
)
from vllm.engine.steering_layouts import refuse_layouts
from vllm.engine.steering_options import (
    DEFAULT_MAX_BODY_MIB,
    MAX_BODY_MIB_LIMIT,
    MAX_CLAMPS_LIMIT,
    MAX_PIECES_LIMIT,
    MAX_SPECS_LIMIT,
    ROOT,
    TOP_FIELDS,
    check_dtype,
    check_module_roots,
    check_sharded,
    check_transcoder,
    decoder_layer_option,
    inline_sites,
    limit_option,
    module_form,
    object_option,
    readout_option,
    spare_slots,
)
from vllm.engine.steering_presets import with_start_up_presets
from vllm.engine.steering_shared_config import is_one_of_several
from vllm.engine.steering_topology import ranks_store
from vllm.logger import init_logger
from vllm.model_executor.layers.steering_kernels.extension import extension_library
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(__name__)

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def resolve_steering(vllm_config: VllmConfig) -> None:
    """Replace the user's form in `vllm_config` by one with `resolved` filled in.

    Does nothing without steering, or when it is resolved already. The dict that the
    caller passed is not changed.

    Raises:
        SteeringConfigError: the options, a module or a feature of the engine is
            refused.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or additional.get("steering") is None:
        return
    steering = additional["steering"]
    object_option(ROOT, steering, TOP_FIELDS)
    refuse_unsupported_features(vllm_config)
    if "resolved" in steering:
        return
    max_clamps = limit_option(
        steering, "max_clamps", DEFAULT_MAX_CLAMPS, MAX_CLAMPS_LIMIT
    )
    max_pieces = limit_option(
        steering, "max_pieces", DEFAULT_MAX_PIECES, MAX_PIECES_LIMIT
    )
    max_specs = limit_option(steering, "max_specs", DEFAULT_MAX_SPECS, MAX_SPECS_LIMIT)
    limit_option(steering, "max_body_mib", DEFAULT_MAX_BODY_MIB, MAX_BODY_MIB_LIMIT)
    modules: dict[str, ModuleInfo] = {}
    for name, given in object_option(
        f"{ROOT}.modules", steering.get("modules", {})
    ).items():
        modules[name] = inspect_for_model(name, given, vllm_config)
        logger.info("Steering module %s: %s", name, describe(modules[name]))
    ranks = ranks_of(vllm_config)
    spare = spare_slots(steering.get("spare", []), vllm_config.model_config, ranks)
    inline = inline_sites(
        steering.get("inline_vectors", {}),
        vllm_config.model_config,
        vllm_config.scheduler_config.max_num_seqs,
    )
    for site in inline:
        logger.info(
            "Steering: requests may bring %d vector(s) to %s, the engine holds up to "
            "%d (%.1f MiB)",
            site.per_request,
            site.name,
            site.directions,
            site.nbytes / 2**20,
        )
    check_module_roots(steering.get("module_roots", []))
    config = start_up_slots(
        SteeringConfig(
            modules,
            max_clamps,
            max_specs=max_specs,
            max_pieces=max_pieces,
            readout=readout_option(steering.get("readout", True)),
            first_read_layer=first_read_layer(vllm_config),
            decoder_layer=decoder_layer_option(steering.get("decoder_layer", "known")),
            inline_sites=inline,
            ranks=ranks,
        ),
        spare,
    )
    config = with_start_up_presets(
        config, steering.get("presets", {}), steering.get("default_preset")
    )
    resolved = config.to_json()
    vllm_config.additional_config = {
        **additional,
        "steering": {**steering, "resolved": resolved},
    }
    if not is_one_of_several(vllm_config.parallel_config):
        make_private_directory()


def first_read_layer(vllm_config: VllmConfig) -> int:
    """The first layer whose features can be read, which is the last pipeline stage's
    first.

    Only that stage's output reaches the scheduler.
    """
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages == 1:
        return 0
    from vllm.distributed.utils import get_pp_indices

    layers = vllm_config.model_config.get_total_num_hidden_layers()
    return get_pp_indices(layers, stages - 1, stages)[0]


def ranks_of(vllm_config: VllmConfig) -> Ranks:
    """The tensor-parallel group, and whether it can share SAEs."""
    parallel, dtype = vllm_config.parallel_config, vllm_config.model_config.dtype
    stores = ranks_store(parallel, dtype)
    return Ranks(
        parallel.tensor_parallel_size,
        dtype.itemsize,
        auto_copies=not (stores or current_platform.is_cpu()),
        stores=stores,
        screens=_can_screen(vllm_config.model_config.dtype),
    )


def _can_screen(dtype: torch.dtype) -> bool:
    """Whether the workers' devices screen wide SAEs: Hopper, with the extension."""
    return (
        current_platform.is_cuda()
        and current_platform.is_device_capability((9, 0))
        and dtype in (torch.bfloat16, torch.float16)
        and extension_library() is not None
    )


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


def refuse_unsupported_features(vllm_config: VllmConfig) -> None:
    """Raise when the engine uses a feature under which steering would be wrong.

    `steering_layouts.py` says how its ranks may divide the work. Only requests that are
    steered alike may share KV.
    """
    refuse_layouts(vllm_config)
    speculative = vllm_config.speculative_config
    refused = {
        "adaptive verification (speculative_config.enable_adaptive_verification)": (
            speculative is not None and speculative.enable_adaptive_verification
        ),
        "KV-sharing fast prefill (--kv-sharing-fast-prefill)": (
            vllm_config.cache_config.kv_sharing_fast_prefill
        ),
        "weights sent by a trainer (--weight-transfer-config)": (
            vllm_config.weight_transfer_config is not None
        ),
        "the Rust front end (VLLM_USE_RUST_FRONTEND=1)": envs.VLLM_USE_RUST_FRONTEND,
        "pooling models (--runner pooling)": (
            vllm_config.model_config.runner_type == "pooling"
        ),
        # They compute the positions of an answer many times, in any order.
        "models that write by diffusion": vllm_config.model_config.is_diffusion,
    }
    for feature, in_use in refused.items():
        if in_use:
            raise SteeringConfigError(
                f"steering does not support {feature}: switch it off, or start "
                "without steering modules"
            )
    connector = unsafe_kv_connector(vllm_config.kv_transfer_config)
    if connector is not None:
        raise SteeringConfigError(
            f"kv_transfer_config.kv_connector: found {connector}, which does not key "
            "KV by vLLM's block hashes, so steered and plain requests would read each "
            f"other's; expected one of {', '.join(BLOCK_HASH_CONNECTORS)}, or "
            f"{MULTI_CONNECTOR} of these"
        )


def describe(module: ModuleInfo) -> str:
    """One line for the log: kind, sites, widths and digest."""
    sites = ", ".join(f"{s.name} ({s.d_sae} x {s.d_in})" for s in module.sites)
    return f"{module.kind}, {sites}, digest {module.digest[:12]}, from {module.path}"
