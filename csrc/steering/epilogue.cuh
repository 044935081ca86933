// SPDX-License-Identifier: Apache-2.0
// What leaves the encoder: the non-zeros of a tile of scores, or all of them.
//
// A lane collects its hits in shared memory while it scans its accumulators,
// then appends them to their tokens' lists in global memory, several atomics in
// flight. Where another tile follows, spare warps append while the tensor cores
// already work on it.
#pragma once

#include "bundles.cuh"
#include "keys.cuh"
#include "ptx/tma.cuh"
#include "scheduler.cuh"

namespace vllm_steering {

// Up to here L2 is asked for the W_dec row of every active feature. With few
// tokens the decoder has too few requests; many tokens keep memory busy.
constexpr int kEagerTokens = 32;
constexpr int kHitsPerLane = 16;
constexpr int kHitsPerWarp = 32 * kHitsPerLane;
constexpr int kPart = 8;  // accumulators scanned between looks at the buffer

template <typename T>
struct EncodeArgs {
  Weights<T> weights;
  Workspace<T> ws;
  bool eager;                   // ask L2 for rows of W_dec
  uint16_t* samples = nullptr;  // of a guess: [rows, kGuessSample]
  const float* bars = nullptr;  // of a guess: [rows]
};

// What leaves the encoder: what the workspace has room for, non-zeros or all
// scores; or, of a guess, the sample or the candidates.
enum class Leaves { kUsual, kSample, kCandidates };

// Bias and bar of the two features whose scores a lane holds (f and f + 8).
// The test is x W > bar - b; features past the end never pass it.
struct LaneFeatures {
  float2 bias, cut;
};

// Of any two features, or of a lane of a tile, f and f + 8.
template <typename T>
__device__ __forceinline__ LaneFeatures load_features(const Weights<T>& w,
                                                      int f, int g) {
  const float inf = infinity();
  LaneFeatures l = {make_float2(-inf, -inf), make_float2(inf, inf)};
  if (f < w.num_features) {
    l.bias.x = w.b_enc[f];
    l.cut.x = fmaxf(w.threshold[f], 0.f) - l.bias.x;
  }
  if (g < w.num_features) {
    l.bias.y = w.b_enc[g];
    l.cut.y = fmaxf(w.threshold[g], 0.f) - l.bias.y;
  }
  return l;
}

template <typename T>
__device__ __forceinline__ LaneFeatures load_features(const Weights<T>& w,
                                                      int f) {
  return load_features(w, f, f + 8);
}

// Where a tile lies, and how many tokens there are in all.
struct TilePlace {
  int f0, t0, n;
  // `first`: the feature of W_enc's first row.
  __device__ uint32_t feature(int first, uint32_t row) const {
    return first + f0 + row;
  }
};

// The same for a tile whose rows are any features.
struct ListPlace {
  const int* features;
  int t0, n;
  __device__ uint32_t feature(int first, uint32_t row) const {
    return first + features[row];
  }
};

// Stores one hit at its place in its token's list, if there is room.
template <typename T, typename Place>
__device__ __forceinline__ void store_hit(const EncodeArgs<T>& a, uint2 hit,
                                          int slot, Place at) {
  if (slot >= a.ws.capacity) return;
  const int64_t t = at.t0 + (hit.x >> 8);
  const int64_t f = at.feature(a.weights.first_feature, hit.x & 0xFF);
  a.ws.entries[t * a.ws.capacity + slot] =
      pack_entry(f, __uint_as_float(hit.y));
  if (a.eager && at.n <= kEagerTokens)
    prefetch_bytes(a.weights.w_dec + f * a.weights.d_out, a.weights.d_out * 2);
}

// As append_hits, for lanes with many hits: lanes that have the same token ask
// once for all of them, or the atomics of all tiles would queue for a token's
// counter.
template <typename T, typename Place>
__device__ __forceinline__ void append_together(const EncodeArgs<T>& a,
                                                const uint2* hits, int own,
                                                int most, Place at) {
  constexpr int kInFlight = 2;
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int first = 0; first < most; first += kInFlight) {
    uint2 hit[kInFlight];
    unsigned same[kInFlight];
    int slot[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      hit[u] = hits[(first + u) * 32];
      const int t = at.t0 + (hit[u].x >> 8);
      const bool there = first + u < own && t < at.n;
      same[u] = __match_any_sync(~0u, there ? t : -1);
      slot[u] = a.ws.capacity;  // for lanes without a hit: no room
      if (there && lane == __ffs(same[u]) - 1)
        slot[u] = atomicAdd(&a.ws.records[t].listed, __popc(same[u]));
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int base = __shfl_sync(~0u, slot[u], __ffs(same[u]) - 1);
      store_hit(a, hit[u], base + __popc(same[u] & ((1u << lane) - 1)), at);
    }
  }
}

// Appends a lane's hits to their tokens' lists, four atomics in flight at a
// time.
template <typename T, typename Place>
__device__ __forceinline__ void append_hits(const EncodeArgs<T>& a,
                                            const uint2* hits, int own,
                                            Place at) {
  const int most = __reduce_max_sync(~0u, own);
  if (most > kHitsPerLane / 2) {
    append_together(a, hits, own, most, at);
    return;
  }
#pragma unroll 1
  for (int first = 0; first < most; first += 4) {
    uint2 hit[4];
    int slot[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      slot[u] = a.ws.capacity;
      if (first + u >= own) continue;
      hit[u] = hits[(first + u) * 32];
      const int t = at.t0 + (hit[u].x >> 8);  // columns past n hold junk
      if (t < at.n) slot[u] = atomicAdd(&a.ws.records[t].listed, 1);
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) store_hit(a, hit[u], slot[u], at);
  }
}

// The bars of a tile's tokens, spread over a warp: lane l has those of tokens
// l, l + 32, ...
struct TileBars {
  float at[kWide / 32];
};

// `bars` has entries for whole tiles of the widest kind.
template <int N>
__device__ __forceinline__ TileBars load_bars(const float* bars, int t0) {
  TileBars b = {};
#pragma unroll
  for (int j = 0; j < (N + 31) / 32; ++j)
    b.at[j] = bars[t0 + (threadIdx.x & 31) + 32 * j];
  return b;
}

// Notes the hits among accumulators [From, From + kPart); `where` holds the
// lane's first token in the high bits, its first feature in the low eight. With
// kBars a hit is a score that is not below its token's bar, which another lane
// of the warp may hold.
template <bool kBars, int From, int R>
__device__ __forceinline__ void note_hits(const float (&p)[R],
                                          const LaneFeatures& l, uint32_t where,
                                          const TileBars& bars, uint2*& next) {
  if constexpr (From < R) {
    constexpr int kTo = From + kPart < R ? From + kPart : R;
    float bar[kPart / 2] = {};
    if constexpr (kBars) {
#pragma unroll
      for (int c = 0; c < kPart / 2; ++c) {
        const int token = From / 4 * 8 + c / 2 * 8 + (c & 1);
        bar[c] = __shfl_sync(~0u, bars.at[token / 32],
                             (token & 31) + (threadIdx.x & 3) * 2);
      }
    }
#pragma unroll
    for (int i = From; i < kTo; ++i) {
      const float value = p[i] + (i & 2 ? l.bias.y : l.bias.x);
      bool hit;
      if constexpr (kBars)
        hit = !(value < bar[(i - From) / 4 * 2 + (i & 1)]);
      else
        hit = p[i] > (i & 2 ? l.cut.y : l.cut.x);
      if (hit) {
        const uint32_t at =
            where + (((i / 4) * 8 + (i & 1)) << 8) + (i & 2 ? 8 : 0);
        *next = make_uint2(at, __float_as_uint(value));
        next += 32;
      }
    }
  }
}

// The accumulators are registers, so a part is a case of code, not an index.
template <bool kBars, int R>
__device__ __forceinline__ void note_part(int part, const float (&p)[R],
                                          const LaneFeatures& l, uint32_t where,
                                          const TileBars& bars, uint2*& next) {
#define STEERING_PART(I)                                  \
  case I:                                                 \
    note_hits<kBars, I * kPart>(p, l, where, bars, next); \
    break;
  switch (part) {
    STEERING_PART(0)
    STEERING_PART(1)
    STEERING_PART(2)
    STEERING_PART(3)
    STEERING_PART(4)
    STEERING_PART(5)
    STEERING_PART(6)
    STEERING_PART(7)
    STEERING_PART(8)
    STEERING_PART(9)
    STEERING_PART(10)
    STEERING_PART(11)
    STEERING_PART(12)
    STEERING_PART(13)
    STEERING_PART(14)
    STEERING_PART(15)
    STEERING_PART(16)
    STEERING_PART(17)
    STEERING_PART(18)
    STEERING_PART(19)
  }
#undef STEERING_PART
}

// Emits one lane's non-zeros, part by part; the buffer is emptied whenever
// another part might not fit. With `keep` the last hits stay in it for another
// warp. Returns how many are left there.
template <bool kBars, int N, typename T, typename Place>
__device__ __forceinline__ int emit_hits(const EncodeArgs<T>& a,
                                         const float (&p)[N / 2],
                                         const LaneFeatures& l, uint2* hits,
                                         uint32_t where, Place at, bool keep,
                                         const TileBars& bars = {}) {
  // A part covers two runs of eight tokens; parts past the last token are left.
  constexpr int kParts = (N / 2 + kPart - 1) / kPart;
  const int parts = min(kParts, (at.n - at.t0 + 15) / 16);
  uint2* next = hits;
#pragma unroll 1
  for (int part = 0; part < parts; ++part) {
    // Opaque, or every sum would be made ahead of the loop and kept in memory.
    LaneFeatures now = l;
    asm volatile("" : "+f"(now.bias.x), "+f"(now.bias.y), "+r"(where));
    note_part<kBars>(part, p, now, where, bars, next);
    const int own = (next - hits) / 32;
    const bool last = part + 1 == parts;
    const bool crowded = __any_sync(~0u, own > kHitsPerLane - kPart);
    if (crowded || (last && !keep)) {
      append_hits(a, hits, own, at);
      next = hits;
    }
  }
  return (next - hits) / 32;
}

// Stores a lane's scores. The walk is one pointer that moves: with an address
// for every score the compiler runs out of registers.
template <int N>
__device__ __forceinline__ void store_scores(float* scores, int num_features,
                                             const float (&p)[N / 2],
                                             const LaneFeatures& l, int f,
                                             TilePlace at) {
  const bool upper = f < num_features, lower = f + 8 < num_features;
  const int64_t stride = num_features;
  int t = at.t0 + (threadIdx.x & 3) * 2;
  float* to = scores + t * stride + f;
#pragma unroll
  for (int i = 0; i < N / 2; i += 4) {
    if (t < at.n) {
      if (upper) to[0] = p[i] + l.bias.x;
      if (lower) to[8] = p[i + 2] + l.bias.y;
    }
    if (t + 1 < at.n) {
      if (upper) to[stride] = p[i + 1] + l.bias.x;
      if (lower) to[stride + 8] = p[i + 3] + l.bias.y;
    }
    t += 8;
    to += 8 * stride;
    asm volatile("" : "+l"(to));
  }
}

// The upper half of a score's order bits: the largest such number below it.
__device__ __forceinline__ uint16_t coarse_order(float p) {
  return static_cast<uint16_t>(order_bits(p) >> 16);
}

// Stores a lane's scores of a sampled tile, coarsely; `column` is that of the
// lane's first feature in the sample.
template <int N>
__device__ __forceinline__ void store_sample(uint16_t* samples,
                                             const float (&p)[N / 2],
                                             const LaneFeatures& l, int column,
                                             TilePlace at) {
  int t = at.t0 + (threadIdx.x & 3) * 2;
  uint16_t* to = samples + static_cast<int64_t>(t) * kGuessSample + column;
#pragma unroll
  for (int i = 0; i < N / 2; i += 4) {
    if (t < at.n) {
      to[0] = coarse_order(p[i] + l.bias.x);
      to[8] = coarse_order(p[i + 2] + l.bias.y);
    }
    if (t + 1 < at.n) {
      to[kGuessSample] = coarse_order(p[i + 1] + l.bias.x);
      to[kGuessSample + 8] = coarse_order(p[i + 3] + l.bias.y);
    }
    t += 8;
    to += 8 * kGuessSample;
    asm volatile("" : "+l"(to));
  }
}

}  // namespace vllm_steering
