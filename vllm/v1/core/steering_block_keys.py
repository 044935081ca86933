# SPDX-License-Identifier: Apache-2.0
"""What steering adds to the prefix-cache key of a block."""

from __future__ import annotations

from collections.abc import Sequence


def steering_block_key(
    schedule: Sequence[tuple[int | None, str | None]], start: int, end: int
) -> tuple[str, str] | None:
    """Key of the tokens `[start, end)` of a request, or None where not steered.

    If one digest covers the whole block, it is the key. Otherwise the key lists the
    digests and where each begins in the block. So two requests share a block exactly if
    they edit every position of it alike.

    The key is a tagged pair of strings, because KV events carry it.

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
