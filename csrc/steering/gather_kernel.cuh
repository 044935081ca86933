// SPDX-License-Identifier: Apache-2.0
// Stage 4 for many tokens, whose lists are sorted: a warp owns one token and
// 256 columns of D and needs no shared memory. Slices are the slow index of the
// walk: the part of W_dec being gathered at any moment is narrow enough to stay
// in L2. The eight accumulators are the eight warps of decode_kernel.cuh and
// are added in the same order: the same bits for any batch.
#pragma once

#include "decode.cuh"

namespace vllm_steering {

// acc[u] += the entries whose place in the list is u modulo 8. Lanes past the
// end hold feature 0 with no weight.
template <typename T>
__device__ __forceinline__ void gather_entries(float (&acc)[kDecodeWarps][8],
                                               const int64_t* own, int n,
                                               const T* columns, int d_out) {
  const int lane = threadIdx.x & 31;
  for (int first = 0; first < n; first += 32) {
    const int64_t mine = first + lane < n ? own[first + lane] : 0;
    const int feature = static_cast<int>(mine >> 32),
              bits = static_cast<int>(mine);
    const int most = min(32, n - first);
    for (int j = 0; j < most; j += kDecodeWarps) {
      Pack8<T> w[kDecodeWarps];
#pragma unroll
      for (int u = 0; u < kDecodeWarps; ++u) {
        const int64_t f = __shfl_sync(~0u, feature, j + u);
        w[u] = load8(columns + f * d_out);
      }
#pragma unroll
      for (int u = 0; u < kDecodeWarps; ++u)
        add_row(acc[u], w[u], __int_as_float(__shfl_sync(~0u, bits, j + u)));
    }
  }
}

// acc += the corrections of the clamps, which follow the entries.
template <typename T>
__device__ __forceinline__ void gather_clamps(float (&acc)[kDecodeWarps][8],
                                              const ClampRow& row,
                                              const float* coef, int listed,
                                              const T* columns, int d_out) {
  const int clamps = row.count();
  for (int c = 0; c < clamps; ++c) {
    const Pack8<T> w =
        load8(columns + static_cast<int64_t>(row.feature(c)) * d_out);
#pragma unroll
    for (int u = 0; u < kDecodeWarps; ++u)
      add_row(acc[u], w, u == (listed + c) % kDecodeWarps ? coef[c] : 0.f);
  }
}

template <typename T>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    gather_kernel(const __grid_constant__ DecodeArgs<T> a) {
  launch_dependents();
  wait_for_previous();
  const int n = a.ws.tokens(), d_out = a.weights.d_out;
  const int slices = (d_out + kColumns - 1) / kColumns;
  const int warps = gridDim.x * kDecodeWarps;
  for (int work = blockIdx.x * kDecodeWarps + threadIdx.x / 32;
       work < n * slices; work += warps) {
    const int64_t i = work % n;
    TokenRecord* record = a.ws.records + i;
    const int token = record->token, listed = record->listed;
    if (token < 0 || record->row == 0 || listed > kListMax) continue;
    const int column = work / n * kColumns + (threadIdx.x & 31) * 8;
    const ClampRow row = a.table.row(record->row);
    float acc[kDecodeWarps][8] = {};
    const T* columns = a.weights.w_dec + min(column, d_out - 8);
    gather_entries(acc, a.ws.entries + i * a.ws.capacity, listed, columns,
                   d_out);
    gather_clamps(acc, row, a.ws.coef + i * row.max_clamps, listed, columns,
                  d_out);
    if (column >= d_out) continue;
    const float* base = base_of(a.weights, a.ws, i);
    bool over = false;
    Pack8<T> out, zero;
    zero.raw = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float total = base[column + j];
#pragma unroll
      for (int u = 0; u < kDecodeWarps; ++u) total += acc[u][j];
      out.at[j] = from_float<T>(saturate<T>(total, over));
    }
    count_saturated(over, &record->saturated, a.saturated);
    T* h = a.stream.hidden + token * a.stream.hidden_stride + column;
    if (a.stream.residual != nullptr) {
      store8(a.stream.residual + token * a.stream.residual_stride + column,
             out);
      store8(h, zero);
    } else {
      store8(h, out);
    }
  }
}

}  // namespace vllm_steering
