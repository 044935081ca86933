// SPDX-License-Identifier: Apache-2.0
// Stage 2: p = x W_enc^T + b_enc on Hopper's tensor cores; only non-zeros
// leave. Entries of a token are appended in any order; the decoder sorts them.
#pragma once

#include "pipeline.cuh"

namespace vllm_steering {

template <typename T>
__global__ void __launch_bounds__(kEncodeThreads, 1)
    encode_kernel(const __grid_constant__ EncodeArgs<T> a,
                  const __grid_constant__ EncodeMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw[];
  EncodeMemory& m = encode_memory(raw);
  if (threadIdx.x == kWeightsThread) {
    init_barriers(m);
    for (int i = 0; i < kWidths; ++i) prefetch_map(&maps.x[i]);
  }
  __syncthreads();
  wait_for_previous();
  const int n = a.ws.tokens();
  if (n <= 0) return;
  if (threadIdx.x >= kConsumers) {
    give_registers<40>();
    producer(a, m, maps, n, 0);
  } else {
    take_registers<232>();
    consumer(a, m, n);
  }
#else
  __trap();
#endif
}

}  // namespace vllm_steering
