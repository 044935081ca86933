# SPDX-License-Identifier: Apache-2.0
"""Builds clamp rows on the host and uploads each once per change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm.config.sae_steering_types import (
    SAEClampEntry,
    SAECondition,
    SiteEdit,
    VectorAction,
)
from vllm.config.steering import ModuleInfo
from vllm.model_executor.layers.steering import (
    ONLY_IF_ACTIVE,
    ClampKind,
    ClampTable,
    SAEWeights,
    SiteKey,
)
from vllm.model_executor.layers.steering_state import CONDITION_SHIFT, ClampFlag
from vllm.utils.torch_utils import async_tensor_h2d

CLAMP_CODES = {
    kind: int(ClampKind[kind.upper()]) for kind in ("absolute", "additive", "scale")
}

Clamp = SAEClampEntry | VectorAction
# Feature, code, value: one place of a row.
Term = tuple[int, int, float]


@dataclass
class BoundTable:
    """A clamp table, and what converts an entry of its module to a row of the table.

    Attributes:
        table: the device table.
        unit_scale: float32 `[F]` or None. `value / unit_scale[feature]` is in native
            units (for modules loaded with `feature_units="unit_decoder"`).
        offset: added to an entry's feature index (steering vectors are stacked).
        written: rows whose device content may edit.
    """

    table: ClampTable
    unit_scale: np.ndarray | None = None
    written: set[int] = field(default_factory=set)

    def encode_row(self, clamps: list[tuple[int, Clamp]]) -> np.ndarray:
        """int32 `[2 + 3K]`: the packed row that applies `clamps`.

        Conditions follow the clamps; clamps with an equal one share it.
        """
        places: dict[tuple[int, SAECondition], int] = {}
        terms: list[Term] = []
        for feature, clamp in clamps:
            if isinstance(clamp, VectorAction):
                terms += _vector_terms(feature, clamp)
                continue
            code = CLAMP_CODES[clamp.kind]
            code |= ONLY_IF_ACTIVE if clamp.only_if_active else 0
            if clamp.when is not None:
                key = (feature - clamp.feature_idx, clamp.when)
                place = places.setdefault(key, len(clamps) + len(places))
                code |= (place + 1) << CONDITION_SHIFT
            value = clamp.value
            if clamp.kind != "scale":
                value = self._native(feature, value)
            terms.append((feature, code, value))
        for offset, when in places:
            terms.append(self._condition_term(offset + when.feature_idx, when))
        return self._pack(terms)

    def _condition_term(self, feature: int, when: SAECondition) -> Term:
        above = when.above is not None
        bound = (when.above if above else when.below) or 0.0
        flag = ClampFlag.IF_ABOVE if above else ClampFlag.IF_BELOW
        return feature, ClampKind.CONDITION | flag, self._native(feature, bound)

    def _pack(self, terms: list[Term]) -> np.ndarray:
        k, n = self.table.max_clamps, len(terms)
        row: np.ndarray = np.zeros(2 + 3 * k, dtype=np.int32)
        row[0], row[1] = 1, n
        if terms:
            features, codes, values = zip(*terms, strict=True)
            row[2 : 2 + n] = features
            row[2 + k : 2 + k + n] = codes
            row[2 + 2 * k :].view(np.float32)[:n] = values
        return row

    def _native(self, feature: int, value: float) -> float:
        if self.unit_scale is None:
            return value
        with np.errstate(over="ignore", divide="ignore"):
            native = np.float32(value) / self.unit_scale[feature]
        limit = np.finfo(np.float32).max
        return float(np.clip(np.nan_to_num(native), -limit, limit))

    def reset(self) -> None:
        """Empty every row, in place; no running request may use the table."""
        self.table.packed.zero_()
        self.written.clear()

    def upload(self, rows: dict[int, np.ndarray]) -> None:
        """Copy the packed rows to the device, in stream order, without blocking."""
        packed = self.table.packed
        where = np.fromiter(rows, dtype=np.int64, count=len(rows))
        data = np.stack(list(rows.values()))
        packed.index_copy_(
            0,
            async_tensor_h2d(where, device=packed.device),
            async_tensor_h2d(data, device=packed.device),
        )


def _vector_terms(feature: int, action: VectorAction) -> list[Term]:
    """The clamps that a vector's action stands for, on its direction."""
    along = ClampFlag.PROJECTION | (ClampFlag.RELATIVE if action.relative else 0)
    if action.sums:
        return [(feature, ClampKind.ADDITIVE, action.value)]
    if action.kind == "bound":
        low, high = action.bounds
        return [
            (feature, ClampKind.ABSOLUTE | along | ClampFlag.IF_BELOW, low),
            (feature, ClampKind.ABSOLUTE | along | ClampFlag.IF_ABOVE, high),
        ]
    kind = {
        "add": ClampKind.ADDITIVE,
        "set": ClampKind.ABSOLUTE,
        "scale": ClampKind.SCALE,
    }[action.kind]
    return [(feature, kind | along, action.value)]


# (module, site) -> its bound table and the direction index of its feature 0.
TableOf = Callable[[str, SiteKey], tuple[BoundTable, int] | None]


def write_rows(
    changes: Mapping[int, Sequence[SiteEdit]],
    tables: list[BoundTable],
    table_of: TableOf,
) -> None:
    """Bring every table of a tier up to date with the changed rows.

    If a row no longer edits a table, that table gets an empty row. Edits at sites that
    this rank does not own are skipped.
    """
    pending: dict[int, dict[int, np.ndarray]] = {}
    for row, edits in changes.items():
        merged: dict[int, tuple[BoundTable, list[tuple[int, Clamp]]]] = {}
        for edit in edits:
            bound = table_of(edit.module, SiteKey(edit.layer, edit.hook))
            if bound is None:
                continue
            table, offset = bound
            clamps = merged.setdefault(id(table), (table, []))[1]
            clamps += [(c.feature_idx + offset, c) for c in edit.clamps]
        for ident, (table, clamps) in merged.items():
            pending.setdefault(ident, {})[row] = table.encode_row(clamps)
        for table in tables:
            if id(table) not in merged and row in table.written:
                empty = np.zeros(table.table.packed.shape[1], dtype=np.int32)
                pending.setdefault(id(table), {})[row] = empty
                table.written.discard(row)
            elif id(table) in merged:
                table.written.add(row)
    for table in tables:
        if rows := pending.get(id(table)):
            table.upload(rows)


def decoder_norms(W_dec: torch.Tensor) -> np.ndarray:
    """float32 `[F]` L2 norms of the decoder rows, in slices."""
    parts = [part.float().norm(dim=1).cpu() for part in W_dec.split(8192)]
    return torch.cat(parts).numpy()


def unit_scale(module: ModuleInfo, weights: SAEWeights) -> np.ndarray | None:
    """What a clamp's value is divided by: see `BoundTable.unit_scale`."""
    if module.feature_units != "unit_decoder":
        return None
    if weights.row_norms is not None:
        return weights.row_norms.cpu().numpy()
    return decoder_norms(weights.W_dec)
