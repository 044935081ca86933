# SPDX-License-Identifier: Apache-2.0
"""The one strict parser of steering specs, for Python and HTTP alike.

`vllm.config.steering_reader` reads the structs of `vllm.config.sae_steering_specs`,
`vllm.config.sae_steering_draft` checks them against the configuration. Whatever a
client sends, the only exception is `VLLMValidationError`; its `parameter` is the path
of the offending field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import msgspec

from vllm.config.sae_inline_vectors import refuse_long_text, with_text
from vllm.config.sae_readout_parser import check_reads
from vllm.config.sae_steering_draft import Draft
from vllm.config.sae_steering_names import refuse_misspelt
from vllm.config.sae_steering_presets import (
    beside,
    broken,
    chosen_preset,
    preset_specs,
)
from vllm.config.sae_steering_request import SteeringRequest
from vllm.config.sae_steering_specs import (
    ADDITIVE_KEY,
    DELTA_KEY,
    EXPANDED_KEY,
    EXTRA_ARGS_KEYS,
    FULL_KEY,
    PRESET_KEY,
    READOUT_KEY,
    SPEC_TYPES,
    SAEClampSpec,
    SAEFullReconstructionSpec,
    SteeringFields,
)
from vllm.config.steering import SteeringConfig, Tier
from vllm.config.steering_checks import bad, refusal
from vllm.config.steering_json import JsonView
from vllm.config.steering_reader import Reader, packed
from vllm.exceptions import VLLMValidationError

# Of one request, over all of its specs.
MAX_SITES = 1024
MAX_CLAMPS = 4096
NOT_CONFIGURED = (
    "this engine was started without steering modules. Start it with "
    "--steering-modules NAME=PATH, or with "
    'additional_config={"steering": {"modules": {"NAME": "PATH"}}}'
)

_READERS = {key: Reader(list[spec]) for key, spec in SPEC_TYPES.items()}  # type: ignore[valid-type]


def parse_steering_request(
    extra_args: JsonView | None, config: SteeringConfig | None
) -> SteeringRequest | None:
    """Check what a request asks for and return its canonical form.

    Args:
        extra_args: `SamplingParams.extra_args`; `EXTRA_ARGS_KEYS` are read, and keys
            that are nearly one of them refused.
        config: what the engine was started with; None when without steering.

    Returns:
        None when nothing is asked: no key, null, or an empty list of specs.

    Raises:
        VLLMValidationError: `parameter` is the path of the first bad field.
    """
    if not isinstance(extra_args, Mapping):
        if config is None or config.default_preset is None:
            return None
        extra_args = {}
    refuse_misspelt(extra_args, "extra_args.")
    given = {
        key: extra_args[key] for key in EXTRA_ARGS_KEYS if is_asked(extra_args.get(key))
    }
    if config is None:
        if extra_args.get(PRESET_KEY) is not None:
            raise refusal(PRESET_KEY, NOT_CONFIGURED)
        if given:
            raise refusal(next(iter(given)), NOT_CONFIGURED)
        return None
    preset = None
    if EXPANDED_KEY not in extra_args:
        preset = chosen_preset(extra_args, config)
    if not given and preset is None:
        return None
    check_counts(given, config)
    # Several processes parse each request, and many requests ask for the same.
    data = packed((given, preset))
    request = config.parsed.get(data)
    if request is None:
        request = _parse_under(given, preset, config)
        config.parsed.keep(data, request)
    return cast(SteeringRequest, request)


def check_preset(preset: JsonView, config: SteeringConfig) -> None:
    """Raise `VLLMValidationError` unless a request could run under the preset alone."""
    specs = preset_specs(preset)
    if not specs:
        raise refusal("preset", "has no specs, expected at least one")
    check_counts(specs, config)
    _parse(specs, config)


def why_broken(preset: JsonView, config: SteeringConfig) -> str | None:
    """Why requests could not run under a preset now, or None if they could."""
    try:
        check_preset(preset, config)
    except VLLMValidationError as error:
        return str(error.args[0])
    return None


def _parse_under(
    given: JsonView, name: str | None, config: SteeringConfig
) -> SteeringRequest:
    """A request's own specs together with those of its preset, if it has one."""
    own = _parse(given, config) if given else None
    if name is None:
        assert own is not None
        return own
    preset = config.presets[name]
    try:
        found = _parse(preset_specs(preset), config)
    except VLLMValidationError as error:
        raise broken(name, error) from None
    if own is None:
        return found
    return _parse(beside(own, found, name, preset["locked"]), config)


def check_counts(given: JsonView, config: SteeringConfig) -> None:
    """Limit how much a request lists, before any of it is read."""
    specs = [spec for specs in given.values() for spec in _items(specs)]
    if len(specs) > config.max_specs:
        raise refusal(
            next(iter(given)),
            f"found {len(specs)} specs in this request, expected at most "
            f"{config.max_specs} (additional_config.steering.max_specs)",
        )
    sites = clamps = 0
    for key, listed in given.items():
        for position, spec in enumerate(_items(listed)):
            refuse_long_text(f"{key}[{position}]", spec)
            for entries in _listed_sites(spec):
                sites += 1
                clamps += len(_items(entries))
            if sites > MAX_SITES or clamps > MAX_CLAMPS:
                raise refusal(
                    f"{key}[{position}].clamps",
                    f"found {sites} sites and {clamps} clamps in this request up to "
                    f"here, expected at most {MAX_SITES} sites and {MAX_CLAMPS} clamps",
                )


def _listed_sites(spec: object) -> Iterator[object]:
    """What a spec lists for each site, before its types are known."""
    if isinstance(spec, dict):
        clamps = spec.get("clamps")
    elif isinstance(spec, (SAEFullReconstructionSpec, SAEClampSpec)):
        clamps = spec.clamps
    else:
        return
    if not isinstance(clamps, dict):
        yield clamps
        return
    for layers in clamps.values():
        if isinstance(layers, dict):
            yield from layers.values()
        else:
            yield layers


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else ()


def is_asked(specs: object) -> bool:
    """Whether a field asks for something: not if it is null or an empty list."""
    return specs is not None and not (isinstance(specs, (list, tuple)) and not specs)


def _parse(given: JsonView, config: SteeringConfig) -> SteeringRequest:
    draft = Draft(config)
    fields = SteeringFields(**{key: _read(key, given[key]) for key in given})
    for position, full in enumerate(fields.sae_full_reconstruction_specs or ()):
        draft.add_sae_spec(Tier.FULL, f"{FULL_KEY}[{position}]", full)
    for position, delta in enumerate(fields.sae_clamp_specs or ()):
        draft.add_sae_spec(Tier.DELTA, f"{DELTA_KEY}[{position}]", delta)
    for position, vector in enumerate(fields.steering_vector_specs or ()):
        draft.add_vector_spec(f"{ADDITIVE_KEY}[{position}]", vector)
    draft.reads = check_reads(READOUT_KEY, fields.sae_readout_specs or (), config)
    return draft.finish()


def _read(key: str, specs: object) -> Any:
    for position, spec in enumerate(_items(specs)):
        # The encoder would treat another tier's struct as an object.
        if isinstance(spec, msgspec.Struct) and type(spec) is not SPEC_TYPES[key]:
            raise bad(f"{key}[{position}]", spec, f"a {SPEC_TYPES[key].__name__}")
    if key == ADDITIVE_KEY:
        specs = with_text(key, specs)
    return _READERS[key].read(specs, key)
