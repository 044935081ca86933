// SPDX-License-Identifier: Apache-2.0
// How kernels with a block a token are launched (clamp_kernel.cuh).
#pragma once

#include <algorithm>

#include "checks.h"
#include "clamp_kernel.cuh"

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

template <typename T, typename W>
int source_width(const ClampArgs<T, W>& a) {
  return a.source != nullptr ? a.weights.d_in : 0;
}

template <typename T, typename W>
int threads_of(const ClampArgs<T, W>& a) {
  return clamp_threads(std::max(a.d_model, source_width(a)));
}

template <typename T, typename W>
int smem_of(const ClampArgs<T, W>& a, int threads) {
  return clamp_smem(threads, a.d_model, source_width(a),
                    a.step.table.max_clamps);
}

// `blocks` tokens; `args` is `a`, or holds it.
template <typename Args, typename T, typename W>
void launch_blocks(void (*kernel)(Args), const Args& args,
                   const ClampArgs<T, W>& a, int blocks, cudaStream_t stream) {
  const int threads = threads_of(a), smem = smem_of(a, threads);
  share_l1(kernel, smem);
  launch(kernel, blocks, threads, smem, stream, args);
}

}  // namespace vllm_steering
