# SPDX-License-Identifier: Apache-2.0
"""Builds clamp rows on the host and uploads each once per change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm.config.sae_steering_edits import SiteEdit
from vllm.config.sae_steering_specs import SAECondition
from vllm.config.sae_steering_vector_action import VectorAction
from vllm.config.steering import ModuleInfo
from vllm.config.steering_points import HookPoint
from vllm.model_executor.layers.steering import SiteKey
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_state import (
    CONDITION_SHIFT,
    ONLY_IF_ACTIVE,
    ClampFlag,
    ClampKind,
    SAEWeights,
)
from vllm.utils.torch_utils import async_tensor_h2d

CLAMP_CODES = {
    kind: int(ClampKind[kind.upper()]) for kind in ("absolute", "additive", "scale")
}

# Feature, code, value: one place of a row.
Term = tuple[int, int, float]


@dataclass
class BoundTable:
    """A clamp table, and what converts an entry of its module to a row of the table.

    Attributes:
        table: the device table.
        unit_scale: float32 `[F]` or None. `value / unit_scale[feature]` is in native
            units (for modules loaded with `feature_units="unit_decoder"`).
        written: rows whose device content may edit.
    """

    table: ClampTable
    unit_scale: np.ndarray | None = None
    written: set[int] = field(default_factory=set)

    def add_terms(self, terms: list[Term], edit: SiteEdit, offset: int = 0) -> None:
        """Append what a row needs for an edit whose features begin at `offset`.

        Conditions follow the clamps; clamps with an equal one share it.
        """
        for action in edit.actions:
            terms += _vector_terms(offset + action.feature_idx, action)
        places: dict[SAECondition, int] = {}
        first = len(terms) + len(edit.entries)
        for clamp in edit.entries:
            code, value = CLAMP_CODES[clamp.kind], clamp.value
            if clamp.only_if_active:
                code |= ONLY_IF_ACTIVE
            if clamp.when is not None:
                place = places.setdefault(clamp.when, first + len(places))
                code |= (place + 1) << CONDITION_SHIFT
            if self.unit_scale is not None and clamp.kind != "scale":
                value = self._native(clamp.feature_idx, value)
            terms.append((offset + clamp.feature_idx, code, value))
        for when in places:
            terms.append(self._condition_term(when, offset))

    def _condition_term(self, when: SAECondition, offset: int) -> Term:
        above = when.above is not None
        bound = (when.above if above else when.below) or 0.0
        flag = ClampFlag.IF_ABOVE if above else ClampFlag.IF_BELOW
        value = self._native(when.feature_idx, bound)
        return offset + when.feature_idx, ClampKind.CONDITION | flag, value

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

    def upload(self, rows: Mapping[int, Sequence[Term] | None]) -> None:
        """Copy rows to the device, in stream order, without blocking.

        Args:
            rows: the terms of each one; None for a row that does not edit.
        """
        upload_rows(self.table.packed, list(rows), self._pack(list(rows.values())))

    def _pack(self, rows: Sequence[Sequence[Term] | None]) -> np.ndarray:
        """int32 `[rows, 2 + 3K]`, as `ClampTable.packed`."""
        k = self.table.max_clamps
        data: np.ndarray = np.zeros((len(rows), 2 + 3 * k), dtype=np.int32)
        data[:, 0] = [terms is not None for terms in rows]
        counts: np.ndarray = np.array([len(terms or ()) for terms in rows])
        data[:, 1] = counts
        all_terms = [term for terms in rows for term in terms or ()]
        if all_terms:
            features, codes, values = zip(*all_terms, strict=True)
            at: np.ndarray = np.repeat(np.arange(len(rows)), counts)
            place = np.arange(len(all_terms)) - (np.cumsum(counts) - counts)[at]
            data[at, 2 + place] = features
            data[at, 2 + k + place] = codes
            data.view(np.float32)[at, 2 + 2 * k + place] = values
        return data


def upload_rows(packed: torch.Tensor, rows: Sequence[int], data: np.ndarray) -> None:
    """Copy `data [n, columns]` into n rows of a table, without blocking."""
    packed.index_copy_(
        0,
        async_tensor_h2d(np.array(rows, dtype=np.int64), device=packed.device),
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
    pending: dict[int, dict[int, list[Term] | None]] = {id(t): {} for t in tables}
    known: dict[tuple[str, int, HookPoint], tuple[BoundTable, int] | None] = {}
    for row, edits in changes.items():
        for edit in edits:
            place = (edit.module, edit.layer, edit.hook)
            if place not in known:
                known[place] = table_of(edit.module, SiteKey(edit.layer, edit.hook))
            bound = known[place]
            if bound is not None:
                table, offset = bound
                terms = pending[id(table)].setdefault(row, [])
                assert terms is not None
                table.add_terms(terms, edit, offset)
    for table in tables:
        rows = pending[id(table)]
        stale = (table.written & changes.keys()) - rows.keys()
        table.written -= stale
        table.written |= rows.keys()
        rows |= dict.fromkeys(stale)
        if rows:
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
