// SPDX-License-Identifier: Apache-2.0
// Tokens with more non-zeros than a list holds: a window of their activations
// is made again, so that any number of them is right. Slow and exact: every
// slice of D encodes all features once more.
#pragma once

#include "decode_args.cuh"
#include "keys.cuh"

namespace vllm_steering {

// window[f - f0] = activation of a threshold SAE's features, a warp each.
template <typename T>
__device__ void encode_window(float* window, const DecodeArgs& a, const T* x,
                              int f0) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* w_enc = static_cast<const T*>(a.w_enc);
  const int end = min(kWindow, a.num_features - f0);
  for (int f = warp; f < end; f += kDecodeWarps) {
    const T* row = w_enc + static_cast<int64_t>(f0 + f) * a.d_model;
    float p = 0.f;
    for (int d = lane * 8; d < a.d_model; d += 256) {
      const Vec8<T> w = load8(row + d), v = load8(x + d);
#pragma unroll
      for (int j = 0; j < 8; ++j) p += to_float(w.at[j]) * to_float(v.at[j]);
    }
    p = warp_sum(p) + a.b_enc[f0 + f];
    if (lane == 0 && p > fmaxf(a.threshold[f0 + f], 0.f)) window[f] = p;
  }
}

// The same for a TopK SAE, whose scores are all there.
__device__ void score_window(float* window, const DecodeArgs& a, int64_t i,
                             int f0) {
  const float* p = a.scores + i * a.num_features + f0;
  const auto kth = static_cast<unsigned long long>(a.kth[i]);
  const bool relu = a.meta[kTopkRelu] != 0;
  const int end = min(kWindow, a.meta[kDSae] - f0);
  for (int f = threadIdx.x; f < end; f += kDecodeThreads)
    if (sort_key(p[f], f0 + f) >= kth && survives(p[f], relu)) window[f] = p[f];
}

}  // namespace vllm_steering
