# SPDX-License-Identifier: Apache-2.0
"""The fold of `fold.py` in NumPy, for commands that would wait for PyTorch's import.

Every step is one that IEEE 754 defines, a sum in a fixed order, or an exponential that
both round from float64. So the result has the same bits as that of `fold.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from vllm.model_executor.layers.steering_chunks import chunk_rows, row_sums
from vllm.model_executor.model_loader.sae_formats.fold import (
    matrix_shape,
    not_finite,
    read_floats,
)
from vllm.model_executor.model_loader.sae_formats.layout import Matrix, SAELayout
from vllm.model_executor.model_loader.sae_formats.tensor_files import read_array
from vllm.model_executor.model_loader.sae_formats.tensor_types import (
    FloatType,
    HostTensor,
    TensorFile,
    as_float32,
)


@dataclass
class HostSAE:
    """A canonical SAE: `W_enc [F, d_in]`, `W_dec [F, d_out]` and `W_skip [d_out, d_in]`
    in `dtype`, the rest float32.

    With `keep=False`, the matrices are checked and not kept.
    """

    dtype: FloatType
    keep: bool = True
    b_enc: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    b_dec: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    threshold: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    chunks: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, name: str, value: np.ndarray, what: str, first: int) -> HostTensor:
        """Round the next rows of a matrix, which begin at `first`, and keep them."""
        stored = HostTensor.rounded(value, self.dtype)
        finite = np.isfinite(
            stored.floats() if self.dtype is FloatType.BF16 else stored.data
        ).all(axis=1)
        if not finite.all():
            raise not_finite(what, self.dtype, first + int(finite.argmin()))
        if self.keep:
            self.chunks.setdefault(name, []).append(stored.data)
        return stored

    def tensors(self) -> dict[str, HostTensor]:
        """By name; without `W_skip` where there is none."""
        found = {
            name: HostTensor(np.concatenate(parts), self.dtype)
            for name, parts in self.chunks.items()
        }
        for name, value in (
            ("b_enc", self.b_enc),
            ("b_dec", self.b_dec),
            ("threshold", self.threshold),
        ):
            found[name] = HostTensor(value, FloatType.F32)
        return found


def fold_host(
    layout: SAELayout, tensors: TensorFile, dtype: FloatType, *, keep: bool = True
) -> HostSAE:
    """The canonical SAE of a checked layout, its matrices rounded to `dtype`.

    Raises:
        LayoutError: a NaN or infinity, also one made by rounding to `dtype`.
    """
    with np.errstate(all="ignore"):  # what is not finite is refused
        return _fold(layout, tensors, HostSAE(dtype, keep))


def _fold(layout: SAELayout, tensors: TensorFile, into: HostSAE) -> HostSAE:
    F = layout.site.d_sae

    def small(name: str | None, size: int) -> np.ndarray:
        if name is None:
            return np.zeros(size, np.float32)
        return np.broadcast_to(read_floats(tensors, name), (size,)).copy()

    b_dec = small(layout.b_dec, layout.site.out_width)
    b_dec *= np.float32(layout.b_dec_scale)
    _need_finite(tensors, str(layout.b_dec), b_dec)
    norms: np.ndarray = np.ones(F, np.float32)
    _fold_decoder(layout, tensors, into, norms)

    row_scale = norms * np.float32(layout.W_enc_scale)
    if layout.gate is not None:
        gain = _exp(small(layout.gate.r_mag, F))
        row_scale *= gain
        b_enc = small(layout.gate.b_mag, F)
        threshold = b_enc - gain * small(layout.gate.b_gate, F)
        threshold = np.maximum(threshold, np.float32(0))
    else:
        b_enc = small(layout.b_enc, F)
        if isinstance(layout.threshold, str):
            threshold = small(layout.threshold, F)
        else:
            threshold = np.full(F, layout.threshold or 0.0, np.float32)
        if layout.threshold_is_log:
            threshold = _exp(threshold)
        threshold *= np.float32(layout.threshold_scale)
    b_enc *= norms * np.float32(layout.b_enc_scale)
    _fold_encoder(layout, tensors, into, (row_scale, b_enc, b_dec))
    if layout.W_skip is not None:
        what = f"{tensors.label}: {layout.W_skip.name}"
        for rows, W in _chunks(tensors, layout.W_skip):
            into.add("W_skip", W, what, rows.start)
    _need_finite(tensors, "folded b_enc", b_enc)
    _need_finite(tensors, "folded threshold", threshold)
    into.b_enc, into.b_dec, into.threshold = b_enc, b_dec, threshold
    return into


def _fold_decoder(
    layout: SAELayout, tensors: TensorFile, into: HostSAE, norms: np.ndarray
) -> None:
    """Fold `W_dec`, and write what its rows were divided by into `norms`."""
    what = f"{tensors.label}: {layout.W_dec.name}"
    for rows, W in _chunks(tensors, layout.W_dec):
        W *= np.float32(layout.W_dec_scale)
        if layout.unit_decoder_rows:
            norms[rows] = np.sqrt(row_sums(W * W))
            # A dead feature may have a zero row; it then contributes nothing.
            W /= np.maximum(norms[rows, None], np.float32(1e-8))
        into.add("W_dec", W, what, rows.start)


def _fold_encoder(
    layout: SAELayout,
    tensors: TensorFile,
    into: HostSAE,
    vectors: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """Fold `W_enc` with `vectors` (row scale, b_enc, b_dec), and `b_dec` into b_enc."""
    row_scale, b_enc, b_dec = vectors
    what = f"{tensors.label}: {layout.W_enc.name}"
    for rows, W in _chunks(tensors, layout.W_enc):
        W *= row_scale[rows, None]
        if layout.centre_input:
            # Not a division, which a GPU does by this product.
            mean = row_sums(W.copy()) * np.float32(1 / W.shape[1])
            W -= mean[:, None]
            if layout.subtract_b_dec:
                b_enc[rows] -= mean * row_sums(b_dec[None].copy())
        stored = into.add("W_enc", W, what, rows.start)
        if layout.subtract_b_dec:
            W = stored.floats()
            W *= b_dec
            b_enc[rows] -= row_sums(W)


def _chunks(tensors: TensorFile, matrix: Matrix) -> Iterator[tuple[slice, np.ndarray]]:
    """Ranges of rows of a matrix, as new float32 `[n, D]`."""
    n, width = matrix_shape(tensors, matrix)
    kind = tensors.infos[matrix.name].dtype
    assert kind is not None
    step = chunk_rows(width)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        axis = int(matrix.features_last)
        part = read_array(tensors, matrix.name, rows.start, rows.stop, axis)
        yield rows, as_float32(part.T if matrix.features_last else part, kind)


def _need_finite(tensors: TensorFile, name: str, value: np.ndarray) -> None:
    if not np.isfinite(value).all():
        raise not_finite(f"{tensors.label}: {name}", FloatType.F32)


def _exp(value: np.ndarray) -> np.ndarray:
    return np.exp(value.astype(np.float64)).astype(np.float32)
