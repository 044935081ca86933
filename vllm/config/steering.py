# SPDX-License-Identifier: Apache-2.0
"""What an engine was started with: the steering modules, their sites and limits.

`SteeringConfig` is plain data. It travels to every process inside
`VllmConfig.additional_config["steering"]`, which vLLM hashes into its
compile-cache key, so everything here converts to and from JSON types.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from typing import Literal

from vllm.config.steering_json import Json, JsonRecord
from vllm.config.steering_kept import KeptParses
from vllm.config.steering_points import (
    HookPoint,
    site_name,
)
from vllm.config.steering_screening import DEFAULT_SCREENING, Screening
from vllm.config.steering_sharding import Ranks, Sharding


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
DecoderLayers = Literal["known", "auto"]


@dataclass(frozen=True)
class SiteInfo:
    """One site of a module: what it reads, what it writes, and its encoder.

    `hook` is the point that the site reads, of width `d_in`; requests name the site by
    it. An SAE writes to the same point (`hook_out` and `d_out` are None). A transcoder
    writes to `hook_out`, of width `d_out`; `has_skip` says that it adds `W_skip x`, and
    `before_gain` that its encoder was trained on `mlp_in` before the norm's gain, which
    is divided out of `W_enc` when the module is loaded into a layer.
    `before_value_bias` says that it was trained on `attn_z` without the bias of the
    values, as TransformerLens's `fold_value_biases` makes it.
    `raw_output`: what it reads or writes of attention or the MLP is the module's own
    output, so a layer that norms it before adding it does not fit.
    `d_sae` is the number of directions: F features of an SAE, 1 for a vector. `k` and
    `topk_relu` (clip the selected pre-activations at zero) are set for TopK only.
    """

    layer: int
    hook: HookPoint
    d_in: int
    d_sae: int
    activation: Activation = Activation.RELU
    k: int | None = None
    topk_relu: bool = True
    hook_out: HookPoint | None = None
    d_out: int | None = None
    has_skip: bool = False
    before_gain: bool = False
    raw_output: bool = False
    before_value_bias: bool = False

    @property
    def name(self) -> str:
        """`hook.layer`, as messages and metrics show it."""
        return site_name(self.hook, self.layer)

    @property
    def out_hook(self) -> HookPoint:
        """The point that the site writes."""
        return self.hook if self.hook_out is None else self.hook_out

    @property
    def out_width(self) -> int:
        """Width of the point that the site writes."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def is_transcoder(self) -> bool:
        """Whether the site writes another point than it reads."""
        return self.out_hook is not self.hook


@dataclass(frozen=True)
class SlotInfo(JsonRecord):
    """Room for one module at one site. A module holds it, or it is spare.

    `width` is the number of directions that fit: features of an SAE, 1 for a vector.
    `topk` and `threshold` say which activations the slot can compute. `hook_out` and
    `has_skip` are as in `SiteInfo`; they must equal the site's. Slots of a site run in
    the order in which the configuration lists them. A slot that was `added` to a
    running engine is removed with its module. The ranks of the tensor-parallel group
    share a `sharded` slot, which holds modules of exactly its width. A `screened` slot
    has a copy of its encoder in 10 bits.
    """

    layer: int
    hook: HookPoint
    kind: ModuleKind
    width: int
    topk: bool = True
    threshold: bool = True
    hook_out: HookPoint | None = None
    has_skip: bool = False
    added: bool = False
    sharded: bool = False
    screened: bool = False

    @property
    def out_hook(self) -> HookPoint:
        """The point that the slot's site writes."""
        return self.hook if self.hook_out is None else self.hook_out


@dataclass(frozen=True)
class InlineSite:
    """A site where requests may bring vectors of their own, of width `width`.

    A request brings at most `per_request` different ones, so the engine holds at most
    `directions` at once, for all of its `max_num_seqs` requests.
    """

    layer: int
    hook: HookPoint
    width: int
    per_request: int
    directions: int

    @property
    def name(self) -> str:
        """`hook.layer`, as messages show it."""
        return site_name(self.hook, self.layer)

    @property
    def nbytes(self) -> int:
        """Device bytes of the directions, in float32."""
        return 4 * self.width * self.directions


# In multiples of the median norm, what only attention sinks exceed.
LARGE_NORM = 10


@dataclass(frozen=True)
class ModuleInfo(JsonRecord):
    """A named SAE, or a named set of vectors, as the front end knows it.

    `digest` is a SHA-256 (hex) over the weights and every option that changes their
    effect; it goes into the prefix-cache keys. `skip_token_ids=None` stands for the
    model's bos, eos and pad; `norm_guard` is a multiple of `reference_norm`. `format`
    names the file layout for the loader. `slots` says, for each of `sites`, which of
    the engine's slots holds it, or None before placing. `sharding` and `screening` are
    what was asked, `sharded` and `screened` the sites (by index) whose slots are so.
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
    sharding: Sharding = "auto"
    sharded: tuple[int, ...] = ()
    screening: Screening = DEFAULT_SCREENING
    screened: tuple[int, ...] = ()

    def described(self) -> Json:
        """The module as descriptions of it show it: each site also has its name."""
        data = self.to_json()
        for site, shown in zip(self.sites, data["sites"], strict=True):
            shown["name"] = site.name
        return data

    def unplaced(self) -> ModuleInfo:
        """The module before it gets slots."""
        return replace(self, slots=None)

    def is_sharded(self, site: SiteInfo) -> bool:
        """Whether the ranks share one of the module's sites."""
        return self.sites.index(site) in self.sharded

    def slot_at(self, hook: HookPoint, layer: int) -> int | None:
        """The slot that holds the site at `(layer, hook)`, or None before placing."""
        at = self._places.get((hook, layer))
        return None if at is None or self.slots is None else self.slots[at]

    def site(self, hook: HookPoint, layer: int) -> SiteInfo | None:
        """The site at `(layer, hook)`, or None when the module does not cover it."""
        at = self._places.get((hook, layer))
        return None if at is None else self.sites[at]

    @functools.cached_property
    def _places(self) -> dict[tuple[HookPoint, int], int]:
        """Places in `sites`: a request may name a thousand of them."""
        return {(site.hook, site.layer): at for at, site in enumerate(self.sites)}


DEFAULT_MAX_CLAMPS = 64
DEFAULT_MAX_SPECS = 64
DEFAULT_MAX_PIECES = 8
# Values that a request reads of a token at a site: by default, and at most.
DEFAULT_MAX_READ_VALUES = 64
MAX_READ_VALUES = 512
DEFAULT_MAX_ANSWER_VALUES = 1 << 20  # about 25 MB of JSON


@dataclass(frozen=True)
class SteeringConfig(JsonRecord):
    """The resolved steering configuration of one engine.

    `modules` keeps registration order, which is the order of the delta tier.
    `max_clamps` bounds the clamps per site and request (K), `max_specs` the specs of a
    request. `slots` are the engine's slots, held and spare; a slot's id is its
    position, and None is one that is gone. A module in `draining` waits for its last
    request before it is removed or replaced; new requests that name it are refused.
    `version` counts the changes since start-up. `readout`: whether requests may read
    features, of layers from `first_read_layer` on (the last pipeline stage).
    `max_pieces` bounds the pieces of a request's schedule; tables have a row for each.
    `max_read_values` bounds the values that a request reads of a token at a site.
    `max_answer_values` bounds the values that one answer holds of what was read.
    `decoder_layer`: "known" for classes of the table alone, "auto" to try others.
    `presets` are in the form of `SteeringPreset`; `default_preset` names the preset of
    requests that choose none. `inline_sites` are those at which requests may bring
    vectors of their own. `ranks` is the tensor-parallel group, which may share SAEs.
    `exact_positions`: whether workers know a token's position in the answer. They do
    not while drafts of the step before may still be rejected.
    """

    modules: dict[str, ModuleInfo] = field(default_factory=dict)
    max_clamps: int = DEFAULT_MAX_CLAMPS
    slots: tuple[SlotInfo | None, ...] = ()
    draining: frozenset[str] = frozenset()
    version: int = 0
    max_specs: int = DEFAULT_MAX_SPECS
    readout: bool = True
    first_read_layer: int = 0
    max_pieces: int = DEFAULT_MAX_PIECES
    max_read_values: int = DEFAULT_MAX_READ_VALUES
    max_answer_values: int = DEFAULT_MAX_ANSWER_VALUES
    presets: Json = field(default_factory=dict)
    default_preset: str | None = None
    decoder_layer: DecoderLayers = "known"
    inline_sites: tuple[InlineSite, ...] = ()
    ranks: Ranks = Ranks()
    exact_positions: bool = True

    @functools.cached_property
    def parsed(self) -> KeptParses:
        """The requests parsed under this configuration, by what they asked."""
        return KeptParses()

    def for_workers(self) -> SteeringConfig:
        """The part that workers need. Requests reach them with presets applied."""
        return replace(self, draining=frozenset(), presets={}, default_preset=None)


def get_steering_config(additional_config: object) -> SteeringConfig | None:
    """The resolved configuration in a `VllmConfig.additional_config`, or None.

    The user's form is resolved to this one when the engine's configuration is created.
    Every later reader finds the form that `to_json` writes.
    """
    if not isinstance(additional_config, dict):
        return None
    steering = additional_config.get("steering")
    return None if steering is None else SteeringConfig.from_json(steering["resolved"])
