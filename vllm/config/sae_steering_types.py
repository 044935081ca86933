# SPDX-License-Identifier: Apache-2.0
"""Request types of steering: the documented import path for users and servers.

    SamplingParams(extra_args={"sae_full_reconstruction_specs": [spec, ...]})
    SteeringSamplingParams(sae_full_reconstruction_specs=[spec, ...])

are the same request.
"""

from __future__ import annotations

from typing import Any

import msgspec

from vllm.config.sae_steering_parser import parse_steering_request
from vllm.config.sae_steering_request import (
    SiteEdit,
    SteeringRequest,
    hash_steering_config,
    module_fingerprint,
)
from vllm.config.sae_steering_specs import (
    EXTRA_ARGS_KEYS,
    SAEClampEntry,
    SAEClampSpec,
    SAEFullReconstructionSpec,
    SteeringVectorSpec,
    TokenPhase,
)
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

__all__ = [
    "EXTRA_ARGS_KEYS",
    "SAEClampEntry",
    "SAEClampSpec",
    "SAEFullReconstructionSpec",
    "SiteEdit",
    "SteeringRequest",
    "SteeringSamplingParams",
    "SteeringVectorSpec",
    "TokenPhase",
    "fold_into_extra_args",
    "hash_steering_config",
    "module_fingerprint",
    "parse_steering_request",
]


def fold_into_extra_args(
    extra_args: dict[str, Any] | None, specs: dict[str, Any]
) -> dict[str, Any] | None:
    """`extra_args` with the specs that are not None added; the input is not changed.

    Raises:
        VLLMValidationError: a key is given in both places.
    """
    given = {key: value for key, value in specs.items() if value is not None}
    for key in given:
        if extra_args and extra_args.get(key) is not None:
            raise VLLMValidationError(
                f"{key}: given as a field and in extra_args, expected one of them",
                parameter=key,
            )
    return {**(extra_args or {}), **given} if given else extra_args


def _fold_fields(self: Any) -> None:
    specs = {key: getattr(self, key) for key in EXTRA_ARGS_KEYS}
    self.extra_args = fold_into_extra_args(self.extra_args, specs)
    for key in EXTRA_ARGS_KEYS:
        setattr(self, key, None)
    SamplingParams.__post_init__(self)


_DOC = """`SamplingParams` with the steering fields, folded into `extra_args`.

The fields are read once, at construction, and are None afterwards: on the wire this is
an ordinary `SamplingParams`, which every process can decode.
"""
# The fields of `SteeringFields`, after those of `SamplingParams`.
SteeringSamplingParams: Any = msgspec.defstruct(
    "SteeringSamplingParams",
    [(key, Any, None) for key in EXTRA_ARGS_KEYS],
    bases=(SamplingParams,),
    module=__name__,
    namespace={"__post_init__": _fold_fields, "__doc__": _DOC},
)
