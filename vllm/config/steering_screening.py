# SPDX-License-Identifier: Apache-2.0
"""Which SAEs have a copy of `W_enc` in few bits, by which decoding steps are screened.

A step of few tokens then reads the copy, and `W_enc` only where a feature may fire
(docs/design/screening.md). The results do not change.
"""

from __future__ import annotations

from typing import Literal

from vllm.utils.math_utils import round_up

Screening = Literal["auto", "off"]

DEFAULT_SCREENING: Screening = "off"
# `auto` screens an SAE whose encoder has at least so many bytes. Below, what a step has
# to wait for takes longer than the bytes that it saves. More than `FEW_TOKENS` tokens
# have so many candidates that only wider SAEs gain.
AUTO_SCREENED_BYTES = 384 << 20
FEW_TOKENS, MOST_TOKENS = 32, 64
MANY_TOKENS_BYTES = 1 << 30
# The copy's columns come in whole groups: of bytes, and of two more bits each.
SCREEN_COLUMNS = 128
FINE_COLUMNS = 256
MAX_SCREENED_WIDTH = 8192
# Facts of a feature: its scale and three bounds.
FACTS_BYTES = 16


def screens(asked: Screening, features: int, d_in: int, item_bytes: int) -> bool:
    """Whether an encoder of `features` rows on this rank gets a copy, on a device that
    can screen."""
    if asked == "off" or item_bytes != 2 or d_in > MAX_SCREENED_WIDTH:
        return False
    return features * d_in * item_bytes >= AUTO_SCREENED_BYTES


def most_tokens(features: int, d_in: int) -> int:
    """The most steered tokens of a step that is screened."""
    wide = features * d_in * 2 >= MANY_TOKENS_BYTES
    return MOST_TOKENS if wide else FEW_TOKENS


def padded(d_in: int) -> int:
    """Columns of the 8-bit copy."""
    return round_up(d_in, SCREEN_COLUMNS)


def fine_bytes(d_in: int) -> int:
    """Bytes of a feature's two more bits."""
    return round_up(d_in, FINE_COLUMNS) // 4


def screen_bytes(features: int, d_in: int) -> int:
    """Bytes of the copy and its facts."""
    feature = padded(d_in) + fine_bytes(d_in) + FACTS_BYTES
    return features * feature + FACTS_BYTES
