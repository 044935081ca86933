// SPDX-License-Identifier: Apache-2.0
// The matrix product of the encoder: p = W_enc x^T, operands through shared
// memory in stages.
//
// Features are the rows of the product (128 a tile, 64 for each of two consumer
// warpgroups) and tokens its columns, so few tokens make a narrow tile and
// W_enc streams through shared memory once, by bulk copies that two threads of
// the last warpgroup request.
#pragma once

#include "epilogue.cuh"
#include "ptx/cluster.cuh"
#include "ptx/launch_control.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "scheduler.cuh"

namespace vllm_steering {

constexpr int kConsumerWarps = 8;
constexpr int kConsumers = kConsumerWarps * 32;
constexpr int kEncodeThreads = kConsumers + 128;
constexpr int kWeightsThread = kConsumers;      // it requests W_enc
constexpr int kTokensThread = kConsumers + 32;  // and this one x
constexpr int kEmitterWarps = 2;  // the rest of the last warpgroup
constexpr int kStageW = kTileF * kTileK * 2;
constexpr int kMaxStages = 11;
constexpr int kEncodePeers = 2;  // blocks of a cluster, where there are any
// Stages of W_enc that are under way at a time until all of the first round
// have come. As many as memory needs; of more, what is requested later would
// wait behind them.
constexpr int kUnderWay = 3;

struct EncodeMaps {
  CUtensorMap w;           // box kTileF x kTileK
  CUtensorMap x[kWidths];  // box N x kTileK for N of the tile widths
};

// The block's shared memory. `operands` begins at a multiple of 1024.
struct EncodeMemory {
  char operands[4 * (kStageW + 256 * kTileK * 2)];
  uint2 hits[kConsumerWarps * kHitsPerWarp];
  int left[kConsumers];  // hits that a lane has left to the emitters
  uint64_t full[kMaxStages], empty[kMaxStages];
  uint64_t first[kMaxStages];  // a stage's weights, in the first round
  uint64_t hits_full[kConsumerWarps], hits_empty[kConsumerWarps];
  uint8_t tokens[kCompactEncodeTokens];  // for kernels that keep the list here
  int sums[kEncodeThreads / 32];
};
constexpr int kEncodeSmem = sizeof(EncodeMemory) + 1024;
static_assert(kEncodeSmem <= 227 * 1024, "more than a multiprocessor has");

// Dynamic shared memory from its first multiple of 1024 on.
__device__ __forceinline__ char* aligned_memory(char* raw) {
  return raw + ((1024 - (smem_address(raw) & 1023)) & 1023);
}

__device__ __forceinline__ EncodeMemory& encode_memory(char* raw) {
  return *reinterpret_cast<EncodeMemory*>(aligned_memory(raw));
}

// A stage is filled by two threads, and emptied by two warpgroups' arrivals for
// every peer.
inline __device__ void init_barriers(EncodeMemory& m, int peers) {
  for (int s = 0; s < kMaxStages; ++s) {
    barrier_init(barrier_at(m.full, s), 2);
    barrier_init(barrier_at(m.empty, s), 2 * peers);
    barrier_init(barrier_at(m.first, s), 1);
  }
  for (int w = 0; w < kConsumerWarps; ++w) {
    barrier_init(barrier_at(m.hits_full, w), 1);
    barrier_init(barrier_at(m.hits_empty, w), 1);
  }
  barrier_init_fence();
}

template <int N>
struct Stages {
  static constexpr int kStageX = N * kTileK * 2;
  static constexpr int kFit =
      sizeof(EncodeMemory::operands) / (kStageW + kStageX);
  static constexpr int kCount = kFit < kMaxStages ? kFit : kMaxStages;
  static constexpr int kX0 = kCount * kStageW;  // where the x stages begin
};

// Requests the first `stages` of feature tile blockIdx.x before the step's
// tokens are known. They fit whatever the tile width will be.
inline __device__ void request_first(EncodeMemory& m, const CUtensorMap* w,
                                     int stages, int k_tiles,
                                     int first_feature) {
  int k = first_k(first_feature / kTileF + blockIdx.x, k_tiles);
  for (int s = 0; s < stages; ++s) {
    const uint32_t come = barrier_at(m.first, s);
    barrier_expect(come, kStageW);
    copy_tile(w, smem_address(m.operands) + s * kStageW, come, k * kTileK,
              blockIdx.x * kTileF);
    k = k + 1 == k_tiles ? 0 : k + 1;
  }
}

// Requested copies must land before the block goes.
inline __device__ void drain_first(EncodeMemory& m, int stages) {
  for (int s = 0; s < stages; ++s) {
    barrier_wait(barrier_at(m.first, s), 0);
  }
}

// Waits until `stage` stages can have come since `start`.
constexpr int kPace = 900;
__device__ __forceinline__ void pace(long long start, int stage) {
  while (clock64() - start < static_cast<long long>(stage) * kPace) {
  }
}

// Waits for the weights of a stage of the first round, and says so to those who
// wait for the stage.
__device__ __forceinline__ void pass_on(EncodeMemory& m, int s) {
  barrier_wait(barrier_at(m.first, s), 0);
  barrier_arrive(barrier_at(m.full, s));
}

// How many peers share the tokens of a tile: all of them, where a peer's part
// is whole groups of eight rows, else none.
template <int N, int kPeers>
constexpr int kSharers = N >= 64 ? kPeers : 1;

// Rows of the tile of x from row `row` on that are requested: not those of a
// wide tile past the n-th, whose columns of the product are not used. Copies of
// rows that are not there would take longer than copies of rows that are.
template <int N>
__device__ __forceinline__ int rows_of_tile(int n, int row) {
  return N < 64 ? N : min(N, (n - row + 7) / 8 * 8);
}

// Requests rows [from, end) of a tile of x at column `column`, in as few boxes
// of the I-th width and narrower ones as hold them: for this block, or for all
// of `kAll`.
template <int I, int kAll>
__device__ __forceinline__ void request_boxes(const CUtensorMap* maps,
                                              uint32_t to, uint32_t full,
                                              int column, int row, int from,
                                              int end) {
  constexpr int kRows = kWidth[I];
#pragma unroll 1
  for (; end - from >= kRows; from += kRows) {
    const uint32_t at = to + from * kTileK * 2;
    if constexpr (kAll > 1)
      copy_tile_to(maps + I, at, full, column, row + from, (1 << kAll) - 1);
    else
      copy_tile(maps + I, at, full, column, row + from);
  }
  if constexpr (I > 0)
    request_boxes<I - 1, kAll>(maps, to, full, column, row, from, end);
}

// Requests `rows` rows of a tile of x. Each sharer requests its part of the
// tile for all of them.
template <int N, int kPeers>
__device__ __forceinline__ void request_tokens(const EncodeMaps& maps,
                                               uint32_t to, uint32_t full,
                                               int column, int row, int rank,
                                               int rows) {
  constexpr int kAll = kSharers<N, kPeers>, kPart = N / kAll;
  const int from = kAll > 1 ? rank * kPart : 0;
  request_boxes<box_index(kPart), kAll>(maps.x, to, full, column, row, from,
                                        min(from + kPart, rows));
}

// One thread: requests one operand of every tile of the block, stage by stage.
// The weights' `first` stages have been requested already. The rest of the
// first round is spread over the time that it takes. Otherwise the tokens,
// which are requested later, would wait behind all of it.
template <int N, bool Weights, int kPeers, typename Walk>
__device__ void request_all(EncodeMemory& m, const EncodeMaps& maps, int d_in,
                            Walk walk, int n, int first) {
  using S = Stages<N>;
  constexpr int kBytes = Weights ? kStageW : S::kStageX;
  const int k_tiles = (d_in + kTileK - 1) / kTileK;
  const uint32_t to = smem_address(m.operands) + (Weights ? 0 : S::kX0);
  int it = 0;
#pragma unroll 1
  for (int tile = walk.first; tile < walk.tiles(); tile += walk.stride) {
    int f, t;
    walk.at(tile, f, t);
    const int row = Weights ? f * kTileF : t * N;
    const int rows = Weights ? kTileF : rows_of_tile<N>(n, row);
    int k = first_k(walk.before + f, k_tiles);
#pragma unroll 1
    for (int step = 0; step < k_tiles; ++step, ++it) {
      const int s = it % S::kCount, round = it / S::kCount;
      const int before = it - kUnderWay;
      if (first > 0 && before >= 0 && before < S::kCount) pass_on(m, before);
      if (round > 0) barrier_wait(barrier_at(m.empty, s), (round - 1) & 1);
      if (it >= first) {
        const bool passes = first > 0 && round == 0;
        const uint32_t full = barrier_at(passes ? m.first : m.full, s);
        const uint32_t at = to + s * kBytes;
        barrier_expect(full, rows * kTileK * 2);
        if constexpr (Weights)
          copy_tile(&maps.w, at, full, k * kTileK, row);
        else
          request_tokens<N, kPeers>(maps, at, full, k * kTileK, row, walk.rank,
                                    rows);
      }
      k = k + 1 == k_tiles ? 0 : k + 1;
    }
  }
  if (first > 0)
    for (int s = max(it - kUnderWay, 0); s < min(it, S::kCount); ++s)
      pass_on(m, s);
}

// A warp of the last warpgroup: appends the hits that consumers hand over.
template <typename T>
__device__ void append_left(const EncodeArgs<T>& a, EncodeMemory& m,
                            TileWalk walk, int width, int n, int emitter) {
  const int lane = threadIdx.x & 31;
  int round = 0;
  for (int tile = walk.first; tile + walk.stride < walk.tiles();
       tile += walk.stride, ++round) {
    int f, t;
    walk.at(tile, f, t);
#pragma unroll 1
    for (int w = emitter; w < kConsumerWarps; w += kEmitterWarps) {
      barrier_wait(barrier_at(m.hits_full, w), round & 1);
      append_hits(a, m.hits + w * kHitsPerWarp + lane, m.left[w * 32 + lane],
                  TilePlace{f * kTileF, t * width, n});
      __syncwarp();
      if (lane == 0) barrier_arrive(barrier_at(m.hits_empty, w));
    }
  }
}

// A warpgroup is done with a stage. It says so to every sharer, since each of
// them writes into the shared memory of all, with a thread for each peer.
template <int N, int kPeers>
__device__ __forceinline__ void release_stage(EncodeMemory& m, int s) {
  const int to = threadIdx.x % 128 / 32;
  if (threadIdx.x % 32 != 0 || to >= kPeers) return;
  if constexpr (kSharers<N, kPeers> > 1)
    barrier_arrive_at(barrier_at(m.empty, s), to);
  else
    barrier_arrive(barrier_at(m.empty, s));
}

// acc += 64 x N products of sixteen columns; a wide tile's in two halves.
template <typename T, int N>
__device__ __forceinline__ void multiply_step(float (&acc)[N / 2], uint64_t w,
                                              uint64_t x) {
  if constexpr (N <= kWidest) {
    Wgmma<T, N>::mma(acc, w, x, 1);
  } else {
    using Half = float (&)[N / 4];
    Wgmma<T, N / 2>::mma(reinterpret_cast<Half>(acc[0]), w, x, 1);
    Wgmma<T, N / 2>::mma(reinterpret_cast<Half>(acc[N / 4]), w,
                         x + N / 2 * kTileK * 2 / 16, 1);
  }
}

// acc = this warpgroup's 64 x N products of one tile, over all of D. `it`
// counts the block's stages.
template <typename T, int N, int kPeers>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], EncodeMemory& m,
                                         int k_tiles, int& it) {
  using S = Stages<N>;
  const uint32_t operands = smem_address(m.operands);
  const uint32_t half = threadIdx.x / 128 * 64 * 128;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.f;
#pragma unroll 1
  for (int k = 0; k < k_tiles; ++k, ++it) {
    const int s = it % S::kCount;
    barrier_wait(barrier_at(m.full, s), it / S::kCount & 1);
    const uint64_t w = tile_descriptor(operands + s * kStageW + half);
    const uint64_t x = tile_descriptor(operands + S::kX0 + s * S::kStageX);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kTileK / 16; ++kk)
      multiply_step<T, N>(acc, w + 2 * kk, x + 2 * kk);
    wgmma_commit();
    // The product of the previous stage is done: its buffers may be refilled.
    wgmma_wait<1>();
    if (k > 0) release_stage<N, kPeers>(m, (it - 1) % S::kCount);
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");
  if (k_tiles > 0) release_stage<N, kPeers>(m, (it - 1) % S::kCount);
}

// The consumers' loop. Its first round has no tile: while the operands load, it
// warms the instruction cache for the epilogue.
template <typename T, int N, int kPeers, Leaves kLeaves, typename Walk>
__device__ void consume(const EncodeArgs<T>& a, EncodeMemory& m, Walk walk,
                        int n) {
  const int k_tiles = (a.weights.d_in + kTileK - 1) / kTileK;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int row = warp * 16 + lane / 4;
  const uint32_t where = ((lane & 3) * 2) << 8 | row;
  uint2* hits = m.hits + warp * kHitsPerWarp + lane;
  int it = 0, left = 0;
  float acc[N / 2];
#pragma unroll 1
  for (int tile = walk.first - walk.stride; tile < walk.tiles();
       tile += walk.stride) {
    const bool real = tile >= 0;
    // Past the end: no feature fires.
    int f_tile = walk.n_f * kPeers, t_tile = 0;
    if (real) walk.at(tile, f_tile, t_tile);
    const TilePlace at = {f_tile * kTileF, t_tile * N, n};
    const LaneFeatures l = load_features(a.weights, at.f0 + row);
    TileBars bars = {};  // requested ahead of the product, which takes longer
    if constexpr (kLeaves == Leaves::kCandidates)
      bars = load_bars<N>(a.bars, at.t0);
    multiply<T, N, kPeers>(acc, m, real ? k_tiles : 0, it);
    // Not sooner: blocks of the decoder would crowd on the few idle
    // multiprocessors.
    if (real) launch_dependents();
    if constexpr (kLeaves == Leaves::kSample) {
      if (real)
        store_sample<N>(a.samples, acc, l, walk.place(tile) * kTileF + row, at);
      continue;
    }
    if (kLeaves == Leaves::kUsual && a.ws.scores != nullptr) {
      store_scores<N>(a.ws.scores, a.weights.num_features, acc, l, at.f0 + row,
                      at);
      continue;
    }
    const bool keep = real && tile + walk.stride < walk.tiles();
    if (left > 0) barrier_wait(barrier_at(m.hits_empty, warp), (left - 1) & 1);
    const int own = emit_hits<kLeaves == Leaves::kCandidates, N>(
        a, acc, l, hits, where, at, keep, bars);
    if (keep) {
      m.left[threadIdx.x] = own;
      __syncwarp();
      if (lane == 0) barrier_arrive(barrier_at(m.hits_full, warp));
      ++left;
    }
  }
}

// The last warpgroup: two threads request copies, the other warps append hits.
// `first` stages of weights have been requested. `kEven`: long steps are
// spread evenly.
template <int kPeers, Leaves kLeaves, bool kEven, typename T, typename Walk>
__device__ __forceinline__ void producer(const EncodeArgs<T>& a,
                                         EncodeMemory& m,
                                         const EncodeMaps& maps, int n,
                                         int first, Walk walk) {
  const int d_in = a.weights.d_in;
  const int emitter = static_cast<int>(threadIdx.x) / 32 - kConsumerWarps - 2;
  if (threadIdx.x == kWeightsThread) {
#define STEERING_WEIGHTS(N) \
  request_all<N, true, kPeers>(m, maps, d_in, walk, n, first)
    if constexpr (kEven) {
      STEERING_EVEN_WIDTHS(n, STEERING_WEIGHTS)
    } else {
      STEERING_WIDTHS(n, STEERING_WEIGHTS)
    }
#undef STEERING_WEIGHTS
  } else if (threadIdx.x == kTokensThread) {
#define STEERING_TOKENS(N) \
  request_all<N, false, kPeers>(m, maps, d_in, walk, n, 0)
    if constexpr (kEven) {
      STEERING_EVEN_WIDTHS(n, STEERING_TOKENS)
    } else {
      STEERING_WIDTHS(n, STEERING_TOKENS)
    }
#undef STEERING_TOKENS
  } else if (kLeaves != Leaves::kSample && emitter >= 0 &&
             a.ws.scores == nullptr) {
    append_left(a, m, walk, tile_width<kEven>(n), n, emitter);
  }
}

template <int kPeers, Leaves kLeaves, bool kEven, typename T, typename Walk>
__device__ __forceinline__ void consumer(const EncodeArgs<T>& a,
                                         EncodeMemory& m, int n, Walk walk) {
#define STEERING_CONSUME(N) consume<T, N, kPeers, kLeaves>(a, m, walk, n)
  if constexpr (kEven) {
    STEERING_EVEN_WIDTHS(n, STEERING_CONSUME)
  } else {
    STEERING_WIDTHS(n, STEERING_CONSUME)
  }
#undef STEERING_CONSUME
}

// Whether blocks of a cluster share tiles of a step of n tokens. Then none may
// leave before the others are done, since they write to its memory.
__device__ __forceinline__ bool shares_tiles(int n) { return n > 32; }

}  // namespace vllm_steering
