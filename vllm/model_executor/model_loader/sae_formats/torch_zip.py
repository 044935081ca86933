# SPDX-License-Identifier: Apache-2.0
"""Read what `torch.save` wrote, without unpickling it.

A torch file is a zip archive: `data.pkl` describes the tensors, `data/KEY` holds their
bytes. This reader knows the pickle instructions that plain data and tensors need, and
refuses every other one. It imports nothing, calls nothing and hashes only strings and
numbers, so its time and memory are bounded by the size of `data.pkl`, which is limited.
Tensor bytes stay in the file until they are read.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from vllm.model_executor.model_loader.sae_formats.layout import LayoutError
from vllm.model_executor.model_loader.sae_formats.tensor_types import (
    FloatType,
    TensorInfo,
    open_zip,
    stored_member_offset,
)

# Describes about 10,000 tensors.
MAX_PICKLE_BYTES = 1 << 20
MAX_DIMENSIONS = 8
MAX_ARGUMENTS = 16
# The name of the one tensor of a file that holds nothing else.
BARE = "tensor"

# Storage class in the pickle -> PyTorch's name of its dtype, and how NumPy reads its
# elements.
_STORAGES: dict[str, tuple[str, str]] = {
    "DoubleStorage": ("float64", "<f8"),
    "FloatStorage": ("float32", "<f4"),
    "HalfStorage": ("float16", "<f2"),
    "BFloat16Storage": ("bfloat16", "<u2"),
    "LongStorage": ("int64", "<i8"),
    "IntStorage": ("int32", "<i4"),
    "ShortStorage": ("int16", "<i2"),
    "CharStorage": ("int8", "<i1"),
    "ByteStorage": ("uint8", "<u1"),
    "BoolStorage": ("bool", "?"),
}
_FLOATS = {kind.value: kind for kind in FloatType}
_DICTS = ("collections OrderedDict", "builtins dict", "__builtin__ dict")
_TENSORS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
_PARAMETERS = ("torch._utils _rebuild_parameter",)


@dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to; never imported."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    kind: str


@dataclass(frozen=True)
class _Tensor:
    """A tensor's place in its storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_MARK = object()


class _Pickle:
    """Reads plain data and tensor descriptions from pickled bytes.

    Raises:
        LayoutError: an instruction, a call or a key that is refused.
    """

    def __init__(self, data: bytes, label: str):
        self.data = data
        self.label = label
        self.at = 0
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}

    def refuse(self, what: str) -> LayoutError:
        return LayoutError(
            f"{self.label}: expected a state dict of tensors and plain data, found "
            f"{what}; it was not run"
        )

    def load(self) -> object:
        """The pickled value."""
        while True:
            code = self.take(1)
            if code == b".":
                return self.stack.pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise self.refuse(f"pickle instruction {code!r}")
            operation(self)

    def take(self, count: int) -> bytes:
        part = self.data[self.at : self.at + count]
        if len(part) < count:
            raise LayoutError(f"{self.label}: data.pkl is cut off")
        self.at += count
        return part

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise LayoutError(f"{self.label}: data.pkl is cut off")
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def string(self, code: str) -> None:
        self.stack.append(self.take(self.number(code)).decode())

    def since_mark(self) -> list[object]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise LayoutError(f"{self.label}: data.pkl is malformed")

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise LayoutError(f"{self.label}: data.pkl is malformed")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a nested key can take time that doubles with each level.
            if type(key) not in (str, int, float, bool, type(None)):
                raise self.refuse(f"a key of type {type(key).__name__}")
            target[key] = value

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise LayoutError(f"{self.label}: data.pkl is malformed")
        target.extend(items)

    def global_name(self, name: str) -> None:
        self.stack.append(_Global(name))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise LayoutError(f"{self.label}: data.pkl is malformed")
        self.global_name(f"{module} {name}")

    def persistent(self) -> None:
        entry = self.stack.pop()
        if type(entry) is not tuple or len(entry) < 3 or entry[0] != "storage":
            raise self.refuse("a reference that is no storage")
        kind, key = entry[1], entry[2]
        name = kind.name if isinstance(kind, _Global) else ""
        storage = name.removeprefix("torch ")
        if storage not in _STORAGES or type(key) is not str:
            raise self.refuse(f"a storage of {name or type(kind).__name__}")
        self.stack.append(_Storage(key, storage))

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        name = function.name if isinstance(function, _Global) else "?"
        if type(arguments) is not tuple or len(arguments) > MAX_ARGUMENTS:
            raise self.refuse(f"a malformed call of {name[:80]}")
        if name in _TENSORS:
            self.stack.append(self.tensor(arguments))
        elif name in _PARAMETERS and arguments:
            self.stack.append(arguments[0])
        elif name in _DICTS and not arguments:
            self.stack.append({})
        else:
            raise self.refuse(f"a call of {name.replace(' ', '.')[:80]}")

    def tensor(self, arguments: tuple[object, ...]) -> _Tensor:
        storage, offset, shape, stride = (*arguments, *(None,) * 4)[:4]
        if (
            not isinstance(storage, _Storage)
            or not _are_sizes(shape)
            or not _are_sizes(stride)
            or len(shape) != len(stride)
            or not _is_size(offset)
        ):
            raise LayoutError(f"{self.label}: data.pkl: a tensor is malformed")
        return _Tensor(storage, offset, shape, stride)

    def build(self) -> None:
        """Skip the attributes of a dict, such as a state dict's `_metadata`."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise self.refuse("an object with attributes")

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise LayoutError(f"{self.label}: data.pkl is malformed")
        self.stack.append(self.memo[index])


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 62


def _are_sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    # The length first: a long tuple may be referred to many times.
    return (
        type(value) is tuple
        and len(value) <= MAX_DIMENSIONS
        and all(_is_size(n) for n in value)
    )


def _push(value: Callable[[], object]) -> Callable[[_Pickle], None]:
    return lambda p: p.stack.append(value())


_OPERATIONS: dict[bytes, Callable[[_Pickle], object]] = {
    b"\x80": lambda p: p.take(1),  # PROTO
    b"\x95": lambda p: p.take(8),  # FRAME
    b"(": lambda p: p.stack.append(_MARK),
    b"N": _push(lambda: None),
    b"\x88": _push(lambda: True),
    b"\x89": _push(lambda: False),
    b")": _push(tuple),
    b"}": _push(dict),
    b"]": _push(list),
    b"J": lambda p: p.stack.append(p.number("i")),  # BININT
    b"K": lambda p: p.stack.append(p.number("B")),  # BININT1
    b"M": lambda p: p.stack.append(p.number("H")),  # BININT2
    b"\x8a": lambda p: p.stack.append(  # LONG1
        int.from_bytes(p.take(p.number("B")), "little", signed=True)
    ),
    b"G": lambda p: p.stack.append(struct.unpack(">d", p.take(8))[0]),  # BINFLOAT
    b"X": lambda p: p.string("I"),  # BINUNICODE
    b"\x8c": lambda p: p.string("B"),  # SHORT_BINUNICODE
    b"t": lambda p: p.stack.append(tuple(p.since_mark())),
    b"\x85": lambda p: p.tuple_of(1),
    b"\x86": lambda p: p.tuple_of(2),
    b"\x87": lambda p: p.tuple_of(3),
    b"s": lambda p: p.set_items([p.stack.pop(), p.stack.pop()][::-1]),
    b"u": lambda p: p.set_items(p.since_mark()),
    b"a": lambda p: p.append([p.stack.pop()]),
    b"e": lambda p: p.append(p.since_mark()),
    b"c": lambda p: p.global_name(f"{p.line()} {p.line()}"),
    b"\x93": lambda p: p.stack_global(),
    b"Q": lambda p: p.persistent(),
    b"R": lambda p: p.call(),
    b"b": lambda p: p.build(),
    b"q": lambda p: p.remember(p.number("B")),  # BINPUT
    b"r": lambda p: p.remember(p.number("I")),  # LONG_BINPUT
    b"\x94": lambda p: p.remember(len(p.memo)),  # MEMOIZE
    b"h": lambda p: p.recall(p.number("B")),  # BINGET
    b"j": lambda p: p.recall(p.number("I")),  # LONG_BINGET
}


class TorchZipFile:
    """The tensors of a state dict that `torch.save` wrote, or the one tensor."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.label = path.name
        self.metadata: dict[str, str] = {}
        self._path = path
        self._members = {item.filename: item for item in archive.infolist()}
        if any(i.compress_type != zipfile.ZIP_STORED for i in self._members.values()):
            raise LayoutError(
                f"{path.name}: found compressed members, expected a file of torch.save"
            )
        pickles = [name for name in self._members if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise LayoutError(
                f"{path.name}: expected a torch zip file (torch.save of torch 1.6 or "
                "later), found another format; save it again with torch.save"
            )
        self._root = pickles[0].removesuffix("data.pkl")
        if self._small_member("byteorder", b"little") != b"little":
            raise LayoutError(f"{path.name}: byteorder: expected little")
        state = _Pickle(self._small_member("data.pkl", b""), path.name).load()
        self._tensors = {
            name: (value, *self._place(name, value))
            for name, value in _named_tensors(state, path.name).items()
        }
        self.infos = {
            name: _info(value) for name, (value, _, _) in self._tensors.items()
        }

    def read(self, name: str, start: int, stop: int, axis: int) -> np.ndarray:
        """As `TensorFile.read`; a copy."""
        value, offset, elements = self._tensors[name]
        _, code = _STORAGES[value.storage.kind]
        if not elements:
            return np.empty(value.shape, code)
        flat: np.ndarray = np.memmap(
            self._path, dtype=code, mode="r", offset=offset, shape=(elements,)
        )
        item_bytes = flat.itemsize
        array = np.lib.stride_tricks.as_strided(
            flat, value.shape, tuple(n * item_bytes for n in value.stride)
        )
        if array.ndim:
            array = array[start:stop] if axis == 0 else array[:, start:stop]
        return np.array(array)

    def _small_member(self, name: str, default: bytes) -> bytes:
        item = self._members.get(self._root + name)
        if item is None:
            return default
        if item.file_size > MAX_PICKLE_BYTES:
            raise LayoutError(
                f"{self.label}: {name}: expected at most {MAX_PICKLE_BYTES} bytes, "
                f"found {item.file_size}"
            )
        with self._path.open("rb") as stream:
            stream.seek(stored_member_offset(self._path, item))
            return stream.read(item.file_size)

    def _place(self, name: str, value: _Tensor) -> tuple[int, int]:
        """Byte offset of a tensor's first element, and how many elements it spans."""
        item = self._members.get(f"{self._root}data/{value.storage.key}")
        if item is None:
            raise LayoutError(f"{self.label}: {name}: its storage is missing")
        item_bytes = np.dtype(_STORAGES[value.storage.kind][1]).itemsize
        spans = 0
        if math.prod(value.shape):
            steps = zip(value.shape, value.stride, strict=True)
            spans = 1 + sum((n - 1) * step for n, step in steps)
        # A view with stride zero can claim any size over a few bytes.
        if (value.offset + spans) * item_bytes > item.file_size or math.prod(
            value.shape
        ) * item_bytes > item.file_size:
            raise LayoutError(
                f"{self.label}: {name}: expected a dense tensor no larger than the "
                f"file, found {list(value.shape)}"
            )
        start = stored_member_offset(self._path, item)
        return start + value.offset * item_bytes, spans


def _info(value: _Tensor) -> TensorInfo:
    name = _STORAGES[value.storage.kind][0]
    return TensorInfo(value.shape, _FLOATS.get(name), f"torch.{name}")


def _named_tensors(state: object, label: str) -> dict[str, _Tensor]:
    """The tensors of a state dict; a bare tensor is named `BARE`."""
    if isinstance(state, _Tensor):
        return {BARE: state}
    if type(state) is not dict:
        raise LayoutError(
            f"{label}: expected a state dict, found {type(state).__name__}"
        )
    return {str(k): v for k, v in state.items() if isinstance(v, _Tensor)}


def open_torch(path: Path) -> TorchZipFile:
    """The tensors of a torch file.

    Raises:
        LayoutError: another format, or contents that are refused.
    """
    with path.open("rb") as stream:
        if stream.read(2) != b"PK":
            raise LayoutError(
                f"{path.name}: expected a torch zip file (torch.save of torch 1.6 or "
                "later), found another format; save it again with torch.save"
            )
    with open_zip(path) as archive:
        return TorchZipFile(path, archive)
