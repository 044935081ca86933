// SPDX-License-Identifier: Apache-2.0
// The first look at all features: the 8-bit copy of a block's tiles is
// multiplied with the limbs of the tokens, and what may fire is listed.
#pragma once

#include "ptx/wgmma_int8.cuh"
#include "rescore.cuh"

namespace vllm_steering {

// The first rows of one or two tiles of the encoder; -1: no second one.
struct TilePair {
  int a, b;
};

__device__ __forceinline__ TilePair tile_pair(const GroupedTiles& g,
                                              const BlockTiles& own, int at) {
  return {g.tile(at) * kTileF, at + 1 < own.end ? g.tile(at + 1) * kTileF : -1};
}

// Requests columns of a pair.
__device__ __forceinline__ void request_rows(const CUtensorMap* map,
                                             TilePair rows, uint32_t to,
                                             uint32_t full, int column) {
  barrier_expect(full, rows.b >= 0 ? kStageW8 : kHalfW8);
  copy_tile(map, to, full, column, rows.a);
  if (rows.b >= 0) copy_tile(map, to + kHalfW8, full, column, rows.b);
}

// One thread: requests one operand of the block's tiles; `first` stages of
// weights have been requested. See request_all for the pace.
template <int Tokens, bool Weights>
__device__ void request_screen(ScreenMemory& m, const CUtensorMap* map,
                               const GroupedTiles& g, const BlockTiles& own,
                               int k_tiles, int first) {
  using S = ScreenStages<Tokens>;
  const uint32_t operands = smem_address(m.base.operands);
  const long long start = clock64();
  int it = 0;
#pragma unroll 1
  for (int at = own.first; at < own.end; at += 2) {
    int k = first_k(at, k_tiles);
    const TilePair rows = tile_pair(g, own, at);
#pragma unroll 1
    for (int step = 0; step < k_tiles; ++step, ++it) {
      const int s = it % S::kCount, round = it / S::kCount;
      if (round > 0) barrier_wait(barrier_at(m.empty, s), (round - 1) & 1);
      const uint32_t full = barrier_at(m.full, s);
      if constexpr (Weights) {
        if (first > 0 && round == 0) pace(start, 2 * (it - first));
        if (it >= first)
          request_rows(map, rows, operands + s * kStageW8, full,
                       k * kScreenColumns);
      } else {
        const uint32_t to = operands + S::kX0 + s * 2 * S::kBox;
        barrier_expect(full, 2 * S::kBox);
        copy_tile(map, to, full, k * kScreenColumns, 0);
        copy_tile(map, to + S::kBox, full, k * kScreenColumns, kScreenTokens);
      }
      k = k + 1 == k_tiles ? 0 : k + 1;
    }
  }
}

// Requests the first stages of the block's first tiles.
inline __device__ void request_screen_first(ScreenMemory& m,
                                            const CUtensorMap* map,
                                            const GroupedTiles& g,
                                            const BlockTiles& own, int first,
                                            int k_tiles) {
  if (first == 0) return;
  int k = first_k(own.first, k_tiles);
  const TilePair rows = tile_pair(g, own, own.first);
  for (int s = 0; s < first; ++s) {
    request_rows(map, rows, smem_address(m.base.operands) + s * kStageW8,
                 barrier_at(m.full, s), k * kScreenColumns);
    k = k + 1 == k_tiles ? 0 : k + 1;
  }
}

// Requested copies must land before their memory has another use.
inline __device__ void drain_screen_first(ScreenMemory& m, int first) {
  for (int s = 0; s < first; ++s) {
    barrier_arrive(barrier_at(m.full, s));
    barrier_wait(barrier_at(m.full, s), 0);
  }
}

// acc[h] = the integer products of rows [64 h, 64 h + 64) of this warpgroup's
// 128 (junk where it has no tile); columns are the tokens' high limbs, then
// their low ones.
template <int Tokens>
__device__ __forceinline__ void multiply_limbs(int (&acc)[2][Tokens],
                                               ScreenMemory& m, int k_tiles,
                                               int& it) {
  using S = ScreenStages<Tokens>;
  const uint32_t operands = smem_address(m.base.operands);
  const uint32_t own = threadIdx.x / 128 * kHalfW8;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int i = 0; i < Tokens; ++i) acc[h][i] = 0;
#pragma unroll 1
  for (int k = 0; k < k_tiles; ++k, ++it) {
    const int s = it % S::kCount;
    barrier_wait(barrier_at(m.full, s), it / S::kCount & 1);
    const uint64_t w = tile_descriptor(operands + s * kStageW8 + own);
    const uint64_t x = tile_descriptor(operands + S::kX0 + s * 2 * S::kBox);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kScreenColumns / 32; ++kk) {
      WgmmaInt8<2 * Tokens>::mma(acc[0], w + 2 * kk, x + 2 * kk);
      WgmmaInt8<2 * Tokens>::mma(
          acc[1], w + (64 * kScreenColumns >> 4) + 2 * kk, x + 2 * kk);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (k > 0 && threadIdx.x % 128 == 0)
      barrier_arrive(barrier_at(m.empty, (it - 1) % S::kCount));
  }
  wgmma_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int i = 0; i < Tokens; ++i)
      asm volatile("" : "+r"(acc[h][i])::"memory");
  if (threadIdx.x % 128 == 0)
    barrier_arrive(barrier_at(m.empty, (it - 1) % S::kCount));
}

// Which of a lane's two rows may fire, in bits 0 and 1.
template <int Tokens>
__device__ __forceinline__ unsigned test_rows(const int (&acc)[Tokens],
                                              const RowBound& upper,
                                              const RowBound& lower,
                                              const float4* tokens) {
  constexpr int kLow = Tokens / 2;  // where the low limbs' sums begin
  bool up = false, down = false;
#pragma unroll
  for (int j = 0; j < Tokens / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 token = tokens[8 * j + (threadIdx.x & 3) * 2 + i];
      const int at = 4 * j + i;
      up |= may_fire(upper, token, acc[at], acc[kLow + at]);
      down |= may_fire(lower, token, acc[at + 2], acc[kLow + at + 2]);
    }
  }
  return up | down << 1;
}

// What a warp appended to a list: its first place there, and which of its 32
// rows, in order.
struct Appended {
  int base;
  unsigned rows;
};

// Appends the rows of a warp that may fire to a list of the block. `rows` has a
// bit for each of the lane's four rows: f0 + lane / 4, and 8, 64, 72 behind.
template <typename T>
__device__ __forceinline__ Appended list_candidates(const Weights<T>& w,
                                                    unsigned rows, int f0,
                                                    int n, int* list,
                                                    int* count) {
  const int lane = threadIdx.x & 31;
  unsigned mine = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const unsigned votes = __ballot_sync(~0u, rows >> r & 1);
    if (lane / 8 == r) mine = votes;
  }
  // Lane l decides for row l % 8 of the eight rows l / 8.
  const bool may = (mine >> (lane % 8 * 4) & 0xF) != 0;
  const unsigned all = __ballot_sync(~0u, may);
  if (all == 0) return {0, 0};
  int base = 0;
  if (lane == 0) base = atomicAdd(count, __popc(all));
  base = __shfl_sync(~0u, base, 0);
  if (!may) return {base, all};
  const int f = f0 + lane % 8 + (lane / 8 & 1) * 8 + (lane / 16) * 64;
  list[base + __popc(all & ((1u << lane) - 1))] = f;
  // It is read soon, and few tokens leave L2 room for all of it.
  if (!looks_twice(n))
    prefetch_bytes(w.w_enc + static_cast<int64_t>(f) * w.d_in, w.d_in * 2);
  return {base, all};
}

// Keeps the sums of a lane's candidates among its rows g and g + 1 of four, for
// the second look.
template <int Tokens>
__device__ __forceinline__ void keep_sums(const int (&acc)[Tokens], Appended at,
                                          int g, float* sums) {
  constexpr int kLow = Tokens / 2;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = (g + half) * 8 + lane / 4;
    if ((at.rows >> row & 1) == 0) continue;
    const int place = at.base + __popc(at.rows & ((1u << row) - 1));
    float* to = sums + static_cast<int64_t>(place) * Tokens + (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < Tokens / 8; ++j) {
      const int i = 4 * j + 2 * half;
      *reinterpret_cast<float2*>(to + 8 * j) =
          make_float2(limb_sum(acc[i], acc[kLow + i]),
                      limb_sum(acc[i + 1], acc[kLow + i + 1]));
    }
  }
}

// The consumers' first loop: multiply, test, list.
template <typename T, int Tokens>
__device__ void screen(const Weights<T>& w, const Screen& s, ScreenMemory& m,
                       const GroupedTiles& g, const BlockTiles& own, int n) {
  const int k_tiles = s.padded / kScreenColumns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const float minus = -infinity();
  float4* tokens = reinterpret_cast<float4*>(m.base.hits);
  int it = 0;
  int acc[2][Tokens];
#pragma unroll 1
  for (int pair = own.first; pair < own.end; pair += 2) {
    const int at = pair + warp / 4;
    const bool mine = at < own.end;
    // Past the end no feature can fire.
    const int f0 = mine ? g.tile(at) * kTileF + warp % 4 * 16 : w.num_features;
    const int f = f0 + lane / 4;
    RowBound rows[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const LaneFeatures l = load_features(w, f + 64 * h);
      rows[2 * h] = row_bound(s, f + 64 * h, w.num_features, l.cut.x);
      rows[2 * h + 1] = row_bound(s, f + 64 * h + 8, w.num_features, l.cut.y);
    }
    multiply_limbs<Tokens>(acc, m, k_tiles, it);
    if (pair == own.first) {
      // The barrier of the grid is behind the limbs that have been multiplied.
      const int t = threadIdx.x;
      if (t < Tokens)
        tokens[t] =
            t < n ? __ldcg(s.tokens + t) : make_float4(0.f, 0.f, 0.f, minus);
      sync_threads<kConsumers>();
    }
    if (!mine) continue;
    unsigned may = test_rows<Tokens>(acc[0], rows[0], rows[1], tokens);
    may |= test_rows<Tokens>(acc[1], rows[2], rows[3], tokens) << 2;
    const int order = g.order(at);
    int* list = candidate_list(s, g, own, order);
    const Appended to = list_candidates(
        w, may, f0, n, list, candidate_counts(m, 0) + order - own.order);
    if constexpr (kLevel<Tokens> == 1) {
      float* sums = s.sums + (list - s.candidates) * Tokens;
      keep_sums<Tokens>(acc[0], to, 0, sums);
      keep_sums<Tokens>(acc[1], to, 2, sums);
    }
  }
}

}  // namespace vllm_steering
