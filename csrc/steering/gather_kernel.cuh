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
    const int feature = entry_feature(mine), bits = static_cast<int>(mine);
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

// Eight columns: the base and the eight sums in order, limited and rounded.
template <typename T>
__device__ __forceinline__ Pack8<T> sum_columns(
    const float (&acc)[kDecodeWarps][8], const float* base, bool& over) {
  Pack8<T> out;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float total = base[j];
#pragma unroll
    for (int u = 0; u < kDecodeWarps; ++u) total += acc[u][j];
    out.at[j] = from_float<T>(saturate<T>(total, over));
  }
  return out;
}

// A warp tells all ranks that a slice of token i has come.
__device__ __forceinline__ void release_columns(const Exchange& x, int64_t i,
                                                int slice, bool over) {
  const int to = threadIdx.x & 31;
  __syncwarp();
  if (to < x.size)
    store_release(x.flag(to, x.rank, i) + slice, slice_flag(x.round(), over));
}

template <typename T, bool kShared>
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
    if (listed > kListMax) continue;
    const int column = work / n * kColumns + (threadIdx.x & 31) * 8;
    if (token < 0 || record->row == 0) {
      if constexpr (kShared) release_columns(a.exchange, i, work / n, false);
      continue;
    }
    const ClampRow row = a.table.row(record->row);
    float acc[kDecodeWarps][8] = {};
    const T* columns = a.weights.w_dec + min(column, d_out - 8);
    gather_entries(acc, a.ws.entries + i * a.ws.capacity, listed, columns,
                   d_out);
    gather_clamps(acc, row, a.ws.coef + i * row.max_clamps, listed, columns,
                  d_out);
    if (!kShared && column >= d_out) continue;
    const float* base = base_of(a.weights, a.ws, i);
    bool over = false;
    if constexpr (kShared) {
      if (column < d_out) {
        const Pack8<T> out = sum_columns<T>(acc, base + column, over);
        for (int to = 0; to < a.exchange.size; ++to)
          store8(a.exchange.template row<T>(to, i) + a.exchange.rank * d_out +
                     column,
                 out);
      }
      release_columns(a.exchange, i, work / n, __any_sync(~0u, over));
      continue;
    }
    const Pack8<T> out = sum_columns<T>(acc, base + column, over);
    count_saturated(over, &record->saturated, a.saturated);
    write_back(a.stream, token, column, out);
  }
}

}  // namespace vllm_steering
