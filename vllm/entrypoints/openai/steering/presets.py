# SPDX-License-Identifier: Apache-2.0
"""Presets as models: any OpenAI client can choose one without knowing of steering."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from vllm.config.sae_steering_presets import SamplingHints
from vllm.config.sae_steering_specs import PRESET_KEY
from vllm.config.steering import SteeringConfig
from vllm.config.steering_checks import refusal, shown
from vllm.config.steering_json import Json
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

# Where routes name a parameter otherwise than `SamplingHints` does.
_OTHER_NAMES = {"max_tokens": ("max_completion_tokens", "max_output_tokens")}


def select_preset(
    request: BaseModel, config: SteeringConfig | None, served: Sequence[str]
) -> None:
    """Turn a `model` that names a preset into the base model and the preset.

    Then the preset's sampling hints fill the fields that the request leaves out.

    Args:
        request: an OpenAI request; changed in place.
        config: of the engine.
        served: names of the server's own models and adapters, the base model's first.
            A preset of the same name is chosen by `steering_preset` alone.

    Raises:
        VLLMValidationError: `model` and `steering_preset` name different presets.
    """
    if config is None or not config.presets:
        return
    values = dict(request)
    model = values.get("model")
    given = PRESET_KEY in request.model_fields_set
    name = values[PRESET_KEY] if given else config.default_preset
    if isinstance(model, str) and model in config.presets and model not in served:
        if given and name != model:
            raise refusal(
                PRESET_KEY,
                f"found {shown(name)}, but model names the preset {shown(model)}, "
                "expected only one of them",
            )
        name = model
        setattr(request, PRESET_KEY, name)
        request.model = served[0]  # type: ignore[attr-defined]
    if isinstance(name, str) and name in config.presets:
        _fill(request, config.presets[name]["sampling"])


def preset_cards(
    config: SteeringConfig | None, served: Sequence[str]
) -> list[ModelCard]:
    """What `/v1/models` says of the presets.

    Args:
        config: of the engine; None when it is not steered.
        served: as of `select_preset`; these names have cards of their own.
    """
    base = served[0]
    return [
        ModelCard(id=name, root=base, parent=base, permission=[ModelPermission()])
        for name in (() if config is None else config.presets)
        if name not in served
    ]


def _fill(request: BaseModel, hints: Json) -> None:
    """Give a request the sampling parameters that it has not set itself.

    A value that is the field's default counts as not set: vLLM writes that of
    `max_tokens` into every completion request.
    """
    fields, values = type(request).model_fields, dict(request)
    for hint in SamplingHints.__struct_fields__:
        if hint not in hints:
            continue
        names = (hint, *_OTHER_NAMES.get(hint, ()))
        known = [name for name in names if name in fields]
        own = [name for name in known if values[name] != fields[name].default]
        if known and not own:
            setattr(request, known[0], hints[hint])
