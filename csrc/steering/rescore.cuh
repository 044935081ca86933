// SPDX-License-Identifier: Apache-2.0
// What follows a screen: the candidates are encoded as the encoder does it,
// with the same instruction and each feature's own order of columns, so the
// sums are the same, bit for bit.
//
// An item is up to 128 candidates of the block that have one order of columns.
// The last warpgroup gathers their rows of W_enc, 128 bytes at a time.
#pragma once

#include "ptx/cp_async.cuh"
#include "screen.cuh"

namespace vllm_steering {

constexpr int kGatherers = 128;
constexpr int kMostRows = 128;
static_assert(kConsumers + kGatherers == kEncodeThreads);
static_assert(kMostRows <= kGatherers, "a thread loads a candidate");
// Up to here candidates are encoded at once, and L2 is asked for their rows
// when they are found. More tokens have more candidates, which get a second
// look.
constexpr int kFewScreened = 8;
// Of all features. With more candidates than that the encoder itself is faster.
constexpr float kMostShare = 0.4f;
// Shared memory that stages leave: a warpgroup reads 64 rows of a short tile.
constexpr int kRescoreTail = kMostRows * kTileK * 2;

// How many candidates the block has of each of its orders; `level` 1 counts
// those that are left when they have been looked at more closely.
__device__ __forceinline__ int* candidate_counts(ScreenMemory& m, int level) {
  return m.base.left + level * kMostOrders;
}

// Whether candidates of a step of n tokens get a second look.
constexpr __host__ __device__ bool looks_twice(int n) {
  return n > kFewScreened;
}
template <int Tokens>
constexpr int kLevel = looks_twice(Tokens) ? 1 : 0;

// Where the block lists its candidates of one order.
__device__ __forceinline__ int* candidate_list(const Screen& s,
                                               const GroupedTiles& g,
                                               const BlockTiles& own,
                                               int order) {
  return s.candidates + max(own.first, g.start(order)) * kTileF;
}

// All threads of the block, for the n-th time.
__device__ __forceinline__ void sync_block(ScreenMemory& m, int n) {
  barrier_arrive(barrier_at(&m.together, 0));
  barrier_wait(barrier_at(&m.together, 0), n & 1);
  __syncwarp();  // or the compiler runs products one by one
}

__device__ __forceinline__ void sync_gatherers() {
  asm volatile("bar.sync 3, %0;" ::"n"(kGatherers) : "memory");
}

// One thread: adds the block's candidates to those of the step. The last block
// decides whether the next steps are screened.
inline __device__ void count_candidates(const Screen& s, int* sync,
                                        ScreenMemory& m, const BlockTiles& own,
                                        int n, int num_features) {
  int total = 0;
  const bool two = looks_twice(n);
  for (int o = 0; o < own.orders; ++o)
    total += two ? candidate_counts(m, 0)[o] / 8 + candidate_counts(m, 1)[o]
                 : candidate_counts(m, 0)[o];
  atomicAdd(s.counts, total);
  __threadfence();
  if (atomicAdd(sync + kScreenExits, 1) != static_cast<int>(gridDim.x) - 1)
    return;
  total = atomicExch(s.counts, 0);
  s.counts[1] = total;
  s.state[screen_width(n)] =
      total > kMostShare * num_features ? kPlainSteps : 0;
  sync[kScreenExits] = 0;
}

// Rows of one of the equal items of `count` candidates.
__device__ __forceinline__ int rows_of_item(int count) {
  const int items = (count + kMostRows - 1) / kMostRows;
  return items == 0 ? 0 : ((count + items - 1) / items + 7) / 8 * 8;
}

// Rows of the block's longest item; orders that it does not have count zero.
__device__ __forceinline__ int longest_item(ScreenMemory& m, int level) {
  int rows = 8;
  for (int o = 0; o < kMostOrders; ++o)
    rows = max(rows, rows_of_item(candidate_counts(m, level)[o]));
  return rows;
}

// Candidates [start, start + count) of a list of the block, its o-th.
struct Item {
  const int* list;
  int o, order, start, count;
  __device__ __forceinline__ const int* features() const {
    return list + start;
  }
};

// Calls `run` for each item of the block. `kWarps`: whole warps call it, and
// the compiler has to know that their threads stay together.
template <bool kWarps, typename Run>
__device__ __forceinline__ void for_items(const Screen& s, ScreenMemory& m,
                                          int num_features, int level,
                                          const Run& run) {
#pragma unroll 1
  for (int o = 0; o < kMostOrders; ++o) {
    int count = candidate_counts(m, level)[o];
    if constexpr (kWarps) count = __shfl_sync(~0u, count, 0);
    if (count == 0) continue;
    // Opaque, or registers would hold all of it meanwhile.
    int pairs = tile_pairs(num_features);
    asm volatile("" : "+r"(pairs));
    const GroupedTiles g(pairs, s.orders);
    const BlockTiles& own = m.own;
    const int order = own.order + o, rows = rows_of_item(count);
    const int* list = candidate_list(s, g, own, order) + level * s.room;
#pragma unroll 1
    for (int start = 0; start < count; start += rows)
      run(Item{list, o, order, start, min(rows, count - start)});
  }
}

// The stages in shared memory: `wide` tiles of columns each, more where an item
// has few rows; rows of W_enc of all stages, then of x.
template <int Tokens>
struct RescoreStages {
  static constexpr int kTileX = Tokens * kTileK * 2;
  int w, wide, count, x0;  // `w`: bytes of a tile of W_enc
  __device__ __forceinline__ explicit RescoreStages(int rows) {
    constexpr int kRoom = sizeof(EncodeMemory::operands) - kRescoreTail;
    w = rows * kTileK * 2;
    wide = rows <= 32 ? 4 : rows <= 64 ? 2 : 1;
    count = min(kRescoreStages, kRoom / (wide * (w + kTileX)));
    x0 = count * wide * w;
  }
  __device__ __forceinline__ uint32_t w_at(int stage, int tile) const {
    return (stage * wide + tile) * w;
  }
  __device__ __forceinline__ uint32_t x_at(int stage, int tile) const {
    return x0 + (stage * wide + tile) * kTileX;
  }
};

// A place in the ring of stages.
struct RingPlace {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The gatherers: one tile of columns of an item's rows.
template <typename T>
__device__ __forceinline__ void gather_rows(const Weights<T>& w,
                                            const int* features, int count,
                                            int k, uint32_t to) {
  const int thread = threadIdx.x - kConsumers, chunk = thread % 8;
  const int column = k * kTileK + chunk * 8;
  const bool there = column < w.d_in;
  const T* from = w.w_enc + (there ? column : 0);
#pragma unroll 2
  for (int r = thread / 8; r < count; r += kGatherers / 8)
    stream_async(to + r * 128 + ((chunk ^ (r & 7)) << 4),
                 from + static_cast<int64_t>(features[r]) * w.d_in, there);
}

// The last warpgroup: copies the rows of every item and the tokens, stage by
// stage.
template <typename T, int Tokens>
__device__ void gather_candidates(const EncodeArgs<T>& a, const Screen& s,
                                  ScreenMemory& m, const CUtensorMap* map) {
  using S = RescoreStages<Tokens>;
  const S stages(longest_item(m, kLevel<Tokens>));
  const int k_tiles = (a.weights.d_in + kTileK - 1) / kTileK;
  const int thread = threadIdx.x - kConsumers;
  const uint32_t operands = smem_address(m.base.operands);
  int* features = reinterpret_cast<int*>(
      m.base.operands + sizeof(EncodeMemory::operands) - 4 * kMostRows);
  RingPlace ring;
  for_items<true>(
      s, m, a.weights.num_features, kLevel<Tokens>, [&](const Item& item) {
        const int* list = item.features();
        const int count = item.count;
        sync_gatherers();
        if (thread < count) features[thread] = __ldcg(list + thread);
        sync_gatherers();
        // That of a pair of tiles, among those of all ranks.
        int k =
            first_k(2 * item.order + a.weights.first_feature / kTileF, k_tiles);
#pragma unroll 1
        for (int step = 0; step < k_tiles; step += stages.wide) {
          const int tiles = min(stages.wide, k_tiles - step);
          barrier_wait(barrier_at(m.rescore_empty, ring.stage), ring.phase ^ 1);
          const uint32_t full = barrier_at(m.rescore_full, ring.stage);
          if (thread == 0) barrier_expect(full, tiles * S::kTileX);
#pragma unroll 1
          for (int tile = 0; tile < tiles; ++tile) {
            if (thread == 0)
              copy_tile(map, operands + stages.x_at(ring.stage, tile), full,
                        k * kTileK, 0);
            gather_rows(a.weights, features, count, k,
                        operands + stages.w_at(ring.stage, tile));
            k = k + 1 == k_tiles ? 0 : k + 1;
          }
          arrive_after_copies(full);
          ring.next(stages.count);
        }
      });
}

// acc = this warpgroup's 64 x Tokens sums of an item. Rows that the item does
// not have are multiplied too, as junk: products are what keeps the warps of a
// warpgroup together, so that its leader gives away no stage that another warp
// still waits for.
template <typename T, int Tokens>
__device__ __forceinline__ void multiply_item(
    float (&acc)[Tokens / 2], ScreenMemory& m,
    const RescoreStages<Tokens>& stages, int k_tiles, RingPlace& ring) {
  const uint32_t operands = smem_address(m.base.operands);
  const uint32_t half = threadIdx.x / 128 * 64 * 128;
  const bool leader = threadIdx.x % 128 == 0;
  int previous = 0;
#pragma unroll
  for (int i = 0; i < Tokens / 2; ++i) acc[i] = 0.f;
#pragma unroll 1
  for (int k = 0; k < k_tiles; k += stages.wide) {
    barrier_wait(barrier_at(m.rescore_full, ring.stage), ring.phase);
    // Rows came by ordinary copies; the tensor cores read otherwise.
    fence_async_shared();
#pragma unroll 1
    for (int tile = 0; tile < min(stages.wide, k_tiles - k); ++tile) {
      const uint64_t w =
          tile_descriptor(operands + stages.w_at(ring.stage, tile) + half);
      const uint64_t x =
          tile_descriptor(operands + stages.x_at(ring.stage, tile));
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kTileK / 16; ++kk)
        Wgmma<T, Tokens>::mma(acc, w + 2 * kk, x + 2 * kk, 1);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (k > 0 && leader) barrier_arrive(barrier_at(m.rescore_empty, previous));
    previous = ring.stage;
    ring.next(stages.count);
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < Tokens / 2; ++i)
    asm volatile("" : "+f"(acc[i])::"memory");
  if (leader) barrier_arrive(barrier_at(m.rescore_empty, previous));
}

// The consumers' second loop: encode the candidates, emit what fires.
template <typename T, int Tokens>
__device__ void rescore(const EncodeArgs<T>& a, const Screen& s,
                        ScreenMemory& m, int n) {
  // The same in all lanes, which the compiler has to know.
  const RescoreStages<Tokens> stages(
      __shfl_sync(~0u, longest_item(m, kLevel<Tokens>), 0));
  const int k_tiles = (a.weights.d_in + kTileK - 1) / kTileK;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int row = warp * 16 + lane / 4, past = a.weights.num_features;
  const uint32_t where = ((lane & 3) * 2) << 8 | row;
  uint2* hits = m.base.hits + warp * kHitsPerWarp + lane;
  RingPlace ring;
  float acc[Tokens / 2];
  for_items<true>(
      s, m, a.weights.num_features, kLevel<Tokens>, [&](const Item& item) {
        const int* list = item.features();
        const int count = item.count;
        const int upper = row < count ? __ldcg(list + row) : past;
        const int lower = row + 8 < count ? __ldcg(list + row + 8) : past;
        const LaneFeatures l = load_features(a.weights, upper, lower);
        multiply_item<T, Tokens>(acc, m, stages, k_tiles, ring);
        emit_hits<false, Tokens>(a, acc, l, hits, where, ListPlace{list, 0, n},
                                 false);
      });
}

}  // namespace vllm_steering
