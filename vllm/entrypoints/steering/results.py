# SPDX-License-Identifier: Apache-2.0
"""Lists whose parts have their methods, such as `to_pandas`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self, SupportsIndex, TypeVar, overload

T = TypeVar("T")


class Results(list[T]):
    """A list; a slice of it, and a sum with another, is of its own class."""

    @overload
    def __getitem__(self, at: SupportsIndex, /) -> T: ...

    @overload
    def __getitem__(self, at: slice, /) -> Self: ...

    def __getitem__(self, at: SupportsIndex | slice, /) -> T | Self:
        if isinstance(at, slice):
            return type(self)(super().__getitem__(at))
        return super().__getitem__(at)

    def __add__(self, other: Iterable[T], /) -> Self:  # type: ignore[override]
        return type(self)([*self, *other])
