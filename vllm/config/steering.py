# SPDX-License-Identifier: Apache-2.0
"""What an engine was started with: the steering modules, their sites and limits.

`SteeringConfig` is plain data. It travels to every process inside
`VllmConfig.additional_config["steering"]`, which vLLM hashes into its
compile-cache key, so everything here converts to and from JSON types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum, IntEnum
from typing import Any, Literal

from vllm.config.steering_kept import KeptParses


class HookPoint(str, Enum):
    """A point of a decoder layer where the residual stream can be read and edited.

    The values are this project's names; `parse_hook` also takes the
    TransformerLens names. Each is exactly the tensor that a Hugging Face model
    shows at that point: block input, stream after attention, block output.
    """

    PRE_ATTN = "pre_attn"
    POST_ATTN = "post_attn"
    POST_BLOCK = "post_block"


HOOK_ALIASES: dict[str, HookPoint] = {
    "resid_pre": HookPoint.PRE_ATTN,
    "resid_mid": HookPoint.POST_ATTN,
    "resid_post": HookPoint.POST_BLOCK,
    "post_mlp": HookPoint.POST_BLOCK,
    **{hook.value: hook for hook in HookPoint},
}


class Activation(str, Enum):
    """Activation of an SAE encoder. ReLU is JumpReLU with a threshold of zero."""

    RELU = "relu"
    JUMPRELU = "jumprelu"
    TOPK = "topk"


class Tier(IntEnum):
    """The three edits, in the order in which a site applies them."""

    ADDITIVE = 0
    DELTA = 1
    FULL = 2


ModuleKind = Literal["sae", "vectors"]
FeatureUnits = Literal["native", "unit_decoder"]


@dataclass(frozen=True)
class SiteInfo:
    """One site of a module.

    `d_sae` is the number of directions: F features of an SAE, 1 for a vector.
    `k` and `topk_relu` (clip the selected pre-activations at zero) are set for
    TopK only.
    """

    layer: int
    hook: HookPoint
    d_model: int
    d_sae: int
    activation: Activation = Activation.RELU
    k: int | None = None
    topk_relu: bool = True

    @property
    def name(self) -> str:
        """`layer.hook`, as messages and metrics show it."""
        return f"{self.layer}.{self.hook.value}"


@dataclass(frozen=True)
class SlotInfo:
    """Room for one module at one site; held by a module, or spare.

    `width` is the number of directions that fit: features of an SAE, 1 for a vector.
    `topk` and `threshold` say which activations the slot can compute. Slots of a site
    run in the order in which the configuration lists them.
    """

    layer: int
    hook: HookPoint
    kind: ModuleKind
    width: int
    topk: bool = True
    threshold: bool = True

    def to_json(self) -> dict[str, Any]:
        """JSON types only; the inverse of `from_json`."""
        return {**asdict(self), "hook": self.hook.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SlotInfo:
        """Rebuild what `to_json` wrote."""
        return cls(**{**data, "hook": HookPoint(data["hook"])})


@dataclass(frozen=True)
class ModuleInfo:
    """A named SAE, or a named set of vectors, as the front end knows it.

    `digest` is a SHA-256 (hex) over the weights and every option that changes
    their effect; it goes into the prefix-cache keys. `skip_token_ids=None` stands
    for the model's bos, eos and pad; `norm_guard` is a multiple of
    `reference_norm`. `format` names the file layout for the loader. `slots` says, for
    each of `sites`, which of the engine's slots holds it; None: not placed.
    """

    name: str
    kind: ModuleKind
    path: str
    format: str
    digest: str
    sites: tuple[SiteInfo, ...]
    feature_units: FeatureUnits = "native"
    skip_token_ids: tuple[int, ...] | None = None
    norm_guard: float | None = None
    reference_norm: float | None = None
    slots: tuple[int, ...] | None = None

    def slot_at(self, hook: HookPoint, layer: int) -> int | None:
        """The slot that holds the site at `(layer, hook)`; None: not placed."""
        for site, slot in zip(self.sites, self.slots or (), strict=False):
            if site.layer == layer and site.hook == hook:
                return slot
        return None

    def site(self, hook: HookPoint, layer: int) -> SiteInfo | None:
        """The site at `(layer, hook)`, or None when the module does not cover it."""
        for site in self.sites:
            if site.layer == layer and site.hook == hook:
                return site
        return None

    def to_json(self) -> dict[str, Any]:
        """JSON types only; the inverse of `from_json`."""
        data = asdict(self)
        data["sites"] = [
            {**s, "hook": s["hook"].value, "activation": s["activation"].value}
            for s in data["sites"]
        ]
        if data["skip_token_ids"] is not None:
            data["skip_token_ids"] = list(data["skip_token_ids"])
        data["slots"] = None if self.slots is None else list(self.slots)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModuleInfo:
        """Rebuild what `to_json` wrote."""
        fields = dict(data)
        fields["sites"] = tuple(
            SiteInfo(
                **{
                    **s,
                    "hook": HookPoint(s["hook"]),
                    "activation": Activation(s["activation"]),
                }
            )
            for s in fields["sites"]
        )
        if fields.get("skip_token_ids") is not None:
            fields["skip_token_ids"] = tuple(fields["skip_token_ids"])
        if fields.get("slots") is not None:
            fields["slots"] = tuple(fields["slots"])
        return cls(**fields)


DEFAULT_MAX_CLAMPS = 64
DEFAULT_MAX_SPECS = 64


@dataclass(frozen=True)
class SteeringConfig:
    """The resolved steering configuration of one engine.

    `modules` keeps registration order, which is the order of the delta tier.
    `max_clamps` bounds the clamps per site and request (K), `max_specs` the specs of a
    request. `slots` are the engine's
    slots, held and spare; a slot's id is its position. Requests that name a module in
    `draining` are refused: it waits for its last request, to be removed or replaced.
    """

    modules: dict[str, ModuleInfo] = field(default_factory=dict)
    max_clamps: int = DEFAULT_MAX_CLAMPS
    slots: tuple[SlotInfo, ...] = ()
    draining: frozenset[str] = frozenset()
    max_specs: int = DEFAULT_MAX_SPECS
    # Requests that were parsed under this configuration.
    parsed: KeptParses = field(
        default_factory=KeptParses, init=False, repr=False, compare=False
    )

    def to_json(self) -> dict[str, Any]:
        """JSON types only; the inverse of `from_json`."""
        return {
            "modules": [module.to_json() for module in self.modules.values()],
            "max_clamps": self.max_clamps,
            "slots": [slot.to_json() for slot in self.slots],
            "draining": sorted(self.draining),
            "max_specs": self.max_specs,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SteeringConfig:
        """Rebuild what `to_json` wrote."""
        modules = [ModuleInfo.from_json(module) for module in data["modules"]]
        slots = tuple(SlotInfo.from_json(slot) for slot in data.get("slots", ()))
        return cls(
            {m.name: m for m in modules},
            data["max_clamps"],
            slots,
            frozenset(data.get("draining", ())),
            data.get("max_specs", DEFAULT_MAX_SPECS),
        )


def get_steering_config(additional_config: object) -> SteeringConfig | None:
    """The resolved configuration in a `VllmConfig.additional_config`, or None.

    Resolution (user's form -> this) happens once, when the engine's configuration
    is created; every later reader finds the form that `to_json` writes.
    """
    if not isinstance(additional_config, dict):
        return None
    steering = additional_config.get("steering")
    return None if steering is None else SteeringConfig.from_json(steering["resolved"])
