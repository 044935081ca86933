# SPDX-License-Identifier: Apache-2.0
"""Tensor files read piece by piece: safetensors, npz, torch zip files and GGUF.

Every reader shows names, shapes and dtypes without reading data, reads one slice of
one tensor at a time, and refuses what could run code or exhaust memory. Data stays
in the file's pages, except for a compressed npz member (one whole tensor at a time).
"""

from __future__ import annotations

import contextlib
import math
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from vllm.model_executor.model_loader.sae_formats.layout import LayoutError

# A header of this size names about 100,000 tensors; an SAE has at most ten a site.
MAX_HEADER_BYTES = 16 << 20
# Trained weights do not compress; a file that inflates more than this is a bomb.
MAX_INFLATION = 8
INFLATION_ALLOWANCE = 1 << 20

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NUMPY_DTYPES = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
}
FLOATING = frozenset(_SAFETENSORS_DTYPES.values())


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype from a header; `dtype` is None for anything but 16-64 bit float,
    and `stored_as` then says what it is."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    stored_as: str


class TensorFile(Protocol):
    """An open tensor file. `label` is its name in messages, `metadata` its strings."""

    label: str
    infos: dict[str, TensorInfo]
    metadata: dict[str, str]

    def read(self, name: str, start: int, stop: int, axis: int) -> torch.Tensor:
        """Elements `start:stop` along `axis`, on the CPU, in the stored dtype."""


class _SafetensorsFile:
    def __init__(self, path: Path, handle: Any):
        self.label = path.name
        self._handle = handle
        self.metadata: dict[str, str] = handle.metadata() or {}
        self.infos: dict[str, TensorInfo] = {}
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            part = handle.get_slice(name)
            kind = part.get_dtype()
            shape = tuple(part.get_shape())
            self.infos[name] = TensorInfo(shape, _SAFETENSORS_DTYPES.get(kind), kind)

    def read(self, name: str, start: int, stop: int, axis: int) -> torch.Tensor:
        if not self.infos[name].shape:
            return self._handle.get_tensor(name)
        part = self._handle.get_slice(name)
        return part[start:stop] if axis == 0 else part[:, start:stop]


class _ArrayFile:
    """Tensors that are already views into mapped memory."""

    def __init__(
        self,
        label: str,
        tensors: dict[str, torch.Tensor],
        metadata: dict[str, str] | None = None,
    ):
        self.label = label
        self.metadata = metadata or {}
        self._tensors = tensors
        self.infos = {
            name: TensorInfo(
                tuple(tensor.shape),
                tensor.dtype if tensor.dtype in FLOATING else None,
                str(tensor.dtype),
            )
            for name, tensor in tensors.items()
        }

    def read(self, name: str, start: int, stop: int, axis: int) -> torch.Tensor:
        tensor = self._tensors[name]
        return tensor.narrow(axis, start, stop - start) if tensor.dim() else tensor


@dataclass(frozen=True)
class _NpyMember:
    info: TensorInfo
    dtype: np.dtype
    fortran_order: bool
    # Offset of the data in the npz file; None when the member is compressed.
    offset: int | None


class _NpzFile:
    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.label = path.name
        self.metadata: dict[str, str] = {}
        self._path = path
        self._archive = archive
        self._members = {
            item.filename.removesuffix(".npy"): _npy_member(path, archive, item)
            for item in archive.infolist()
            if item.filename.endswith(".npy")
        }
        self.infos = {name: member.info for name, member in self._members.items()}
        self._inflated: tuple[str, np.ndarray] | None = None

    def read(self, name: str, start: int, stop: int, axis: int) -> torch.Tensor:
        array = self._array(name)
        if array.ndim:
            array = array[start:stop] if axis == 0 else array[:, start:stop]
        return torch.from_numpy(np.array(array))

    def _array(self, name: str) -> np.ndarray:
        member = self._members[name]
        order: Any = "F" if member.fortran_order else "C"
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
            with self._archive.open(f"{name}.npy") as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
            self._inflated = (name, array)
        return self._inflated[1]


def _npy_member(
    path: Path, archive: zipfile.ZipFile, item: zipfile.ZipInfo
) -> _NpyMember:
    """Read one member's header and hold its declared shape against its size."""
    where = f"{path.name}: {item.filename.removesuffix('.npy')}"
    with archive.open(item) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise LayoutError(f"{where}: unknown npy version {version}")
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = read_header(stream)
        header_bytes = stream.tell()
    if dtype.hasobject:
        raise LayoutError(f"{where}: expected numbers, found pickled Python objects")
    expected = header_bytes + math.prod(shape) * dtype.itemsize
    if any(n < 0 for n in shape) or item.file_size != expected:
        raise LayoutError(
            f"{where}: shape {shape} of {dtype} needs {expected} bytes, "
            f"the archive declares {item.file_size}"
        )
    offset = None
    if item.compress_type == zipfile.ZIP_STORED and expected > header_bytes:
        with path.open("rb") as raw:
            raw.seek(item.header_offset)
            local = raw.read(30)
            name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
        offset = item.header_offset + 30 + name_bytes + extra_bytes + header_bytes
        if offset + expected - header_bytes > path.stat().st_size:
            raise LayoutError(f"{where}: its data ends past the end of the file")
    info = TensorInfo(tuple(shape), _NUMPY_DTYPES.get(dtype.str), dtype.str)
    return _NpyMember(info, dtype, fortran_order, offset)


def _broken(label: str, error: Exception) -> LayoutError:
    """The error for a file that its parser chokes on, whatever the parser raises."""
    detail = (str(error).splitlines() or [""])[0][:200]
    return LayoutError(f"{label}: cannot be read: {type(error).__name__}: {detail}")


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a tensor file by its suffix.

    Raises:
        LayoutError: missing, unreadable, truncated, or of a kind that is refused.
    """
    opener = _OPENERS.get(path.suffix)
    if opener is None:
        raise LayoutError(f"{path.name}: not a tensor file ({', '.join(_OPENERS)})")
    if not path.is_file():
        raise LayoutError(f"{path.name}: missing")
    with contextlib.ExitStack() as stack:
        try:
            tensors = opener(path, stack)
        except LayoutError:
            raise
        except Exception as error:
            raise _broken(path.name, error) from error
        yield tensors


def read_slice(
    tensors: TensorFile, name: str, start: int, stop: int, axis: int = 0
) -> torch.Tensor:
    """`TensorFile.read`, with every failure of the parser as a `LayoutError`."""
    try:
        return tensors.read(name, start, stop, axis)
    except Exception as error:
        raise _broken(f"{tensors.label}: {name}", error) from error


def _open_safetensors(path: Path, stack: contextlib.ExitStack) -> TensorFile:
    with path.open("rb") as raw:
        prefix = raw.read(8)
    if len(prefix) < 8:
        raise LayoutError(f"{path.name}: too short for a safetensors file")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise LayoutError(
            f"{path.name}: safetensors header of {header_bytes} bytes, expected at "
            f"most {MAX_HEADER_BYTES}"
        )
    try:
        handle = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except SafetensorError as error:
        raise LayoutError(f"{path.name}: not a safetensors file: {error}") from error
    return _SafetensorsFile(path, handle)


def _check_inflation(path: Path, archive: zipfile.ZipFile) -> None:
    on_disk = path.stat().st_size
    declared = sum(item.file_size for item in archive.infolist())
    if declared > MAX_INFLATION * on_disk + INFLATION_ALLOWANCE:
        raise LayoutError(
            f"{path.name}: inflates from {on_disk} to {declared} bytes, expected at "
            f"most {MAX_INFLATION} times"
        )


def _open_npz(path: Path, stack: contextlib.ExitStack) -> TensorFile:
    archive = stack.enter_context(zipfile.ZipFile(path))
    _check_inflation(path, archive)
    return _NpzFile(path, archive)


def _open_torch(path: Path, stack: contextlib.ExitStack) -> TensorFile:
    if not zipfile.is_zipfile(path):
        raise LayoutError(
            f"{path.name}: expected a torch zip file (torch.save of torch 1.6 or "
            "later), found another format; save it again with torch.save"
        )
    with zipfile.ZipFile(path) as archive:
        if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()):
            raise LayoutError(f"{path.name}: compressed members in a torch file")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict):
        raise LayoutError(
            f"{path.name}: expected a state dict, found {type(state).__name__}"
        )
    tensors = {
        str(name): value.detach()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    for name, tensor in tensors.items():
        # A view with stride zero can claim any size over a few bytes.
        if (
            tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or tensor.nbytes > path.stat().st_size
        ):
            raise LayoutError(
                f"{path.name}: {name}: expected a dense tensor no larger than the "
                f"file, found {tensor.layout} {list(tensor.shape)} on {tensor.device}"
            )
    return _ArrayFile(path.name, tensors)


def _open_gguf(path: Path, stack: contextlib.ExitStack) -> TensorFile:
    try:
        import gguf
    except ImportError as error:
        raise LayoutError(
            f"{path.name}: reading GGUF needs the gguf package (pip install gguf)"
        ) from error
    reader = gguf.GGUFReader(path)
    metadata = {}
    for key in ("general.architecture", "controlvector.model_hint"):
        if (field := reader.get_field(key)) is not None:
            metadata[key] = str(field.contents())
    kinds = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    tensors = {}
    for tensor in reader.tensors:
        if tensor.tensor_type not in kinds:
            raise LayoutError(
                f"{path.name}: {tensor.name}: expected F32 or F16, found "
                f"{tensor.tensor_type.name}"
            )
        # A copy, because the mapping is read-only; vectors are small.
        tensors[tensor.name] = torch.from_numpy(np.array(tensor.data))
    return _ArrayFile(path.name, tensors, metadata)


_OPENERS = {
    ".safetensors": _open_safetensors,
    ".npz": _open_npz,
    ".pt": _open_torch,
    ".pth": _open_torch,
    ".gguf": _open_gguf,
}
