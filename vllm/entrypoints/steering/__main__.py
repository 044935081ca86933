# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm.entrypoints.steering` is the `vllm-steering` command."""

import sys

from vllm_steering_cli.main import main

sys.exit(main())
