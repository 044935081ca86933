// SPDX-License-Identifier: Apache-2.0
// Tokens with more non-zeros than a list holds: a window of their activations
// is made again, so that any number of them is right. Slow and exact: every
// slice of D encodes all features once more.
#pragma once

#include "decode.cuh"
#include "keys.cuh"

namespace vllm_steering {

constexpr int kWindow = 4096;  // features of a window

// window[f - f0] = activation of a threshold SAE's features, a warp each.
template <typename T>
__device__ void encode_window(float* window, const Weights<T>& weights,
                              const T* x, int f0) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int end = min(kWindow, weights.num_features - f0);
  for (int f = warp; f < end; f += kDecodeWarps) {
    const T* row =
        weights.w_enc + static_cast<int64_t>(f0 + f) * weights.d_model;
    float p = 0.f;
    for (int d = lane * 8; d < weights.d_model; d += 256) {
      const Pack8<T> w = load8(row + d), v = load8(x + d);
#pragma unroll
      for (int j = 0; j < 8; ++j) p += to_float(w.at[j]) * to_float(v.at[j]);
    }
    p = warp_sum(p) + weights.b_enc[f0 + f];
    if (lane == 0 && p > fmaxf(weights.threshold[f0 + f], 0.f)) window[f] = p;
  }
}

// The same for a TopK SAE, whose scores are all there.
template <typename T>
__device__ void score_window(float* window, const DecodeArgs<T>& a, int64_t i,
                             int f0) {
  const float* p = a.ws.scores + i * a.weights.num_features + f0;
  const auto kth = static_cast<unsigned long long>(a.ws.kth[i]);
  const bool relu = a.weights.meta[kTopkRelu] != 0;
  const int end = min(kWindow, a.weights.meta[kDSae] - f0);
  for (int f = threadIdx.x; f < end; f += kDecodeThreads)
    if (sort_key(p[f], f0 + f) >= kth && survives(p[f], relu)) window[f] = p[f];
}

// The activations of features f0 onwards, from a token's `n` entries or, where
// its list could not hold them, anew. The window is zero before.
template <typename T>
__device__ void fill_window(float* window, const DecodeArgs<T>& a,
                            const int64_t* own, int n, int64_t i, int f0) {
  if (n > a.ws.capacity) {
    if (a.ws.scores != nullptr)
      score_window(window, a, i, f0);
    else
      encode_window(window, a.weights, a.ws.x + i * a.weights.d_model, f0);
    return;
  }
  for (int e = threadIdx.x; e < n; e += kDecodeThreads) {
    const int f = entry_feature(own[e]) - f0;
    if (f >= 0 && f < kWindow) window[f] = entry_value(own[e]);
  }
}

// Many entries: window by window of features, dense in shared memory; a warp
// takes every eighth feature, so the order is again that of the features. Not
// inlined: it would cost the usual path registers.
template <typename T>
__device__ __noinline__ Partial gather_windows(const DecodeArgs<T>& a,
                                               const int64_t* own, int n,
                                               const ClampRow& row, int64_t i,
                                               float* window, int column) {
  Partial sum = {};
  const int d_model = a.weights.d_model;
  const T* columns = a.weights.w_dec + min(column, d_model - 8);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int f0 = 0; f0 < a.weights.num_features; f0 += kWindow) {
    __syncthreads();
    for (int f = threadIdx.x; f < kWindow; f += kDecodeThreads) window[f] = 0.f;
    __syncthreads();
    fill_window(window, a, own, n, i, f0);
    __syncthreads();
    for (int c = threadIdx.x; c < row.count(); c += kDecodeThreads) {
      const int f = row.feature(c) - f0;
      if (f < 0 || f >= kWindow) continue;
      window[f] += a.resolved ? a.ws.coef[i * row.max_clamps + c]
                              : clamp_delta(row, c, window[f]);
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
        add_row(sum.at, load8(columns + f * d_model), weight);
      }
    }
  }
  __syncthreads();
  return sum;
}

}  // namespace vllm_steering
