# SPDX-License-Identifier: Apache-2.0
"""From what a user writes in `additional_config["steering"]` to `SteeringConfig`.

    {"modules": {"name": "path" | {"path": ..., "feature_units": ...,
                                   "skip_token_ids": [...] | None,
                                   "norm_guard": float | None, "sites": [...]}},
     "max_clamps": 64,
     "max_specs": 64,
     "max_pieces": 8,
     "readout": True,
     "spare": [{"layer": 20, "hook": "resid_post", "width": 16384, "count": 1},
               {"layer": 20, "hook": "resid_post", "vectors": 4}],
     "module_roots": ["/srv/saes", "hf:"]}

`spare` reserves room for modules that are registered later; `module_roots` says where
the HTTP routes may load them from. Every
refusal is one line that names the field or the module, what was found and what would
be accepted.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch

import vllm.envs as envs
from vllm.config.steering import (
    DEFAULT_MAX_CLAMPS,
    DEFAULT_MAX_PIECES,
    DEFAULT_MAX_SPECS,
    HOOK_ALIASES,
    HOOK_NAMES,
    FeatureUnits,
    HookPoint,
    ModuleInfo,
    SlotInfo,
    SteeringConfig,
    point_widths,
)
from vllm.config.steering_checks import SteeringConfigError, shown
from vllm.config.steering_points import RESIDUAL_HOOKS
from vllm.config.steering_private_directory import make_private_directory
from vllm.config.steering_slots import start_up_slots
from vllm.engine.steering_kv_connectors import (
    BLOCK_HASH_CONNECTORS,
    MULTI_CONNECTOR,
    unsafe_kv_connector,
)
from vllm.engine.steering_shared_config import is_one_of_several
from vllm.logger import init_logger
from vllm.platforms import current_platform

logger = init_logger(__name__)

ROOT = "additional_config.steering"
TOP_FIELDS = (
    "modules",
    "max_clamps",
    "max_specs",
    "max_pieces",
    "readout",
    "spare",
    "module_roots",
    "resolved",
)
MODULE_OPTIONS = ("feature_units", "skip_token_ids", "norm_guard", "sites")
SPARE_FIELDS = ("layer", "hook", "hook_out", "skip", "width", "count", "vectors")
MAX_CLAMPS_LIMIT = 4096
MAX_SPECS_LIMIT = 4096
MAX_PIECES_LIMIT = 64
MAX_SPARE_COUNT = 1024
MAX_SPARE_WIDTH = 1 << 24
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def resolve_steering(vllm_config: Any) -> None:
    """Replace the user's form in `vllm_config` by one with `resolved` filled in.

    Does nothing without steering, or when it is resolved already. The dict that the
    caller passed is not changed.

    Raises:
        SteeringConfigError: the configuration, a module or the engine's features do
            not allow it.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or additional.get("steering") is None:
        return
    steering = additional["steering"]
    _object(ROOT, steering, TOP_FIELDS)
    refuse_unsupported_features(vllm_config)
    if "resolved" in steering:
        return
    max_clamps = _limit(steering, "max_clamps", DEFAULT_MAX_CLAMPS, MAX_CLAMPS_LIMIT)
    max_pieces = _limit(steering, "max_pieces", DEFAULT_MAX_PIECES, MAX_PIECES_LIMIT)
    max_specs = _limit(steering, "max_specs", DEFAULT_MAX_SPECS, MAX_SPECS_LIMIT)
    modules: dict[str, ModuleInfo] = {}
    for name, given in _object(f"{ROOT}.modules", steering.get("modules", {})).items():
        modules[name] = inspect_for_model(name, given, vllm_config.model_config)
        logger.info("Steering module %s: %s", name, describe(modules[name]))
    spare = spare_slots(steering.get("spare", []), vllm_config.model_config)
    check_module_roots(steering.get("module_roots", []))
    config = start_up_slots(
        SteeringConfig(
            modules,
            max_clamps,
            max_specs=max_specs,
            max_pieces=max_pieces,
            extended_clamps=current_platform.is_cpu(),
            readout=_readout(steering.get("readout", True)),
            first_read_layer=first_read_layer(vllm_config),
        ),
        spare,
    )
    resolved = config.to_json()
    vllm_config.additional_config = {
        **additional,
        "steering": {**steering, "resolved": resolved},
    }
    if not is_one_of_several(vllm_config.parallel_config):
        make_private_directory()


def _readout(value: Any) -> bool:
    if type(value) is not bool:
        raise SteeringConfigError(
            f"{ROOT}.readout: found {shown(value)}, expected true or false"
        )
    return value


def first_read_layer(vllm_config: Any) -> int:
    """The first layer whose features can be read: that of the last pipeline stage.

    Only that stage's output reaches the scheduler.
    """
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages == 1:
        return 0
    from vllm.distributed.utils import get_pp_indices

    layers = vllm_config.model_config.get_total_num_hidden_layers()
    return get_pp_indices(layers, stages - 1, stages)[0]


def inspect_for_model(
    name: Any,
    given: Any,
    model_config: Any,
    inspect: Callable[..., ModuleInfo] | None = None,
) -> ModuleInfo:
    """The module as described by its files, checked against the model.

    Args:
        name: the module's name.
        given: its path, or an object with `path` and `MODULE_OPTIONS`.
        model_config: vLLM's `ModelConfig`.
        inspect: None for `inspect_module`, which reads the files in this process.
    """
    from vllm.model_executor.model_loader.sae_loader import inspect_module

    path, options = _module_form(name, given)
    try:
        module = (inspect or inspect_module)(name, path, **options)
    except ValueError as error:
        # One line is all that a start-up mistake should print at the end.
        raise SteeringConfigError(str(error)) from None
    check_against_model(module, model_config)
    if module.skip_token_ids is None:
        ids = special_token_ids(model_config)
        module = dataclasses.replace(module, skip_token_ids=ids)
    return module


def check_against_model(module: ModuleInfo, model_config: Any) -> None:
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
            _check_dtype(where, hook, model_config)
        if site.is_transcoder:
            _check_transcoder(where, site.hook, site.out_hook)
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


def _check_dtype(where: str, hook: HookPoint, model_config: Any) -> None:
    """Raise where an absurd value at the point would overflow in the layer itself."""
    if model_config.dtype == torch.float16 and hook not in RESIDUAL_HOOKS:
        raise SteeringConfigError(
            f"{where}: found {hook.value} in float16, expected bfloat16 or float32: "
            "large values at this point overflow float16 in the layer that reads them"
        )


def _check_transcoder(where: str, hook: HookPoint, hook_out: HookPoint) -> None:
    if (hook, hook_out) != (HookPoint.MLP_IN, HookPoint.MLP_OUT):
        raise SteeringConfigError(
            f"{where}: found a transcoder from {hook.value} to {hook_out.value}, "
            "expected one from mlp_in to mlp_out"
        )


def special_token_ids(model_config: Any) -> tuple[int, ...]:
    """Ids of the model's bos, eos and pad tokens, sorted.

    Both of the model's configurations are read; the tokenizer only says what
    neither of them does, and is left alone with `skip_tokenizer_init`.
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


def _tokenizer_ids(model_config: Any, names: Iterable[str]) -> set[int]:
    from vllm.tokenizers import cached_tokenizer_from_config

    try:
        tokenizer = cached_tokenizer_from_config(model_config)
    except Exception as error:
        logger.warning("Steering: %s not known, no tokenizer: %s", names, error)
        return set()
    ids: set[int] = set()
    for name in names:
        ids |= _ids(getattr(tokenizer, name, None))
    return ids


def _ids(value: Any) -> set[int]:
    """A token id, a list of them, or nothing."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return {item for item in values if type(item) is int and item >= 0}


def refuse_unsupported_features(vllm_config: Any) -> None:
    """Raise when the engine uses a feature under which steering would be wrong.

    The per-token index assumes that a forward's tokens are the step's tokens in
    batch order, whole on every rank. KV may be shared only by requests that are
    steered alike.
    """
    parallel = vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    refused = {
        "sequence parallelism (expert parallelism over several data-parallel ranks "
        "with this all2all backend)": parallel.use_sequence_parallel_moe,
        "micro-batching (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
        "prefill context parallelism (--prefill-context-parallel-size)": (
            parallel.prefill_context_parallel_size > 1
        ),
        "adaptive verification (speculative_config.enable_adaptive_verification)": (
            speculative is not None and speculative.enable_adaptive_verification
        ),
        "KV-sharing fast prefill (--kv-sharing-fast-prefill)": (
            vllm_config.cache_config.kv_sharing_fast_prefill
        ),
        "the Rust front end (VLLM_USE_RUST_FRONTEND=1)": envs.VLLM_USE_RUST_FRONTEND,
        "pooling models (--runner pooling)": (
            vllm_config.model_config.runner_type == "pooling"
        ),
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


def _object(
    path: str, value: Any, fields: tuple[str, ...] | None = None
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SteeringConfigError(f"{path}: found {shown(value)}, expected an object")
    for key in value:
        if fields is not None and key not in fields:
            known = ", ".join(field for field in fields if field != "resolved")
            raise SteeringConfigError(
                f"{path}: unknown field {shown(key)}, expected {known}"
            )
    return value


def _limit(steering: dict[str, Any], key: str, default: int, most: int) -> int:
    least = 2 if key == "max_pieces" else 1  # prompt and answer
    return _integer(f"{ROOT}.{key}", steering.get(key, default), least, most)


def spare_slots(value: Any, model_config: Any) -> list[SlotInfo]:
    """The slots that `spare` reserves, each checked against the model."""
    if not isinstance(value, (list, tuple)):
        raise SteeringConfigError(
            f"{ROOT}.spare: found {shown(value)}, expected a list of objects"
        )
    num_layers = model_config.get_total_num_hidden_layers()
    slots: list[SlotInfo] = []
    for at, given in enumerate(value):
        where = f"{ROOT}.spare[{at}]"
        _object(where, given, SPARE_FIELDS)
        layer = _integer(f"{where}.layer", given.get("layer"), 0, num_layers - 1)
        hook = _hook(f"{where}.hook", given.get("hook"))
        _check_dtype(f"{where}.hook", hook, model_config)
        if ("width" in given) == ("vectors" in given):
            raise SteeringConfigError(f"{where}: expected either width or vectors")
        if "vectors" in given:
            for key in ("count", "hook_out", "skip"):
                if key in given:
                    raise SteeringConfigError(
                        f"{where}.{key}: expected only with width"
                    )
            count = _integer(f"{where}.vectors", given["vectors"], 1, MAX_SPARE_COUNT)
            slot = SlotInfo(layer, hook, "vectors", 1)
        else:
            slot = _spare_sae(where, given, layer, hook)
            count = _integer(
                f"{where}.count", given.get("count", 1), 1, MAX_SPARE_COUNT
            )
        slots += [slot] * count
    return slots


def _spare_sae(
    where: str, given: dict[str, Any], layer: int, hook: HookPoint
) -> SlotInfo:
    """Room for an SAE, or with `hook_out` for a transcoder."""
    width = _integer(f"{where}.width", given["width"], 1, MAX_SPARE_WIDTH)
    skip = given.get("skip", False)
    if type(skip) is not bool or (skip and "hook_out" not in given):
        raise SteeringConfigError(
            f"{where}.skip: found {shown(skip)}, expected true or false, with hook_out"
        )
    hook_out = None
    if "hook_out" in given:
        hook_out = _hook(f"{where}.hook_out", given["hook_out"])
        _check_transcoder(where, hook, hook_out)
    return SlotInfo(layer, hook, "sae", width, hook_out=hook_out, has_skip=skip)


def _hook(where: str, name: Any) -> HookPoint:
    if type(name) is not str or name not in HOOK_ALIASES:
        raise SteeringConfigError(
            f"{where}: found {shown(name)}, expected one of {HOOK_NAMES}"
        )
    return HOOK_ALIASES[name]


def check_module_roots(value: Any) -> None:
    """Raise unless `module_roots` is a list of absolute directories and `hf:` paths."""
    good = isinstance(value, (list, tuple)) and all(
        type(root) is str and (root.startswith("hf:") or os.path.isabs(root))
        for root in value
    )
    if not good:
        raise SteeringConfigError(
            f"{ROOT}.module_roots: found {shown(value)}, expected a list of absolute "
            'directories, and "hf:" or "hf:owner" where the Hub is allowed'
        )


def _integer(path: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise SteeringConfigError(
            f"{path}: found {shown(value)}, expected an integer in {low}..{high}"
        )
    return value


def _module_form(name: Any, given: Any) -> tuple[str, dict[str, Any]]:
    """The path and the options of one entry of `modules`."""
    if type(name) is not str or not name.strip():
        raise SteeringConfigError(
            f"{ROOT}.modules: found the name {shown(name)}, expected a non-empty string"
        )
    where = f"{ROOT}.modules.{name}"
    if isinstance(given, str):
        given = {"path": given}
    options = dict(_object(where, given, ("path", *MODULE_OPTIONS)))
    path = options.pop("path", None)
    if type(path) is not str or not path:
        raise SteeringConfigError(
            f"{where}.path: found {shown(path)}, expected a path or hf:owner/repo"
        )
    for key, value in options.items():
        accepted = _OPTION_CHECKS[key](value)
        if accepted is not None:
            raise SteeringConfigError(
                f"{where}.{key}: found {shown(value)}, expected {accepted}"
            )
    return path, options


def _check_units(value: Any) -> str | None:
    known = get_args(FeatureUnits)
    return None if value in known else " or ".join(f'"{unit}"' for unit in known)


def _check_ids(value: Any) -> str | None:
    good = value is None or (
        isinstance(value, (list, tuple))
        and all(type(item) is int and item >= 0 for item in value)
    )
    return None if good else "null or a list of token ids"


def _check_guard(value: Any) -> str | None:
    good = value is None or (type(value) in (int, float) and 0 < value < math.inf)
    return None if good else "null or a positive number"


def _check_sites(value: Any) -> str | None:
    good = value is None or (
        isinstance(value, (list, tuple)) and all(type(item) is str for item in value)
    )
    return None if good else 'null or a list of sites such as "post_block.20"'


_OPTION_CHECKS = {
    "feature_units": _check_units,
    "skip_token_ids": _check_ids,
    "norm_guard": _check_guard,
    "sites": _check_sites,
}
