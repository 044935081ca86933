# SPDX-License-Identifier: Apache-2.0
"""Results as data frames, where pandas is installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas


def data_frame(
    rows: Iterable[Mapping[str, object]], columns: Sequence[str]
) -> pandas.DataFrame:
    """A frame with these columns, which an empty one has too.

    Raises:
        ImportError: pandas is not installed.
    """
    return _pandas().DataFrame(list(rows), columns=list(columns))


def frame_of_columns(columns: Mapping[str, np.ndarray]) -> pandas.DataFrame:
    """A frame of arrays of the same length; much faster than row by row.

    Raises:
        ImportError: pandas is not installed.
    """
    return _pandas().DataFrame(dict(columns))


def _pandas() -> ModuleType:
    try:
        import pandas
    except ImportError:
        raise ImportError(
            "to_pandas() needs pandas, which is not installed: pip install pandas"
        ) from None
    return pandas
