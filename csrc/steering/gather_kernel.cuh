// SPDX-License-Identifier: Apache-2.0
// Stage 4 for many tokens, whose lists are sorted: a warp owns one token and a
// slice of D and needs no shared memory. Slices are the slow index of the walk,
// and narrow enough for L2 to hold the part of W_dec that is being gathered.
// The eight partial sums are the eight warps of decode_kernel.cuh and are added
// in the same order: the same bits for any batch and any width of slice.
#pragma once

#include "decode.cuh"

namespace vllm_steering {

// Bytes of a slice of W_dec that L2 holds beside what else passes through it.
constexpr int64_t kSliceBytes = 17 << 20;

// The warp's lanes in kGroups groups: each reads other rows of the slice and
// has some of the partial sums.
template <int kGroups>
struct GatherShape {
  static constexpr int kLanes = 32 / kGroups;  // they read a row together
  static constexpr int kSlice = kLanes * 8;    // columns
  static constexpr int kChains = kDecodeWarps / kGroups;  // sums of a lane
  static constexpr int kOwn = 8 / kGroups;  // columns that a lane writes
  static constexpr int kInFlight = 8;       // rows of a group
  static constexpr int kBlocks = kGroups == 4 ? 3 : 2;  // a multiprocessor
};

// How many groups make a slice fit.
inline int gather_groups(int num_features) {
  int groups = 1;
  while (groups < 4 && int64_t{num_features} * 512 / groups > kSliceBytes)
    groups *= 2;
  return groups;
}

// acc[c] += the entries whose place in the list is this lane's chain c, modulo
// 8. Lanes past the end hold feature 0 with no weight.
template <int kGroups, typename T>
__device__ __forceinline__ void gather_entries(
    float (&acc)[GatherShape<kGroups>::kChains][8], const int64_t* own, int n,
    const T* columns, int d_model) {
  using S = GatherShape<kGroups>;
  const int lane = threadIdx.x & 31;
  const int first_chain = lane / S::kLanes * S::kChains;
  for (int first = 0; first < n; first += 32) {
    const int64_t mine = first + lane < n ? own[first + lane] : 0;
    const int feature = static_cast<int>(mine >> 32),
              bits = static_cast<int>(mine);
    const int most = min(32, n - first);
#pragma unroll 1
    for (int j = 0; j < most; j += S::kInFlight * kGroups) {
      const int from = j + first_chain;
      Pack8<T> w[S::kInFlight];
#pragma unroll
      for (int u = 0; u < S::kInFlight; ++u) {
        const int at = from + u / S::kChains * kDecodeWarps + u % S::kChains;
        const int64_t f = __shfl_sync(~0u, feature, at);
        w[u] = load8(columns + f * d_model);
      }
#pragma unroll
      for (int u = 0; u < S::kInFlight; ++u) {
        const int at = from + u / S::kChains * kDecodeWarps + u % S::kChains;
        add_row(acc[u % S::kChains], w[u],
                __int_as_float(__shfl_sync(~0u, bits, at)));
      }
    }
  }
}

// acc += the corrections of the clamps, which follow the entries.
template <int kChains, typename T>
__device__ __forceinline__ void gather_clamps(float (&acc)[kChains][8],
                                              const ClampRow& row,
                                              const float* coef, int listed,
                                              int first_chain, const T* columns,
                                              int d_model) {
  const int clamps = row.count();
#pragma unroll 1
  for (int c = 0; c < clamps; ++c) {
    const Pack8<T> w =
        load8(columns + static_cast<int64_t>(row.feature(c)) * d_model);
    const int chain = (listed + c) % kDecodeWarps - first_chain;
#pragma unroll
    for (int u = 0; u < kChains; ++u)
      add_row(acc[u], w, u == chain ? coef[c] : 0.f);
  }
}

// Lanes that are `mask` apart have half of the sums each, of the same columns.
// Afterwards both have all of them, in order, of half of the columns each.
template <int kSums, int kColumns>
__device__ __forceinline__ void exchange(const float (&from)[kSums][kColumns],
                                         float (&to)[2 * kSums][kColumns / 2],
                                         int mask) {
  const bool upper = (threadIdx.x & mask) != 0;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int k = 0; k < kColumns / 2; ++k) {
      const float low = from[s][k], high = from[s][k + kColumns / 2];
      const float got = __shfl_xor_sync(~0u, upper ? low : high, mask);
      to[s][k] = upper ? got : low;
      to[s + kSums][k] = upper ? high : got;
    }
  }
}

// Brings the eight sums of the columns that this lane writes together; returns
// the first of these columns, from the lane's first.
__device__ __forceinline__ int collect_sums(const float (&acc)[8][8],
                                            float (&sums)[8][8]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) sums[i / 8][i % 8] = acc[i / 8][i % 8];
  return 0;
}
__device__ __forceinline__ int collect_sums(const float (&acc)[4][8],
                                            float (&sums)[8][4]) {
  exchange(acc, sums, 16);
  return (threadIdx.x & 16) / 4;
}
__device__ __forceinline__ int collect_sums(const float (&acc)[2][8],
                                            float (&sums)[8][2]) {
  float half[4][4];
  exchange(acc, half, 8);
  exchange(half, sums, 16);
  return (threadIdx.x & 8) / 2 + (threadIdx.x & 16) / 8;
}

// Adds the sums and the base, rounds once, writes back exactly; true where a
// component was limited.
template <int kOwn, typename T>
__device__ __forceinline__ bool write_columns(const float (&sums)[8][kOwn],
                                              const float* b_dec, T* hidden,
                                              T* residual) {
  struct alignas(kOwn * sizeof(T)) Columns {
    T at[kOwn];
  };
  Columns out, zero;
  bool over = false;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    float total = b_dec[k];
#pragma unroll
    for (int s = 0; s < 8; ++s) total += sums[s][k];
    out.at[k] = from_float<T>(saturate<T>(total, over));
    zero.at[k] = from_float<T>(0.f);
  }
  *reinterpret_cast<Columns*>(residual != nullptr ? residual : hidden) = out;
  if (residual != nullptr) *reinterpret_cast<Columns*>(hidden) = zero;
  return over;
}

template <typename T, int kGroups>
__global__ void __launch_bounds__(kDecodeThreads, GatherShape<kGroups>::kBlocks)
    gather_kernel(const __grid_constant__ DecodeArgs<T> a) {
  using S = GatherShape<kGroups>;
  launch_dependents();
  wait_for_previous();
  const int n = a.ws.tokens(), d_model = a.weights.d_model;
  const int slices = (d_model + S::kSlice - 1) / S::kSlice;
  const int warps = gridDim.x * kDecodeWarps;
  const int lane = threadIdx.x & 31;
  for (int work = blockIdx.x * kDecodeWarps + threadIdx.x / 32;
       work < n * slices; work += warps) {
    const int64_t i = work % n;
    TokenRecord* record = a.ws.records + i;
    const int token = record->token, listed = record->listed;
    if (token < 0 || record->row == 0 || listed > kListMax) continue;
    const int column = work / n * S::kSlice + lane % S::kLanes * 8;
    const ClampRow row = a.table.row(record->row);
    float acc[S::kChains][8] = {}, sums[8][S::kOwn];
    const T* columns = a.weights.w_dec + min(column, d_model - 8);
    gather_entries<kGroups>(acc, a.ws.entries + i * a.ws.capacity, listed,
                            columns, d_model);
    gather_clamps(acc, row, a.ws.coef + i * row.max_clamps, listed,
                  lane / S::kLanes * S::kChains, columns, d_model);
    const int own = column + collect_sums(acc, sums);
    if (column >= d_model) continue;
    T* h = a.stream.hidden + token * a.stream.hidden_stride + own;
    T* r = a.stream.residual == nullptr
               ? nullptr
               : a.stream.residual + token * a.stream.residual_stride + own;
    if (write_columns(sums, a.weights.b_dec + own, h, r))
      count_saturated(true, &record->saturated, a.saturated);
  }
}

}  // namespace vllm_steering
