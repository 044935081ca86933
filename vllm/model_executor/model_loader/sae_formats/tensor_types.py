# SPDX-License-Identifier: Apache-2.0
"""What every reader of tensor files shares: descriptions, limits and first checks."""

from __future__ import annotations

import struct
import zipfile
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vllm.model_executor.model_loader.sae_formats.layout import (
    LFS_POINTER,
    LayoutError,
    excerpt,
    lfs_pointer,
)

if TYPE_CHECKING:
    import torch

# The largest public SAEs are about 30 GB a file.
MAX_FILE_BYTES = 128 << 30
# A directory of this size lists about 10,000 members of a zip file.
MAX_ZIP_DIRECTORY_BYTES = 1 << 20
_ZIP_END = struct.Struct("<4s4H2LH")
_ZIP64_LOCATOR_BYTES = 20
_ZIP64_END = struct.Struct("<4sQ2H2L4Q")


class FloatType(Enum):
    """The types that weights may have; names as in safetensors, values as in PyTorch.

    Headers are read without PyTorch, whose import takes longer than they do.
    """

    F64 = "float64"
    F32 = "float32"
    F16 = "float16"
    BF16 = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return {"F64": 8, "F32": 4}.get(self.name, 2)

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's type."""
        import torch

        return {
            FloatType.F64: torch.float64,
            FloatType.F32: torch.float32,
            FloatType.F16: torch.float16,
            FloatType.BF16: torch.bfloat16,
        }[self]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype from a header; `dtype` is None for anything but 16-64 bit float,
    and `stored_as` then says what it is."""

    shape: tuple[int, ...]
    dtype: FloatType | None
    stored_as: str


@dataclass(frozen=True)
class HostTensor:
    """A tensor in host memory; bfloat16 as its bits (`uint16`), which NumPy lacks."""

    data: np.ndarray
    dtype: FloatType

    @classmethod
    def rounded(cls, value: np.ndarray, dtype: FloatType) -> HostTensor:
        """Float32 values in another type, rounded to the nearest, ties to even."""
        if dtype is not FloatType.BF16:
            with np.errstate(over="ignore"):  # to infinity, which the caller refuses
                return cls(value.astype(dtype.value), dtype)
        bits = np.ascontiguousarray(value).view(np.uint32)
        nearest = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
        # Adding to the bits of a NaN could carry into its sign.
        bits = np.where(np.isfinite(value), nearest, bits)
        return cls((bits >> 16).astype(np.uint16), dtype)

    def floats(self) -> np.ndarray:
        """A new float32 array of the values."""
        return as_float32(self.data, self.dtype)


def as_float32(data: np.ndarray, dtype: FloatType) -> np.ndarray:
    """A new, C-contiguous float32 array of what a `TensorFile` read."""
    if dtype is FloatType.BF16:
        wide = np.array(data, np.uint32, order="C")
        wide <<= 16
        return wide.view(np.float32)
    with np.errstate(over="ignore"):
        return np.array(data, np.float32, order="C")


class TensorFile(Protocol):
    """An open tensor file. `label` is its name in messages, `metadata` its strings."""

    label: str
    infos: dict[str, TensorInfo]
    metadata: dict[str, str]

    def read(self, name: str, start: int, stop: int, axis: int) -> np.ndarray:
        """A copy of elements `start:stop` along `axis` in the stored dtype.

        NumPy has no bfloat16: its bits come as `uint16`.
        """


def why_no_file(path: Path) -> str:
    """What stands where a regular file is expected."""
    if path.is_dir():
        return "found a directory, expected a file"
    if path.exists():
        return "found a pipe, a socket or a device, expected a regular file"
    if path.is_symlink():
        return "found a symbolic link that leads nowhere, expected a file"
    return "missing"


def check_file(path: Path) -> None:
    """Refuse a tensor file that is missing, too large, or only a pointer to one.

    Raises:
        LayoutError: one line that says what to do.
    """
    if not path.is_file():
        raise LayoutError(f"{path.name}: {why_no_file(path)}")
    try:
        _check_content(path)
    except OSError as error:
        raise LayoutError(f"{path.name}: cannot be read: {error.strerror}") from error


def _check_content(path: Path) -> None:
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise LayoutError(
            f"{path.name}: expected at most {MAX_FILE_BYTES} bytes, found {size}"
        )
    with path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise lfs_pointer(path.name)


def open_zip(path: Path) -> zipfile.ZipFile:
    """A zip file whose list of members is small enough to be read, and clear.

    Raises:
        LayoutError: no zip file, or one whose directory is too large, or names a
            member twice.
    """
    size = _zip_directory_bytes(path)
    if size is None:
        raise LayoutError(f"{path.name}: expected a zip file, found another format")
    if size > MAX_ZIP_DIRECTORY_BYTES:
        raise LayoutError(
            f"{path.name}: lists members in {size} bytes, expected at most "
            f"{MAX_ZIP_DIRECTORY_BYTES}"
        )
    archive = zipfile.ZipFile(path)
    counts = Counter(archive.namelist())
    if twice := [name for name, count in counts.items() if count > 1]:
        archive.close()
        raise LayoutError(
            f"{path.name}: {excerpt(twice[0])} is there twice, expected once"
        )
    return archive


def _zip_directory_bytes(path: Path) -> int | None:
    """The declared size of a zip file's central directory, or None for other files.

    The size in a zip64 record counts if there is one, as it does for `zipfile`.
    """
    tail_bytes = min(path.stat().st_size, (1 << 16) + _ZIP_END.size)
    with path.open("rb") as stream:
        stream.seek(-tail_bytes, 2)
        tail = stream.read(tail_bytes)
        at = tail.rfind(b"PK\5\6")
        if at < 0 or len(tail) - at < _ZIP_END.size:
            return None
        size = _ZIP_END.unpack_from(tail, at)[5]
        end64 = path.stat().st_size - (len(tail) - at) - _ZIP64_LOCATOR_BYTES
        stream.seek(max(0, end64 - _ZIP64_END.size))
        record = stream.read(_ZIP64_END.size)
    if len(record) == _ZIP64_END.size and record[:4] == b"PK\6\6":
        return _ZIP64_END.unpack(record)[8]
    return None if size == 0xFFFFFFFF else size


def stored_member_offset(path: Path, item: zipfile.ZipInfo) -> int:
    """Where the bytes of an uncompressed zip member begin.

    Raises:
        LayoutError: the member ends past the end of the file.
    """
    with path.open("rb") as raw:
        raw.seek(item.header_offset)
        local = raw.read(30)
    if len(local) < 30:
        raise LayoutError(f"{path.name}: {item.filename}: its header is cut off")
    name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
    offset = item.header_offset + 30 + name_bytes + extra_bytes
    if offset + item.file_size > path.stat().st_size:
        raise LayoutError(
            f"{path.name}: {item.filename}: its data ends past the end of the file"
        )
    return offset
