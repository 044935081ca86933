# SPDX-License-Identifier: Apache-2.0
"""Types of decoded JSON, and records that convert to and from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import msgspec

# A JSON object. A value is checked where it is read.
Json = dict[str, Any]
# A JSON object that is only read.
JsonView = Mapping[str, Any]


class JsonRecord:
    """A dataclass that travels between processes as JSON.

    Its fields, and those of the records in it, have types that msgspec converts.
    """

    def to_json(self) -> Json:
        """JSON types only; the inverse of `from_json`."""
        return msgspec.json.decode(msgspec.json.encode(self))

    @classmethod
    def from_json(cls, data: JsonView) -> Self:
        """Rebuild what `to_json` wrote.

        Raises:
            ValueError: a value is missing, or has another type than its field.
        """
        return msgspec.convert(data, cls)
