// SPDX-License-Identifier: Apache-2.0
// What the stages know about a token, and the layout of a clamp table's row.
#pragma once

#include <cstdint>

#include "constants.cuh"

namespace vllm_steering {

// 2^n, for 0 <= n < 128.
__host__ __device__ constexpr float power_of_2(int n) {
  float power = 1.f;
  for (int i = 0; i < n; ++i) power *= 2.f;
  return power;
}

// An active token, in its own cache line. Otherwise the atomics of a whole tile
// would queue for a few lines.
struct alignas(4 * kRecordInts) TokenRecord {
  int listed;     // non-zeros found so far
  int token;      // id in the step, -1: past the norm limit
  int row;        // of the clamp table; 0: only read
  int saturated;  // whether the token has been counted as saturated
  int dense;      // the n-th record: index of the n-th token that no list holds
  int read;       // row of the reading table, 0: not read
};
static_assert(sizeof(TokenRecord) == 4 * kRecordInts);

// Counters that blocks share; zero between launches.
enum SyncField {
  kArrivals = 0,
  kExits = 1,
  // Of a launch that never runs beside those of the two above.
  kGatherTicket = kArrivals,
  kGatherExits = kExits,
  kDenseCount = 2,
  kDenseTicket = 3,
  kDenseDone = 4,
  kDenseExits = 5,
  kScreenExits = 6,
};
static_assert(kScreenExits < kSyncInts);

// A row of a packed clamp table: active, count, then features, codes, values.
struct ClampRow {
  const int* packed;
  int max_clamps;

  __device__ __forceinline__ bool active() const { return packed[0] != 0; }
  __device__ __forceinline__ int count() const { return packed[1]; }
  __device__ __forceinline__ int feature(int c) const { return packed[2 + c]; }
  __device__ __forceinline__ int code(int c) const {
    return packed[2 + max_clamps + c];
  }
  __device__ __forceinline__ float value(int c) const {
    return __int_as_float(packed[2 + 2 * max_clamps + c]);
  }
};

struct ClampTable {
  const int* packed;
  int64_t stride;
  int max_clamps;

  __device__ __forceinline__ ClampRow row(int r) const {
    return {packed + r * stride, max_clamps};
  }
};

// Whether a clamp's change depends on its feature's activation.
__device__ __forceinline__ bool reads_activation(int code) {
  return (code & ((1 << kConditionShift) - 1)) != kAdditive;
}

// Whether f is above or below the value of a clamp or a condition that asks.
__device__ __forceinline__ bool holds(int code, float value, float f) {
  return ((code & kIfAbove) == 0 || f > value) &&
         ((code & kIfBelow) == 0 || f < value);
}

__device__ __forceinline__ float limit_coefficient(float delta) {
  constexpr float kLimit = power_of_2(kCoefficientLimit);
  return fminf(fmaxf(delta, -kLimit), kLimit);
}

// g - f of one clamp, limited; another clamp's condition aside.
__device__ __forceinline__ float clamp_delta(int code, float value, float f) {
  const int kind = code & kKindBits;
  if (kind == kCondition || !holds(code, value, f)) return 0.f;
  if ((code & kOnlyIfActive) != 0 && f == 0.f) return 0.f;
  return limit_coefficient(
      kind == kAdditive ? value : (kind == kScale ? f * value : value) - f);
}

// g - f of clamp c of a row, where `find` gives a feature's activation; 0 where
// the condition that it needs does not hold.
template <typename Find>
__device__ __forceinline__ float clamp_delta(const ClampRow& row, int c,
                                             const Find& find) {
  const int code = row.code(c), needed = (code >> kConditionShift) - 1;
  const float delta = clamp_delta(code, row.value(c), find(row.feature(c)));
  if (needed < 0 ||
      holds(row.code(needed), row.value(needed), find(row.feature(needed))))
    return delta;
  return 0.f;
}

}  // namespace vllm_steering
