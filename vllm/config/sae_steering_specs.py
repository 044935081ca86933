# SPDX-License-Identifier: Apache-2.0
"""The specs that a user writes, for the tiers and for reading.

The structs below are the one definition of three things: the classes of the Python
interface, what `vllm.config.steering_reader` parses, and the JSON schema of the HTTP
fields. Import them from `vllm.config.sae_steering_types`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
from msgspec import Meta

from vllm.config.sae_inline_vectors import vector_text
from vllm.config.sae_readout_specs import SAEReadoutSpec, name_sites
from vllm.config.sae_steering_spans import MAX_SPANS, SpecPhase, SteeringSpan
from vllm.config.steering_json import Json
from vllm.config.steering_points import HOOK_ALIASES, site_text
from vllm.config.steering_reader import Number, expects, json_schema

ClampKindName = Literal["absolute", "additive", "scale"]
CLAMP_KINDS: tuple[ClampKindName, ...] = ("absolute", "additive", "scale")

VectorKind = Literal["add", "set", "scale", "bound"]
VECTOR_KINDS: tuple[VectorKind, ...] = ("add", "set", "scale", "bound")

ModuleName = Annotated[str, Meta(description="Name of a module the server has loaded.")]
FeatureIndex = Annotated[int, expects("a feature index, an integer of 0 or more", ge=0)]


class SAECondition(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    gc=False,
):
    """A feature of the same module and site, read on the same token.

    Holds where its activation is strictly above, or strictly below, a bound in the
    module's `feature_units`. Exactly one of `above` and `below` is given.
    """

    feature_idx: FeatureIndex
    above: Number | None = None
    below: Number | None = None


class SAEClampEntry(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    gc=False,
):
    """One feature clamped at one site.

    The clamp sets the feature's activation `f` to `value` (absolute), `f + value`
    (additive) or `f * value` (scale). `only_if_active` limits it to tokens whose `f` is
    not 0, and `when` to tokens where that condition holds. `value` is in the module's
    `feature_units`. Source: Templeton et al. 2024, "Scaling Monosemanticity".
    """

    feature_idx: FeatureIndex
    kind: ClampKindName
    value: Number
    only_if_active: bool = False
    when: SAECondition | None = None


Entries = Annotated[list[SAEClampEntry], expects("a list of clamp entries")]
Layers = dict[
    Annotated[int | str, expects('a layer index such as 20 or "20"')], Entries
]
Hook = Annotated[str, Meta(extra_json_schema={"enum": list(HOOK_ALIASES)})]
_SITE_SCHEMAS = (
    {"pattern": r"^[A-Za-z0-9_.]+\.[0-9]{1,9}$"},
    {"pattern": r"^(layers\.|blocks\.)?[0-9]{1,9}\.[A-Za-z0-9_.]+$"},
)
SiteName = Annotated[
    str,
    expects(
        'a site such as "post_block.20"',
        extra_json_schema={"anyOf": list(_SITE_SCHEMAS)},
    ),
]
HookOrSite = Annotated[
    str,
    expects(
        'a site such as "post_block.20", or a hook such as "post_block"',
        extra_json_schema={"anyOf": [*_SITE_SCHEMAS, {"enum": list(HOOK_ALIASES)}]},
    ),
]
SiteClamps = Annotated[
    dict[
        HookOrSite,
        Annotated[
            Layers | Entries,
            expects(
                "a list of entries for a site, or {layer: [entry, ...]} for a hook"
            ),
        ],
    ]
    | Entries,
    expects(
        "{site: [entry, ...]}, {hook: {layer: [entry, ...]}}, or a list of entries for "
        "a module with one site",
        description="{site: [entry, ...]}, with sites such as post_block.20, or "
        "{hook: {layer: [entry, ...]}}; a list of entries for a module that has one "
        "site.",
    ),
]


SpanList = Annotated[
    list[SteeringSpan],
    expects(f"null or a list of 1 to {MAX_SPANS} spans", max_length=MAX_SPANS),
]
Bounds = Annotated[list[Number], expects("[low, high]", min_length=2, max_length=2)]


class SAEFullReconstructionSpec(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False
):
    """Replace the stream by the SAE's reconstruction of it, with features clamped.

    If `clamps` is empty, every site of the module is reconstructed, else exactly the
    listed sites; a listed site may have an empty list. Source: Templeton et al. 2024,
    with the SAE's error term dropped.
    """

    module_name: ModuleName
    clamps: SiteClamps = {}
    phase: SpecPhase = "both"
    spans: SpanList | None = None

    def __post_init__(self) -> None:
        name_sites(self, "clamps", self.clamps)


class SAEClampSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Add what the clamps change (delta tier) and keep the SAE's error term.

    `clamps` names at least one site, and at least one entry for each. Source: Templeton
    et al. 2024.
    """

    module_name: ModuleName
    clamps: SiteClamps
    phase: SpecPhase = "both"
    spans: SpanList | None = None

    def __post_init__(self) -> None:
        name_sites(self, "clamps", self.clamps)


VectorText = Annotated[
    str,
    expects(
        "base64 of little-endian float16 or float32 numbers, one for each component",
        description="A vector of the request's own: base64 of little-endian float16 or "
        "float32 numbers [D].",
    ),
]
LayerIndex = Annotated[int, expects("a layer index such as 20", ge=0, lt=2**31)]


class SteeringVectorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Edit the stream along the named module's vectors, at every site it has.

    Instead of `module_name`, a request may bring a `vector [D]` and name the `site`, or
    its `layer` and `hook`, where the engine reserved room. In Python the vector may be
    a tensor or an array; the struct holds it as text.

    Let `v` be the vector, `u` its unit vector and `p` the stream's projection on `u`.
    `add` adds `scale * v`. `set` sets `p` to `value`, `scale` sets it to `scale * p` (0
    removes the direction), and `bound` limits it to `bounds`. With `relative`, `value`,
    `bounds` and the `scale` of `add` are in units of the stream's norm, and `add` adds
    `scale * norm * u`. Sources: Rimsky et al. 2024 (`add`), Arditi et al. 2024
    (`scale`).
    """

    module_name: ModuleName | None = None
    scale: Number = 1.0
    phase: SpecPhase = "both"
    kind: VectorKind = "add"
    value: Number | None = None
    bounds: Bounds | None = None
    relative: bool = False
    spans: SpanList | None = None
    vector: VectorText | None = None
    layer: LayerIndex | None = None
    hook: Hook | None = None
    site: SiteName | None = None

    def __post_init__(self) -> None:
        if self.site is not None:
            msgspec.structs.force_setattr(self, "site", site_text(self.site))
        given: object = self.vector
        if isinstance(given, (torch.Tensor, np.ndarray)):
            msgspec.structs.force_setattr(self, "vector", vector_text(given))


class SteeringFields(msgspec.Struct, kw_only=True):
    """The steering of a request: fields of an HTTP body, keys of `extra_args`."""

    sae_full_reconstruction_specs: Annotated[
        Annotated[list[SAEFullReconstructionSpec], expects("a list of specs")] | None,
        Meta(
            description="Replace the residual stream by the SAE's reconstruction of "
            "it, with the given features clamped. Without clamps, every site of the "
            "module is reconstructed."
        ),
    ] = None
    sae_clamp_specs: Annotated[
        Annotated[list[SAEClampSpec], expects("a list of specs")] | None,
        Meta(
            description="Clamp the given features and add only what that changes, so "
            "that the SAE's error is kept."
        ),
    ] = None
    steering_vector_specs: Annotated[
        Annotated[list[SteeringVectorSpec], expects("a list of specs")] | None,
        Meta(
            description="Edit the residual stream along steering vectors: add one, or "
            "set, scale or bound the projection on it. A vector belongs to a module, "
            "or comes with the request."
        ),
    ] = None
    sae_readout_specs: Annotated[
        Annotated[list[SAEReadoutSpec], expects("a list of specs")] | None,
        Meta(
            description="Return the activations of SAE features on the request's own "
            "tokens. stop_if ends the request when a feature is active."
        ),
    ] = None


EXTRA_ARGS_KEYS = SteeringFields.__struct_fields__
# The preset whose specs a request takes over. null means none, not even the default.
PRESET_KEY = "steering_preset"
# Set by the front end and the engine: presets have been applied.
EXPANDED_KEY = "steering_expanded"
# Set by the engine: see `vllm.config.sae_steering_admission`.
ROWS_KEY = "steering_rows"
# Set by the engine: see `vllm.config.sae_steering_plan`.
PLAN_KEY = "steering_plan"
RESERVED_KEYS = (ROWS_KEY, PLAN_KEY, EXPANDED_KEY)
PRESET_SCHEMA_FIELD = {
    "anyOf": [{"type": "string"}, {"type": "null"}],
    "description": "Name of a preset whose specs apply beside the request's own; null "
    "opts out of the server's default preset.",
}
FULL_KEY, DELTA_KEY, ADDITIVE_KEY, READOUT_KEY = EXTRA_ARGS_KEYS
SPEC_TYPES: dict[str, type[msgspec.Struct]] = {
    FULL_KEY: SAEFullReconstructionSpec,
    DELTA_KEY: SAEClampSpec,
    ADDITIVE_KEY: SteeringVectorSpec,
    READOUT_KEY: SAEReadoutSpec,
}


def field_schemas() -> dict[str, Json]:
    """The JSON schema of each HTTP field."""
    schemas = json_schema(SteeringFields)["properties"]
    for schema in schemas.values():
        schema.pop("default")
    return schemas
