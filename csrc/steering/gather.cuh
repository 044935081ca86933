// SPDX-License-Identifier: Apache-2.0
// The decoder for many tokens: lists are sorted once, then a warp owns one
// token and 256 columns of D and needs no shared memory. Slices are the slow
// index of the walk: the part of W_dec being gathered at any moment is narrow
// enough to stay in L2. The eight accumulators are the eight warps of
// decode.cuh and are added in the same order: the same bits for any batch.
#pragma once

#include "decode.cuh"

namespace vllm_steering {

// One block a token: entries sorted in place, coef = g - f of its clamps.
__global__ void __launch_bounds__(kDecodeThreads)
    prepare_kernel(DecodeArgs a, int64_t* entries, float* coef) {
  __shared__ int2 list[kSortMax];
  __shared__ __align__(16) int features[kSortMax];
  launch_dependents();
  wait_for_previous();
  const int n = min(*a.count - a.base, a.rows);
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const int* line = a.lines + i * kLine;
    const int token = line[kToken], listed = line[kListed];
    if (token < 0 || listed > sorted_max(a)) continue;
    int64_t* own = entries + i * a.capacity;
    __syncthreads();
    sort_entries(load_entries(own, listed), listed, list, features);
    for (int e = threadIdx.x; e < listed; e += kDecodeThreads)
      own[e] = static_cast<int64_t>(list[e].x) << 32 |
               static_cast<uint32_t>(list[e].y);
    if (a.coef != nullptr) continue;  // selection has resolved the clamps
    const int* row = a.table + line[kRow] * a.table_stride;
    for (int c = threadIdx.x; c < row[1]; c += kDecodeThreads) {
      const float value = __int_as_float(row[2 + 2 * a.max_clamps + c]);
      const float f = find_feature(list, listed, row[2 + c]);
      coef[i * a.max_clamps + c] =
          clamp_delta(row[2 + a.max_clamps + c], value, f);
    }
  }
}

// acc[u] += the entries whose place in the list is u modulo 8. Lanes past the
// end hold feature 0 with no weight.
template <typename T>
__device__ __forceinline__ void gather_entries(float (&acc)[kDecodeWarps][8],
                                               const int64_t* own, int n,
                                               const T* columns, int d_model) {
  const int lane = threadIdx.x & 31;
  for (int first = 0; first < n; first += 32) {
    const int64_t mine = first + lane < n ? own[first + lane] : 0;
    const int feature = static_cast<int>(mine >> 32),
              bits = static_cast<int>(mine);
    const int most = min(32, n - first);
    for (int j = 0; j < most; j += kDecodeWarps) {
      Vec8<T> w[kDecodeWarps];
#pragma unroll
      for (int u = 0; u < kDecodeWarps; ++u) {
        const int64_t f = __shfl_sync(~0u, feature, j + u);
        w[u] = load8(columns + f * d_model);
      }
#pragma unroll
      for (int u = 0; u < kDecodeWarps; ++u)
        add_row(acc[u], w[u], __int_as_float(__shfl_sync(~0u, bits, j + u)));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    gather_kernel(DecodeArgs a, const float* coef, const T* w_dec, T* hidden,
                  T* residual) {
  launch_dependents();
  wait_for_previous();
  const int n = min(*a.count - a.base, a.rows);
  const int slices = (a.d_model + kColumns - 1) / kColumns;
  const int warps = gridDim.x * kDecodeWarps;
  for (int work = blockIdx.x * kDecodeWarps + threadIdx.x / 32;
       work < n * slices; work += warps) {
    const int64_t i = work % n;
    const int* line = a.lines + i * kLine;
    const int token = line[kToken], listed = line[kListed];
    if (token < 0 || listed > sorted_max(a)) continue;
    const int column = work / n * kColumns + (threadIdx.x & 31) * 8;
    const bool inside = column < a.d_model;
    const int* row = a.table + line[kRow] * a.table_stride;
    const int clamps = row[1];
    float acc[kDecodeWarps][8] = {};
    const T* columns = w_dec + min(column, a.d_model - 8);
    gather_entries(acc, a.entries + i * a.capacity, listed, columns, a.d_model);
    for (int c = 0; c < clamps; ++c) {
      const float delta = coef[i * a.max_clamps + c];
      const Vec8<T> w =
          load8(columns + static_cast<int64_t>(row[2 + c]) * a.d_model);
#pragma unroll
      for (int u = 0; u < kDecodeWarps; ++u)
        add_row(acc[u], w, u == (listed + c) % kDecodeWarps ? delta : 0.f);
    }
    if (!inside) continue;
    Vec8<T> out, zero;
    zero.raw = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float total = a.b_dec[column + j];
#pragma unroll
      for (int u = 0; u < kDecodeWarps; ++u) total += acc[u][j];
      out.at[j] = from_float<T>(total);
    }
    T* h = hidden + token * a.hidden_stride + column;
    if (residual != nullptr) {
      store8(residual + token * a.residual_stride + column, out);
      store8(h, zero);
    } else {
      store8(h, out);
    }
  }
}

}  // namespace vllm_steering
