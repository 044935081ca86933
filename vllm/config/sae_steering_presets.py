# SPDX-License-Identifier: Apache-2.0
"""Presets: named bundles of specs, chosen by a request or applied to all of them.

A preset is kept as it was written. Each request reads it again under its own
configuration, so a request is refused if its preset's module is gone.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from vllm.config.sae_steering_edits import SiteEdit
from vllm.config.sae_steering_request import Group, SteeringRequest
from vllm.config.sae_steering_specs import (
    EXTRA_ARGS_KEYS,
    PRESET_KEY,
    SteeringFields,
)
from vllm.config.steering import SteeringConfig, Tier
from vllm.config.steering_checks import bad, listing, refusal, shown
from vllm.config.steering_json import Json, JsonView
from vllm.config.steering_points import HookPoint
from vllm.config.steering_reader import MAX_FLOAT32, Reader, expects, json_schema
from vllm.exceptions import VLLMValidationError

MAX_PRESETS = 256
MAX_DESCRIPTION = 4096
PRESET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_Description = Annotated[
    str,
    expects(
        f"a text of at most {MAX_DESCRIPTION} characters", max_length=MAX_DESCRIPTION
    ),
]


_Temperature = Annotated[float, expects("null or a number in 0..2", ge=0, le=2)]
_TopP = Annotated[float, expects("null or a number above 0, at most 1", gt=0, le=1)]
_MinP = Annotated[float, expects("null or a number in 0..1", ge=0, le=1)]
_TopK = Annotated[int, expects("null, or an integer of -1 or more", ge=-1)]
_MaxTokens = Annotated[int, expects("null or an integer of 1 or more", ge=1)]
_Penalty = Annotated[float, expects("null or a number in -2..2", ge=-2, le=2)]
_Repetition = Annotated[
    float, expects("null or a finite number above 0", gt=0, le=MAX_FLOAT32)
]


class SamplingHints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sampling parameters of a server's requests that do not give their own.

    Their ranges are those of vLLM's `SamplingParams`.
    """

    temperature: _Temperature | None = None
    top_p: _TopP | None = None
    top_k: _TopK | None = None
    min_p: _MinP | None = None
    max_tokens: _MaxTokens | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: _Repetition | None = None
    seed: int | None = None

    def given(self) -> Json:
        """The hints that are set."""
        hints = msgspec.structs.asdict(self)
        return {key: value for key, value in hints.items() if value is not None}


class SteeringPreset(SteeringFields, kw_only=True, forbid_unknown_fields=True):
    """The specs of a request under a name.

    `locked`: a request may not change what the preset does to a feature, and may not
    opt out where it is the server's default.
    """

    description: _Description = ""
    sampling: SamplingHints = SamplingHints()
    locked: bool = False


# Module, hook, layer and index.
_Feature = tuple[str, HookPoint, int, int]

_PRESET = Reader(SteeringPreset, "preset")
PRESET_SCHEMA = json_schema(SteeringPreset)


def read_preset(given: object, path: str = "preset") -> SteeringPreset:
    """The typed preset; its specs are not checked against a configuration.

    Raises:
        VLLMValidationError: `parameter` is the path of the first bad field.
    """
    return _PRESET.read(given, path)


def preset_specs(given: JsonView) -> Json:
    """The specs in a preset, as the `extra_args` of a request."""
    return {key: given[key] for key in EXTRA_ARGS_KEYS if given.get(key)}


def chosen_preset(extra_args: JsonView, config: SteeringConfig) -> str | None:
    """The preset that a request runs under: its own, or the server's default.

    Raises:
        VLLMValidationError: no such preset, or the locked default may not be left.
    """
    default = config.default_preset
    if PRESET_KEY not in extra_args:
        return default
    name = extra_args[PRESET_KEY]
    if name is not None and (type(name) is not str or name not in config.presets):
        known = listing(list(config.presets)) if config.presets else "none exists"
        raise bad(PRESET_KEY, name, f"null or a preset: {known}")
    if default is not None and name != default and config.presets[default]["locked"]:
        raise refusal(
            PRESET_KEY,
            f"found {shown(name)}, expected {shown(default)}: it is the server's "
            "default preset and is locked",
        )
    return name


def opt_out(config: SteeringConfig) -> Json:
    """`extra_args` of a request that is to run under no preset, where that is allowed:
    not if the server's default is locked."""
    default = config.default_preset
    if default is not None and config.presets[default]["locked"]:
        return {}
    return {PRESET_KEY: None}


def broken(name: str, error: VLLMValidationError) -> VLLMValidationError:
    """The error for a request whose preset is no longer valid."""
    return refusal(
        PRESET_KEY,
        f"preset {shown(name)} cannot be used on this server: {error.args[0]}",
    )


def beside(
    own: SteeringRequest, preset: SteeringRequest, name: str, locked: bool
) -> Json:
    """The specs of a request and of its preset together, as `extra_args`.

    The request wins over the preset: by its own entry for a feature, its own module at
    a reconstructed site, and its own use of a vector.

    Raises:
        VLLMValidationError: the request would override a locked preset.
    """
    kept = _without(preset, own)
    if locked and kept != preset:
        raise refusal(
            PRESET_KEY,
            f"preset {shown(name)} is locked, expected no specs of the request for a "
            "feature, site or vector that the preset uses",
        )
    first, second = kept.to_extra_args(), own.to_extra_args()
    return {
        key: [*first.get(key, ()), *second.get(key, ())]
        for key in EXTRA_ARGS_KEYS
        if key in first or key in second
    }


def _without(preset: SteeringRequest, own: SteeringRequest) -> SteeringRequest:
    """A preset without what the request itself sets."""
    sae_edits: dict[Tier, dict[Group, tuple[SiteEdit, ...]]] = {}
    for tier, groups in preset.sae_edits.items():
        features, sites = _taken(own, tier)
        for group, edits in groups.items():
            left = [
                _left(edit, features)
                for edit in edits
                if sites.get((edit.hook, edit.layer), edit.module) == edit.module
            ]
            if tier is Tier.DELTA:
                left = [edit for edit in left if edit.clamps]
            if left:
                sae_edits.setdefault(tier, {})[group] = tuple(left)
    vectors = {module for module, _ in own.vectors}
    return SteeringRequest(
        sae_edits,
        {group: a for group, a in preset.vectors.items() if group[0] not in vectors},
        preset.modules,
        preset.reads,
        preset.inline,
    )


def _taken(
    own: SteeringRequest, tier: Tier
) -> tuple[set[_Feature], dict[tuple[HookPoint, int], str]]:
    """The features that a request's tier clamps, and the module at each site."""
    features: set[_Feature] = set()
    sites: dict[tuple[HookPoint, int], str] = {}
    for edits in own.sae_edits.get(tier, {}).values():
        for edit in edits:
            if tier is Tier.FULL:
                sites[edit.hook, edit.layer] = edit.module
            features |= {
                (edit.module, edit.hook, edit.layer, clamp.feature_idx)
                for clamp in edit.clamps
            }
    return features, sites


def _left(edit: SiteEdit, features: set[_Feature]) -> SiteEdit:
    """An edit of an SAE tier without its clamps of these features."""
    entries = tuple(
        clamp
        for clamp in edit.entries
        if (edit.module, edit.hook, edit.layer, clamp.feature_idx) not in features
    )
    return SiteEdit(edit.module, edit.hook, edit.layer, entries)
