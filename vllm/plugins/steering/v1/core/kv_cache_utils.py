# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.core.kv_cache_utils`: steering is part of a block's key.

The edit a branch would make: `generate_block_hash_extra_keys` appends the key that
`steering_block_key` returns.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from vllm.config.sae_steering_admission import admitted_schedule
from vllm.plugins.steering.seam import BOUND, SeamError, Stock, resolve, wrap
from vllm.v1.core.steering_block_keys import steering_block_key

if TYPE_CHECKING:
    from vllm.v1.request import Request

MODULE = "vllm.v1.core.kv_cache_utils"
TARGET = f"{MODULE}:generate_block_hash_extra_keys"


def install() -> None:
    """Replace the function here and in every module that imported it by name."""
    wrap(
        TARGET,
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
        _make_extra_keys,
    )
    stock = BOUND[TARGET]
    _, name, replacement = resolve(TARGET)
    for holder in holders(stock):
        setattr(sys.modules[holder], name, replacement)
    left = holders(stock)
    if left:
        raise SeamError(
            f"steering seam {TARGET}: still stock under another name: {left}"
        )


def holders(function: Stock) -> list[str]:
    """Names of the loaded vLLM modules that hold `function` as a global."""
    return [
        name
        for name, module in list(sys.modules.items())
        if name.startswith("vllm.")
        and any(value is function for value in list(vars(module).values()))
    ]


def _make_extra_keys(stock: Stock) -> Stock:
    def generate_block_hash_extra_keys(
        request: Request, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[object, ...] | None, int]:
        keys, next_mm_idx = stock(request, start_token_idx, end_token_idx, start_mm_idx)
        params = request.sampling_params
        if params is None or not params.extra_args:
            return keys, next_mm_idx
        schedule = admitted_schedule(params.extra_args, request.num_prompt_tokens)
        key = steering_block_key(schedule, start_token_idx, end_token_idx)
        if key is None:
            return keys, next_mm_idx
        return (*(keys or ()), key), next_mm_idx

    return generate_block_hash_extra_keys
