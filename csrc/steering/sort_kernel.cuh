// SPDX-License-Identifier: Apache-2.0
// Stage 3 for many tokens: one block a token sorts its entries in place and
// writes coef = g - f of its clamps.
#pragma once

#include "decode.cuh"

namespace vllm_steering {

template <typename T>
__global__ void __launch_bounds__(kDecodeThreads)
    sort_kernel(const __grid_constant__ DecodeArgs<T> a) {
  __shared__ int2 list[kListMax];
  __shared__ __align__(16) int features[kListMax];
  launch_dependents();
  wait_for_previous();
  const int n = a.ws.tokens();
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const TokenRecord* record = a.ws.records + i;
    const int token = record->token, listed = record->listed;
    if (token < 0) continue;
    if (listed > kListMax) {
      if (threadIdx.x == 0) note_dense(a.ws, i);
      continue;
    }
    int64_t* own = a.ws.entries + i * a.ws.capacity;
    __syncthreads();
    sort_entries(load_entries(own, listed), listed, list, features);
    for (int e = threadIdx.x; e < listed; e += kDecodeThreads)
      own[e] = pack_entry(list[e].x, __int_as_float(list[e].y));
    if (a.resolved) continue;
    const ClampRow row = a.table.row(record->row);
    for (int c = threadIdx.x; c < row.count(); c += kDecodeThreads)
      a.ws.coef[i * row.max_clamps + c] = clamp_delta(
          row, c, [listed](int f) { return find_feature(list, listed, f); });
  }
}

}  // namespace vllm_steering
