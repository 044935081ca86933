# SPDX-License-Identifier: Apache-2.0
"""GPU kernels of the steering tiers, one stage a file; Triton, with CUDA C++ beside.

`plan` decides sizes (pure functions), `compact`, `encode`, `resolve`, `combine` are the
stages of full reconstruction in order, `clamp` is the delta and additive tiers.
"""
