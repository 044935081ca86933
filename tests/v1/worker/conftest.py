# SPDX-License-Identifier: Apache-2.0
"""Files of modules that the tests of running engines register."""

from __future__ import annotations

import pytest
from steering_testing.hot_modules import save_modules


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The paths of `hot_modules.KINDS` and of a vector, by name; do not write there."""
    return save_modules(tmp_path_factory.mktemp("saes"))
