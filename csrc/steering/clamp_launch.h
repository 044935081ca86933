// SPDX-License-Identifier: Apache-2.0
// How kernels with a block a token are launched (clamp_kernel.cuh).
#pragma once

#include <algorithm>

#include "clamp_kernel.cuh"
#include "held.h"

namespace vllm_steering {

// Leaves the shared memory that two blocks per SM do not need to L1: blocks
// that read the same rows at the same time get them from there.
template <typename Kernel>
void share_l1(Kernel* kernel, int smem) {
  constexpr int kReserved = 2 * 1024;  // the system's, and the static part
  static const int all =
      current_device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int bytes = 2 * (smem + kReserved);
  const int percent = (bytes * 100 + all - 1) / all;
  check_cuda(cudaFuncSetAttribute(
                 kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                 std::min(percent, 100)),
             "carveout");
}

// `blocks` tokens; `args` is `a`, or holds it.
template <typename Args, typename T, typename W>
void launch_blocks(void (*kernel)(Args), const Args& args,
                   const ClampArgs<T, W>& a, int blocks, cudaStream_t stream) {
  const int d_source = a.source != nullptr ? a.weights.d_in : 0;
  const int threads = clamp_threads(std::max(a.d_model, d_source));
  const int smem =
      clamp_smem(threads, a.d_model, d_source, a.step.table.max_clamps);
  share_l1(kernel, smem);
  launch(kernel, blocks, threads, smem, stream, args);
}

}  // namespace vllm_steering
