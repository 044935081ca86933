# SPDX-License-Identifier: Apache-2.0
"""Seam into `vllm.v1.core.kv_cache_utils`: steering is part of a block's key.

The edit a branch would make: `generate_block_hash_extra_keys` appends the key that
`steering_block_key` returns. The key is a two-element tagged tuple of strings, as
KV events want it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from vllm.config.sae_steering_admission import phase_digests
from vllm.plugins.steering.seam import BOUND, SeamError, Stock, resolve, wrap

if TYPE_CHECKING:
    from vllm.v1.request import Request

MODULE = "vllm.v1.core.kv_cache_utils"
TARGET = f"{MODULE}:generate_block_hash_extra_keys"


def steering_block_key(
    num_prompt_tokens: int,
    start: int,
    end: int,
    prefill_digest: str | None,
    decode_digest: str | None,
) -> tuple[str, str] | None:
    """Key of the tokens `[start, end)` of a request, or None where not steered.

    Prompt tokens are of the prefill phase, all others of the decode phase. A block
    of both whose digests differ is keyed by both and by where the phase changes, so
    it equals no uniformly steered block.
    """
    if end <= num_prompt_tokens:
        digest = prefill_digest
    elif start >= num_prompt_tokens or prefill_digest == decode_digest:
        digest = decode_digest
    else:
        change = num_prompt_tokens - start
        digest = f"{prefill_digest or 'none'}|{decode_digest or 'none'}@{change}"
    return None if digest is None else ("steering", digest)


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
        key = steering_block_key(
            request.num_prompt_tokens,
            start_token_idx,
            end_token_idx,
            *phase_digests(params.extra_args),
        )
        if key is None:
            return keys, next_mm_idx
        return (*(keys or ()), key), next_mm_idx

    return generate_block_hash_extra_keys
