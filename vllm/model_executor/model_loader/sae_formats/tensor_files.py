# SPDX-License-Identifier: Apache-2.0
"""Tensor files read piece by piece: safetensors, npz, npy, torch zip files and GGUF.

Every reader lists names, shapes and dtypes without reading data. It reads one slice of
one tensor at a time. It refuses files that could run code or exhaust memory. Data stays
in the file's pages, except for a compressed npz member, which is read whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vllm.model_executor.model_loader.sae_formats.gguf_file import GGUFFile
from vllm.model_executor.model_loader.sae_formats.layout import LayoutError
from vllm.model_executor.model_loader.sae_formats.npz_file import NpzFile, open_npz
from vllm.model_executor.model_loader.sae_formats.safetensors_file import (
    SafetensorsFile,
)
from vllm.model_executor.model_loader.sae_formats.tensor_types import (
    FloatType,
    TensorFile,
    check_file,
)
from vllm.model_executor.model_loader.sae_formats.torch_zip import open_torch

if TYPE_CHECKING:
    import torch


def _broken(label: str, error: Exception) -> LayoutError:
    """The error for a file that its parser fails on, whatever the parser raises."""
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
    check_file(path)
    with contextlib.ExitStack() as stack:
        try:
            tensors = opener(path, stack)
        except LayoutError:
            raise
        except Exception as error:
            raise _broken(path.name, error) from error
        yield tensors


def read_array(
    tensors: TensorFile, name: str, start: int, stop: int, axis: int = 0
) -> np.ndarray:
    """`TensorFile.read`, with every failure of the parser as a `LayoutError`."""
    try:
        return tensors.read(name, start, stop, axis)
    except Exception as error:
        raise _broken(f"{tensors.label}: {name}", error) from error


def read_slice(
    tensors: TensorFile, name: str, start: int, stop: int, axis: int = 0
) -> torch.Tensor:
    """As `read_array`, as a tensor of the stored dtype on the CPU."""
    import torch

    value = torch.from_numpy(read_array(tensors, name, start, stop, axis))
    is_bfloat16 = tensors.infos[name].dtype is FloatType.BF16
    return value.view(torch.bfloat16) if is_bfloat16 else value


def _open_npz(path: Path, stack: contextlib.ExitStack) -> TensorFile:
    tensors, archive = open_npz(path)
    stack.enter_context(archive)
    return tensors


_OPENERS: dict[str, Callable[[Path, contextlib.ExitStack], TensorFile]] = {
    ".safetensors": lambda path, stack: SafetensorsFile(path),
    ".npz": _open_npz,
    ".npy": lambda path, stack: NpzFile(path, None),
    ".pt": lambda path, stack: open_torch(path),
    ".pth": lambda path, stack: open_torch(path),
    ".gguf": lambda path, stack: GGUFFile(path),
}
