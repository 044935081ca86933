# SPDX-License-Identifier: Apache-2.0
"""Lets the tests of this folder import `steering_reference` beside them, and lets
Triton's interpreter in where vLLM was built for a CPU."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))

if os.environ.get("TRITON_INTERPRET") == "1":
    # vLLM's CPU build turns Triton off unless it has a backend of this name. Kernels
    # that the interpreter runs use none.
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: False)
    backends.setdefault("cpu", SimpleNamespace(driver=driver, compiler=None))
