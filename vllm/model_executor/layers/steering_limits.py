# SPDX-License-Identifier: Apache-2.0
"""The largest numbers that steering computes with, so that the model stays finite."""

from __future__ import annotations

import torch

from vllm.config.steering_points import HookPoint

# The largest component that a tier writes back, by the model's dtype. Two such
# components add up without overflow, and float32 holds the sum of squares of 2^16 of
# them. So whatever reads the stream next stays finite.
STREAM_LIMIT = {
    torch.bfloat16: 2.0**56,
    torch.float32: 2.0**56,
    torch.float16: 2.0**15,
}
# The largest component at points outside the residual stream. These limits are lower,
# because nothing normalises these points before they are multiplied or added. The
# product of two projections of `mlp_in` stays below 2^56 after the down projection, and
# so do the sums of many layers' `attn_out` and `mlp_out`. Float16's range is too small
# for this: see `steering_site_checks`.
POINT_LIMIT = {
    HookPoint.ATTN_Z: 2.0**40,
    HookPoint.ATTN_OUT: 2.0**48,
    HookPoint.MLP_IN: 2.0**16,
    HookPoint.MLP_OUT: 2.0**48,
}
# The largest coefficient of a direction (see `steering_reference`). The sum of a
# thousand such clamps does not overflow float32 if the directions' components are below
# 2^20.
COEFFICIENT_LIMIT = 2.0**96
# `SAEWeights.norm_limit` without a norm guard: every finite float32 norm is allowed.
NO_NORM_LIMIT = torch.finfo(torch.float32).max
