# SPDX-License-Identifier: Apache-2.0
"""What the stages of one pipeline share, and what the device can do."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Self

import torch

from vllm.config.steering import Tier
from vllm.config.steering_json import Json
from vllm.model_executor.layers.steering_clamp_table import ClampTable
from vllm.model_executor.layers.steering_read_state import ReadBuffers
from vllm.model_executor.layers.steering_state import SAESlot, StepState
from vllm.model_executor.layers.steering_stream import encoder_input

from .peers import Peers
from .workspace import StageBuffers, SteeringWorkspace, uses_threshold, uses_topk


@functools.cache
def device_facts(device: torch.device) -> tuple[int, bool, bool]:
    """(multiprocessors, has TMA, can overlap dependent launches) of a device."""
    if device.type != "cuda":
        return 4, False, False
    properties = torch.cuda.get_device_properties(device)
    hopper = properties.major >= 9
    return properties.multi_processor_count, hopper, hopper


def stream_arguments(hidden: torch.Tensor, residual: torch.Tensor | None) -> Json:
    """The stream as Triton kernels take it; `hidden` stands in for no residual."""
    return {
        "hidden": hidden,
        "residual": hidden if residual is None else residual,
        "hidden_stride": hidden.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
        "HAS_RESIDUAL": residual is not None,
    }


def pdl_options(device: torch.device) -> Json:
    """Launch options that let a kernel's prologue overlap its predecessor's end."""
    on = device_facts(device)[2]
    return {"PDL": True, "launch_pdl": True} if on else {"PDL": False}


@dataclass(frozen=True)
class Run:
    """What the stages of one pipeline share.

    Attributes:
        gate: -1 takes any module, 0 only threshold ones, 1 only TopK.
        source: what a transcoder reads.
        reads: who reads on the way, in the extension's decoder; None: nobody.
        edits: False where no token is to be changed, whatever its row.
        own_scores: float32 `[rows, F / size]`, where the encoder of a shared TopK SAE
            writes; None: to the workspace.
        own_index: int32 `[T]`, the tokens' rows; None: those of the step.
        peers: the memory through which ranks share the SAE in the extension's kernels.
    """

    slot: SAESlot
    step: StepState
    workspace: SteeringWorkspace
    buffers: StageBuffers
    hidden: torch.Tensor
    residual: torch.Tensor | None
    tier: Tier
    topk: bool
    gate: int
    source: torch.Tensor | None = None
    reads: ReadBuffers | None = None
    edits: bool = True
    own_scores: torch.Tensor | None = None
    own_index: torch.Tensor | None = None
    peers: Peers | None = None

    @classmethod
    def over(
        cls,
        slot: SAESlot,
        step: StepState,
        workspace: SteeringWorkspace,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        *,
        tier: Tier,
        topk: bool,
        capacity: int | None = None,
        source: torch.Tensor | None = None,
        reads: ReadBuffers | None = None,
        edits: bool = True,
    ) -> Self:
        """A pipeline over the step, with views of the workspace for its length.

        Args:
            capacity: the most that a list needs to hold; None: as much as fits.

        Raises:
            ValueError: the workspace was built for fewer tokens.
        """
        tokens = hidden.shape[0]
        if tokens > workspace.max_tokens:
            raise ValueError(
                f"steering: {tokens} tokens, workspace built for {workspace.max_tokens}"
            )
        mixed = uses_threshold(slot) and uses_topk(slot)
        return cls(
            slot=slot,
            step=step,
            workspace=workspace,
            buffers=workspace.buffers(slot, tokens, topk, capacity),
            hidden=hidden,
            residual=residual,
            tier=tier,
            topk=topk,
            gate=int(topk) if mixed else -1,
            source=source,
            reads=reads,
            edits=edits,
        )

    @property
    def table(self) -> ClampTable:
        return self.slot.full if self.tier is Tier.FULL else self.slot.delta

    @property
    def tokens(self) -> torch.Tensor:
        """int32: which token each active row is; -1: none, its norm is too large."""
        return self.workspace.tokens

    @property
    def encoded(self) -> torch.Tensor:
        """What the encoder writes: scores of TopK, else entries."""
        if self.own_scores is not None:
            return self.own_scores
        return self.buffers.scores if self.topk else self.buffers.entries

    @property
    def d_out(self) -> int:
        """Columns that this rank decodes."""
        return self.slot.weights.W_dec.shape[1]

    @property
    def saturated(self) -> torch.Tensor:
        """The counter of limited write-backs."""
        return self.slot.saturated

    @property
    def read(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the encoder reads: the source of a transcoder, else the stream."""
        return encoder_input(self.hidden, self.residual, self.source)

    @property
    def index(self) -> torch.Tensor:
        if self.own_index is not None:
            return self.own_index
        return self.step.index[self.tier] if self.edits else self.step.no_rows
