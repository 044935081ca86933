// SPDX-License-Identifier: Apache-2.0
// Stages 1 and 2 of a decoding step of a wide SAE: at most kScreenTokens active
// tokens are screened, so that W_enc is read where a feature may fire only.
//
// One launch, as compact_encode_kernel.cuh. Behind its barrier a block lists
// the candidates among its tiles (candidates.cuh), looks at them again if
// tokens are many (refine.cuh), and encodes what is left (rescore.cuh). A
// block's tiles have one order of columns, or a few. More tokens, and a step
// after one in which too many features were candidates, take the encoder's own
// way.
#pragma once

#include "candidates.cuh"
#include "refine.cuh"

namespace vllm_steering {

template <typename T>
struct ScreenArgs {
  CompactEncodeArgs<T> compact;
  Screen screen;
};

struct ScreenMaps {
  CUtensorMap w;         // box kTileF x kScreenColumns
  CUtensorMap limbs[3];  // box tokens x kScreenColumns
};

constexpr int kFirstScreenStages = 2;

inline __device__ void init_screen_barriers(ScreenMemory& m) {
  for (int s = 0; s < kMostScreenStages; ++s) {
    barrier_init(barrier_at(m.full, s), 2);
    barrier_init(barrier_at(m.empty, s), 2);
  }
  for (int s = 0; s < kRescoreStages; ++s) {
    barrier_init(barrier_at(m.rescore_full, s), kGatherers + 1);
    barrier_init(barrier_at(m.rescore_empty, s), 2);
  }
  barrier_init(barrier_at(&m.together, 0), kEncodeThreads);
  init_barriers(m.base, 1);
}

template <typename T>
__device__ __forceinline__ void screen_producer(
    const ScreenArgs<T>& a, ScreenMemory& m, const EncodeMaps& encode_maps,
    const ScreenMaps& maps, const GroupedTiles& g, const BlockTiles& own, int n,
    int first) {
  const int k_tiles = a.screen.padded / kScreenColumns;
  if (threadIdx.x == kWeightsThread) {
#define STEERING_COPY(N, I) \
  request_screen<N, true>(m, &maps.w, g, own, k_tiles, first)
    STEERING_SCREEN_WIDTHS(n, STEERING_COPY)
#undef STEERING_COPY
  } else if (threadIdx.x == kTokensThread) {
#define STEERING_LIMBS(N, I) \
  request_screen<N, false>(m, &maps.limbs[I], g, own, k_tiles, 0)
    STEERING_SCREEN_WIDTHS(n, STEERING_LIMBS)
#undef STEERING_LIMBS
  }
  __syncwarp();
  sync_block(m, 0);
  if (looks_twice(n)) {
    if (threadIdx.x == kTokensThread) {
#define STEERING_LIMBS(N, I)                   \
  request_fine<N>(a.screen, m, &maps.limbs[I], \
                  a.compact.encode.weights.num_features)
      STEERING_SCREEN_WIDTHS(n, STEERING_LIMBS)
#undef STEERING_LIMBS
    }
    __syncwarp();
    sync_block(m, 1);
  }
#define STEERING_GATHER(N, I) \
  gather_candidates<T, N>(a.compact.encode, a.screen, m, &encode_maps.x[I])
  STEERING_SCREEN_WIDTHS(n, STEERING_GATHER)
#undef STEERING_GATHER
  if (threadIdx.x == kWeightsThread)
    count_candidates(a.screen, a.compact.encode.ws.sync, m, own, n,
                     a.compact.encode.weights.num_features);
}

template <typename T>
__device__ __forceinline__ void screen_consumer(const ScreenArgs<T>& a,
                                                ScreenMemory& m,
                                                const GroupedTiles& g,
                                                const BlockTiles& own, int n) {
#define STEERING_SCREEN(N, I) \
  screen<T, N>(a.compact.encode.weights, a.screen, m, g, own, n)
  STEERING_SCREEN_WIDTHS(n, STEERING_SCREEN)
#undef STEERING_SCREEN
  sync_block(m, 0);
  launch_dependents();
#define STEERING_REFINE(N, I)                               \
  if constexpr (kLevel<N> == 1) {                           \
    refine<T, N>(a.compact.encode.weights, a.screen, m, n); \
    sync_block(m, 1);                                       \
  }
  STEERING_SCREEN_WIDTHS(n, STEERING_REFINE)
#undef STEERING_REFINE
#define STEERING_RESCORE(N, I) rescore<T, N>(a.compact.encode, a.screen, m, n)
  STEERING_SCREEN_WIDTHS(n, STEERING_RESCORE)
#undef STEERING_RESCORE
}

// What the consumers do before the barrier of the grid, beyond the gather.
template <typename T>
__device__ __forceinline__ void prepare_screen(const ScreenArgs<T>& a,
                                               ScreenMemory& m, int n) {
  const Workspace<T>& ws = a.compact.encode.ws;
  const int d_in = a.compact.encode.weights.d_in;
  float* shared = reinterpret_cast<float*>(m.base.hits);
  if (threadIdx.x < 2 * kMostOrders) candidate_counts(m, 0)[threadIdx.x] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) a.screen.counts[0] = 0;
  for (int i = blockIdx.x; i < n; i += gridDim.x)
    split_row(a.screen, ws, d_in, i, shared);
}

// Whether a step of n tokens is screened.
__device__ __forceinline__ bool is_screened(const Screen& s, int n, int left,
                                            int most) {
  return n <= min(most, kScreenTokens) && left <= 0 &&
         s.orders <= (kMostOrders - 2) * static_cast<int>(gridDim.x);
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
  const int t = threadIdx.x;
  if (t == kWeightsThread) {
    init_screen_barriers(m);
    prefetch_map(&maps.w);
  }
  const int pairs = tile_pairs(c.encode.weights.num_features);
  const GroupedTiles g(pairs, a.screen.orders);
  if (t == kTokensThread) m.own = block_tiles(g, pairs, blockIdx.x, gridDim.x);
  const FirstLoads loads = load_first(c, t);
  const int4 plain_left = *reinterpret_cast<const int4*>(a.screen.state);
  if (!__syncthreads_or((loads.row | loads.read) != 0)) {
    if (blockIdx.x == 0 && t == 0) *ws.count = 0;
    return;
  }
  const BlockTiles& own = m.own;
  const int k_tiles = a.screen.padded / kScreenColumns;
  const bool early = own.first < own.end &&
                     c.stream.tokens <= min(plain_left.w, kScreenTokens);
  const int first = early ? min(kFirstScreenStages, k_tiles) : 0;
  prefetch_rows(c.stream, c.encode.weights.d_in);
  if (t == kWeightsThread)
    request_screen_first(m, &maps.w, g, own, first, k_tiles);
  const int n = list_active(c, loads, m.base);
  if (blockIdx.x == 0 && t == 0) *ws.count = n;
  if (n == 0) {
    if (t == kWeightsThread) drain_screen_first(m, first);
    return;
  }
  const int width = screen_width(n);
  const int left = width == 0   ? plain_left.x
                   : width == 1 ? plain_left.y
                                : plain_left.z;
  const bool screens = is_screened(a.screen, n, left, plain_left.w);
  if (!screens) {
    if (t == kWeightsThread) drain_screen_first(m, first);
    __syncthreads();
  }
  const TileWalk walk = tile_walk(c.encode.weights.num_features, n, 1, 0,
                                  c.encode.weights.first_feature);
  if (t >= kConsumers) {
    give_registers<40>();
    if (t == kTokensThread) {
      await_tokens(ws);
      if (!screens && n <= kScreenTokens && left > 0 && blockIdx.x == 0)
        a.screen.state[width] = left - 1;
    }
    if (screens)
      screen_producer(a, m, encode_maps, maps, g, own, n, first);
    else
      producer<1, Leaves::kUsual, false>(c.encode, m.base, encode_maps, n, 0,
                                         walk);
  } else {
    take_registers<232>();
    gather_active(c, m.base, n, loads.limit);
    if (screens) prepare_screen(a, m, n);
    announce_tokens(ws);
    if (screens)
      screen_consumer(a, m, g, own, n);
    else
      consumer<1, Leaves::kUsual, false>(c.encode, m.base, n, walk);
  }
#else
  __trap();
#endif
}

}  // namespace vllm_steering
