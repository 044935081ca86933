# SPDX-License-Identifier: Apache-2.0
"""Layouts of an engine over ranks under which steering would be wrong.

The per-token index assumes that a forward's tokens are the step's tokens in batch
order, and that every rank of a tensor-parallel group has the whole stream of them.
Tensor, pipeline and data parallelism keep it so, and expert parallelism over the ranks
of one tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.config.steering_checks import SteeringConfigError, shown

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

SPLIT = "each rank of a tensor-parallel group would have a part of the tokens"


@dataclass(frozen=True)
class Layout:
    """One field of vLLM's configuration that asks for such a layout.

    path: of the field. found: its value. feature: what it is, and why it is refused.
    expected: what would be accepted.
    """

    path: str
    found: object
    feature: str
    expected: str

    @property
    def refusal(self) -> str:
        """The message, in one line."""
        return (
            f"{self.path}: found {shown(self.found)}, which is {self.feature}; "
            f"steering expects {self.expected}"
        )


def refuse_layouts(vllm_config: VllmConfig) -> None:
    """Raise `SteeringConfigError` for a layout under which steering would be wrong."""
    for layout in (
        *_split_experts(vllm_config.parallel_config),
        *_split_layers(vllm_config),
        *_split_batches(vllm_config.parallel_config),
    ):
        raise SteeringConfigError(layout.refusal)


def _split_experts(parallel: ParallelConfig) -> Iterator[Layout]:
    if parallel.use_sequence_parallel_moe:
        tp, dp = parallel.tensor_parallel_size, parallel.data_parallel_size
        yield Layout(
            "parallel_config.all2all_backend",
            parallel.all2all_backend,
            f"sequence parallelism with expert parallelism over {dp} data-parallel "
            f"groups of {tp} ranks: {SPLIT}",
            "one of tensor, data and expert parallelism less "
            "(--tensor-parallel-size 1, --data-parallel-size 1, or no "
            "--enable-expert-parallel)",
        )
    if parallel.enable_elastic_ep:
        yield Layout(
            "parallel_config.enable_elastic_ep",
            True,
            "elastic expert parallelism: ranks that start later would lack the "
            "modules that were registered before",
            "no --enable-elastic-ep",
        )


def _split_layers(vllm_config: VllmConfig) -> Iterator[Layout]:
    """Sequence parallelism around a layer's norms; not every release has all of it."""
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size == 1:
        return
    fields = {
        "compilation_config.pass_config": vars(
            vllm_config.compilation_config.pass_config
        ),
        "parallel_config": vars(parallel),
    }
    for where, name in (
        ("compilation_config.pass_config", "enable_sp"),
        ("compilation_config.pass_config", "fuse_gemm_comms"),
        ("parallel_config", "enable_hc_sp"),
    ):
        if found := fields[where].get(name):
            yield Layout(
                f"{where}.{name}", found, f"sequence parallelism: {SPLIT}", "false"
            )


def _split_batches(parallel: ParallelConfig) -> Iterator[Layout]:
    if parallel.use_ubatching:
        by_size = parallel.ubatch_size > 1
        yield Layout(
            "parallel_config." + ("ubatch_size" if by_size else "enable_dbo"),
            parallel.ubatch_size if by_size else True,
            "micro-batching: a forward would have a part of the step's tokens",
            "neither --enable-dbo nor --ubatch-size",
        )
    if parallel.prefill_context_parallel_size > 1:
        yield Layout(
            "parallel_config.prefill_context_parallel_size",
            parallel.prefill_context_parallel_size,
            "prefill context parallelism: each rank would have a part of a prompt",
            "1",
        )
