# SPDX-License-Identifier: Apache-2.0
"""Check a site's tensors by their headers, and fold them into the canonical SAE.

The fold streams: a chunk of features at a time goes to the device in its stored
dtype, becomes fp32 there, and is written into the site's buffers. `fold_host.py` has
the same arithmetic without PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm.model_executor.layers.steering_chunks import (
    ChunkMemory,
    chunk_rows,
    row_sums,
)
from vllm.model_executor.model_loader.sae_formats.layout import (
    LayoutError,
    Matrix,
    SAELayout,
    VectorLayout,
)
from vllm.model_executor.model_loader.sae_formats.tensor_files import (
    read_array,
    read_slice,
)
from vllm.model_executor.model_loader.sae_formats.tensor_types import (
    FloatType,
    TensorFile,
    as_float32,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.steering_state import SAEWeights

Progress = Callable[[int], None]


def _info_of(tensors: TensorFile, name: str) -> tuple[tuple[int, ...], FloatType]:
    """Shape and dtype of a tensor, which must be present and floating."""
    info = tensors.infos.get(name)
    if info is None:
        found = ", ".join(sorted(tensors.infos)[:12]) or "nothing"
        raise LayoutError(
            f"{tensors.label}: {name}: expected a tensor, found none (has {found})"
        )
    if info.dtype is None:
        raise LayoutError(
            f"{tensors.label}: {name}: expected a floating dtype (float64, float32, "
            f"float16, bfloat16), found {info.stored_as}"
        )
    return info.shape, info.dtype


def matrix_shape(tensors: TensorFile, matrix: Matrix) -> tuple[int, int]:
    """`(F, D)` of a stored matrix, whichever way round it is stored.

    Raises:
        LayoutError: missing, not floating, or not a matrix.
    """
    shape, _ = _info_of(tensors, matrix.name)
    if len(shape) != 2 or 0 in shape:
        raise LayoutError(
            f"{tensors.label}: {matrix.name}: expected a matrix, found shape "
            f"{list(shape)}"
        )
    return (shape[1], shape[0]) if matrix.features_last else (shape[0], shape[1])


def _expect(
    tensors: TensorFile, name: str, shapes: tuple[tuple[int, ...], ...]
) -> None:
    found, _ = _info_of(tensors, name)
    if found not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise LayoutError(
            f"{tensors.label}: {name}: expected shape {expected}, found {list(found)}"
        )


def check_sae(layout: SAELayout, tensors: TensorFile) -> None:
    """Check every tensor's header against the layout.

    Raises:
        LayoutError: naming file, tensor, what was expected and what was found.
    """
    F, d_in, d_out = layout.site.d_sae, layout.site.d_in, layout.site.out_width
    k = layout.site.k
    if k is not None and k > F:
        raise LayoutError(f"{layout.file}: k: expected at most {F}, found {k}")
    _expect_matrix(tensors, layout.W_enc, F, d_in)
    _expect_matrix(tensors, layout.W_dec, F, d_out)
    if layout.W_skip is not None:
        _expect_matrix(tensors, layout.W_skip, d_out, d_in)
    gate = layout.gate
    encoder_biases = (gate.r_mag, gate.b_mag, gate.b_gate) if gate else (layout.b_enc,)
    for name in encoder_biases:
        if name is not None:
            _expect(tensors, name, ((F,),))
    if layout.b_dec is not None:
        _expect(tensors, layout.b_dec, ((d_out,),))
    if isinstance(layout.threshold, str):
        _expect(tensors, layout.threshold, ((F,), (1,), ()))


def _expect_matrix(
    tensors: TensorFile, matrix: Matrix, rows: int, columns: int
) -> None:
    _info_of(tensors, matrix.name)
    shape = (columns, rows) if matrix.features_last else (rows, columns)
    _expect(tensors, matrix.name, (shape,))


def check_vector(layout: VectorLayout, tensors: TensorFile) -> None:
    """As `check_sae`, for a steering vector `[D]` or a row of `[n, D]`."""
    shape, _ = _info_of(tensors, layout.tensor)
    rows = () if layout.row is None else shape[:1]
    _expect(tensors, layout.tensor, ((*rows, layout.site.d_in),))


def sae_bytes(layout: SAELayout, tensors: TensorFile) -> int:
    """Bytes of the two matrices, for the progress bar."""
    return sum(
        math.prod(matrix_shape(tensors, m)) * _itemsize(tensors, m)
        for m in (layout.W_enc, layout.W_dec)
    )


def _itemsize(tensors: TensorFile, matrix: Matrix) -> int:
    return _info_of(tensors, matrix.name)[1].itemsize


def read_floats(tensors: TensorFile, name: str, row: int | None = None) -> np.ndarray:
    """A small tensor, whole or one row of it, in fp32; a scalar is `[1]`.

    Raises:
        LayoutError: it holds a NaN or an infinity.
    """
    shape, dtype = _info_of(tensors, name)
    first, last = (0, shape[0] if shape else 1) if row is None else (row, row + 1)
    value = as_float32(read_array(tensors, name, first, last).reshape(-1), dtype)
    if not np.isfinite(value).all():
        raise not_finite(f"{tensors.label}: {name}", FloatType.F32)
    return value


def read_vector(tensors: TensorFile, name: str, row: int | None = None) -> torch.Tensor:
    """As `read_floats`, as a tensor on the CPU."""
    return torch.from_numpy(read_floats(tensors, name, row))


def not_finite(what: str, dtype: FloatType, feature: int | None = None) -> LayoutError:
    """The error for a NaN or an infinity."""
    where = "" if feature is None else f" in the row of feature {feature}"
    return LayoutError(
        f"{what}: expected finite values in {dtype.value}, found NaN or infinity{where}"
    )


def _check_finite(value: torch.Tensor, what: str, first_row: int = 0) -> None:
    # Both are NaN if any element is. Unlike `isfinite(value)`, this needs no mask.
    lowest, highest = torch.aminmax(value)
    if bool(torch.isfinite(lowest) & torch.isfinite(highest)):
        return
    bad = None
    if value.dim() == 2:
        rows = (~torch.isfinite(value)).any(dim=1).to(torch.uint8)
        bad = first_row + int(rows.argmax())
    raise not_finite(what, FloatType(str(value.dtype).removeprefix("torch.")), bad)


def _memory(
    layout: SAELayout, tensors: TensorFile, device: torch.device
) -> ChunkMemory:
    """Room for the chunks of all matrices of an SAE."""
    elements = stored = 0
    for matrix in (layout.W_enc, layout.W_dec, layout.W_skip):
        if matrix is not None:
            n, width = matrix_shape(tensors, matrix)
            size = min(n, chunk_rows(width)) * width
            elements = max(elements, size)
            stored = max(stored, size * _itemsize(tensors, matrix))
    # On the host, a chunk is widened from where its reader left it.
    return ChunkMemory(elements, device, 0 if device.type == "cpu" else stored)


def _chunks(
    tensors: TensorFile,
    matrix: Matrix,
    memory: ChunkMemory,
    own: slice | None = None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Feature ranges of a matrix as fp32 `[f, D]`, which the next one overwrites.

    `own`: read these features only; None: all.
    """
    n, width = matrix_shape(tensors, matrix)
    first, last = (0, n) if own is None else (min(own.start, n), min(own.stop, n))
    for start in range(first, last, chunk_rows(width)):
        rows = slice(start, min(start + chunk_rows(width), last))
        yield rows, _read_rows(tensors, matrix, rows, memory)


def _read_rows(
    tensors: TensorFile, matrix: Matrix, rows: slice, memory: ChunkMemory
) -> torch.Tensor:
    """Features `rows` as fp32 `[f, D]`."""
    axis = int(matrix.features_last)
    part = read_slice(tensors, matrix.name, rows.start, rows.stop, axis)
    part = memory.from_host(part)
    # Always a copy, because the reader may return a view of a mapped file.
    return memory.work(part.T if matrix.features_last else part)


def fold_sae(
    layout: SAELayout, tensors: TensorFile, into: SAEWeights, progress: Progress
) -> None:
    """Write the canonical SAE of a checked layout into a site's buffers.

    A shard reads its own features of the encoder. It reads the decoder a chunk of rows
    at a time and keeps its columns, so every rank knows the norms of whole rows.
    Features past `d_sae` keep their values. `progress` is called with the number of
    stored bytes read. If `b_dec` is subtracted, the fold uses the encoder as `into`
    stores it. Rounding `W_enc` then acts on `x - b_dec`, as in the SAE itself.

    Raises:
        LayoutError: a NaN or infinity, also one made by rounding to `into`'s dtype.
    """
    with torch.no_grad():
        _fold_sae(layout, tensors, into, progress)


def _fold_sae(
    layout: SAELayout, tensors: TensorFile, into: SAEWeights, progress: Progress
) -> None:
    F = layout.site.d_sae
    device = into.W_enc.device
    memory = _memory(layout, tensors, device)

    def small(name: str | None, size: int, default: float = 0.0) -> torch.Tensor:
        """A vector on the host, where its float64 steps take no device memory."""
        if name is None:
            return _on_host(size, default)
        return read_vector(tensors, name).expand(size).clone()

    b_dec = small(layout.b_dec, layout.site.out_width) * layout.b_dec_scale
    _check_finite(b_dec, f"{tensors.label}: {layout.b_dec}")
    into.b_dec.copy_(b_dec[into.columns])
    norms = _fold_decoder(layout, tensors, into, memory, progress)

    row_scale = norms * layout.W_enc_scale
    if layout.gate is not None:
        gain = _exactly(torch.exp, small(layout.gate.r_mag, F))
        row_scale *= gain
        b_enc = small(layout.gate.b_mag, F)
        threshold = (b_enc - gain * small(layout.gate.b_gate, F)).clamp(min=0)
    else:
        b_enc = small(layout.b_enc, F)
        threshold = _threshold(layout, small, F)
    b_enc *= norms * layout.b_enc_scale
    _fold_encoder(layout, tensors, into, memory, progress, (row_scale, b_enc, b_dec))
    _copy_skip(layout.W_skip, tensors, into, memory)

    for name, target, value in (
        ("b_enc", into.b_enc, b_enc),
        ("threshold", into.threshold, threshold),
    ):
        _check_finite(value, f"{tensors.label}: folded {name}")
        own = value[into.own]
        target[: own.shape[0]].copy_(own)


def _fold_encoder(
    layout: SAELayout,
    tensors: TensorFile,
    into: SAEWeights,
    memory: ChunkMemory,
    progress: Progress,
    vectors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Write `W_enc` with `vectors` (row scale, b_enc, b_dec; on the host), and fold
    `b_dec` into b_enc."""
    row_scale, b_enc, b_dec = vectors
    device = into.W_enc.device
    on_device = b_dec.to(device)
    for rows, W in _chunks(tensors, layout.W_enc, memory, into.own):
        W *= row_scale[rows, None].to(device)
        if layout.centre_input:
            mean = row_sums(memory.spare(W.shape).copy_(W)) * (1 / W.shape[1])
            W -= mean[:, None]
            if layout.subtract_b_dec:
                # The part of W_enc b_dec (below) that comes from the mean of a row.
                b_enc[rows] -= mean.cpu() * row_sums(b_dec[None].clone())
        stored = into.W_enc[rows.start - into.own.start : rows.stop - into.own.start]
        stored.copy_(W)
        _check_finite(stored, f"{tensors.label}: {layout.W_enc.name}", rows.start)
        if layout.subtract_b_dec:
            W.copy_(stored)
            W *= on_device
            b_enc[rows] -= row_sums(W).cpu()
        progress(W.numel() * _itemsize(tensors, layout.W_enc))


def _fold_decoder(
    layout: SAELayout,
    tensors: TensorFile,
    into: SAEWeights,
    memory: ChunkMemory,
    progress: Progress,
) -> torch.Tensor:
    """Write `W_dec` and the norms of its rows; float32 `[F]` on the host, what rows
    were divided by."""
    norms = _on_host(layout.site.d_sae, 1.0)
    what = f"{tensors.label}: {layout.W_dec.name}"
    for rows, W in _chunks(tensors, layout.W_dec, memory):
        W *= layout.W_dec_scale
        if layout.unit_decoder_rows:
            squares = torch.mul(W, W, out=memory.spare(W.shape))
            # A dead feature may have a zero row; it then contributes nothing.
            norms[rows] = _exactly(torch.sqrt, row_sums(squares).cpu())
            W /= norms[rows, None].clamp(min=1e-8).to(W.device)
        stored = memory.rounded(W, into.W_dec.dtype)
        _check_finite(stored, what, rows.start)
        into.W_dec[rows].copy_(stored[:, into.columns])
        if into.row_norms is not None:
            into.row_norms[rows] = memory.work(stored).norm(dim=1)
        progress(W.numel() * _itemsize(tensors, layout.W_dec))
    return norms


def _copy_skip(
    matrix: Matrix | None, tensors: TensorFile, into: SAEWeights, memory: ChunkMemory
) -> None:
    if matrix is None or into.W_skip is None:
        return
    own = into.columns
    for rows, W in _chunks(tensors, matrix, memory, own):
        stored = into.W_skip[rows.start - own.start : rows.stop - own.start]
        stored.copy_(W)
        _check_finite(stored, f"{tensors.label}: {matrix.name}")


def _threshold(
    layout: SAELayout,
    small: Callable[[str | None, int, float], torch.Tensor],
    d_sae: int,
) -> torch.Tensor:
    if isinstance(layout.threshold, str):
        threshold = small(layout.threshold, d_sae, 0.0)
    else:
        threshold = _on_host(d_sae, layout.threshold or 0.0)
    if layout.threshold_is_log:
        threshold = _exactly(torch.exp, threshold)
    return threshold * layout.threshold_scale


def _on_host(size: int, value: float) -> torch.Tensor:
    """A float32 vector, whatever the default dtype and device are."""
    return torch.full((size,), value, dtype=torch.float32, device="cpu")


def _exactly(
    function: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor
) -> torch.Tensor:
    """A function in float64, so that every library rounds to the same float32."""
    return function(value.double()).float()
