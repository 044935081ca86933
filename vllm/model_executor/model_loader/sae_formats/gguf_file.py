# SPDX-License-Identifier: Apache-2.0
"""Read a small GGUF file: metadata strings and F32 or F16 tensors.

Every length is compared with the bytes that are left before anything is read, so a
false length costs nothing. Source: the GGUF specification, versions 2 and 3
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from vllm.model_executor.model_loader.sae_formats.layout import LayoutError
from vllm.model_executor.model_loader.sae_formats.tensor_types import (
    FloatType,
    TensorInfo,
)
from vllm.utils.math_utils import round_up

MAX_HEADER_BYTES = 1 << 20
DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# Value type -> struct code; strings and arrays have a length instead.
_SCALARS = dict(zip([*range(8), 10, 11, 12], "BbHhIif?Qqd", strict=True))
_DTYPES = {0: (FloatType.F32, "<f4"), 1: (FloatType.F16, "<f2")}
_MAX_DEPTH = 4


class _Header:
    """The first bytes of a file, read with every length checked."""

    def __init__(self, data: bytes, label: str):
        self.data = data
        self.label = label
        self.at = 0

    def skip(self, count: int) -> int:
        """Move past `count` bytes and return where they began."""
        if count > len(self.data) - self.at:
            raise LayoutError(
                f"{self.label}: declares {count} bytes where the header has "
                f"{len(self.data) - self.at} left (at most {MAX_HEADER_BYTES} in all)"
            )
        start = self.at
        self.at += count
        return start

    def number(self, code: str) -> int:
        size = struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, self.data, self.skip(size))[0]

    def string(self) -> str:
        length = self.number("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode()

    def value(self, kind: int, depth: int = 0) -> int | str | None:
        """A scalar or a string. Arrays are skipped."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY or depth >= _MAX_DEPTH:
            raise LayoutError(f"{self.label}: unknown value type {kind}")
        element, length = self.number("I"), self.number("Q")
        if element in _SCALARS:
            self.skip(length * struct.calcsize("<" + _SCALARS[element]))
            return None
        # Each takes at least eight bytes, so the header's size bounds the loop.
        if length * 8 > len(self.data) - self.at:
            self.skip(length * 8)
        for _ in range(length):
            self.value(element, depth + 1)
        return None


class GGUFFile:
    """The tensors of a GGUF file, each a copy."""

    def __init__(self, path: Path):
        self.label = path.name
        self._path = path
        with path.open("rb") as stream:
            header = _Header(stream.read(MAX_HEADER_BYTES), path.name)
        if header.data[:4] != b"GGUF":
            raise LayoutError(f"{path.name}: not a GGUF file")
        header.skip(4)
        if (version := header.number("I")) not in (2, 3):
            raise LayoutError(f"{path.name}: version: expected 2 or 3, found {version}")
        tensor_count, value_count = header.number("Q"), header.number("Q")
        values: dict[str, int | str | None] = {}
        for _ in range(value_count):
            key = header.string()
            values[key] = header.value(header.number("I"))
        self.metadata = {k: v for k, v in values.items() if isinstance(v, str)}
        self.infos: dict[str, TensorInfo] = {}
        self._tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            self._describe(header)
        alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_HEADER_BYTES:
            raise LayoutError(
                f"{path.name}: general.alignment: found {alignment!r}, expected an "
                f"integer in 1..{MAX_HEADER_BYTES}"
            )
        self._start = round_up(header.at, alignment)
        self._check_sizes()

    def _describe(self, header: _Header) -> None:
        name, dimensions = header.string(), header.number("I")
        if dimensions > _MAX_DEPTH:
            raise LayoutError(
                f"{self.label}: {name}: found {dimensions} dimensions, expected at "
                f"most {_MAX_DEPTH}"
            )
        shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
        kind, offset = header.number("I"), header.number("Q")
        if kind not in _DTYPES:
            raise LayoutError(
                f"{self.label}: {name}: expected F32 or F16, found tensor type {kind}"
            )
        if name in self.infos:
            raise LayoutError(f"{self.label}: {name}: appears twice")
        dtype = _DTYPES[kind][0]
        self.infos[name] = TensorInfo(shape, dtype, dtype.value)
        self._tensors[name] = (shape, kind, offset)

    def _check_sizes(self) -> None:
        size = self._path.stat().st_size
        for name, (shape, kind, offset) in self._tensors.items():
            end = self._start + offset + math.prod(shape) * _DTYPES[kind][0].itemsize
            if end > size:
                raise LayoutError(
                    f"{self.label}: {name}: its data ends past the end of the file, "
                    "expected a complete file"
                )

    def read(self, name: str, start: int, stop: int, axis: int) -> np.ndarray:
        """As `TensorFile.read`."""
        shape, kind, offset = self._tensors[name]
        _, code = _DTYPES[kind]
        if not math.prod(shape):
            return np.empty(shape, code)
        array: np.ndarray = np.memmap(
            self._path, code, mode="r", offset=self._start + offset, shape=shape
        )
        array = array[start:stop] if axis == 0 else array[:, start:stop]
        return np.array(array)
