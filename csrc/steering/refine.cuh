// SPDX-License-Identifier: Apache-2.0
// The closer look at the candidates of a step of many tokens: two more bits of
// each element of W_enc, so that few rows that do not fire are left.
//
//   w = s q + s c / 8 + r2, x = u 128 h + e, H = c . h, exact
//   accumulator <= s u (P + 16 H) + A2 |x| + B |d| + (A + A2) |e| + eta
//
// The codes of 256 columns of a row are 64 bytes, in the order in which the
// lanes of a warp hold an operand of the tensor cores; so they come straight to
// registers.
#pragma once

#include "ptx/wgmma_int8.cuh"
#include "rescore.cuh"

namespace vllm_steering {

constexpr int kFineAhead = 4;   // groups of columns that are asked for ahead
constexpr int kEarlyRows = 16;  // of W_enc that a block asks L2 for at once

// The consumers ask L2 for the codes of candidates [start, start + kMostRows)
// of a list: whole rows at once, which memory brings faster than 64 bytes each.
__device__ __forceinline__ void prefetch_codes(const Screen& s, const int* list,
                                               int start, int count) {
  const int i = start + threadIdx.x;
  if (threadIdx.x >= kMostRows || i >= count) return;
  prefetch_bytes(s.fine + static_cast<int64_t>(__ldcg(list + i)) * 4 * s.groups,
                 s.groups * 64);
}

// The place of one group of columns of the high limbs, for `Tokens` tokens.
template <int Tokens>
struct FineStages {
  static constexpr int kBox = Tokens * kScreenColumns;
  static constexpr int kBytes = kFineColumns / kScreenColumns * kBox;
  static_assert(kRefineStages * kBytes <= sizeof(EncodeMemory::operands));
};

// One thread: requests the high limbs for every item.
template <int Tokens>
__device__ void request_fine(const Screen& s, ScreenMemory& m,
                             const CUtensorMap* map, int num_features) {
  using S = FineStages<Tokens>;
  const uint32_t operands = smem_address(m.base.operands);
  RingPlace ring;
  for_items<false>(s, m, num_features, 0, [&](const Item&) {
#pragma unroll 1
    for (int g = 0; g < s.groups; ++g) {
      barrier_wait(barrier_at(m.base.empty, ring.stage), ring.phase ^ 1);
      const uint32_t full = barrier_at(m.base.full, ring.stage);
      const uint32_t to = operands + ring.stage * S::kBytes;
      barrier_expect(full, S::kBytes);
      barrier_arrive(full);  // the encoder's barriers count two
      copy_tile(map, to, full, g * kFineColumns, 0);
      copy_tile(map, to + S::kBox, full, g * kFineColumns + kScreenColumns, 0);
      ring.next(kRefineStages);
    }
  });
}

// Eight codes of two bits, in the nibbles of `codes`, as bytes -3, -1, 1, 3.
__device__ __forceinline__ uint2 fine_bytes(uint32_t codes) {
  constexpr uint32_t kValues = 0x0301FFFD;
  return make_uint2(__byte_perm(kValues, 0, codes & 0xFFFF),
                    __byte_perm(kValues, 0, codes >> 16));
}

// The codes of 256 columns of two rows, as the operands of eight products.
__device__ __forceinline__ void unpack_fine(const uint4& upper,
                                            const uint4& lower,
                                            uint32_t (&a)[8][4]) {
  const uint32_t up[4] = {upper.x, upper.y, upper.z, upper.w};
  const uint32_t low[4] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint2 u = fine_bytes(up[j / 2] >> (j % 2 * 2) & 0x33333333);
    const uint2 l = fine_bytes(low[j / 2] >> (j % 2 * 2) & 0x33333333);
    a[j][0] = u.x;
    a[j][1] = l.x;
    a[j][2] = u.y;
    a[j][3] = l.y;
  }
}

// acc = c . h of this warpgroup's 64 rows of an item, all of them: see
// multiply_item.
template <int Tokens>
__device__ __forceinline__ void multiply_fine(int (&acc)[Tokens / 2],
                                              ScreenMemory& m, int groups,
                                              const uint4* upper,
                                              const uint4* lower, bool together,
                                              RingPlace& ring) {
  using S = FineStages<Tokens>;
  const uint32_t operands = smem_address(m.base.operands);
  uint4 up[kFineAhead], low[kFineAhead];
#pragma unroll
  for (int i = 0; i < Tokens / 2; ++i) acc[i] = 0;
#pragma unroll
  for (int u = 0; u < kFineAhead; ++u) {
    const int g = min(u, groups - 1);
    up[u] = __ldg(upper + 4 * g);
    low[u] = __ldg(lower + 4 * g);
  }
#pragma unroll 1
  for (int g0 = 0; g0 < groups; g0 += kFineAhead) {
#pragma unroll
    for (int u = 0; u < kFineAhead; ++u) {
      if (g0 + u >= groups) break;
      barrier_wait(barrier_at(m.base.full, ring.stage), ring.phase);
      // Always; but not known to the compiler, which else believes that the
      // threads of a warp part while they wait, and runs products one by one.
      if (together) {
        uint32_t a[8][4];
        unpack_fine(up[u], low[u], a);
        const int next = min(g0 + u + kFineAhead, groups - 1);
        up[u] = __ldg(upper + 4 * next);
        low[u] = __ldg(lower + 4 * next);
        const uint32_t at = operands + ring.stage * S::kBytes;
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            asm volatile("" : "+r"(a[j][i])::"memory");
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 8; ++j)
          WgmmaInt8<Tokens>::mma(
              acc, a[j], tile_descriptor(at + j / 4 * S::kBox) + 2 * (j % 4));
        wgmma_commit();
        wgmma_wait<0>();
      }
      if (threadIdx.x % 128 == 0)
        barrier_arrive(barrier_at(m.base.empty, ring.stage));
      ring.next(kRefineStages);
    }
  }
#pragma unroll
  for (int i = 0; i < Tokens / 2; ++i)
    asm volatile("" : "+r"(acc[i])::"memory");
}

// Whether a row may still fire; `half` picks the lane's upper or lower row.
template <int Tokens>
__device__ __forceinline__ bool test_fine(const int (&acc)[Tokens / 2],
                                          int half, const RowBound& row,
                                          float finer, const float* sums,
                                          const float4* tokens,
                                          const float* tails) {
  const float both = __fadd_ru(row.a, finer);
  bool may = false;
#pragma unroll
  for (int j = 0; j < Tokens / 8; ++j) {
    const int t = 8 * j + (threadIdx.x & 3) * 2;
    const float2 p = __ldcg(reinterpret_cast<const float2*>(sums + t));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 token = tokens[t + i];
      const float sum = __fmaf_ru(__int2float_ru(acc[4 * j + 2 * half + i]),
                                  16.f, i == 0 ? p.x : p.y);
      const float error = __fmaf_ru(
          finer, token.y,
          __fmaf_ru(both, tails[t + i], __fmaf_ru(row.b, token.z, token.w)));
      may |= !(__fmaf_ru(row.scale * token.x, sum, error) <= row.cut);
    }
  }
  return may;
}

// The consumers, between screen and rescore: lists the candidates that are
// left.
template <typename T, int Tokens>
__device__ void refine(const Weights<T>& w, const Screen& s, ScreenMemory& m,
                       int n) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int row = warp * 16 + lane / 4;
  const float4* tokens = reinterpret_cast<const float4*>(m.base.hits);
  float* tails = reinterpret_cast<float*>(m.base.hits) + 4 * kScreenTokens;
  if (threadIdx.x < Tokens)
    tails[threadIdx.x] =
        static_cast<int>(threadIdx.x) < n ? __ldcg(s.tails + threadIdx.x) : 0.f;
  sync_threads<kConsumers>();
  RingPlace ring;
  int acc[Tokens / 2];
  for_items<true>(s, m, w.num_features, 0, [&](const Item& item) {
    const int* list = item.features();
    const int count = item.count;
    const int listed = candidate_counts(m, 0)[item.o];
    if (item.start == 0) prefetch_codes(s, item.list, 0, listed);
    prefetch_codes(s, item.list, item.start + kMostRows, listed);
    const int up = __ldcg(list + min(row, count - 1));
    const int down = __ldcg(list + min(row + 8, count - 1));
    const uint4* fine = s.fine + (lane & 3);
    const int64_t stride = 4 * s.groups;
    multiply_fine<Tokens>(acc, m, s.groups, fine + up * stride,
                          fine + down * stride, __shfl_sync(~0u, count > 0, 0),
                          ring);
    const int f[2] = {up, down};
    unsigned left = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = row + 8 * half;
      const float cut = fmaxf(w.threshold[f[half]], 0.f) - w.b_enc[f[half]];
      const RowBound bound = row_bound(s, f[half], w.num_features, cut);
      const float* sums =
          s.sums + ((list - s.candidates) + min(own, count - 1)) * Tokens;
      const bool may = test_fine<Tokens>(acc, half, bound, s.rows[f[half]].w,
                                         sums, tokens, tails);
      const unsigned votes = __ballot_sync(~0u, may && own < count);
      if (lane / 8 == half) left = votes;
    }
    // Lane l < 16 decides for row l % 8 of the upper or lower eight.
    const bool may = lane < 16 && (left >> (lane % 8 * 4) & 0xF) != 0;
    const unsigned all = __ballot_sync(~0u, may);
    if (all == 0) return;
    int place = 0;
    if (lane == 0)
      place = atomicAdd(candidate_counts(m, 1) + item.o, __popc(all));
    place = __shfl_sync(~0u, place, 0) + __popc(all & ((1u << lane) - 1));
    if (!may) return;
    const int left_over = __ldcg(list + warp * 16 + lane);
    s.candidates[item.list - s.candidates + s.room + place] = left_over;
    if (place < kEarlyRows)
      prefetch_bytes(w.w_enc + static_cast<int64_t>(left_over) * w.d_in,
                     w.d_in * 2);
  });
}

}  // namespace vllm_steering
