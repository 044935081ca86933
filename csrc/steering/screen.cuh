// SPDX-License-Identifier: Apache-2.0
// Certified screening of the encoder: which features may fire, from a copy of
// W_enc in 8 bits, and 2 more for a second look (refine.cuh).
// docs/design/screening.md proves the bounds.
//
//   w = s q + r,  x = u (128 h + l) + d,  P = 128 (q . h) + (q . l), exact
//   accumulator of the encoder <= s u P + A |x| + B |d| + eta
//
// A = |r| + gamma |w| + tiny and B = |s q| come with the weights, rounded up.
// Everything here is rounded up too, and what is not a number may fire.
#pragma once

#include "compact_encode_kernel.cuh"

namespace vllm_steering {

constexpr int kHalfW8 =
    kTileF * kScreenColumns;  // a warpgroup's rows of a stage
constexpr int kStageW8 = 2 * kHalfW8;
constexpr int kMostScreenStages = 5;
constexpr int kMostScreened = 8192;  // the widest row
constexpr int kMostOrders = 16;      // of columns, among the tiles of a block
constexpr int kRefineStages = 6;
constexpr int kLimb = 128;  // x = u (kLimb h + l)
constexpr int kMostLimbs = 127 * kLimb + kLimb / 2 - 1;
constexpr int kTinyExponent = -40;  // smaller x have no limbs
constexpr int kPlainSteps = 256;    // without a screen after one that failed

// An SAE's copy in few bits and the scratch memory of one step.
struct Screen {
  const float4* rows;  // [F]: s, A, B, A of the finer copy
  const uint4* fine;   // [F, 4 groups]: two more bits of each element
  int8_t* limbs;       // [2 kScreenTokens, padded]: h of all tokens, then l
  float4* tokens;      // [kScreenTokens]: u, |x|, |d|, eta
  float* tails;        // [kScreenTokens]: |x - 128 u h|
  float* sums;         // [tiles of the encoder, kTileF, kScreenTokens]: P
  int* candidates;     // [2, tiles of the encoder, kTileF] features
  int* counts;         // candidates so far, and those of the last step
  // [4]: steps left without a screen, by tile width, and the most tokens of a
  // step that is screened.
  int* state;
  int padded;  // columns of the copy and the limbs
  int orders;  // in which the encoder adds up the features' sums
  int groups;  // of kFineColumns columns
  int room;    // candidates of one list of all features
};

// Pairs of neighbouring tiles of the encoder, which have one order of columns.
__host__ __device__ inline int tile_pairs(int num_features) {
  return (num_features + 2 * kTileF - 1) / (2 * kTileF);
}

// The tiles of the encoder, by their order of columns: first all of order 0.
struct GroupedTiles {
  // Of pairs; the first `longer` orders have one more than `each`.
  int orders, each, longer;

  __host__ __device__ GroupedTiles(int pairs, int orders)
      : orders(orders), each(pairs / orders), longer(pairs % orders) {}

  __host__ __device__ int order(int at) const {
    const int pair = at / 2, head = longer * (each + 1);
    return pair < head ? pair / (each + 1) : longer + (pair - head) / each;
  }
  // Where an order begins.
  __host__ __device__ int start(int order) const {
    return 2 * (order * each + (order < longer ? order : longer));
  }
  __host__ __device__ int tile(int at) const {
    const int o = order(at), pair = (at - start(o)) / 2;
    return 2 * (o + pair * orders) + at % 2;
  }
};

// A block's tiles [first, end) of the grouped ones, and their orders.
struct BlockTiles {
  int first, end, order, orders;
};

// The tiles of block `block` of `blocks`. Blocks have tiles of one order, if
// the longest share does not become longer by that: each order is one more
// round of products that wait for one another.
__host__ __device__ inline BlockTiles block_tiles(const GroupedTiles& g,
                                                  int pairs, int block,
                                                  int blocks) {
  const int most = 2 * (g.each + (g.longer > 0));
  const int fewest = blocks / g.orders;  // blocks of an order
  BlockTiles b = {0, 0, 0, 0};
  if (fewest > 0 &&
      (most + fewest - 1) / fewest <= (2 * pairs + blocks - 1) / blocks) {
    const int o = ((block + 1) * g.orders - 1) / blocks;
    const int head = o * blocks / g.orders;
    const int own = (o + 1) * blocks / g.orders - head;
    const int tiles = g.start(o + 1) - g.start(o);
    b.first = g.start(o) + (block - head) * tiles / own;
    b.end = g.start(o) + (block - head + 1) * tiles / own;
  } else {
    b.first = block * 2 * pairs / blocks;
    b.end = (block + 1) * 2 * pairs / blocks;
  }
  if (b.first < b.end) {
    b.order = g.order(b.first);
    b.orders = g.order(b.end - 1) - b.order + 1;
  }
  return b;
}

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

// Shared memory: that of the encoder, the barriers of two more pipelines, and
// one between them.
constexpr int kRescoreStages = 14;
struct ScreenMemory {
  EncodeMemory base;
  uint64_t full[kMostScreenStages], empty[kMostScreenStages];
  uint64_t rescore_full[kRescoreStages], rescore_empty[kRescoreStages];
  uint64_t together;  // of all threads
  BlockTiles own;     // the block's
};
static_assert(2 * kMostOrders <= kConsumers, "counts take the place of `left`");
static_assert(sizeof(EncodeMemory::hits) >= 5 * kScreenTokens * sizeof(float),
              "facts and tails of the tokens take the place of `hits`");
constexpr int kScreenSmem = sizeof(ScreenMemory) + 1024;
static_assert(kScreenSmem <= 227 * 1024, "more than a multiprocessor has");

// The stages of the 8-bit copy, and behind them those of the limbs.
template <int Tokens>
struct ScreenStages {
  static constexpr int kCount = Tokens == 8 ? kMostScreenStages : 4;
  static constexpr int kBox = Tokens * kScreenColumns;
  static constexpr int kX0 = kCount * kStageW8;
  static_assert(kX0 + kCount * 2 * kBox <= sizeof(EncodeMemory::operands));
};

__device__ __forceinline__ float round_up_sum(float x) {
  for (int d = 16; d > 0; d >>= 1) x = __fadd_ru(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

// The largest `most` and the sum of `square`, rounded up, of the consumers;
// `shared` has room for two floats of each of their warps.
__device__ __forceinline__ void reduce_consumers(float& most, float& square,
                                                 float* shared) {
  for (int d = 16; d > 0; d >>= 1)
    most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
  square = round_up_sum(square);
  float2* all = reinterpret_cast<float2*>(shared);
  sync_threads<kConsumers>();
  if (threadIdx.x % 32 == 0) all[threadIdx.x / 32] = make_float2(most, square);
  sync_threads<kConsumers>();
  square = 0.f;
#pragma unroll
  for (int w = 0; w < kConsumerWarps; ++w) {
    most = fmaxf(most, all[w].x);
    square = __fadd_ru(square, all[w].y);
  }
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
                                        float square, float& tail, uint2& high,
                                        uint2& low) {
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
    const float e = __fmaf_rn(-unit.x * kLimb, up, value);  // exact
    tail = __fmaf_ru(e, e, tail);
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
  constexpr int kEach = kMostScreened / (kConsumers * 8);
  const T* x = ws.x + static_cast<int64_t>(i) * d_in;
  const int first = threadIdx.x * 8;
  float most = 0.f, square = 0.f, rest = 0.f, tail = 0.f;
  Pack8<T> v[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int d = first + e * kConsumers * 8;
    v[e].raw = make_uint4(0, 0, 0, 0);
    if (d < d_in) v[e] = load8(x + d);
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float value = to_float(v[e].at[j]);
      most = fmaxf(most, fabsf(value));
      square = __fmaf_ru(value, value, square);
    }
  }
  reduce_consumers(most, square, shared);
  const bool dead = ws.records[i].token < 0;
  const float2 unit = dead ? make_float2(0.f, 0.f) : limb_unit(most);
  int8_t* to = s.limbs + static_cast<int64_t>(i) * s.padded + first;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int d = e * kConsumers * 8;
    if (first + d >= s.padded) continue;
    uint2 high = {0, 0}, low = {0, 0};
    if (!dead) rest = split8(v[e], unit, rest, tail, high, low);
    *reinterpret_cast<uint2*>(to + d) = high;
    *reinterpret_cast<uint2*>(
        to + d + static_cast<int64_t>(kScreenTokens) * s.padded) = low;
  }
  float largest = most;
  reduce_consumers(largest, rest, shared);
  reduce_consumers(largest, tail, shared);
  if (threadIdx.x != 0) return;
  s.tails[i] = __fsqrt_ru(tail);
  const float eta = most == 0.f ? 0.f : 1.f / power_of_2(100);
  const float minus = -infinity();
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
  const float inf = infinity();
  if (f >= count) return {0.f, 0.f, 0.f, inf};
  const float4 row = s.rows[f];
  // A row of zeros: its sum is exactly zero.
  if (row.y == 0.f && cut >= 0.f) cut = inf;
  return {row.x, row.y, row.z, cut};
}

// 128 (q . h) + (q . l), rounded up.
__device__ __forceinline__ float limb_sum(int high, int low) {
  return __fmaf_ru(__int2float_ru(high), kLimb, __int2float_ru(low));
}

// Whether the encoder's accumulator could pass the bar.
__device__ __forceinline__ bool may_fire(const RowBound& row, float4 token,
                                         int high, int low) {
  const float p = limb_sum(high, low);
  const float error =
      __fmaf_ru(row.a, token.y, __fmaf_ru(row.b, token.z, token.w));
  return !(__fmaf_ru(row.scale * token.x, p, error) <= row.cut);
}

}  // namespace vllm_steering
