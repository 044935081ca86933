// SPDX-License-Identifier: Apache-2.0
// Tokens that no list holds, at the end of the decoder of a short step: without
// any, a step pays neither a launch nor a wait. A block has little shared
// memory here, for one stage of the product; its neighbours on the
// multiprocessor work while it waits for the next.
#pragma once

#include "dense_phases.cuh"

namespace vllm_steering {

constexpr int kTailWidths = 2;
constexpr int kTailWidest = 32;  // tokens of a tile
constexpr int kTailThreads = 256;
constexpr int kTailTokens = 512;  // of a step, at most

struct TailMaps {
  CUtensorMap w_enc;               // box kTileF x kTileK
  CUtensorMap w_dec;               // box kTileK x 64
  CUtensorMap x[kTailWidths];      // box N x kTileK, N = 8 and kTailWidest
  CUtensorMap limbs[kTailWidths];  // box N x kTileK
};

struct TailMemory {
  char operands[kStageW + 2 * kTailWidest * kTileK * 2];
  uint64_t full;
  int ticket;
  int counts[kTailThreads / 32];
  uint16_t tokens[kTailTokens];  // the dense ones, in order
};
constexpr int kTailSmem = sizeof(TailMemory) + 1024;
// Clamps whose corrections the last phase keeps in `operands`.
constexpr int kTailClamps = sizeof(TailMemory::operands) / 4;

// One thread: requests step `k` of a tile.
template <int N, bool kDecodes>
__device__ __forceinline__ void request_step(TailMemory& m,
                                             const TailMaps& maps, int width,
                                             int low_row, const DenseTile& tile,
                                             int k) {
  constexpr int kTokens = N * kTileK * 2;
  const uint32_t full = smem_address(&m.full), to = smem_address(m.operands);
  barrier_expect(full, kStageW + (kDecodes ? 2 : 1) * kTokens);
  if constexpr (kDecodes) {
    copy_tile(&maps.w_dec, to, full, tile.row, k * kTileK);
    copy_tile(&maps.w_dec, to + kStageW / 2, full, tile.row + 64, k * kTileK);
    copy_tile(&maps.limbs[width], to + kStageW, full, k * kTileK, tile.t0);
    copy_tile(&maps.limbs[width], to + kStageW + kTokens, full, k * kTileK,
              low_row + tile.t0);
  } else {
    copy_tile(&maps.w_enc, to, full, k * kTileK, tile.row);
    copy_tile(&maps.x[width], to + kStageW, full, k * kTileK, tile.t0);
  }
}

// Phases 2 and 3 for one tile, by two warpgroups, the first thread of which
// requests. `it` counts the block's stages.
template <typename T, int N, int kWidthIndex, bool kDecodes>
__device__ __forceinline__ void run_tail_tile(const DenseArgs<T>& a,
                                              TailMemory& m,
                                              const TailMaps& maps,
                                              const DenseItem& item, int& it) {
  int split;
  const DenseTile tile = dense_tile<T, kDecodes>(a, item, N, split);
  const int row = tile.row + threadIdx.x / 32 * 16 + (threadIdx.x & 31) / 4;
  const uint32_t stage = smem_address(m.operands);
  const uint32_t half = threadIdx.x / 128 * (kStageW / 2);
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.f;
  if (threadIdx.x == 0) fence_async();  // copies read what was stored before
  int k = tile.k0;
#pragma unroll 1
  for (int step = 0; step < tile.steps; ++step, ++it) {
    if (threadIdx.x == 0)
      request_step<N, kDecodes>(m, maps, kWidthIndex, a.scratch.rows, tile, k);
    barrier_wait(smem_address(&m.full), it & 1);
    const uint64_t w = tile_descriptor(stage + half);
    const uint64_t high = tile_descriptor(stage + kStageW);
    const uint64_t low = tile_descriptor(stage + kStageW + N * kTileK * 2);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kTileK / 16; ++kk) {
      if constexpr (kDecodes) {
        Wgmma<T, N, true>::mma(acc, w + 128 * kk, high + 2 * kk, 1);
        Wgmma<T, N, true>::mma(acc, w + 128 * kk, low + 2 * kk, 1);
      } else {
        Wgmma<T, N>::mma(acc, w + 2 * kk, high + 2 * kk, 1);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    __syncthreads();  // the stage may be filled again
    k = k + 1 == tile.k_tiles ? 0 : k + 1;
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");
  if constexpr (kDecodes)
    store_partial<T, N>(a, acc, split, row, tile.t0, item.tokens);
  else
    store_limbs<T, N>(a.scratch, acc, load_features(a.weights, row), row,
                      tile.t0, item.tokens);
}

template <typename T, bool kDecodes>
__device__ __forceinline__ void run_tail_tile(const DenseArgs<T>& a,
                                              TailMemory& m,
                                              const TailMaps& maps,
                                              const DenseItem& item, int& it) {
  if (item.tokens <= 8)
    run_tail_tile<T, 8, 0, kDecodes>(a, m, maps, item, it);
  else
    run_tail_tile<T, kTailWidest, 1, kDecodes>(a, m, maps, item, it);
}

// Lists the dense tokens; every block finds the same ones. Returns how many.
template <typename T>
__device__ __forceinline__ int list_dense(const Workspace<T>& ws,
                                          TailMemory& m) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int total = 0;
#pragma unroll 1
  for (int first = 0; first < kTailTokens; first += kTailThreads) {
    const int i = first + threadIdx.x;
    bool dense = false;
    if (i < ws.tokens()) {
      const TokenRecord& r = ws.records[i];
      dense = r.token >= 0 && r.row != 0 && r.listed > kListMax;
    }
    const unsigned votes = __ballot_sync(~0u, dense);
    if (lane == 0) m.counts[warp] = __popc(votes);
    __syncthreads();
    int before = total + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kTailThreads / 32; ++w) {
      if (w < warp) before += m.counts[w];
      total += m.counts[w];
    }
    if (dense) m.tokens[before] = static_cast<uint16_t>(i);
    __syncthreads();
  }
  return total;
}

// Every block of a grid of kTailThreads threads calls this at its end, where
// some list may have been too short, with shared memory that nothing else uses
// any more. Not inlined: rare, and its registers are not to be the decoder's.
template <typename T>
__device__ __noinline__ void dense_tail(const DenseArgs<T>& a,
                                        const TailMaps& maps, TailMemory& m) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  fence_async();  // copies write where threads have read and written
  __syncthreads();
  const int n = list_dense(a.ws, m);
  if (threadIdx.x == 0) {
    barrier_init(smem_address(&m.full), 1);
    barrier_init_fence();
  }
  int it = 0;
  while (true) {
    __syncthreads();
    if (threadIdx.x == 0) m.ticket = atomicAdd(a.ws.sync + kDenseTicket, 1);
    __syncthreads();
    const DenseItem item = dense_item(a, m.ticket, n, kTailWidest);
    if (item.phase == kPhases) break;
    if (threadIdx.x == 0) grid_wait(a.ws.sync + kDenseDone, item.first);
    __syncthreads();
    const int d = item.index;
    if (item.phase == kGather) {
      gather_dense(a, d, m.tokens[item.base + d]);
    } else if (item.phase == kEncode) {
      run_tail_tile<T, false>(a, m, maps, item, it);
    } else if (item.phase == kDecode) {
      run_tail_tile<T, true>(a, m, maps, item, it);
    } else {
      finish_dense(a, reinterpret_cast<float*>(m.operands), d,
                   m.tokens[item.base + d]);
    }
    fence_async();  // copies of other blocks may read what was stored here
    __syncthreads();
    if (threadIdx.x == 0) grid_arrive(a.ws.sync + kDenseDone);
  }
  if (threadIdx.x == 0) leave_dense(a.ws);
#else
  __trap();
#endif
}

}  // namespace vllm_steering
