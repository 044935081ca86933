# SPDX-License-Identifier: Apache-2.0
"""What a step has read, as it passes from the workers to the front ends.

No process on the way cuts out a request's rows. A step's rows stay one array a slot,
and the front end takes a request's rows when somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

# On a `ModelRunnerOutput`: its `StepReadout`, where some request reads.
READOUT_ATTRIBUTE = "sae_readout"


@dataclass(frozen=True)
class StepReadout:
    """What the sites of a step have read, on the host.

    Attributes:
        req_ids: the reading requests, in batch order; the arrays below go with them.
        first_rows: int64 `[n]`, the row of each one's first token.
        num_tokens: int64 `[n]`, its tokens in the step, drafts included.
        num_computed: int64 `[n]`, position of its first token, as the worker knows it:
            draft tokens that are rejected later may still count.
        rows: for each slot that was read, int32 `[rows, width]`, rows as
            `vllm.config.sae_features` has them.
    """

    req_ids: list[str]
    first_rows: np.ndarray
    num_tokens: np.ndarray
    num_computed: np.ndarray
    rows: Mapping[int, np.ndarray]


# For each of a request's reads, in canonical order: the engine's slot, and F.
ReadPlaces = tuple[Sequence[int], Sequence[int]]
# A `StepRows` in plain types: (req_ids, spans), (slot, width, rows) of each slot,
# new.
Wire = tuple[
    tuple[list[str], bytes] | None,
    list[tuple[int, int, bytes]],
    dict[str, ReadPlaces],
]


@dataclass(frozen=True, eq=False)
class StepLayout:
    """Whose rows a step has, and where.

    Attributes:
        req_ids: the requests; the columns of `spans` go with them.
        spans: int64 `[3, n]`: the row of each one's first token, the position of that
            token, and how many tokens count; drafts that were rejected do not.
    """

    req_ids: list[str]
    spans: np.ndarray

    def after(self, steps: int) -> StepLayout:
        """The layout so many steps later, if each step continues the one before."""
        firsts, starts, counts = self.spans
        spans = np.stack([firsts, starts + counts * steps, counts])
        return StepLayout(self.req_ids, spans)

    def part(self, places: Sequence[int]) -> tuple[StepLayout, np.ndarray]:
        """The layout of some requests, given by their places, and the rows it needs."""
        firsts, starts, counts = self.spans[:, places]
        ends = np.cumsum(counts)
        # Row r of the part is row r + (first - own first) of the whole.
        shift: np.ndarray = np.repeat(firsts - (ends - counts), counts)
        spans = np.stack([ends - counts, starts, counts])
        own = StepLayout([self.req_ids[at] for at in places], spans)
        return own, np.arange(len(shift)) + shift


@dataclass(frozen=True, eq=False)
class StepRows:
    """The part of a step that one front end gets.

    Attributes:
        layout: whose rows they are. None if the step continues the one before: the
            same requests, rows and slots, each request from where it ended.
        rows: as of `StepReadout`.
        new: where requests read that are new in this step.
    """

    layout: StepLayout | None
    rows: Mapping[int, np.ndarray]
    new: Mapping[str, ReadPlaces] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows."""
        return sum(rows.nbytes for rows in self.rows.values())

    def to_wire(self) -> Wire:
        """Plain types, for msgpack."""
        head = None
        if self.layout is not None:
            spans = self.layout.spans.astype(np.int64).tobytes()
            head = self.layout.req_ids, spans
        rows = [
            (slot, found.shape[1], found.tobytes()) for slot, found in self.rows.items()
        ]
        return head, rows, dict(self.new)

    @classmethod
    def from_wire(cls, wire: Wire) -> StepRows:
        """The inverse of `to_wire`."""
        head, rows, new = wire
        layout = None
        if head is not None:
            req_ids, spans = head
            spans_of = np.frombuffer(spans, dtype=np.int64).reshape(3, -1)
            layout = StepLayout(req_ids, spans_of)
        return cls(
            layout,
            {
                slot: np.frombuffer(data, dtype=np.int32).reshape(-1, width)
                for slot, width, data in rows
            },
            {req_id: (slots, d_sae) for req_id, (slots, d_sae) in new.items()},
        )
