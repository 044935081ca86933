# SPDX-License-Identifier: Apache-2.0
"""What the sizes of a worker's steering buffers follow from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm.config import VllmConfig
from vllm.config.steering import SteeringConfig
from vllm.config.steering_points import PointWidths, point_widths


@dataclass(frozen=True)
class SteeringShape:
    """Sizes, type and place of a worker's steering buffers.

    Attributes:
        num_rows: of every table; row 0 is not steered.
        max_clamps: in a row of an SAE's table.
        max_tokens: that a forward can have, padding included.
        vocab_size: bound of token ids, for the skip sets.
        widths: of the points of the model's layers.
        dtype, device: of the model's activations.
        max_read: values that a request reads of a token at a site, at most; 0 if none
            may read.
    """

    num_rows: int
    max_clamps: int
    max_tokens: int
    vocab_size: int
    widths: PointWidths
    dtype: torch.dtype
    device: torch.device
    max_read: int

    @classmethod
    def of_worker(
        cls, vllm_config: VllmConfig, steering: SteeringConfig, device: torch.device
    ) -> SteeringShape:
        """The shape of a worker of an engine."""
        scheduler = vllm_config.scheduler_config
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        model_config = vllm_config.model_config
        return cls(
            num_rows=steering.max_pieces * scheduler.max_num_seqs + 1,
            max_clamps=steering.max_clamps,
            max_tokens=max(scheduler.max_num_batched_tokens, captured),
            vocab_size=model_config.get_vocab_size(),
            widths=point_widths(model_config),
            dtype=model_config.dtype,
            device=device,
            max_read=steering.max_read_values if steering.readout else 0,
        )
