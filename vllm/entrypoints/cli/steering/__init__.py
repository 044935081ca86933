# SPDX-License-Identifier: Apache-2.0
"""The `vllm-steering` command: inspect, convert and probe steering modules."""
