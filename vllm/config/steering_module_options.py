# SPDX-License-Identifier: Apache-2.0
"""What a user may say of a module, at start-up and when it is loaded later."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from vllm.config.steering import FeatureUnits
from vllm.config.steering_json import Json
from vllm.config.steering_reader import MAX_FLOAT32, expects
from vllm.config.steering_screening import Screening
from vllm.config.steering_sharding import Sharding

MAX_LIST = 8192

TokenId = Annotated[int, expects("a token id", ge=0, lt=2**31)]
TokenIds = Annotated[
    list[TokenId],
    expects(f"null or a list of at most {MAX_LIST} token ids", max_length=MAX_LIST),
]
SiteName = Annotated[
    str,
    expects("a site such as post_block.20", pattern=r"\A[A-Za-z0-9_.]{1,64}\Z"),
]
SiteNames = Annotated[
    list[SiteName],
    expects(
        f'null or a list of at most {MAX_LIST} sites such as "post_block.20"',
        max_length=MAX_LIST,
    ),
]
Positive = Annotated[
    float,
    expects(
        "null or a positive number within the range of float32", gt=0, le=MAX_FLOAT32
    ),
]


class ModuleOptions(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The options of a module; docs/features/operating.md explains each."""

    feature_units: FeatureUnits | UnsetType = UNSET
    skip_token_ids: TokenIds | None | UnsetType = UNSET
    norm_guard: Positive | None | UnsetType = UNSET
    reference_norm: Positive | None | UnsetType = UNSET
    sites: SiteNames | None | UnsetType = UNSET
    sharding: Sharding | UnsetType = UNSET
    screening: Screening | UnsetType = UNSET

    @property
    def options(self) -> Json:
        """Those that are given."""
        given = msgspec.structs.asdict(self)
        return {key: given[key] for key in MODULE_OPTIONS if given[key] is not UNSET}


MODULE_OPTIONS = ModuleOptions.__struct_fields__
