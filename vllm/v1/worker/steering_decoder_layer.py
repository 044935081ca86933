# SPDX-License-Identifier: Apache-2.0
"""Runs the forward that checks an unknown layer class (`decoder_layer: "auto"`)."""

from __future__ import annotations

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.steering_auto_family import (
    TOKENS,
    trust_unknown_layers,
)
from vllm.model_executor.layers.steering_families import (
    has_known_layers,
    refuse_unfit_layers,
)
from vllm.model_executor.models.interfaces import supports_multimodal

logger = init_logger(__name__)


def try_unknown_layers(
    model: nn.Module, vllm_config: VllmConfig, device: torch.device
) -> None:
    """Recognise and check the decoder layers of a model that the table does not know.

    Raises:
        ValueError: they do not do what their names say, or cannot be checked here.
    """
    refuse_unfit_layers(model)
    if supports_multimodal(model) or has_known_layers(model):
        return
    ranks = vllm_config.parallel_config.world_size
    if ranks > 1 or vllm_config.lora_config is not None:
        raise ValueError(
            f"steering: decoder_layer auto: found {ranks} ranks"
            + (" and LoRA" if vllm_config.lora_config is not None else "")
            + ", expected one rank without LoRA: the check of an unknown class runs "
            "the whole model"
        )

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        ids = torch.arange(TOKENS, device=device)
        with set_forward_context(
            None, vllm_config, num_tokens=TOKENS, skip_compiled=True
        ):
            return model(input_ids=ids, positions=ids)

    family = trust_unknown_layers(model, forward)
    if family is not None:
        logger.warning(
            "Steering: the decoder layers of %s are in no table. They were recognised "
            "by name (%s), and a forward on made-up values did what the names say.",
            type(model).__name__,
            family,
        )
