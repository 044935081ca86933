// SPDX-License-Identifier: Apache-2.0
// Stages 3 and 4: sort a token's entries, resolve its clamps, gather rows of
// W_dec.
//
//   full:  x' = b_dec + sum_i f_i W_dec[i] + sum_c (g_c - f_c) W_dec[c]
//   delta: x' = x + sum_c (g_c - f_c) W_dec[c]
//
// A block owns one token and some slices of D; its eight warps take the sorted
// entries in turn and their partial sums are added in a fixed order, so a
// token's bits depend neither on the run nor on its batch.
#pragma once

#include "overflow.cuh"

namespace vllm_steering {

// The number of slots of the sorted list: entries, then clamps.
__host__ __device__ inline int list_slots(int max_clamps) {
  return kSortMax + max_clamps;
}

// Bytes of shared memory: list (feature, weight), then raw entries, a window,
// or the partial sums, which are needed one after another.
inline int decode_smem(int max_clamps) {
  const int sums = kDecodeWarps * kColumns * 4;
  const int scratch = sums > kWindow * 4 ? sums : kWindow * 4;
  return list_slots(max_clamps) * 8 + scratch;
}

__device__ __forceinline__ float entry_value(int64_t e) {
  return __uint_as_float(static_cast<uint32_t>(e));
}

// A warp's sum of its entries, this lane's columns.
struct Partial {
  float at[8];
};

// acc += weight * W_dec[feature, columns of this lane].
template <typename T>
__device__ __forceinline__ void add_row(float (&acc)[8], const Vec8<T>& w,
                                        float weight) {
#pragma unroll
  for (int j = 0; j < 8; ++j) acc[j] += weight * to_float(w.at[j]);
}

// A thread's entries of a token's list, requested before their number is known:
// that saves one of the dependent loads. Places past `room` are not read.
struct Listed {
  int64_t at[kSortMax / kDecodeThreads];
};

__device__ __forceinline__ Listed load_entries(const int64_t* own, int room) {
  Listed l;
#pragma unroll
  for (int u = 0; u < kSortMax / kDecodeThreads; ++u) {
    const int e = threadIdx.x + u * kDecodeThreads;
    l.at[u] = e < room ? own[e] : 0;
  }
  return l;
}

// Sorted (feature, weight) of the token in `list`. An entry's place is the
// number of features below its own.
__device__ void sort_entries(const Listed& l, int n, int2* list,
                             int* features) {
  int2 mine[kSortMax / kDecodeThreads];
#pragma unroll
  for (int u = 0; u < kSortMax / kDecodeThreads; ++u) {
    const int e = threadIdx.x + u * kDecodeThreads;
    mine[u] =
        make_int2(static_cast<int>(l.at[u] >> 32), static_cast<int>(l.at[u]));
    // Sorts last; rounds n up to a multiple of 4.
    if (e >= n) mine[u] = make_int2(0x7FFFFFFF, 0);
    features[e] = mine[u].x;
  }
  __syncthreads();
#pragma unroll
  for (int u = 0; u < kSortMax / kDecodeThreads; ++u) {
    if (threadIdx.x + u * kDecodeThreads >= n) continue;
    int rank = 0;
#pragma unroll 4
    for (int o = 0; o < n; o += 4) {
      const int4 other = *reinterpret_cast<const int4*>(features + o);
      rank += (other.x < mine[u].x) + (other.y < mine[u].x) +
              (other.z < mine[u].x) + (other.w < mine[u].x);
    }
    list[rank] = mine[u];
  }
  __syncthreads();
}

// The activation of `feature` in the sorted list, 0 when absent.
__device__ float find_feature(const int2* list, int n, int feature) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list[middle].x < feature)
      low = middle + 1;
    else
      high = middle;
  }
  return low < n && list[low].x == feature ? __int_as_float(list[low].y) : 0.f;
}

// Appends the clamps' corrections behind the entries; returns the new length.
__device__ int append_clamps(const DecodeArgs& a, const int* row, int clamps,
                             int64_t i, int2* list, int n) {
  if (clamps == 0) return n;
  for (int c = threadIdx.x; c < clamps; c += kDecodeThreads) {
    const int feature = row[2 + c];
    float delta;
    if (a.coef != nullptr) {
      delta = a.coef[i * a.max_clamps + c];
    } else {
      const float value = __int_as_float(row[2 + 2 * a.max_clamps + c]);
      delta = clamp_delta(row[2 + a.max_clamps + c], value,
                          find_feature(list, n, feature));
    }
    list[n + c] = make_int2(feature, __float_as_int(delta));
  }
  __syncthreads();
  return n + clamps;
}

// acc += this warp's entries, `Ahead` rows in flight. Places past the end
// repeat the last entry with no weight: loads without branches are issued back
// to back.
template <int Ahead, typename T>
__device__ __forceinline__ void gather_list(float (&acc)[8], const int2* list,
                                            int n, const T* w_dec, int column,
                                            int d_model) {
  const T* columns = w_dec + min(column, d_model - 8);
#pragma unroll 1
  for (int j = threadIdx.x / 32; j < n; j += kDecodeWarps * Ahead) {
    Vec8<T> w[Ahead];
    float weight[Ahead];
#pragma unroll
    for (int u = 0; u < Ahead; ++u) {
      const int at = j + u * kDecodeWarps;
      const int2 e = list[min(at, n - 1)];
      weight[u] = at < n ? __int_as_float(e.y) : 0.f;
      w[u] = load8(columns + static_cast<int64_t>(e.x) * d_model);
    }
#pragma unroll
    for (int u = 0; u < Ahead; ++u) add_row(acc, w[u], weight[u]);
  }
}

// The activations of features f0 onwards, from a token's `n` entries or, where
// its list could not hold them, anew. The window is zero before.
template <typename T>
__device__ void fill_window(float* window, const DecodeArgs& a,
                            const int64_t* own, int n, int64_t i, const T* x,
                            int f0) {
  if (n > a.capacity) {
    if (a.scores != nullptr)
      score_window(window, a, i, f0);
    else
      encode_window(window, a, x, f0);
    return;
  }
  for (int e = threadIdx.x; e < n; e += kDecodeThreads) {
    const int f = static_cast<int>(own[e] >> 32) - f0;
    if (f >= 0 && f < kWindow) window[f] = entry_value(own[e]);
  }
}

// Many entries: window by window of features, dense in shared memory; a warp
// takes every eighth feature, so the order is again that of the features. Not
// inlined: it would cost the usual path registers.
template <typename T>
__device__ __noinline__ Partial gather_windows(const DecodeArgs& a,
                                               const int64_t* own, int n,
                                               const int* row, int64_t i,
                                               float* window, const T* x,
                                               const T* w_dec, int column) {
  Partial sum = {};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int f0 = 0; f0 < a.num_features; f0 += kWindow) {
    __syncthreads();
    for (int f = threadIdx.x; f < kWindow; f += kDecodeThreads) window[f] = 0.f;
    __syncthreads();
    fill_window(window, a, own, n, i, x, f0);
    __syncthreads();
    for (int c = threadIdx.x; c < row[1]; c += kDecodeThreads) {
      const int f = row[2 + c] - f0;
      if (f < 0 || f >= kWindow) continue;
      const float value = __int_as_float(row[2 + 2 * a.max_clamps + c]);
      window[f] += a.coef != nullptr ? a.coef[i * a.max_clamps + c]
                                     : clamp_delta(row[2 + a.max_clamps + c],
                                                   value, window[f]);
    }
    __syncthreads();
    for (int m = 0; m < kWindow; m += kDecodeThreads) {
      const float mine = window[m + lane * kDecodeWarps + warp];
      unsigned left = __ballot_sync(~0u, mine != 0.f);
      while (left != 0) {
        const int at = __ffs(left) - 1;
        left &= left - 1;
        const float weight = __shfl_sync(~0u, mine, at);
        const int64_t f = f0 + m + at * kDecodeWarps + warp;
        add_row(sum.at,
                load8(w_dec + f * a.d_model + min(column, a.d_model - 8)),
                weight);
      }
    }
  }
  __syncthreads();
  return sum;
}

// Adds the eight partial sums and the base, rounds once, writes back exactly.
template <typename T>
__device__ void finish_slice(const Partial& sum, const DecodeArgs& a,
                             float* sums, const T* x, T* hidden, T* residual,
                             int first) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float4* to = reinterpret_cast<float4*>(sums + warp * kColumns + lane * 8);
  to[0] = make_float4(sum.at[0], sum.at[1], sum.at[2], sum.at[3]);
  to[1] = make_float4(sum.at[4], sum.at[5], sum.at[6], sum.at[7]);
  const int c = first + threadIdx.x;
  float total = 0.f;
  if (c < a.d_model) total = a.delta ? to_float(x[c]) : a.b_dec[c];
  __syncthreads();
  if (c < a.d_model) {
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w)
      total += sums[w * kColumns + threadIdx.x];
    if (residual != nullptr) {
      residual[c] = from_float<T>(total);
      hidden[c] = from_float<T>(0.f);
    } else {
      hidden[c] = from_float<T>(total);
    }
  }
  __syncthreads();
}

// Blocks share a token's slices in groups, as many as keep all of them busy:
// the list is sorted once a group, not once a slice. `Ahead` rows are in flight
// in a warp, and blocks share a multiprocessor accordingly: many for one
// token's latency, few for many tokens.
template <typename T, int Ahead>
__global__ void __launch_bounds__(kDecodeThreads, 32 / Ahead)
    decode_kernel(const __grid_constant__ DecodeArgs a, const T* x,
                  const T* w_dec, T* hidden, T* residual) {
  extern __shared__ __align__(16) char memory[];
  int2* list = reinterpret_cast<int2*>(memory);
  float* scratch =
      reinterpret_cast<float*>(memory + list_slots(a.max_clamps) * 8);
  launch_dependents();
  wait_for_previous();
  const int n = min(*a.count - a.base, a.rows);
  const int slices = (a.d_model + kColumns - 1) / kColumns;
  const int groups =
      max(1, min(slices, static_cast<int>(gridDim.x) / max(n, 1)));
  const int room = a.delta || a.long_only ? 0 : a.capacity;
  for (int work = blockIdx.x; work < n * groups; work += gridDim.x) {
    const int64_t i = work % n;
    const int64_t* own = a.entries + i * a.capacity;
    const int* line = a.lines + i * kLine;
    const int token = line[kToken];
    const int listed = a.delta ? 0 : line[kListed];
    const Listed mine = load_entries(own, room);
    const bool sorted = listed <= sorted_max(a);
    if (token < 0 || (a.long_only && sorted)) continue;
    const int* row = a.table + line[kRow] * a.table_stride;
    const int clamps = row[1];
    const T* own_x = x + i * a.d_model;
    T* r = residual == nullptr ? nullptr : residual + token * a.residual_stride;
    int total = listed;
    if (sorted) {
      sort_entries(mine, listed, list, reinterpret_cast<int*>(scratch));
      total = append_clamps(a, row, clamps, i, list, listed);
    }
    for (int slice = work / n; slice < slices; slice += groups) {
      const int first = slice * kColumns,
                column = first + (threadIdx.x & 31) * 8;
      Partial sum = {};
      if (sorted)
        gather_list<Ahead>(sum.at, list, total, w_dec, column, a.d_model);
      else
        sum = gather_windows(a, own, listed, row, i, scratch, own_x, w_dec,
                             column);
      finish_slice(sum, a, scratch, own_x, hidden + token * a.hidden_stride, r,
                   first);
    }
  }
}

}  // namespace vllm_steering
