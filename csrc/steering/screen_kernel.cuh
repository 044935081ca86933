// SPDX-License-Identifier: Apache-2.0
// Stages 1 and 2 of a decoding step of a wide SAE: at most kScreenTokens active
// tokens are screened, so that W_enc is read where a feature may fire only.
//
// One launch, as compact_encode_kernel.cuh. Between its first barrier and its
// second the grid multiplies the 8-bit copy and lists the candidates; then
// rescore.cuh encodes those. More tokens, and a step after one in which too
// many features were candidates, take the encoder's own way.
#pragma once

#include "ptx/wgmma_int8.cuh"
#include "rescore.cuh"

namespace vllm_steering {

template <typename T>
struct ScreenArgs {
  CompactEncodeArgs<T> compact;
  Screen screen;
};

struct ScreenMaps {
  CUtensorMap w;         // box kScreenF x kScreenColumns
  CUtensorMap limbs[3];  // box tokens x kScreenColumns
};

constexpr int kFirstScreenStages = 2;

__device__ __forceinline__ int screen_tiles(int num_features) {
  return (num_features + kScreenF - 1) / kScreenF;
}

inline __device__ void init_screen_barriers(ScreenMemory& m) {
  for (int s = 0; s < kScreenStages; ++s) {
    barrier_init(barrier_at(m.full, s), 2);
    barrier_init(barrier_at(m.empty, s), 2);
  }
  for (int s = 0; s < kRescoreStages; ++s) {
    barrier_init(barrier_at(m.rescore_full, s), kGatherers + 1);
    barrier_init(barrier_at(m.rescore_empty, s), 2);
  }
  init_barriers(m.base, 1);
}

// One thread: requests the weights of the block's tiles; `first` stages have
// been requested. See request_all for the pace.
template <int Tokens, bool Weights>
__device__ void request_screen(ScreenMemory& m, const CUtensorMap* map,
                               int k_tiles, int tiles, int first) {
  constexpr int kBox = Tokens * kScreenColumns;
  const uint32_t operands = smem_address(m.base.operands);
  const long long start = clock64();
  int it = 0;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int k = first_k(tile, k_tiles);
#pragma unroll 1
    for (int step = 0; step < k_tiles; ++step, ++it) {
      const int s = it % kScreenStages, round = it / kScreenStages;
      if (round > 0) barrier_wait(barrier_at(m.empty, s), (round - 1) & 1);
      const uint32_t full = barrier_at(m.full, s);
      if constexpr (Weights) {
        if (first > 0 && round == 0) pace(start, 2 * (it - first));
        if (it >= first) {
          barrier_expect(full, kStageW8);
          copy_tile(map, operands + s * kStageW8, full, k * kScreenColumns,
                    tile * kScreenF);
        }
      } else {
        const uint32_t to = operands + kScreenStages * kStageW8 + s * 2 * kBox;
        barrier_expect(full, 2 * kBox);
        copy_tile(map, to, full, k * kScreenColumns, 0);
        copy_tile(map, to + kBox, full, k * kScreenColumns, kScreenTokens);
      }
      k = k + 1 == k_tiles ? 0 : k + 1;
    }
  }
}

// Requests the first stages of the block's first tile.
inline __device__ void request_screen_first(ScreenMemory& m,
                                            const CUtensorMap* map, int first,
                                            int k_tiles) {
  int k = first_k(blockIdx.x, k_tiles);
  for (int s = 0; s < first; ++s) {
    const uint32_t full = barrier_at(m.full, s);
    barrier_expect(full, kStageW8);
    copy_tile(map, smem_address(m.base.operands) + s * kStageW8, full,
              k * kScreenColumns, blockIdx.x * kScreenF);
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
// 128; columns are the tokens' high limbs, then their low ones.
template <int Tokens>
__device__ __forceinline__ void multiply_limbs(int (&acc)[2][Tokens],
                                               ScreenMemory& m, int k_tiles,
                                               int& it) {
  constexpr int kStageX8 = 2 * Tokens * kScreenColumns;
  const uint32_t operands = smem_address(m.base.operands);
  const uint32_t own = threadIdx.x / 128 * 128 * kScreenColumns;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int i = 0; i < Tokens; ++i) acc[h][i] = 0;
#pragma unroll 1
  for (int k = 0; k < k_tiles; ++k, ++it) {
    const int s = it % kScreenStages;
    barrier_wait(barrier_at(m.full, s), it / kScreenStages & 1);
    const uint64_t w = tile_descriptor(operands + s * kStageW8 + own);
    const uint64_t x =
        tile_descriptor(operands + kScreenStages * kStageW8 + s * kStageX8);
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
      barrier_arrive(barrier_at(m.empty, (it - 1) % kScreenStages));
  }
  wgmma_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int i = 0; i < Tokens; ++i)
      asm volatile("" : "+r"(acc[h][i])::"memory");
  if (threadIdx.x % 128 == 0)
    barrier_arrive(barrier_at(m.empty, (it - 1) % kScreenStages));
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

// Appends the rows of a warp that may fire to the list of their order. `rows`
// has a bit for each of the lane's four rows: f, f + 8, f + 64, f + 72.
template <typename T>
__device__ __forceinline__ void list_candidates(const ScreenArgs<T>& a,
                                                unsigned rows, int f0, int n) {
  const Weights<T>& w = a.compact.encode.weights;
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
  if (all == 0) return;
  const int order = (w.first_feature + f0) / kScreenF % a.screen.orders;
  int base = 0;
  if (lane == 0) base = atomicAdd(a.screen.counts + order, __popc(all));
  base = __shfl_sync(~0u, base, 0);
  if (!may) return;
  const int f = f0 + lane % 8 + (lane / 8 & 1) * 8 + (lane / 16) * 64;
  a.screen.candidates[order * a.screen.per_order + base +
                      __popc(all & ((1u << lane) - 1))] = f;
  // It is read soon, and few tokens leave L2 room for all of it.
  if (n <= kFewScreened)
    prefetch_bytes(w.w_enc + static_cast<int64_t>(f) * w.d_in, w.d_in * 2);
}

// The consumers' first loop: multiply, test, list.
template <typename T, int Tokens>
__device__ void screen(const ScreenArgs<T>& a, ScreenMemory& m, int n) {
  const Weights<T>& w = a.compact.encode.weights;
  const int k_tiles = a.screen.padded / kScreenColumns;
  const int tiles = screen_tiles(w.num_features);
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int row = warp / 4 * 128 + warp % 4 * 16;
  const float minus = -__int_as_float(0x7F800000);
  float4* tokens = reinterpret_cast<float4*>(m.base.hits);
  int it = 0;
  int acc[2][Tokens];
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int f0 = tile * kScreenF + row, f = f0 + lane / 4;
    RowBound rows[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const LaneFeatures l = load_features(w, f + 64 * h);
      rows[2 * h] = row_bound(a.screen, f + 64 * h, w.num_features, l.cut.x);
      rows[2 * h + 1] =
          row_bound(a.screen, f + 64 * h + 8, w.num_features, l.cut.y);
    }
    multiply_limbs<Tokens>(acc, m, k_tiles, it);
    if (tile == static_cast<int>(blockIdx.x)) {
      // The barrier of the grid is behind the limbs that have been multiplied.
      const int t = threadIdx.x;
      if (t < Tokens)
        tokens[t] = t < n ? __ldcg(a.screen.tokens + t)
                          : make_float4(0.f, 0.f, 0.f, minus);
      sync_threads<kConsumers>();
    }
    unsigned may = test_rows<Tokens>(acc[0], rows[0], rows[1], tokens);
    may |= test_rows<Tokens>(acc[1], rows[2], rows[3], tokens) << 2;
    list_candidates(a, may, f0, n);
  }
}

template <typename T>
__device__ __forceinline__ void screen_producer(const ScreenArgs<T>& a,
                                                ScreenMemory& m,
                                                const EncodeMaps& encode_maps,
                                                const ScreenMaps& maps, int n,
                                                int first) {
  const int k_tiles = a.screen.padded / kScreenColumns;
  const int tiles = screen_tiles(a.compact.encode.weights.num_features);
  if (threadIdx.x == kWeightsThread) {
    request_screen<8, true>(m, &maps.w, k_tiles, tiles, first);
  } else if (threadIdx.x == kTokensThread) {
#define STEERING_LIMBS(N, I) \
  request_screen<N, false>(m, &maps.limbs[I], k_tiles, tiles, 0)
    STEERING_SCREEN_WIDTHS(n, STEERING_LIMBS)
#undef STEERING_LIMBS
  }
  __syncwarp();
  if (threadIdx.x / 32 == kTokensThread / 32)
    plan_rescore(a.screen, a.compact.encode.ws.sync, m, n,
                 a.compact.encode.weights.num_features);
  sync_block();
#define STEERING_GATHER(N, I) \
  gather_candidates<T, N>(a.compact.encode, a.screen, m, &encode_maps.x[I])
  STEERING_SCREEN_WIDTHS(n, STEERING_GATHER)
#undef STEERING_GATHER
}

template <typename T>
__device__ __forceinline__ void screen_consumer(const ScreenArgs<T>& a,
                                                ScreenMemory& m, int n) {
#define STEERING_SCREEN(N, I) screen<T, N>(a, m, n)
  STEERING_SCREEN_WIDTHS(n, STEERING_SCREEN)
#undef STEERING_SCREEN
  sync_threads<kConsumers>();
  if (threadIdx.x == 0) grid_arrive(a.compact.encode.ws.sync + kScreenArrivals);
  sync_block();
  launch_dependents();
#define STEERING_RESCORE(N, I) rescore<T, N>(a.compact.encode, a.screen, m, n)
  STEERING_SCREEN_WIDTHS(n, STEERING_RESCORE)
#undef STEERING_RESCORE
}

template <typename T>
__global__ void __launch_bounds__(kEncodeThreads, 1)
    screen_kernel(const __grid_constant__ ScreenArgs<T> a,
                  const __grid_constant__ EncodeMaps encode_maps,
                  const __grid_constant__ ScreenMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw[];
  ScreenMemory& m = *reinterpret_cast<ScreenMemory*>(aligned_memory(raw));
  const CompactEncodeArgs<T>& c = a.compact;
  const Workspace<T>& ws = c.encode.ws;
  const int d_in = c.encode.weights.d_in;
  const int t = threadIdx.x;
  if (t == kWeightsThread) {
    init_screen_barriers(m);
    prefetch_map(&maps.w);
  }
  const FirstLoads own = load_first(c, t);
  const int4 plain_left = *reinterpret_cast<const int4*>(a.screen.state);
  if (!__syncthreads_or((own.row | own.read) != 0)) {
    if (blockIdx.x == 0 && t == 0) *ws.count = 0;
    return;
  }
  const int k_tiles = a.screen.padded / kScreenColumns;
  const bool has_tile = static_cast<int>(blockIdx.x) <
                        screen_tiles(c.encode.weights.num_features);
  const int first = has_tile ? min(kFirstScreenStages, k_tiles) : 0;
  prefetch_rows(c.stream, d_in);
  if (t == kWeightsThread) request_screen_first(m, &maps.w, first, k_tiles);
  const int n = list_active(c, own, m.base);
  if (blockIdx.x == 0 && t == 0) *ws.count = n;
  if (n == 0) {
    if (t == kWeightsThread) drain_screen_first(m, first);
    return;
  }
  const int width = screen_width(n);
  const int left = width == 0   ? plain_left.x
                   : width == 1 ? plain_left.y
                                : plain_left.z;
  const bool screens = n <= kScreenTokens && left <= 0;
  if (!screens) {
    if (t == kWeightsThread) drain_screen_first(m, first);
    __syncthreads();
  }
  const TileWalk walk = tile_walk(c.encode.weights.num_features, n, 1, 0,
                                  c.encode.weights.first_feature);
  if (t >= kConsumers) {
    give_registers<40>();
    if (t == kTokensThread) {
      grid_wait(ws.sync + kArrivals, gridDim.x);
      grid_leave(ws.sync + kArrivals, ws.sync + kExits);
      fence_async();
      if (!screens && n <= kScreenTokens && blockIdx.x == 0)
        a.screen.state[width] = left - 1;
    }
    if (screens)
      screen_producer(a, m, encode_maps, maps, n, first);
    else
      producer<1, Leaves::kUsual>(c.encode, m.base, encode_maps, n, 0, walk);
  } else {
    take_registers<232>();
    gather_active(c, m.base, n, own.limit);
    if (screens) {
      float* shared = reinterpret_cast<float*>(m.base.hits);
      for (int i = blockIdx.x; i < n; i += gridDim.x)
        split_row(a.screen, ws, d_in, i, shared);
      if (blockIdx.x == 0 && t < a.screen.orders) a.screen.counts[t] = 0;
    }
    fence_async();
    sync_threads<kConsumers>();
    if (t == 0) grid_arrive(ws.sync + kArrivals);
    if (screens)
      screen_consumer(a, m, n);
    else
      consumer<1, Leaves::kUsual>(c.encode, m.base, n, walk);
  }
#else
  __trap();
#endif
}

}  // namespace vllm_steering
