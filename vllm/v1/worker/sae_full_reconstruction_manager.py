# SPDX-License-Identifier: Apache-2.0
"""Rows of the full-reconstruction tier."""

from vllm.config.steering import Tier
from vllm.v1.worker.steering_manager import RowManager


class SAEFullReconstructionManager(RowManager):
    """Allocates full-reconstruction rows: `acquire(key, edits)`, `release(row)`."""

    tier = Tier.FULL
