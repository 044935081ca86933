// SPDX-License-Identifier: Apache-2.0
// Stage 4 for many tokens, whose lists are sorted: a warp takes one token and
// 256 columns of D at a time and needs no shared memory. Slices are the slow
// index of the walk: the part of W_dec being gathered at any moment is narrow
// enough to stay in L2. Warps take tickets, so all of them are in the same
// slice, however long the lists are. The eight accumulators are the eight warps
// of decode_kernel.cuh and are added in the same order: the same bits for any
// batch.
#pragma once

#include "decode.cuh"

namespace vllm_steering {

// acc[u] += the entries whose place in the list is u modulo 8. Lanes past the
// end hold feature 0 with no weight.
// `mine` is the lane's first entry.
template <typename T>
__device__ __forceinline__ void gather_entries(float (&acc)[kDecodeWarps][8],
                                               int64_t mine, const int64_t* own,
                                               int n, const T* columns,
                                               int d_out) {
  const int lane = threadIdx.x & 31;
  for (int first = 0; first < n; first += 32) {
    if (first > 0) mine = own[min(first + lane, n - 1)];
    if (first + lane >= n) mine = 0;
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

// Where an item of the walk lies: 256 columns of one token.
struct GatherItem {
  int64_t i;
  int slice;
  __device__ GatherItem(int work, int n) : i(work % n), slice(work / n) {}
  __device__ int column() const {
    return slice * kColumns + (threadIdx.x & 31) * 8;
  }
};

// acc = the entries of an item's token; false: the token is not written.
template <typename T, bool kShared>
__device__ __forceinline__ bool gather_item(const DecodeArgs<T>& a,
                                            GatherItem at,
                                            float (&acc)[kDecodeWarps][8]) {
  const TokenRecord* record = a.ws.records + at.i;
  const int64_t* own = a.ws.entries + at.i * a.ws.capacity;
  // Requested before it is known how many there are.
  const int lane = threadIdx.x & 31;
  const int64_t mine = lane < a.ws.capacity ? own[lane] : 0;
  const int listed = record->listed, token = record->token, row = record->row;
  const int d_out = a.weights.d_out;
  if (listed > kListMax) return false;
  if (token < 0 || row == 0) {
    if constexpr (kShared) release_columns(a.exchange, at.i, at.slice, false);
    return false;
  }
  const T* columns = a.weights.w_dec + min(at.column(), d_out - 8);
  gather_entries(acc, mine, own, listed, columns, d_out);
  return true;
}

// Adds an item's clamps and base, and writes its columns.
template <typename T, bool kShared>
__device__ __forceinline__ void finish_item(const DecodeArgs<T>& a,
                                            GatherItem at,
                                            float (&acc)[kDecodeWarps][8]) {
  TokenRecord* record = a.ws.records + at.i;
  const int column = at.column(), d_out = a.weights.d_out;
  const ClampRow row = a.table.row(record->row);
  gather_clamps(acc, row, a.ws.coef + at.i * row.max_clamps, record->listed,
                a.weights.w_dec + min(column, d_out - 8), d_out);
  if (!kShared && column >= d_out) return;
  const float* base = base_of(a.weights, a.ws, at.i);
  bool over = false;
  if constexpr (kShared) {
    if (column < d_out) {
      const Pack8<T> out = sum_columns<T>(acc, base + column, over);
      for (int to = 0; to < a.exchange.size; ++to)
        store8(a.exchange.template row<T>(to, at.i) + a.exchange.rank * d_out +
                   column,
               out);
    }
    release_columns(a.exchange, at.i, at.slice, __any_sync(~0u, over));
    return;
  }
  const Pack8<T> out = sum_columns<T>(acc, base + column, over);
  count_saturated(over, &record->saturated, a.saturated);
  write_back(a.stream, record->token, column, out);
}

template <typename T, bool kShared>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    gather_kernel(const __grid_constant__ DecodeArgs<T> a) {
  launch_dependents();
  wait_for_previous();
  const int n = a.ws.tokens();
  if (n <= 0) return;
  int* ticket = a.ws.sync + kGatherTicket;
  int work = blockIdx.x * kDecodeWarps + threadIdx.x / 32;
  while (work < n * decode_slices(a.weights.d_out)) {
    float acc[kDecodeWarps][8] = {};
    const bool there = gather_item<T, kShared>(a, {work, n}, acc);
    // Opaque: all else of the item is computed again. Registers that kept it
    // would be missing for rows that are under way.
    asm volatile("" : "+r"(work));
    int next = 0;
    if ((threadIdx.x & 31) == 0) next = atomicAdd(ticket, 1);
    if (there) finish_item<T, kShared>(a, {work, n}, acc);
    __syncwarp();
    work = gridDim.x * kDecodeWarps + __shfl_sync(~0u, next, 0);
  }
  __syncthreads();
  if (threadIdx.x == 0) grid_leave(ticket, a.ws.sync + kGatherExits);
}

}  // namespace vllm_steering
