# SPDX-License-Identifier: Apache-2.0
"""A seeded chaos run: any schedule, every finished request compared with itself alone.

`python -m tests.soak --help`; `test_soak.py` is a short run.
"""
