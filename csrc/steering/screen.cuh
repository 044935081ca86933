// SPDX-License-Identifier: Apache-2.0
// Certified screening of the encoder: which features may fire, from an 8-bit
// copy of W_enc. docs/design/screening.md proves the bound.
//
//   w = s q + r,  x = u (128 h + l) + d,  P = 128 (q . h) + (q . l), exact
//   accumulator of the encoder <= s u P + A |x| + B |d| + eta
//
// A = |r| + gamma |w| + tiny and B = |s q| come with the weights, rounded up.
// Everything here is rounded up too, and what is not a number may fire.
#pragma once

#include "compact_encode_kernel.cuh"

namespace vllm_steering {

constexpr int kScreenF = 256;  // features of a tile, 128 a warpgroup
constexpr int kScreenStages = 4;
constexpr int kStageW8 = kScreenF * kScreenColumns;
constexpr int kLimb = 128;  // x = u (kLimb h + l)
constexpr int kMostLimbs = 127 * kLimb + kLimb / 2 - 1;
constexpr int kTinyExponent = -40;  // smaller x have no limbs
constexpr int kPlainSteps = 32;     // without a screen after one that failed

// An SAE's 8-bit copy and the scratch memory of one step.
struct Screen {
  const float4* rows;  // [F]: s, A, B, unused
  int8_t* limbs;       // [2 kScreenTokens, padded]: h of all tokens, then l
  float4* tokens;      // [kScreenTokens]: u, |x|, |d|, eta
  int* candidates;     // [orders, per_order] features
  int* counts;         // [orders]
  int* state;          // [3]: steps left without a screen, by tile width
  int padded;          // columns of the copy and the limbs
  int orders;          // orders in which the encoder adds up a feature's sum
  int per_order;
};

// The tile width that a step is screened with, as an index.
__device__ __forceinline__ int screen_width(int n) {
  return n <= 8 ? 0 : n <= 32 ? 1 : 2;
}

#define STEERING_SCREEN_WIDTHS(n, RUN) \
  if (n <= 8) {                        \
    RUN(8, 0);                         \
  } else if (n <= 32) {                \
    RUN(32, 1);                        \
  } else {                             \
    RUN(64, 2);                        \
  }

// Shared memory: that of the encoder, and the barriers of two more pipelines.
constexpr int kRescoreStages = 16;
struct ScreenMemory {
  EncodeMemory base;
  uint64_t full[kScreenStages], empty[kScreenStages];
  uint64_t rescore_full[kRescoreStages], rescore_empty[kRescoreStages];
};
constexpr int kScreenSmem = sizeof(ScreenMemory) + 1024;
static_assert(kScreenSmem <= 227 * 1024, "more than a multiprocessor has");
static_assert(kScreenStages * (kStageW8 + 2 * kScreenTokens * kScreenColumns) <=
              sizeof(EncodeMemory::operands));

__device__ __forceinline__ float round_up_sum(float x) {
  for (int d = 16; d > 0; d >>= 1) x = __fadd_ru(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

// The sum over the consumers' warps, rounded up; `shared` has a float a warp.
__device__ __forceinline__ float consumers_sum(float x, float* shared) {
  x = round_up_sum(x);
  sync_threads<kConsumers>();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  sync_threads<kConsumers>();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kConsumerWarps; ++w) total = __fadd_ru(total, shared[w]);
  return total;
}

__device__ __forceinline__ float consumers_max(float x, float* shared) {
  for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  sync_threads<kConsumers>();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  sync_threads<kConsumers>();
#pragma unroll
  for (int w = 0; w < kConsumerWarps; ++w) x = fmaxf(x, shared[w]);
  return x;
}

// The unit of the limbs of a row whose largest component is `most`, a power of
// two, and its inverse; zeros where the row is too small for limbs.
__device__ __forceinline__ float2 limb_unit(float most) {
  const int exponent = (__float_as_int(most) >> 23) - 127;
  if (exponent < kTinyExponent) return make_float2(0.f, 0.f);
  return make_float2(__int_as_float((exponent - 13 + 127) << 23),
                     __int_as_float((13 - exponent + 127) << 23));
}

// Limbs of eight components; returns |d|^2 of them, added to `square`.
template <typename T>
__device__ __forceinline__ float split8(const Pack8<T>& x, float2 unit,
                                        float square, uint2& high, uint2& low) {
  constexpr float kMost = kMostLimbs;
  uint32_t h[2] = {0, 0}, l[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float value = to_float(x.at[j]);
    const float v = fminf(fmaxf(rintf(value * unit.y), -kMost), kMost);
    const int whole = static_cast<int>(v);
    const int up = (whole + kLimb / 2) >> 7;
    h[j / 4] |= static_cast<uint32_t>(up & 0xFF) << (j % 4 * 8);
    l[j / 4] |= static_cast<uint32_t>((whole - kLimb * up) & 0xFF)
                << (j % 4 * 8);
    const float d = __fmaf_rn(-unit.x, v, value);  // exact
    square = __fmaf_ru(d, d, square);
  }
  high = make_uint2(h[0], h[1]);
  low = make_uint2(l[0], l[1]);
  return square;
}

// The consumers turn row i of x into limbs and facts. A token that the decoder
// leaves alone gets no candidates.
template <typename T>
__device__ void split_row(const Screen& s, const Workspace<T>& ws, int d_in,
                          int i, float* shared) {
  const T* x = ws.x + static_cast<int64_t>(i) * d_in;
  float most = 0.f, square = 0.f, rest = 0.f;
  for (int d = threadIdx.x * 8; d < d_in; d += kConsumers * 8) {
    const Pack8<T> v = load8(x + d);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float value = to_float(v.at[j]);
      most = fmaxf(most, fabsf(value));
      square = __fmaf_ru(value, value, square);
    }
  }
  most = consumers_max(most, shared);
  square = consumers_sum(square, shared);
  const bool dead = ws.records[i].token < 0;
  const float2 unit = dead ? make_float2(0.f, 0.f) : limb_unit(most);
  int8_t* to = s.limbs + static_cast<int64_t>(i) * s.padded;
  for (int d = threadIdx.x * 8; d < s.padded; d += kConsumers * 8) {
    uint2 high = {0, 0}, low = {0, 0};
    if (d < d_in && !dead) rest = split8(load8(x + d), unit, rest, high, low);
    *reinterpret_cast<uint2*>(to + d) = high;
    *reinterpret_cast<uint2*>(
        to + d + static_cast<int64_t>(kScreenTokens) * s.padded) = low;
  }
  rest = consumers_sum(rest, shared);
  if (threadIdx.x != 0) return;
  const float eta = most == 0.f ? 0.f : 1.f / power_of_2(100);
  const float minus = -__int_as_float(0x7F800000);
  s.tokens[i] =
      dead ? make_float4(0.f, 0.f, 0.f, minus)
           : make_float4(unit.x, __fsqrt_ru(square), __fsqrt_ru(rest), eta);
}

// What decides about one feature: scale and error of its row, and the bar.
struct RowBound {
  float scale, a, b, cut;
};

__device__ __forceinline__ RowBound row_bound(const Screen& s, int f, int count,
                                              float cut) {
  const float inf = __int_as_float(0x7F800000);
  if (f >= count) return {0.f, 0.f, 0.f, inf};
  const float4 row = s.rows[f];
  // A row of zeros: its sum is exactly zero.
  if (row.y == 0.f && cut >= 0.f) cut = inf;
  return {row.x, row.y, row.z, cut};
}

// Whether the encoder's accumulator could pass the bar.
__device__ __forceinline__ bool may_fire(const RowBound& row, float4 token,
                                         int high, int low) {
  const float p = __fmaf_ru(__int2float_ru(high), kLimb, __int2float_ru(low));
  const float error =
      __fmaf_ru(row.a, token.y, __fmaf_ru(row.b, token.z, token.w));
  return !(__fmaf_ru(row.scale * token.x, p, error) <= row.cut);
}

}  // namespace vllm_steering
