// SPDX-License-Identifier: Apache-2.0
// What follows a screen: the candidates are encoded as the encoder does it,
// with the same instruction and each feature's own order of columns, so the
// sums are the same, bit for bit.
//
// An item is up to 128 candidates that have one order of columns. The last
// warpgroup gathers their rows of W_enc, 128 bytes at a time.
#pragma once

#include "ptx/cp_async.cuh"
#include "screen.cuh"

namespace vllm_steering {

constexpr int kGatherers = 128;
constexpr int kMostRows = 128;
constexpr int kFewScreened = 8;     // up to here candidates are asked for early
constexpr float kMostShare = 0.3f;  // of features; more: no screen next time
// Shared memory that stages leave: a warpgroup reads 64 rows of a short tile.
constexpr int kRescoreTail = 128 * 64 * 2;

// How the candidates are cut into items; in EncodeMemory::sums and ::left.
struct RescorePlan {
  int rows;   // of an item
  int items;  // of all orders
};

__device__ __forceinline__ RescorePlan& rescore_plan(ScreenMemory& m) {
  return *reinterpret_cast<RescorePlan*>(m.base.sums);
}

// All threads of the block.
__device__ __forceinline__ void sync_block() {
  asm volatile("bar.sync 2, %0;" ::"n"(kEncodeThreads) : "memory");
}

__device__ __forceinline__ void sync_gatherers() {
  asm volatile("bar.sync 3, %0;" ::"n"(kGatherers) : "memory");
}

// One warp: waits until every block has listed its candidates, and cuts them
// into items. m.base.left gets the items up to and with each order, then the
// candidates of each order.
inline __device__ void plan_rescore(const Screen& s, int* sync, ScreenMemory& m,
                                    int n, int num_features) {
  constexpr int kEach = kScreenOrders / 32;
  const int lane = threadIdx.x & 31, blocks = gridDim.x;
  if (lane == 0) grid_wait(sync + kScreenArrivals, blocks);
  __syncwarp();
  int count[kEach], own = 0;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int order = lane * kEach + e;
    count[e] = order < s.orders ? __ldcg(s.counts + order) : 0;
    m.base.left[kScreenOrders + order] = count[e];
    own += count[e];
  }
  const int total = __reduce_add_sync(~0u, own);
  // Rows of an item: as few as keep every block equally busy.
  const int full = kMostRows * blocks;
  const int rounds = max(1, (total + full - 1) / full);
  const int target = rounds * blocks;
  int rows = (total + target - 1) / target;
  rows = min(kMostRows, max(8, (rows + 7) / 8 * 8));
  int items;
#pragma unroll 1
  while (true) {
    items = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) items += (count[e] + rows - 1) / rows;
    if (rows == kMostRows || __reduce_add_sync(~0u, items) <= target) break;
    rows += 8;
  }
  int before = items;
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, before, d);
    if (lane >= d) before += other;
  }
  if (lane == 31) rescore_plan(m) = {rows, before};
  before -= items;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    before += (count[e] + rows - 1) / rows;
    m.base.left[lane * kEach + e] = before;
  }
  if (lane != 0) return;
  if (blockIdx.x == 0) {
    const bool many = total > kMostShare * num_features;
    s.state[screen_width(n)] = many ? kPlainSteps : 0;
  }
  grid_leave(sync + kScreenArrivals, sync + kScreenExits);
}

// An item: candidates [features, features + count) of one order.
struct Item {
  const int* features;
  int order, count;
};

// The same in every lane of a warp.
__device__ __forceinline__ Item find_item(const Screen& s,
                                          const ScreenMemory& m,
                                          RescorePlan plan, int item) {
  const int lane = threadIdx.x & 31;
  int order = 0;
  for (int first = 0; first < kScreenOrders; first += 32) {
    const unsigned behind =
        __ballot_sync(~0u, m.base.left[first + lane] > item);
    if (behind == 0) continue;
    order = first + __ffs(behind) - 1;
    break;
  }
  const int before = order == 0 ? 0 : m.base.left[order - 1];
  const int start = (item - before) * plan.rows;
  return {s.candidates + order * s.per_order + start, order,
          min(plan.rows, m.base.left[kScreenOrders + order] - start)};
}

// The stages in shared memory: rows of W_enc of all of them, then of x.
template <int Tokens>
struct RescoreStages {
  static constexpr int kStageX = Tokens * kTileK * 2;
  int w, count, x0;
  __device__ explicit RescoreStages(int rows) {
    constexpr int kRoom = sizeof(EncodeMemory::operands) - kRescoreTail;
    w = rows * kTileK * 2;
    count = min(kRescoreStages, kRoom / (w + kStageX));
    x0 = count * w;
  }
};

// A place in the ring of stages.
struct RingPlace {
  int stage = 0, phase = 0;
  __device__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The last warpgroup: copies the rows of every item and the tokens, stage by
// stage.
template <typename T, int Tokens>
__device__ void gather_candidates(const EncodeArgs<T>& a, const Screen& s,
                                  ScreenMemory& m, const CUtensorMap* map) {
  const RescorePlan plan = rescore_plan(m);
  const RescoreStages<Tokens> stages(plan.rows);
  const int d_in = a.weights.d_in;
  const int k_tiles = (d_in + kTileK - 1) / kTileK;
  const int thread = threadIdx.x - kConsumers;
  const uint32_t operands = smem_address(m.base.operands);
  int* features = reinterpret_cast<int*>(
      m.base.operands + sizeof(EncodeMemory::operands) - 4 * kMostRows);
  const int chunk = thread % 8, first = thread / 8;
  RingPlace ring;
#pragma unroll 1
  for (int i = blockIdx.x; i < plan.items; i += gridDim.x) {
    const Item item = find_item(s, m, plan, i);
    sync_gatherers();
    if (thread < item.count) features[thread] = __ldcg(item.features + thread);
    sync_gatherers();
    int k = first_k(2 * item.order, k_tiles);
#pragma unroll 1
    for (int step = 0; step < k_tiles; ++step) {
      barrier_wait(barrier_at(m.rescore_empty, ring.stage), ring.phase ^ 1);
      const uint32_t full = barrier_at(m.rescore_full, ring.stage);
      if (thread == 0) {
        barrier_expect(full, RescoreStages<Tokens>::kStageX);
        copy_tile(
            map,
            operands + stages.x0 + ring.stage * RescoreStages<Tokens>::kStageX,
            full, k * kTileK, 0);
      }
      const int column = k * kTileK + chunk * 8;
      const bool there = column < d_in;
      const T* from = a.weights.w_enc + (there ? column : 0);
      const uint32_t to = operands + ring.stage * stages.w;
#pragma unroll 4
      for (int r = first; r < item.count; r += kGatherers / 8)
        stream_async(to + r * 128 + ((chunk ^ (r & 7)) << 4),
                     from + static_cast<int64_t>(features[r]) * d_in, there);
      arrive_after_copies(full);
      k = k + 1 == k_tiles ? 0 : k + 1;
      ring.next(stages.count);
    }
  }
}

// acc = this warpgroup's 64 x Tokens sums of an item; nothing unless `mine`.
template <typename T, int Tokens>
__device__ __forceinline__ void multiply_item(
    float (&acc)[Tokens / 2], ScreenMemory& m,
    const RescoreStages<Tokens>& stages, int k_tiles, bool mine,
    RingPlace& ring) {
  const uint32_t operands = smem_address(m.base.operands);
  const uint32_t half = threadIdx.x / 128 * 64 * 128;
  const bool leader = threadIdx.x % 128 == 0;
  int previous = 0;
#pragma unroll
  for (int i = 0; i < Tokens / 2; ++i) acc[i] = 0.f;
#pragma unroll 1
  for (int k = 0; k < k_tiles; ++k) {
    barrier_wait(barrier_at(m.rescore_full, ring.stage), ring.phase);
    if (mine) {
      // Rows came by ordinary copies; the tensor cores read otherwise.
      fence_async();
      const uint64_t w =
          tile_descriptor(operands + ring.stage * stages.w + half);
      const uint64_t x = tile_descriptor(
          operands + stages.x0 + ring.stage * RescoreStages<Tokens>::kStageX);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kTileK / 16; ++kk)
        Wgmma<T, Tokens>::mma(acc, w + 2 * kk, x + 2 * kk, 1);
      wgmma_commit();
      wgmma_wait<1>();
    }
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

// Bias and bar of two features anywhere; past the end none fires.
template <typename T>
__device__ __forceinline__ LaneFeatures load_two(const Weights<T>& w, int f,
                                                 int g) {
  const float inf = __int_as_float(0x7F800000);
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

// The consumers' second loop: encode the candidates, emit what fires.
template <typename T, int Tokens>
__device__ void rescore(const EncodeArgs<T>& a, const Screen& s,
                        ScreenMemory& m, int n) {
  const RescorePlan plan = rescore_plan(m);
  const RescoreStages<Tokens> stages(plan.rows);
  const int k_tiles = (a.weights.d_in + kTileK - 1) / kTileK;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int row = warp * 16 + lane / 4, past = a.weights.num_features;
  const uint32_t where = ((lane & 3) * 2) << 8 | row;
  uint2* hits = m.base.hits + warp * kHitsPerWarp + lane;
  RingPlace ring;
  float acc[Tokens / 2];
#pragma unroll 1
  for (int i = blockIdx.x; i < plan.items; i += gridDim.x) {
    const Item item = find_item(s, m, plan, i);
    const bool mine = static_cast<int>(threadIdx.x / 128) * 64 < item.count;
    const int upper = row < item.count ? __ldcg(item.features + row) : past;
    const int lower =
        row + 8 < item.count ? __ldcg(item.features + row + 8) : past;
    const LaneFeatures l = load_two(a.weights, upper, lower);
    multiply_item<T, Tokens>(acc, m, stages, k_tiles, mine, ring);
    emit_hits<false, Tokens>(a, acc, l, hits, where,
                             ListPlace{item.features, 0, n}, false);
  }
}

}  // namespace vllm_steering
