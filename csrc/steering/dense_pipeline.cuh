// SPDX-License-Identifier: Apache-2.0
// Tiles of the products that the dense path makes: operands through shared
// memory in stages, as in pipeline.cuh.
#pragma once

#include "dense.cuh"
#include "pipeline.cuh"

namespace vllm_steering {

constexpr int kDenseWidths = 4;
// Stages by the widest tile. Where a kernel decodes lists too, they are few and
// small: L1 keeps room for the rows that are gathered.
template <int kWidest>
constexpr int kDenseStages = kWidest > 64 ? 4 : 3;
template <int kWidest>
constexpr int kDenseStage = kStageW + 2 * kWidest * kTileK * 2;

struct DenseMaps {
  CUtensorMap w_enc;                // box kTileF x kTileK
  CUtensorMap w_dec;                // box kTileK x 64
  CUtensorMap x[kDenseWidths];      // box N x kTileK
  CUtensorMap limbs[kDenseWidths];  // box N x kTileK
};

template <int kWidest>
struct DenseMemory {
  char operands[kDenseStages<kWidest> * kDenseStage<kWidest>];
  uint64_t full[kDenseStages<kWidest>], empty[kDenseStages<kWidest>];
  int ticket;
  uint8_t tokens[kCompactEncodeTokens];  // where a kernel lists them itself
};
template <int kWidest>
constexpr int kDenseSmem = sizeof(DenseMemory<kWidest>) + 1024;
static_assert(kDenseSmem<128> <= 227 * 1024, "more than a multiprocessor has");
// Clamps whose corrections the last phase keeps in `operands`.
constexpr int kDenseClamps = sizeof(DenseMemory<64>::operands) / 4;

#define STEERING_DENSE_WIDTHS(n, RUN)    \
  if (n <= 8) {                          \
    RUN(8);                              \
  } else if (n <= 32) {                  \
    RUN(32);                             \
  } else if (n <= 64 || kWidest == 64) { \
    RUN(64);                             \
  } else {                               \
    RUN(kWidest);                        \
  }

// What the producer requests and the consumers multiply for one tile: `steps`
// stages from k-tile `k0`, which wraps at `k_tiles`; rows `row` of the weights
// (columns of W_dec when decoding) and tokens from `t0`.
struct DenseTile {
  int row, t0, k0, k_tiles, steps;
};

// The rows of a tile that are requested. Where tiles are of 64, whole boxes are
// as fast.
template <int N, int kWidest>
__device__ __forceinline__ int dense_rows_of_tile(int n, int row) {
  return kWidest > 64 ? rows_of_tile<N>(n, row) : N;
}

// Requests `rows` rows of a tile of tokens.
template <int N, int kWidest>
__device__ __forceinline__ void request_dense_tokens(const CUtensorMap* maps,
                                                     uint32_t to, uint32_t full,
                                                     int column, int row,
                                                     int rows) {
  constexpr int kBox = box_index(N);
  if constexpr (kWidest > 64)
    request_boxes<kBox, 1>(maps, to, full, column, row, 0, rows);
  else
    copy_tile(maps + kBox, to, full, column, row);
}

template <int N, int kWidest, bool kDecodes>
__device__ __forceinline__ void request_dense(DenseMemory<kWidest>& m,
                                              const DenseMaps& maps,
                                              int low_row, DenseTile tile,
                                              int rows, int it) {
  constexpr int kTokens = N * kTileK * 2;
  const int bytes = kStageW + (kDecodes ? 2 : 1) * rows * kTileK * 2;
  int k = tile.k0;
#pragma unroll 1
  for (int step = 0; step < tile.steps; ++step, ++it) {
    const int s = it % kDenseStages<kWidest>,
              round = it / kDenseStages<kWidest>;
    if (round > 0) barrier_wait(barrier_at(m.empty, s), (round - 1) & 1);
    const uint32_t full = barrier_at(m.full, s);
    const uint32_t to = smem_address(m.operands) + s * kDenseStage<kWidest>;
    barrier_expect(full, bytes);
    if constexpr (kDecodes) {
      copy_tile(&maps.w_dec, to, full, tile.row, k * kTileK);
      copy_tile(&maps.w_dec, to + kStageW / 2, full, tile.row + 64, k * kTileK);
      request_dense_tokens<N, kWidest>(maps.limbs, to + kStageW, full,
                                       k * kTileK, tile.t0, rows);
      request_dense_tokens<N, kWidest>(maps.limbs, to + kStageW + kTokens, full,
                                       k * kTileK, low_row + tile.t0, rows);
    } else {
      copy_tile(&maps.w_enc, to, full, k * kTileK, tile.row);
      request_dense_tokens<N, kWidest>(maps.x, to + kStageW, full, k * kTileK,
                                       tile.t0, rows);
    }
    k = k + 1 == tile.k_tiles ? 0 : k + 1;
  }
}

// acc = this warpgroup's 64 x N products. Encoding: rows of W_enc, reduction
// over D. Decoding: columns of W_dec (its rows are the reduction), both limbs.
template <typename T, int N, int kWidest, bool kDecodes>
__device__ __forceinline__ void multiply_dense(float (&acc)[N / 2],
                                               DenseMemory<kWidest>& m,
                                               int steps, int it) {
  const uint32_t operands = smem_address(m.operands);
  const uint32_t half = threadIdx.x / 128 * (kStageW / 2);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.f;
#pragma unroll 1
  for (int k = 0; k < steps; ++k, ++it) {
    const int s = it % kDenseStages<kWidest>;
    barrier_wait(barrier_at(m.full, s), it / kDenseStages<kWidest> & 1);
    const uint32_t stage = operands + s * kDenseStage<kWidest>;
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
      barrier_arrive(barrier_at(m.empty, (it - 1) % kDenseStages<kWidest>));
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");
  if (steps > 0 && threadIdx.x % 128 == 0)
    barrier_arrive(barrier_at(m.empty, (it - 1) % kDenseStages<kWidest>));
}

}  // namespace vllm_steering
