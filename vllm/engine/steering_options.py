# SPDX-License-Identifier: Apache-2.0
"""What a user may write in `additional_config["steering"]`.

    {"modules": {"name": "path" | {"path": ..., "feature_units": ...,
                                   "skip_token_ids": [...] | None,
                                   "norm_guard": float | None,
                                   "reference_norm": float | None, "sites": [...],
                                   "sharding": "auto" | "replicate" | "shard",
                                   "screening": "auto" | "off"}},
     "max_clamps": 64, "max_specs": 64, "max_pieces": 8,
     "max_body_mib": 32, "max_read_values": 64, "max_answer_values": 1048576,
     "presets": {"name": "file" | {...}},
     "default_preset": "name",
     "readout": True,
     "decoder_layer": "known" | "auto",
     "spare": [{"site": "post_block.20", "width": 16384, "count": 1},
               {"layer": 20, "hook": "post_block", "vectors": 4}],
     "inline_vectors": {"post_block.20": 4},
     "module_roots": ["/srv/saes", "hf:"]}

`spare` reserves room for modules that are registered later; `inline_vectors` says how
many vectors of its own a request may bring to each site; `module_roots` says where
the HTTP routes may load them from. Every refusal is one line that names the field, what
was found and what would be accepted.
"""

from __future__ import annotations

import os
from typing import get_args

from vllm.config.sae_inline_vectors import INLINE_PREFIX
from vllm.config.steering import (
    DEFAULT_MAX_ANSWER_VALUES,
    DEFAULT_MAX_CLAMPS,
    DEFAULT_MAX_PIECES,
    DEFAULT_MAX_READ_VALUES,
    DEFAULT_MAX_SPECS,
    MAX_READ_VALUES,
    DecoderLayers,
)
from vllm.config.steering_checks import (
    SteeringConfigError,
    integer_in_range,
    shown,
)
from vllm.config.steering_json import Json
from vllm.config.steering_module_options import MODULE_OPTIONS, ModuleOptions
from vllm.config.steering_reader import Reader
from vllm.exceptions import VLLMValidationError

ROOT = "additional_config.steering"
TOP_FIELDS = (
    "modules",
    "max_clamps",
    "max_specs",
    "max_pieces",
    "max_body_mib",
    "max_read_values",
    "max_answer_values",
    "presets",
    "default_preset",
    "readout",
    "decoder_layer",
    "spare",
    "inline_vectors",
    "module_roots",
    "resolved",
)
# Of each option that is a limit: its default, and the least and most it may be.
LIMITS = {
    "max_clamps": (DEFAULT_MAX_CLAMPS, 1, 4096),
    "max_specs": (DEFAULT_MAX_SPECS, 1, 4096),
    "max_pieces": (DEFAULT_MAX_PIECES, 2, 64),  # at least prompt and answer
    "max_body_mib": (32, 1, 65536),
    "max_read_values": (
        DEFAULT_MAX_READ_VALUES,
        DEFAULT_MAX_READ_VALUES,
        MAX_READ_VALUES,
    ),
    "max_answer_values": (DEFAULT_MAX_ANSWER_VALUES, 1, 1 << 30),
}
_MODULE_OPTIONS = Reader(ModuleOptions)


def readout_option(value: object) -> bool:
    if type(value) is not bool:
        raise SteeringConfigError(
            f"{ROOT}.readout: found {shown(value)}, expected true or false"
        )
    return value


def decoder_layer_option(value: object) -> DecoderLayers:
    for known in get_args(DecoderLayers):
        if value == known:
            return known
    raise SteeringConfigError(
        f'{ROOT}.decoder_layer: found {shown(value)}, expected "known" or "auto"'
    )


def object_option(
    path: str, value: object, fields: tuple[str, ...] | None = None
) -> Json:
    if not isinstance(value, dict):
        raise SteeringConfigError(f"{path}: found {shown(value)}, expected an object")
    for key in value:
        if fields is not None and key not in fields:
            known = ", ".join(field for field in fields if field != "resolved")
            raise SteeringConfigError(
                f"{path}: unknown field {shown(key)}, expected {known}"
            )
    return value


def limit_option(steering: Json, key: str) -> int:
    """The value of an option of `LIMITS`."""
    default, least, most = LIMITS[key]
    return integer(f"{ROOT}.{key}", steering.get(key, default), least, most)


def check_module_roots(value: object) -> None:
    """Raise unless `module_roots` is a list of absolute directories and `hf:` paths."""
    accepted = 'absolute directories, "hf:", "hf:owner" or "hf:owner/repo"'
    path = f"{ROOT}.module_roots"
    if not isinstance(value, (list, tuple)):
        raise SteeringConfigError(
            f"{path}: found {shown(value)}, expected a list of {accepted}"
        )
    for at, root in enumerate(value):
        if type(root) is not str or not (root.startswith("hf:") or os.path.isabs(root)):
            raise SteeringConfigError(
                f"{path}[{at}]: found {shown(root)}, expected one of {accepted}"
            )


def integer(path: str, value: object, low: int, high: int) -> int:
    return integer_in_range(path, value, low, high, SteeringConfigError)


def module_form(name: object, given: object) -> tuple[str, Json]:
    """The path and the options of one entry of `modules`."""
    if type(name) is not str or not name.strip():
        raise SteeringConfigError(
            f"{ROOT}.modules: found the name {shown(name)}, expected a non-empty string"
        )
    if name.startswith(INLINE_PREFIX):
        raise SteeringConfigError(
            f"{ROOT}.modules: found the name {shown(name)}, expected one that does not "
            f'begin with "{INLINE_PREFIX}"'
        )
    where = f"{ROOT}.modules.{name}"
    if isinstance(given, str):
        given = {"path": given}
    options = dict(object_option(where, given, ("path", *MODULE_OPTIONS)))
    path = options.pop("path", None)
    if type(path) is not str or not path:
        raise SteeringConfigError(
            f"{where}.path: found {shown(path)}, expected a path, hf:owner/repo or "
            "saelens:RELEASE/SAE_ID"
        )
    try:
        return path, _MODULE_OPTIONS.read(options, where).options
    except VLLMValidationError as error:
        raise SteeringConfigError(error.args[0]) from None
