# SPDX-License-Identifier: Apache-2.0
"""What a request has read: the record that clients get, and the rows it is made from.

A worker writes one row of int32 words for each token and site:

    [num_active, num_listed, E explicit values, K features, K values]

`num_active` is the number of active features (L0), or -1 where the token was not read;
`num_listed` says how many of the K places of the top-k list are filled; values are the
bits of a float32. E and K are `len(SiteRead.explicit)` and `SiteRead.top_k`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm.config.sae_readout_specs import SiteRead
from vllm.config.steering_json import Json

if TYPE_CHECKING:
    import scipy.sparse

# What outputs and answers call that which was read of generated tokens and of a prompt.
FEATURES = "sae_features"
PROMPT_FEATURES = "prompt_sae_features"
NOT_READ = -1
# Rows that become lists at once. Other threads get their turn in between.
ROWS_AT_ONCE = 512


@dataclass(frozen=True, eq=False, repr=False)
class SAEFeatures:
    """Feature activations of some tokens at one site, sparse.

    Attributes:
        positions: int32 `[n]`, places of the tokens in the whole sequence, ascending.
        features: int32 `[n, k]`, feature indices; largest value first for `top_k`,
            ascending for given features. Unused places hold -1.
        values: float32 `[n, k]`, activations in the module's units; 0 where unused.
        counts: int32 `[n]`, used places of each row.
        num_active: int32 `[n]`, active features of each token (L0).
        d_sae: F, the number of features of the SAE.
    """

    positions: np.ndarray
    features: np.ndarray
    values: np.ndarray
    counts: np.ndarray
    num_active: np.ndarray
    d_sae: int

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        width = self.features.shape[1]
        return f"SAEFeatures({len(self)} tokens, {width} of {self.d_sae} features)"

    def head(self, n: int) -> SAEFeatures:
        """The first `n` tokens."""
        return SAEFeatures(
            self.positions[:n],
            self.features[:n],
            self.values[:n],
            self.counts[:n],
            self.num_active[:n],
            self.d_sae,
        )

    def listed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions int32, features int32 and values float32 of all used places.

        Each has the shape `[m]`, token after token; `m` is the sum of `counts`.
        """
        rows, places = self._used()
        features, values = self.features[rows, places], self.values[rows, places]
        return self.positions[rows], features, values

    def to_dense(self) -> np.ndarray:
        """float32 `[n, d_sae]`: the returned activations, zero elsewhere."""
        dense: np.ndarray = np.zeros((len(self), self.d_sae), dtype=np.float32)
        rows, places = self._used()
        dense[rows, self.features[rows, places]] = self.values[rows, places]
        return dense

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        """`[n, d_sae]` in compressed sparse rows; needs SciPy."""
        from scipy.sparse import csr_matrix

        rows, places = self._used()
        values = self.values[rows, places]
        where = (rows, self.features[rows, places])
        return csr_matrix((values, where), shape=(len(self), self.d_sae))

    def to_json(self) -> Json:
        """The JSON of HTTP answers; see docs/features/reading.md."""
        return {
            "positions": self.positions.tolist(),
            "features": _ragged(self.features, self.counts),
            "values": _ragged(self.values, self.counts),
            "num_active": self.num_active.tolist(),
        }

    def _used(self) -> tuple[np.ndarray, np.ndarray]:
        place = np.arange(self.features.shape[1])
        return np.nonzero(place[None, :] < self.counts[:, None])


def _ragged(table: np.ndarray, counts: np.ndarray) -> list[list[float]]:
    found: list[list[float]] = []
    for at in range(0, len(table), ROWS_AT_ONCE):
        rows, used = table[at : at + ROWS_AT_ONCE], counts[at : at + ROWS_AT_ONCE]
        pairs = zip(rows.tolist(), used.tolist(), strict=True)
        found += [row[:n] for row, n in pairs]
    return found


# {module: {site: record}}; a site is spelled `hook.layer`.
ReadFeatures = dict[str, dict[str, SAEFeatures]]


def features_json(features: ReadFeatures) -> Json:
    """JSON types of all records."""
    return {
        module: {site: record.to_json() for site, record in sites.items()}
        for module, sites in features.items()
    }


def to_record(
    read: SiteRead, positions: np.ndarray, rows: np.ndarray, d_sae: int
) -> SAEFeatures:
    """Make the record of rows that were read.

    Args:
        read: what the rows are of.
        positions: `[n]`, ascending.
        rows: int32 `[n, >= read.width]`.
    """
    n, explicit, k = len(positions), len(read.explicit), read.top_k
    values = rows[:, 2:].view(np.float32)
    if k:
        first = 2 + explicit
        counts = rows[:, 1].copy()
        features = rows[:, first : first + k].copy()
        found = values[:, explicit + k : explicit + 2 * k].copy()
        if counts.min(initial=k) < k:
            unused = np.arange(k) >= counts[:, None]
            features[unused], found[unused] = -1, 0.0
    else:
        columns = np.searchsorted(read.explicit, read.features)
        features = np.tile(np.array(read.features, dtype=np.int32), (n, 1))
        found = values[:, columns]
        counts = np.full(n, len(read.features), dtype=np.int32)
    if not np.isfinite(found).all():
        found = finite(found)
    positions = positions.astype(np.int32, copy=False)
    return SAEFeatures(positions, features, found, counts, rows[:, 0].copy(), d_sae)


def finite(values: np.ndarray) -> np.ndarray:
    """float32 values that JSON can carry: NaN as 0, infinity as the largest number."""
    limit = np.finfo(np.float32).max
    return np.clip(np.where(np.isnan(values), 0, values), -limit, limit)


def first_firing(
    read: SiteRead, rows: np.ndarray, allowed: np.ndarray
) -> tuple[int, int] | None:
    """The first row that meets a stop condition, and the feature that meets it.

    Args:
        rows: int32 `[n, >= read.width]`.
        allowed: bool `[n]`, rows that may end the request.
    """
    may = allowed & (rows[:, 0] != NOT_READ)
    if not read.stops or not may.any():
        return None
    values = rows[:, 2:].view(np.float32)
    columns = np.searchsorted(read.explicit, [feature for feature, _ in read.stops])
    bounds = np.array([bound for _, bound in read.stops], dtype=np.float32)
    fires = (values[:, columns] > bounds) & may[:, None]
    at = np.flatnonzero(fires.any(axis=1))
    if not len(at):
        return None
    row = int(at[0])
    return row, read.stops[int(np.argmax(fires[row]))][0]


def join(records: Sequence[SAEFeatures]) -> SAEFeatures:
    """Join records of one site and one request, one after the other."""
    if len(records) == 1:
        return records[0]
    return SAEFeatures(
        np.concatenate([record.positions for record in records]),
        np.concatenate([record.features for record in records]),
        np.concatenate([record.values for record in records]),
        np.concatenate([record.counts for record in records]),
        np.concatenate([record.num_active for record in records]),
        records[0].d_sae,
    )


def merge(first: ReadFeatures | None, then: ReadFeatures | None) -> ReadFeatures | None:
    """Join the records of two outputs of one request, one after the other."""
    if not first or not then:
        return first or then
    return merge_all((first, then))


def merge_all(parts: Iterable[ReadFeatures]) -> ReadFeatures:
    """Join the records of outputs of one request, one after the other, at once."""
    found: dict[str, dict[str, list[SAEFeatures]]] = {}
    for part in parts:
        for module, sites in part.items():
            own = found.setdefault(module, {})
            for site, record in sites.items():
                own.setdefault(site, []).append(record)
    return {
        module: {site: join(records) for site, records in sites.items()}
        for module, sites in found.items()
    }
