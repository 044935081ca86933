# SPDX-License-Identifier: Apache-2.0
"""Request types of steering: the documented import path for users and servers.

    SamplingParams(extra_args={"sae_full_reconstruction_specs": [spec, ...]})
    SteeringSamplingParams(sae_full_reconstruction_specs=[spec, ...])

are the same request.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import force_setattr

import vllm.envs as envs
from vllm.config.sae_features import SAEFeatures
from vllm.config.sae_readout_specs import SAEReadoutSpec, SAEStopEntry
from vllm.config.sae_steering_names import refuse_misspelt
from vllm.config.sae_steering_parser import parse_steering_request
from vllm.config.sae_steering_request import SteeringRequest, hash_steering_config
from vllm.config.sae_steering_spans import SteeringSpan, TokenPhase
from vllm.config.sae_steering_specs import (
    EXTRA_ARGS_KEYS,
    PRESET_KEY,
    SAEClampEntry,
    SAEClampSpec,
    SAECondition,
    SAEFullReconstructionSpec,
    SteeringVectorSpec,
)
from vllm.config.steering_checks import refusal
from vllm.config.steering_json import Json
from vllm.sampling_params import SamplingParams

__all__ = [
    "EXTRA_ARGS_KEYS",
    "SAEClampEntry",
    "SAEClampSpec",
    "SAECondition",
    "SAEFeatures",
    "SAEFullReconstructionSpec",
    "SAEReadoutSpec",
    "SAEStopEntry",
    "SteeringRequest",
    "SteeringSamplingParams",
    "SteeringSpan",
    "SteeringVectorSpec",
    "TokenPhase",
    "fold_into_extra_args",
    "hash_steering_config",
    "parse_steering_request",
]

# The name of our entry point, as `VLLM_PLUGINS` lists it.
PLUGIN = "steering"


def fold_into_extra_args(extra_args: Json | None, specs: Json) -> Json | None:
    """`extra_args` with the specs that are not None added; the input is not changed.

    Raises:
        VLLMValidationError: a key is given in both places.
    """
    given = {key: value for key, value in specs.items() if value is not None}
    refuse_misspelt(extra_args or (), "extra_args.")
    for key in given:
        if extra_args and extra_args.get(key) is not None:
            raise refusal(
                key, "is given as a field and in extra_args, expected only one of them"
            )
    return {**(extra_args or {}), **given} if given else extra_args


def refuse_without_plugin(specs: Json) -> None:
    """Raise when specs are given and `VLLM_PLUGINS` keeps steering from loading."""
    loaded = envs.VLLM_PLUGINS
    if loaded is None or PLUGIN in loaded:
        return
    for key, value in specs.items():
        if value is not None and value is not msgspec.UNSET:
            raise refusal(
                key,
                "steering is not loaded, because the environment variable "
                f"VLLM_PLUGINS={','.join(loaded)} does not name it: add "
                f'"{PLUGIN}" to it, or unset it',
            )


def _fold_fields(self: SamplingParams) -> None:
    specs = {key: getattr(self, key) for key in EXTRA_ARGS_KEYS}
    preset = getattr(self, PRESET_KEY)
    refuse_without_plugin({**specs, PRESET_KEY: preset})
    self.extra_args = fold_into_extra_args(self.extra_args, specs)
    if preset is not msgspec.UNSET:
        self.extra_args = {**(self.extra_args or {}), PRESET_KEY: preset}
    force_setattr(self, PRESET_KEY, msgspec.UNSET)
    for key in EXTRA_ARGS_KEYS:
        force_setattr(self, key, None)
    SamplingParams.__post_init__(self)


_FIELDS = frozenset((*EXTRA_ARGS_KEYS, PRESET_KEY))


def _set_field(self: SamplingParams, name: str, value: object) -> None:
    """Set a field: a steering field in `extra_args`, where the engine reads it."""
    if name not in _FIELDS:
        if name not in self.__struct_fields__:
            refuse_misspelt((name,))
        force_setattr(self, name, value)
        return
    refuse_without_plugin({name: value})
    kept = {key: own for key, own in (self.extra_args or {}).items() if key != name}
    # A preset of None means none, not even the default one.
    absent = value is msgspec.UNSET or (value is None and name != PRESET_KEY)
    self.extra_args = kept if absent else {**kept, name: value}


_DOC = """`SamplingParams` with the steering fields, folded into `extra_args`.

    sae_full_reconstruction_specs: list of `SAEFullReconstructionSpec`.
    sae_clamp_specs: list of `SAEClampSpec`.
    steering_vector_specs: list of `SteeringVectorSpec`.
    sae_readout_specs: list of `SAEReadoutSpec`.
    steering_preset: name of a preset; None for no preset, not even the default one.

Dicts may be given instead of the spec classes. They become keys of
`extra_args`, where they are read: as fields they are None, because on the wire this is
an ordinary `SamplingParams`, which every process can decode. A field that is set later
replaces the key. The engine checks them when it gets the request.

Raises:
    VLLMValidationError: a field is given here and in `extra_args`, a key of
        `extra_args` is nearly one of them, or `VLLM_PLUGINS` keeps steering from
        loading.
"""
# The fields of `SteeringFields`, after those of `SamplingParams`.
SteeringSamplingParams: Any = msgspec.defstruct(
    "SteeringSamplingParams",
    [*((key, Any, None) for key in EXTRA_ARGS_KEYS), (PRESET_KEY, Any, msgspec.UNSET)],
    bases=(SamplingParams,),
    module=__name__,
    namespace={
        "__post_init__": _fold_fields,
        "__setattr__": _set_field,
        "__doc__": _DOC,
    },
)
