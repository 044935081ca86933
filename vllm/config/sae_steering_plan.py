# SPDX-License-Identifier: Apache-2.0
"""What the engine tells the workers of an admitted request.

A worker does not read the specs again. The engine has checked them, and sends what it
made of them: the edits of each distinct table row, and which rows act where. It travels
in `extra_args` under `PLAN_KEY`, which no client may set.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import msgspec

from vllm.config.sae_readout_specs import SiteRead
from vllm.config.sae_steering_edits import SiteEdit
from vllm.config.sae_steering_request import Acting, SteeringRequest
from vllm.config.sae_steering_spans import TOKEN_PHASES
from vllm.config.steering import Tier
from vllm.config.steering_points import HookPoint

# After every position.
NO_STOP = 1 << 40


class PlannedRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One content of a table row; `key` is that of `Acting.row_keys`."""

    tier: Tier
    key: str
    edits: tuple[SiteEdit, ...]


class PlannedVector(msgspec.Struct, frozen=True, array_like=True):
    """A vector of the request's own: little-endian float32 numbers, for one site."""

    module: str
    hook: HookPoint
    layer: int
    data: bytes


class SteeringPlan(msgspec.Struct, frozen=True, array_like=True):
    """What a worker does for one request.

    Attributes:
        modules: the registered modules that it uses.
        rows: the distinct rows that it needs.
        stops: int64 `[pieces]`, where each piece of its schedule stops, counted from
            the end of the prompt; the last one at `NO_STOP`.
        places: int32 `[pieces, tiers]`, 0 where a tier does nothing, else 1 + the place
            of its row in `rows`.
        reads: what is read.
        vectors: those that the request brings.
    """

    modules: tuple[str, ...]
    rows: tuple[PlannedRow, ...]
    stops: bytes
    places: bytes
    reads: tuple[SiteRead, ...] = ()
    vectors: tuple[PlannedVector, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(SteeringPlan)


def encode_plan(request: SteeringRequest, num_prompt_tokens: int) -> bytes:
    """The plan of a request with this prompt."""
    pieces: Iterable[tuple[int, Acting]]
    if request.has_spans:
        pieces = [
            (
                NO_STOP if piece.stop is None else piece.stop - num_prompt_tokens,
                piece.acting,
            )
            for piece in request.schedule(num_prompt_tokens)
        ]
    else:
        phases = [request.acting(phase) for phase in TOKEN_PHASES]
        pieces = zip((0, NO_STOP), phases, strict=True)
    rows: dict[tuple[Tier, str], PlannedRow] = {}
    at: dict[tuple[Tier, str], int] = {}
    stops, places = [], []
    for stop, acting in pieces:
        stops.append(stop)
        for tier, key in zip(Tier, acting.row_keys, strict=True):
            if key is None:
                places.append(0)
                continue
            places.append(at.setdefault((tier, key), len(at) + 1))
            if len(rows) < len(at):
                rows[tier, key] = PlannedRow(tier, key, acting.edits[tier])
    vectors = []
    for name, data in request.inline.items():
        (site,) = request.modules[name].sites
        vectors.append(PlannedVector(name, site.hook, site.layer, data))
    plan = SteeringPlan(
        tuple(name for name in request.modules if name not in request.inline),
        tuple(rows.values()),
        struct.pack(f"={len(stops)}q", *stops),
        struct.pack(f"={len(places)}i", *places),
        request.reads,
        tuple(vectors),
    )
    return _encoder.encode(plan)


def decode_plan(data: bytes) -> SteeringPlan:
    """The inverse of `encode_plan`."""
    return _decoder.decode(data)
