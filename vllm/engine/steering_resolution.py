# SPDX-License-Identifier: Apache-2.0
"""Makes a `SteeringConfig` from what a user writes in `additional_config["steering"]`.

`steering_options.py` checks the options and `steering_inspection.py` the modules. This
module refuses features of vLLM under which steering would be wrong. Every refusal is
one line: the field or the module, what was found and what would be accepted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import vllm.envs as envs
from vllm.config.steering import (
    ModuleInfo,
    SteeringConfig,
)
from vllm.config.steering_checks import SteeringConfigError
from vllm.config.steering_json import Json
from vllm.config.steering_private_directory import make_private_directory
from vllm.config.steering_slots import NoRoomError, start_up_slots
from vllm.engine.steering_inspection import describe, inspect_for_model
from vllm.engine.steering_kv_connectors import (
    BLOCK_HASH_CONNECTORS,
    MULTI_CONNECTOR,
    unsafe_kv_connector,
)
from vllm.engine.steering_layouts import refuse_layouts
from vllm.engine.steering_options import (
    LIMITS,
    ROOT,
    TOP_FIELDS,
    check_module_roots,
    decoder_layer_option,
    limit_option,
    object_option,
    readout_option,
)
from vllm.engine.steering_presets import with_start_up_presets
from vllm.engine.steering_shared_config import is_one_of_several
from vllm.engine.steering_slot_options import inline_sites, spare_slots
from vllm.engine.steering_topology import exact_positions, first_read_layer, ranks_of
from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


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
    config = configuration_of(steering, vllm_config)
    vllm_config.additional_config = {
        **additional,
        "steering": {**steering, "resolved": config.to_json()},
    }
    if not is_one_of_several(vllm_config.parallel_config):
        make_private_directory()


def configuration_of(steering: Json, vllm_config: VllmConfig) -> SteeringConfig:
    """The configuration that the options of `steering_options.py` ask for.

    Raises:
        SteeringConfigError: an option or a module is refused.
    """
    model_config = vllm_config.model_config
    limits = {name: limit_option(steering, name) for name in LIMITS}
    check_module_roots(steering.get("module_roots", []))
    ranks = ranks_of(vllm_config)
    config = SteeringConfig(
        max_clamps=limits["max_clamps"],
        max_pieces=limits["max_pieces"],
        max_specs=limits["max_specs"],
        max_read_values=limits["max_read_values"],
        max_answer_values=limits["max_answer_values"],
        readout=readout_option(steering.get("readout", True)),
        decoder_layer=decoder_layer_option(steering.get("decoder_layer", "known")),
        modules=modules_option(steering.get("modules", {}), vllm_config),
        inline_sites=inline_sites(
            steering.get("inline_vectors", {}),
            model_config,
            vllm_config.scheduler_config.max_num_seqs,
        ),
        first_read_layer=first_read_layer(vllm_config),
        ranks=ranks,
        exact_positions=exact_positions(vllm_config),
    )
    for site in config.inline_sites:
        logger.info(
            "Steering: requests may bring %d vector(s) to %s, the engine holds up to "
            "%d (%.1f MiB)",
            site.per_request,
            site.name,
            site.directions,
            site.nbytes / 2**20,
        )
    spare = spare_slots(steering.get("spare", []), model_config, ranks)
    try:
        placed = start_up_slots(config, spare)
    except NoRoomError as error:
        raise SteeringConfigError(f"{ROOT}.modules: {error}") from None
    return with_start_up_presets(
        placed,
        steering.get("presets", {}),
        steering.get("default_preset"),
    )


def modules_option(value: object, vllm_config: VllmConfig) -> dict[str, ModuleInfo]:
    """The modules that the engine starts with, as their files describe them."""
    modules: dict[str, ModuleInfo] = {}
    for name, given in object_option(f"{ROOT}.modules", value).items():
        modules[name] = inspect_for_model(name, given, vllm_config)
        logger.info("Steering module %s: %s", name, describe(modules[name]))
    return modules


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
