# SPDX-License-Identifier: Apache-2.0
"""Types of decoded JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# A JSON object. A value is checked where it is read.
Json = dict[str, Any]
# A JSON object that is only read.
JsonView = Mapping[str, Any]
