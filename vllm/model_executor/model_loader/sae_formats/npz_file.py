# SPDX-License-Identifier: Apache-2.0
"""NumPy's `.npz` archives and `.npy` files, without pickled objects.

Uncompressed members are mapped; a compressed one is inflated whole, one at a time.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np

from vllm.model_executor.model_loader.sae_formats.layout import LayoutError
from vllm.model_executor.model_loader.sae_formats.tensor_types import (
    FloatType,
    TensorInfo,
    open_zip,
    stored_member_offset,
)

# Trained weights do not compress; a file that inflates more than this is a bomb.
MAX_INFLATION = 8
INFLATION_ALLOWANCE = 1 << 20

_DTYPES = {
    "<f8": FloatType.F64,
    "<f4": FloatType.F32,
    "<f2": FloatType.F16,
}


@dataclass(frozen=True)
class _Member:
    info: TensorInfo
    dtype: np.dtype
    fortran_order: bool
    # Offset of the data in the file; None when the member is compressed.
    offset: int | None


class NpzFile:
    """The arrays of an `.npz` archive, or the one of an `.npy` file."""

    def __init__(self, path: Path, archive: zipfile.ZipFile | None):
        self.label = path.name
        self.metadata: dict[str, str] = {}
        self._path = path
        self._archive = archive
        self._inflated: tuple[str, np.ndarray] | None = None
        if archive is None:
            self._members = {path.stem: _npy_file(path)}
        else:
            _check_inflation(path, archive)
            self._members = {
                item.filename.removesuffix(".npy"): _npz_member(path, archive, item)
                for item in archive.infolist()
                if item.filename.endswith(".npy")
            }
        self.infos = {name: member.info for name, member in self._members.items()}

    def read(self, name: str, start: int, stop: int, axis: int) -> np.ndarray:
        """As `TensorFile.read`."""
        array = self._array(name)
        if array.ndim:
            array = array[start:stop] if axis == 0 else array[:, start:stop]
        return np.array(array)

    def _array(self, name: str) -> np.ndarray:
        member = self._members[name]
        order: Literal["F", "C"] = "F" if member.fortran_order else "C"
        if member.offset is not None:
            return np.memmap(
                self._path,
                dtype=member.dtype,
                mode="r",
                offset=member.offset,
                shape=member.info.shape,
                order=order,
            )
        if self._inflated is None or self._inflated[0] != name:
            self._inflated = None
            assert self._archive is not None
            with self._archive.open(f"{name}.npy") as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
            self._inflated = (name, array)
        return self._inflated[1]


def open_npz(path: Path) -> tuple[NpzFile, zipfile.ZipFile]:
    """The arrays of an archive, and the archive to close."""
    archive = open_zip(path)
    try:
        return NpzFile(path, archive), archive
    except BaseException:
        archive.close()
        raise


def _check_inflation(path: Path, archive: zipfile.ZipFile) -> None:
    on_disk = path.stat().st_size
    declared = sum(item.file_size for item in archive.infolist())
    if declared > MAX_INFLATION * on_disk + INFLATION_ALLOWANCE:
        raise LayoutError(
            f"{path.name}: inflates from {on_disk} to {declared} bytes, expected at "
            f"most {MAX_INFLATION} times"
        )


def _npz_member(path: Path, archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> _Member:
    """Read one member's header and hold its declared shape against its size."""
    where = f"{path.name}: {item.filename.removesuffix('.npy')}"
    with archive.open(item) as stream:
        shape, fortran_order, dtype, header_bytes = _npy_header(stream, where)
    _check_size(where, shape, dtype, header_bytes, item.file_size)
    offset = None
    if item.compress_type == zipfile.ZIP_STORED and item.file_size > header_bytes:
        offset = stored_member_offset(path, item) + header_bytes
    info = TensorInfo(shape, _DTYPES.get(dtype.str), dtype.str)
    return _Member(info, dtype, fortran_order, offset)


def _npy_file(path: Path) -> _Member:
    with path.open("rb") as stream:
        shape, fortran_order, dtype, header_bytes = _npy_header(stream, path.name)
    _check_size(path.name, shape, dtype, header_bytes, path.stat().st_size)
    info = TensorInfo(shape, _DTYPES.get(dtype.str), dtype.str)
    return _Member(info, dtype, fortran_order, header_bytes)


def _npy_header(
    stream: IO[bytes], where: str
) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, dtype, and the header's size in bytes."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise LayoutError(f"{where}: found npy version {version}, expected 1.0 or 2.0")
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran_order, dtype = read_header(stream)
    if dtype.hasobject:
        raise LayoutError(f"{where}: expected numbers, found pickled Python objects")
    return tuple(shape), fortran_order, dtype, stream.tell()


def _check_size(
    where: str, shape: tuple[int, ...], dtype: np.dtype, header_bytes: int, size: int
) -> None:
    expected = header_bytes + math.prod(shape) * dtype.itemsize
    if any(n < 0 for n in shape) or size != expected:
        raise LayoutError(
            f"{where}: shape {shape} of {dtype} needs {expected} bytes, "
            f"the archive declares {size}"
        )
