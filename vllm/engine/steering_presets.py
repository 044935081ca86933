# SPDX-License-Identifier: Apache-2.0
"""Checked changes of an engine's presets, one a function."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from vllm.config.sae_steering_parser import check_preset, why_broken
from vllm.config.sae_steering_presets import (
    MAX_PRESETS,
    PRESET_NAME,
    preset_specs,
    read_preset,
)
from vllm.config.sae_steering_specs import EXTRA_ARGS_KEYS
from vllm.config.steering import SteeringConfig
from vllm.config.steering_checks import SteeringConfigError, listing, shown
from vllm.config.steering_json import Json
from vllm.config.steering_replies import Outcome, RefusedCall
from vllm.config.strict_json import marked_loads, refuse_ambiguous
from vllm.engine.steering_options import ROOT
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

logger = init_logger(__name__)

MAX_FILE_BYTES = 1 << 20


def checked_preset(given: object, config: SteeringConfig) -> Json:
    """A preset as the configuration keeps it.

    Raises:
        VLLMValidationError: it is not valid on this engine.
    """
    preset = msgspec.to_builtins(read_preset(given), str_keys=True)
    check_preset(preset, config)
    return {
        **preset_specs(preset),
        "description": preset["description"],
        "sampling": {k: v for k, v in preset["sampling"].items() if v is not None},
        "locked": preset["locked"],
    }


def with_preset(config: SteeringConfig, payload: Json) -> SteeringConfig:
    """The configuration with the payload's preset; it replaces one of the same name."""
    name = payload.get("name")
    if type(name) is not str or not PRESET_NAME.fullmatch(name):
        raise RefusedCall(
            Outcome.INVALID,
            f"name: found {shown(name)}, expected 1 to 128 letters, digits, '.', '_' "
            "or '-'",
            "name",
        )
    if name not in config.presets and len(config.presets) >= MAX_PRESETS:
        raise RefusedCall(
            Outcome.CONFLICT,
            f"found {MAX_PRESETS} presets already, expected fewer: delete one first",
            "name",
        )
    try:
        preset = checked_preset(payload.get("preset"), config)
    except VLLMValidationError as error:
        raise RefusedCall(Outcome.INVALID, error.args[0], error.parameter) from None
    return replace(config, presets={**config.presets, name: preset})


def without_preset(config: SteeringConfig, payload: Json) -> SteeringConfig:
    """The configuration without a preset. The default preset cannot go."""
    name = _known(config, payload.get("name"), "name")
    if name == config.default_preset:
        raise RefusedCall(
            Outcome.CONFLICT,
            f"preset {shown(name)} is the server's default: choose another one first",
            "name",
        )
    presets = {n: p for n, p in config.presets.items() if n != name}
    return replace(config, presets=presets)


def with_default(config: SteeringConfig, payload: Json) -> SteeringConfig:
    """The configuration with another default preset, or with none."""
    name = payload.get("name")
    if name is None:
        return replace(config, default_preset=None)
    name = _known(config, name, "preset")
    why = why_broken(config.presets[name], config)
    if why is not None:
        text = f"preset {shown(name)} is not valid now: {why}"
        raise RefusedCall(Outcome.CONFLICT, text, "preset")
    return replace(config, default_preset=name)


def refuse_without_default(config: SteeringConfig, module: str) -> None:
    """Raise if the default preset needs a module that is to be removed."""
    name = config.default_preset
    if name is not None and _uses(config.presets[name], module):
        raise RefusedCall(
            Outcome.CONFLICT,
            f"module {shown(module)} is used by the server's default preset "
            f"{shown(name)}: choose another default first",
            "name",
        )


def broken_presets(config: SteeringConfig) -> dict[str, str]:
    """The presets that requests could not run under now, and why."""
    presets = config.presets.items()
    reasons = {name: why_broken(preset, config) for name, preset in presets}
    return {name: why for name, why in reasons.items() if why is not None}


def warn_of_broken_presets(
    before: SteeringConfig, after: SteeringConfig, module: str
) -> None:
    """Log which presets the change of a module breaks."""
    known = broken_presets(_ready(before, module))
    for name, why in broken_presets(_ready(after, module)).items():
        if name not in known:
            logger.warning("Steering: preset %s is not valid any more: %s", name, why)


def with_valid_default(after: SteeringConfig, module: str) -> SteeringConfig:
    """`after`, unless a module that is replaced would break the default preset.

    Args:
        after: the configuration with the new module.
        module: its name.
    """
    name = after.default_preset
    if name is None or not _uses(after.presets[name], module):
        return after
    why = why_broken(after.presets[name], _ready(after, module))
    if why is not None:
        raise RefusedCall(
            Outcome.CONFLICT,
            f"the server's default preset {shown(name)} would not be valid: {why}; "
            "expected another module or another default",
            "name",
        )
    return after


def _uses(preset: Json, module: str) -> bool:
    """Whether a spec of a preset names a module."""
    specs = [spec for key in EXTRA_ARGS_KEYS for spec in preset.get(key, ())]
    return any(spec.get("module_name") == module for spec in specs)


def _ready(config: SteeringConfig, module: str) -> SteeringConfig:
    """The configuration once the drain of a module has ended."""
    return replace(config, draining=config.draining - {module})


def _known(config: SteeringConfig, name: object, field: str) -> str:
    if type(name) is not str or name not in config.presets:
        known = listing(list(config.presets)) if config.presets else "none exists"
        raise RefusedCall(
            Outcome.UNKNOWN, f"found {shown(name)}, expected a preset: {known}", field
        )
    return name


def with_start_up_presets(
    config: SteeringConfig, given: object, default: object
) -> SteeringConfig:
    """The configuration with the presets that the engine starts with.

    Args:
        config: with every module in place.
        given: `{name: path of a JSON file, or the preset itself}`.
        default: name of the server's default preset, or None.

    Raises:
        SteeringConfigError: one line that names the preset and what is wrong.
    """
    if not isinstance(given, dict):
        raise SteeringConfigError(
            f"{ROOT}.presets: found {shown(given)}, expected an object of presets"
        )
    for name, preset in given.items():
        where = f"{ROOT}.presets.{name if type(name) is str else shown(name)}"
        try:
            found = _read_file(preset) if isinstance(preset, str) else preset
            config = with_preset(config, {"name": name, "preset": found})
        except (RefusedCall, VLLMValidationError) as error:
            raise SteeringConfigError(f"{where}: {error.args[0]}") from None
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise SteeringConfigError(
                f"{where}: {shown(preset)} cannot be read as a JSON file: {reason}, "
                "expected the path of a preset's JSON file"
            ) from None
    try:
        return with_default(config, {"name": default})
    except RefusedCall as error:
        raise SteeringConfigError(f"{ROOT}.default_preset: {error}") from None


def _read_file(path: str) -> object:
    size = Path(path).stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"found {size} bytes, expected at most {MAX_FILE_BYTES}")
    found = marked_loads(Path(path).read_bytes())
    refuse_ambiguous("preset", found)
    return found
