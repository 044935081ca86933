// SPDX-License-Identifier: Apache-2.0
// Full reconstruction of the tokens that have more non-zeros than a list holds
// (dense.cuh), in one launch, whatever their number: for steps of many tokens.
#pragma once

#include "dense_phases.cuh"

namespace vllm_steering {

constexpr int kDenseWidths = 4;
constexpr int kDenseWidest = 128;  // tokens of a tile
constexpr int kDenseStages = 4;
constexpr int kDenseStage = kStageW + 2 * 128 * kTileK * 2;

struct DenseMaps {
  CUtensorMap w_enc;                // box kTileF x kTileK
  CUtensorMap w_dec;                // box kTileK x 64
  CUtensorMap x[kDenseWidths];      // box N x kTileK
  CUtensorMap limbs[kDenseWidths];  // box N x kTileK
};

struct DenseMemory {
  char operands[kDenseStages * kDenseStage];
  uint64_t full[kDenseStages], empty[kDenseStages];
  int ticket;
};
constexpr int kDenseSmem = sizeof(DenseMemory) + 1024;
static_assert(kDenseSmem <= 227 * 1024, "more than a multiprocessor has");
// Clamps whose corrections the last phase keeps in `operands`.
constexpr int kDenseClamps = sizeof(DenseMemory::operands) / 4;

#define STEERING_DENSE_WIDTHS(n, RUN) \
  if (n <= 8) {                       \
    RUN(8, 0);                        \
  } else if (n <= 32) {               \
    RUN(32, 1);                       \
  } else if (n <= 64) {               \
    RUN(64, 2);                       \
  } else {                            \
    RUN(128, 3);                      \
  }

template <int N, bool kDecodes>
__device__ __forceinline__ void request_dense(DenseMemory& m,
                                              const DenseMaps& maps, int width,
                                              int low_row, DenseTile tile,
                                              int it) {
  constexpr int kTokens = N * kTileK * 2;
  int k = tile.k0;
#pragma unroll 1
  for (int step = 0; step < tile.steps; ++step, ++it) {
    const int s = it % kDenseStages, round = it / kDenseStages;
    if (round > 0) barrier_wait(barrier_at(m.empty, s), (round - 1) & 1);
    const uint32_t full = barrier_at(m.full, s);
    const uint32_t to = smem_address(m.operands) + s * kDenseStage;
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
    k = k + 1 == tile.k_tiles ? 0 : k + 1;
  }
}

// acc = this warpgroup's 64 x N products. Encoding: rows of W_enc, reduction
// over D. Decoding: columns of W_dec (its rows are the reduction), both limbs.
template <typename T, int N, bool kDecodes>
__device__ __forceinline__ void multiply_dense(float (&acc)[N / 2],
                                               DenseMemory& m, int steps,
                                               int it) {
  const uint32_t operands = smem_address(m.operands);
  const uint32_t half = threadIdx.x / 128 * (kStageW / 2);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.f;
#pragma unroll 1
  for (int k = 0; k < steps; ++k, ++it) {
    const int s = it % kDenseStages;
    barrier_wait(barrier_at(m.full, s), it / kDenseStages & 1);
    const uint32_t stage = operands + s * kDenseStage;
    const uint64_t w = tile_descriptor(stage + half);
    const uint64_t high = tile_descriptor(stage + kStageW);
    const uint64_t low = tile_descriptor(stage + kStageW + N * kTileK * 2);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kTileK / 16; ++kk) {
      if constexpr (kDecodes) {
        // Sixteen rows of the reduction are 2048 bytes further on.
        Wgmma<T, N, true>::mma(acc, w + 128 * kk, high + 2 * kk, 1);
        Wgmma<T, N, true>::mma(acc, w + 128 * kk, low + 2 * kk, 1);
      } else {
        Wgmma<T, N>::mma(acc, w + 2 * kk, high + 2 * kk, 1);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (k > 0 && threadIdx.x % 128 == 0)
      barrier_arrive(barrier_at(m.empty, (it - 1) % kDenseStages));
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");
  if (steps > 0 && threadIdx.x % 128 == 0)
    barrier_arrive(barrier_at(m.empty, (it - 1) % kDenseStages));
}

// Phases 2 and 3 for one tile. One thread requests, two warpgroups multiply.
// Returns the block's count of stages.
template <typename T, int N, int kWidthIndex, bool kDecodes>
__device__ __forceinline__ int run_dense_tile(const DenseArgs<T>& a,
                                              DenseMemory& m,
                                              const DenseMaps& maps,
                                              const DenseItem& item, int it) {
  int split;
  const DenseTile tile = dense_tile<T, kDecodes>(a, item, N, split);
  if (threadIdx.x == kWeightsThread) {
    fence_async();  // what was stored before is read by copies now
    request_dense<N, kDecodes>(m, maps, kWidthIndex, a.scratch.rows, tile, it);
  } else if (threadIdx.x < kConsumers) {
    const int row = tile.row + threadIdx.x / 32 * 16 + (threadIdx.x & 31) / 4;
    float acc[N / 2];
    if constexpr (kDecodes) {
      multiply_dense<T, N, true>(acc, m, tile.steps, it);
      store_partial<T, N>(a, acc, split, row, tile.t0, item.tokens);
    } else {
      const LaneFeatures l = load_features(a.weights, row);
      multiply_dense<T, N, false>(acc, m, tile.steps, it);
      store_limbs<T, N>(a.scratch, acc, l, row, tile.t0, item.tokens);
    }
  }
  return it + tile.steps;
}

template <typename T, bool kDecodes>
__device__ __forceinline__ int run_dense_tile(const DenseArgs<T>& a,
                                              DenseMemory& m,
                                              const DenseMaps& maps,
                                              const DenseItem& item, int it) {
#define STEERING_DENSE(N, I) \
  return run_dense_tile<T, N, I, kDecodes>(a, m, maps, item, it)
  STEERING_DENSE_WIDTHS(item.tokens, STEERING_DENSE)
#undef STEERING_DENSE
}

template <typename T>
__global__ void __launch_bounds__(kEncodeThreads, 1)
    dense_kernel(const __grid_constant__ DenseArgs<T> a,
                 const __grid_constant__ DenseMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw[];
  // Nothing that earlier kernels write is read yet, only moved into L2.
  if (threadIdx.x == 0) prefetch_line(a.ws.sync + kDenseCount);
  wait_for_previous();
  launch_dependents();
  const int n = a.ws.sync[kDenseCount];
  if (n == 0) return;
  DenseMemory& m = *reinterpret_cast<DenseMemory*>(aligned_memory(raw));
  if (threadIdx.x == 0) {
    for (int s = 0; s < kDenseStages; ++s) {
      barrier_init(barrier_at(m.full, s), 1);
      barrier_init(barrier_at(m.empty, s), 2);
    }
    barrier_init_fence();
  }
  int it = 0;
  while (true) {
    __syncthreads();
    if (threadIdx.x == 0) m.ticket = atomicAdd(a.ws.sync + kDenseTicket, 1);
    __syncthreads();
    const DenseItem item = dense_item(a, m.ticket, n, kDenseWidest);
    if (item.phase == kPhases) break;
    if (threadIdx.x == 0) grid_wait(a.ws.sync + kDenseDone, item.first);
    __syncthreads();
    const int d = item.index;
    if (item.phase == kGather) {
      gather_dense(a, d, a.ws.records[item.base + d].dense);
    } else if (item.phase == kEncode) {
      it = run_dense_tile<T, false>(a, m, maps, item, it);
    } else if (item.phase == kDecode) {
      it = run_dense_tile<T, true>(a, m, maps, item, it);
    } else {
      finish_dense(a, reinterpret_cast<float*>(m.operands), d,
                   a.ws.records[item.base + d].dense);
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
