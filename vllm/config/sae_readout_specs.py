# SPDX-License-Identifier: Apache-2.0
"""What one request asks to read: which features, at which sites, on which tokens.

`SAEReadoutSpec` is what a client writes. `SiteRead` is what the parser makes of it, one
for each site; it travels to the workers, the scheduler and the front end.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from vllm.config.steering import MAX_READ_VALUES
from vllm.config.steering_checks import refusal
from vllm.config.steering_json import Json
from vllm.config.steering_points import HookPoint, named_sites
from vllm.config.steering_reader import Number, expects

# Most sites of which a request may read as much as it may read of one.
SITES_IN_FULL = 16
MAX_STOPS = 8
# `top_k` of a call that states neither `top_k` nor `features`.
DEFAULT_TOP_K = 16

ReadPhase = Literal["both", "prefill", "decode"]

_Name = Annotated[str, expects("a name of at most 256 characters", max_length=256)]
_Index = Annotated[int, expects("a feature index", ge=0)]
_Layer = Annotated[int, expects("a layer index", ge=0)]
ReadSites = Annotated[
    dict[
        Annotated[str, expects('a hook such as "post_block"')],
        Annotated[list[_Layer], expects("a list of layer indices")],
    ]
    | Annotated[
        list[Annotated[str, expects('a site such as "post_block.20"')]],
        expects('a list of sites such as "post_block.20"'),
    ],
    expects(
        'null, a list of sites such as "post_block.20", or {hook: [layer, ...]}',
        description="Sites such as post_block.20, or {hook: [layer, ...]}; null reads "
        "every site of the module.",
    ),
]
TopK = Annotated[
    int,
    expects(f"null or an integer in 1..{MAX_READ_VALUES}", ge=1, le=MAX_READ_VALUES),
]
Features = Annotated[
    list[_Index],
    expects(
        f"null or a list of 1 to {MAX_READ_VALUES} feature indices",
        min_length=1,
        max_length=MAX_READ_VALUES,
    ),
]


class SAEStopEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """End the request once `feature_idx` is above `above` on a generated token.

    `above` is in the module's `feature_units`.
    """

    feature_idx: _Index
    above: Number


_Stops = Annotated[
    list[SAEStopEntry],
    expects(
        f"null or a list of 1 to {MAX_STOPS} objects with feature_idx and above",
        min_length=1,
        max_length=MAX_STOPS,
    ),
]


class SAEReadoutSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Return feature activations of the tokens that the request runs.

    Exactly one of `top_k` (the largest activations) and `features` (the given ones) is
    set, to at most `SteeringConfig.max_read_values` of them. Values are in the module's
    `feature_units`. `sites` is a list of names such as `post_block.20`, or
    `{hook: [layer, ...]}`; None reads every site of the module. `stop_if` ends the
    request.
    """

    module_name: _Name
    sites: ReadSites | None = None
    top_k: TopK | None = None
    features: Features | None = None
    phase: ReadPhase = "both"
    stop_if: _Stops | None = None

    def __post_init__(self) -> None:
        name_sites(self, "sites", self.sites)


def name_sites(spec: msgspec.Struct, field: str, given: object) -> None:
    """Write each `(hook, layer)` of a spec made in Python as the site's name."""
    named = named_sites(given)
    if named is not given:
        msgspec.structs.force_setattr(spec, field, named)


@dataclass(frozen=True)
class SiteRead:
    """What a request reads at one site of one module.

    Attributes:
        top_k: how many of the largest activations; 0 for the given features only.
        features: indices whose activations are returned, ascending; empty with `top_k`.
        stops: `(feature, bound)` pairs that end the request, ascending.
    """

    module: str
    hook: HookPoint
    layer: int
    top_k: int
    features: tuple[int, ...]
    stops: tuple[tuple[int, float], ...]
    phase: ReadPhase

    @functools.cached_property
    def explicit(self) -> tuple[int, ...]:
        """The features that a worker looks up: asked for, or watched by `stops`."""
        return tuple(sorted({*self.features, *(f for f, _ in self.stops)}))

    @property
    def num_values(self) -> int:
        """Values that one token takes."""
        return len(self.explicit) + self.top_k

    @property
    def width(self) -> int:
        """int32 words of one token's row; see `vllm.config.sae_features`."""
        return 2 + len(self.explicit) + 2 * self.top_k

    @property
    def order(self) -> tuple[str, int, str]:
        """Sorts the reads of a request; each (module, site) occurs once."""
        return self.module, self.layer, self.hook.value

    @property
    def site(self) -> str:
        """`hook.layer`."""
        return f"{self.hook.value}.{self.layer}"

    def reads(self, phase: str) -> bool:
        """Whether tokens of a phase ("prefill" or "decode") are read."""
        return self.phase in ("both", phase)

    @property
    def row_key(self) -> bytes:
        """Identifies what a worker reads. Requests with equal keys can share a row."""
        name = self.module.encode("utf-8", "surrogatepass")
        where = struct.pack("<IIQ", len(name), self.top_k, self.layer)
        features = struct.pack(f"<{len(self.explicit)}Q", *self.explicit)
        return where + name + self.hook.value.encode() + b"\0" + features


def check_prompt_values(
    path: str, lengths: Iterable[int], reads: Iterable[SiteRead], most: int
) -> None:
    """Limit what one HTTP answer holds of its prompts.

    Args:
        path: the field with the prompts.
        lengths: tokens of each prompt.
        reads: what is read of each of them.
        most: `SteeringConfig.max_answer_values`.

    Raises:
        VLLMValidationError: there are more values.
    """
    of_a_token = sum(read.num_values for read in reads if read.reads("prefill"))
    values = sum(lengths) * of_a_token
    if values > most:
        raise refusal(
            path,
            f"found {values} values over all tokens and sites, expected at most "
            f"{most}: send less text, or read fewer sites or features",
        )


def check_generated_values(
    path: str, tokens: int, reads: Iterable[SiteRead], most: int
) -> None:
    """Limit what one answer may come to hold of its generated tokens until it ends.

    Args:
        path: the field with the tokens that one choice may have.
        tokens: that all choices of all prompts may have.
        reads: what is read of each of them.
        most: `SteeringConfig.max_answer_values`.

    Raises:
        VLLMValidationError: there may be more values.
    """
    of_a_token = sum(read.num_values for read in reads if read.reads("decode"))
    values = tokens * of_a_token
    if values > most:
        raise refusal(
            path,
            f"found up to {tokens} generated tokens over all choices, so up to "
            f"{values} values over all sites, expected at most {most // of_a_token} "
            f"tokens, which is {most} values: stream the answer, ask for fewer "
            "tokens, or read fewer sites or features",
        )


def reads_to_json(reads: tuple[SiteRead, ...]) -> list[Json]:
    """Specs in JSON types that parse to equal reads; alike sites share a spec."""
    specs: dict[tuple[object, ...], Json] = {}
    for read in reads:
        key = (read.module, read.top_k, read.features, read.stops, read.phase)
        if key not in specs:
            stops = [{"feature_idx": f, "above": bound} for f, bound in read.stops]
            specs[key] = {
                "module_name": read.module,
                "sites": {},
                "top_k": read.top_k or None,
                "features": list(read.features) or None,
                "phase": read.phase,
                "stop_if": stops or None,
            }
        specs[key]["sites"].setdefault(read.hook.value, []).append(read.layer)
    return list(specs.values())


def read_key(reads: tuple[SiteRead, ...], phase: str) -> str | None:
    """Key (hex) of the row that reads a phase's tokens; None if none is read."""
    keys = [read.row_key for read in reads if read.reads(phase)]
    if not keys:
        return None
    digest = hashlib.sha256(b"vllm.steering.read")
    for key in sorted(keys):
        digest.update(struct.pack("<Q", len(key)) + key)
    return digest.hexdigest()
