# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.core.kv_cache_utils`: steering is part of a block's key.

The edit a branch would make: `generate_block_hash_extra_keys` appends the key that
`steering_block_key` returns. The key is a two-element tagged tuple of strings, as
KV events want it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.config.sae_steering_admission import admitted_schedule
from vllm.plugins.steering.seam import BOUND, SeamError, Stock, resolve, wrap

if TYPE_CHECKING:
    from vllm.v1.request import Request

MODULE = "vllm.v1.core.kv_cache_utils"
TARGET = f"{MODULE}:generate_block_hash_extra_keys"


def steering_block_key(
    schedule: Sequence[tuple[int | None, str | None]], start: int, end: int
) -> tuple[str, str] | None:
    """Key of the tokens `[start, end)` of a request, or None where not steered.

    A block that is edited alike throughout is keyed by that digest. Another one is
    keyed by its digests and where each begins in the block, so blocks are shared
    exactly where every position is edited alike.

    Args:
        schedule: where each piece of the request stops (None: never), and its digest.
        start, end: positions of the block.
    """
    parts: list[tuple[int, str | None]] = []
    first = 0
    for stop, digest in schedule:
        last = end if stop is None else min(stop, end)
        begin = max(first, start)
        if begin < last and (not parts or parts[-1][1] != digest):
            parts.append((begin - start, digest))
        first = last
    if len(parts) == 1:
        digest = parts[0][1]
        return None if digest is None else ("steering", digest)
    key = "|".join(f"{digest or 'none'}@{offset}" for offset, digest in parts)
    return ("steering", key) if parts else None


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
