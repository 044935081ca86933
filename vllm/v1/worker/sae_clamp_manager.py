# SPDX-License-Identifier: Apache-2.0
"""Rows of the SAE delta tier."""

from vllm.config.steering import Tier
from vllm.v1.worker.steering_manager import RowManager


class SAEClampManager(RowManager):
    """Allocates delta rows: `acquire(key, edits) -> row`, `release(row)`."""

    tier = Tier.DELTA
