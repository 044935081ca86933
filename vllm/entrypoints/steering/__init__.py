# SPDX-License-Identifier: Apache-2.0
"""Command line for steering modules: `python -m vllm.entrypoints.steering`."""
