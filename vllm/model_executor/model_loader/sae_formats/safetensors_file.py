# SPDX-License-Identifier: Apache-2.0
"""Read a safetensors file through a read-only mapping, header first; write one.

The safetensors package maps a file so that its pages count as memory of this process.
This mapping does not, so a large file can be inspected under a memory limit. Source:
the format's description, https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import numpy as np

from vllm.config.steering_json import Json
from vllm.config.steering_written_files import whole_file
from vllm.model_executor.model_loader.sae_formats.layout import (
    LayoutError,
    each_key_once,
)
from vllm.model_executor.model_loader.sae_formats.tensor_types import (
    FloatType,
    HostTensor,
    TensorInfo,
)

# A header of this size names about 10,000 tensors; an SAE has at most ten a site.
MAX_HEADER_BYTES = 2 << 20
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_NUMPY |= {
    f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind in "IU" for n in (1, 2, 4, 8)
}
_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2}
_ITEM_BYTES |= {"BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class SafetensorsFile:
    """The tensors of a safetensors file; reads are copies."""

    def __init__(self, path: Path):
        self.label = path.name
        self._path = path
        header, self._start = _read_header(path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise LayoutError(f"{path.name}: __metadata__: expected an object")
        self.metadata = {k: v for k, v in metadata.items() if isinstance(v, str)}
        self.infos: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        data_bytes = path.stat().st_size - self._start
        for name, entry in header.items():
            self._describe(name, entry, data_bytes)
        self._check_places(header, data_bytes)

    def _describe(self, name: str, entry: object, data_bytes: int) -> None:
        where = f"{self.label}: {name}"
        if not isinstance(entry, dict):
            raise LayoutError(f"{where}: expected an object in the header")
        kind, shape = entry.get("dtype"), entry.get("shape")
        offsets = entry.get("data_offsets")
        if not isinstance(kind, str) or not _sizes(shape) or not _sizes(offsets, 2):
            raise LayoutError(f"{where}: expected dtype, shape and data_offsets")
        begin, end = offsets
        item_bytes = _ITEM_BYTES.get(kind)
        needed = end - begin if item_bytes is None else math.prod(shape) * item_bytes
        if end - begin != needed or begin > end or end > data_bytes:
            raise LayoutError(
                f"{where}: {kind} {shape} at {offsets} does not fit the {data_bytes} "
                "bytes of data in the file, expected a complete file"
            )
        dtype = FloatType[kind] if kind in FloatType.__members__ else None
        self.infos[name] = TensorInfo(tuple(shape), dtype, kind)
        self._offsets[name] = self._start + begin

    def _check_places(self, header: Json, data_bytes: int) -> None:
        """Every byte of the data belongs to one tensor, as the format requires."""
        done = 0
        for begin, end, name in sorted(
            (*entry["data_offsets"], name) for name, entry in header.items()
        ):
            if begin != done:
                raise LayoutError(
                    f"{self.label}: {name}: begins at byte {begin} of the data, "
                    f"expected {done}, where the tensor before it ends"
                )
            done = end
        if done != data_bytes:
            raise LayoutError(
                f"{self.label}: found {data_bytes} bytes of data, expected {done}, "
                "where the last tensor ends"
            )

    def read(self, name: str, start: int, stop: int, axis: int) -> np.ndarray:
        """As `TensorFile.read`."""
        info = self.infos[name]
        code = _NUMPY[info.stored_as]
        if not math.prod(info.shape):
            return np.empty(info.shape, code)
        array: np.ndarray = np.memmap(
            self._path,
            code,
            mode="r",
            offset=self._offsets[name],
            shape=info.shape or (1,),
        )
        if not info.shape:
            return np.array(array).reshape(())
        return np.array(array[start:stop] if axis == 0 else array[:, start:stop])


def _sizes(value: object, length: int | None = None) -> TypeGuard[list[int]]:
    """Whether a value is a list of sizes, of this length if one is given."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and length in (None, len(value))
        and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
    )


def _read_header(path: Path) -> tuple[Json, int]:
    """The header, and the offset where the data begins."""
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise LayoutError(
                f"{path.name}: too short for a safetensors file, expected a complete "
                "one"
            )
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise LayoutError(
                f"{path.name}: safetensors header of {header_bytes} bytes, expected at "
                f"most {MAX_HEADER_BYTES}"
            )
        content = stream.read(header_bytes)
    if len(content) < header_bytes:
        raise LayoutError(
            f"{path.name}: not a safetensors file: its header is cut off, expected a "
            "complete file"
        )
    try:
        header = json.loads(content.decode(), object_pairs_hook=each_key_once)
    except (ValueError, RecursionError) as error:
        detail = (str(error).splitlines() or [""])[0]
        raise LayoutError(f"{path.name}: not a safetensors file: {detail}") from error
    if not isinstance(header, dict):
        raise LayoutError(f"{path.name}: not a safetensors file: no JSON object")
    return header, 8 + header_bytes


def write_safetensors(path: Path, tensors: Mapping[str, HostTensor]) -> None:
    """Write tensors as the safetensors package would, to the byte.

    Wider elements come first, and names are sorted, so that all data is aligned. A file
    that is there is replaced when all is written: a process that reads it goes on.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: Json = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.data.nbytes
        header[name] = {
            "dtype": tensor.dtype.name,
            "shape": list(tensor.data.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(np.ascontiguousarray(tensors[name].data).data)
