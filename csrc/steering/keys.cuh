// SPDX-License-Identifier: Apache-2.0
// The order of TopK scores: a score and its feature make one 63-bit key, larger
// for a larger score and, at equal scores, for a lower feature.
#pragma once

#include <cstdint>

namespace vllm_steering {

// Orders as the scores do; -0.0 equals 0.0.
__device__ __forceinline__ unsigned order_bits(float p) {
  const unsigned bits = __float_as_uint(p + 0.f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(unsigned order) {
  return __uint_as_float(order >> 31 ? order & 0x7FFFFFFFu : ~order);
}

__device__ __forceinline__ unsigned long long sort_key(float p, int f) {
  return static_cast<unsigned long long>(order_bits(p)) << 31 |
         (0x7FFFFFFFu ^ f);
}

__device__ __forceinline__ int key_feature(unsigned long long key) {
  return 0x7FFFFFFF ^ static_cast<int>(key & 0x7FFFFFFF);
}

__device__ __forceinline__ float key_score(unsigned long long key) {
  return score_of(static_cast<unsigned>(key >> 31));
}

__device__ __forceinline__ bool survives(float p, bool relu) {
  return p > 0.f || (!relu && p != 0.f);
}

}  // namespace vllm_steering
