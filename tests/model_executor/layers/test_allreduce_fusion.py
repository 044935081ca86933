# SPDX-License-Identifier: Apache-2.0
"""vLLM fuses an all-reduce with the norm behind it. A site between them keeps the
all-reduce, so the stream is whole there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.pattern_matcher import (
    PatternMatcherPass,
    fwd_only,
    register_replacement,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import vllm.distributed.parallel_state
import vllm.ir.ops
import vllm.model_executor.layers.sae_full_reconstruction
import vllm.model_executor.layers.sae_steering
import vllm.model_executor.layers.steering

Streams = tuple[torch.Tensor, torch.Tensor]
GROUP, EPSILON = "tp:0", 1e-6


class Counted(Exception):
    """Ends a compilation once its graph has been seen."""


def reduce_and_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    site: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> Streams:
    """What stands between two layers, with a site's op or without."""
    hidden = torch.ops.vllm.all_reduce(x, GROUP)
    if site is not None:
        site(hidden, residual)
    return vllm.ir.ops.fused_add_rms_norm(hidden, residual, weight, EPSILON)


def fusions(site: Callable[[torch.Tensor, torch.Tensor], None] | None) -> int:
    """In how many places of the compiled graph vLLM's pattern matches."""
    patterns, seen = PatternMatcherPass(), []

    def pattern(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> Streams:
        return reduce_and_norm(x, residual, w)

    def fused(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> Streams:
        return x + w, residual + w

    with FakeTensorMode():
        shapes = [torch.empty(5, 16), torch.empty(5, 16), torch.empty(16)]
        register_replacement(pattern, fused, shapes, fwd_only, patterns)

    def compiler(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        seen.append(patterns.apply(module.graph))
        raise Counted

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, residual, w: reduce_and_norm(x, residual, w, site),
        backend=aot_autograd(fw_compiler=compiler),
        fullgraph=True,
    )
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Counted"):
        compiled(torch.empty(5, 16), torch.empty(5, 16), torch.empty(16))
    (found,) = seen
    return found


def test_without_a_site_the_all_reduce_is_fused() -> None:
    assert fusions(None) == 1


@pytest.mark.parametrize(
    "op", ["apply_steering_vectors", "apply_sae_clamp", "apply_sae_full_reconstruction"]
)
def test_a_site_sees_what_the_all_reduce_has_summed(op: str) -> None:
    def site(hidden: torch.Tensor, residual: torch.Tensor) -> None:
        getattr(torch.ops.vllm, op)(hidden, residual, "site")

    assert fusions(site) == 0
