// SPDX-License-Identifier: Apache-2.0
// Stages 1 and 2 of a decoding step in one launch.
//
// One block a multiprocessor, all of them resident; a barrier of the grid
// stands where longer steps have a kernel boundary. Every block finds out for
// itself which tokens are active, so that a step without any ends at once, and
// W_enc is requested while the activations are still being gathered. It is not
// requested all at once, or the gather's loads would queue behind it in memory.
#pragma once

#include "compact.cuh"
#include "pipeline.cuh"

namespace vllm_steering {

constexpr int kFirstStages = 2;  // of W_enc, before the tokens are known
static_assert(kCompactThreads == kConsumers, "who gathers multiplies");
static_assert(kCompactEncodeTokens <= kEncodeThreads, "a thread looks at one");
static_assert(kCompactEncodeTokens <= 1 << 8, "ids of 8 bits in shared memory");

template <typename T>
struct CompactEncodeArgs {
  Step step;
  Stream<T> stream;  // what the encoder reads
  EncodeArgs<T> encode;
  int gate;
};

// What is read before anything is known; all loads are in flight together.
struct FirstLoads {
  int row, read, flags, skip, topk;
  float limit;
};

template <typename T>
__device__ __forceinline__ FirstLoads load_first(const CompactEncodeArgs<T>& a,
                                                 int t) {
  const bool there = t < a.stream.tokens;
  const Weights<T>& w = a.encode.weights;
  return {there ? a.step.index[t] : 0, there ? read_index(a.step, t) : 0,
          there ? a.step.flags[t] : 0, w.meta[kSkipMask],
          w.meta[kUsesTopk],           *w.norm_limit};
}

// Asks L2 for the rows that this block may have to gather.
template <typename T>
__device__ void prefetch_rows(const Stream<T>& s, int d_in) {
  for (int t = blockIdx.x; t < s.tokens; t += gridDim.x) {
    for (int d = threadIdx.x * 64; d < d_in; d += blockDim.x * 64) {
      prefetch_line(s.hidden + t * s.hidden_stride + d);
      if (s.residual != nullptr)
        prefetch_line(s.residual + t * s.residual_stride + d);
    }
  }
}

// Lists the active tokens in order in shared memory; returns how many.
template <typename T>
__device__ int list_active(const CompactEncodeArgs<T>& a, const FirstLoads& own,
                           EncodeMemory& m) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const TokenRows rows = active_rows(a.step, own.row, own.read);
  const bool active = is_meant(a.gate, own.topk) &&
                      (own.flags & own.skip) == 0 &&
                      (rows.edit | rows.read) != 0;
  const unsigned votes = __ballot_sync(~0u, active);
  if (lane == 0) m.sums[warp] = __popc(votes);
  __syncthreads();
  int before = 0, total = 0;
#pragma unroll
  for (int w = 0; w < kEncodeThreads / 32; ++w) {
    if (w == warp) before = total;
    total += m.sums[w];
  }
  before += __popc(votes & ((1u << lane) - 1));
  if (active) m.tokens[before] = static_cast<uint8_t>(threadIdx.x);
  __syncthreads();
  return total;
}

// This block's share of the active rows goes to x; their counters become zero.
// With more than one row a block, halves of the threads take two at a time.
template <typename T>
__device__ void gather_active(const CompactEncodeArgs<T>& a, EncodeMemory& m,
                              int n, float limit) {
  float* squares = reinterpret_cast<float*>(m.sums);
  const int blocks = gridDim.x;
  const bool pairs = n > blocks;
  const int threads = pairs ? kConsumers / 2 : kConsumers;
  const int mine = pairs && threadIdx.x >= kConsumers / 2 ? blocks : 0;
#pragma unroll 1
  for (int first = blockIdx.x; first < n;
       first += pairs ? 2 * blocks : blocks) {
    const int i = first + mine;
    if (i < n && (threadIdx.x & (threads - 1)) == 0)
      a.encode.ws.records[i].listed = 0;
    gather_together(a.step, a.stream, a.encode.ws, a.encode.weights.d_in,
                    i < n ? m.tokens[i] : -1, i, limit, squares, threads);
    sync_threads<kCompactThreads>();
  }
}

// One thread: waits until every block has gathered its tokens.
template <typename T>
__device__ __forceinline__ void await_tokens(const Workspace<T>& ws) {
  grid_wait(ws.sync + kArrivals, gridDim.x);
  grid_leave(ws.sync + kArrivals, ws.sync + kExits);
  fence_async();
}

// The consumers: this block has gathered its tokens.
template <typename T>
__device__ __forceinline__ void announce_tokens(const Workspace<T>& ws) {
  fence_async();
  sync_threads<kConsumers>();
  if (threadIdx.x == 0) grid_arrive(ws.sync + kArrivals);
}

// With more than one of kPeers, blocks of a cluster share tiles of x. What one
// of them writes to another waits for the barrier of the grid, which comes
// after the other's barriers are ready.
template <typename T, int kPeers>
__global__ void __launch_bounds__(kEncodeThreads, 1)
    compact_encode_kernel(const __grid_constant__ CompactEncodeArgs<T> a,
                          const __grid_constant__ EncodeMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw[];
  EncodeMemory& m = encode_memory(raw);
  const Workspace<T>& ws = a.encode.ws;
  const int t = threadIdx.x;
  if (t == kWeightsThread) {
    init_barriers(m, kPeers);
    prefetch_map(&maps.w);
  }
  if (t == kTokensThread)
    for (int i = 0; i < kWidths; ++i) prefetch_map(&maps.x[i]);
  const FirstLoads own = load_first(a, t);
  // A row of the tier is only a hint: this site may have nothing to do.
  if (!__syncthreads_or((own.row | own.read) != 0)) {
    if (blockIdx.x == 0 && t == 0) *ws.count = 0;
    return;
  }
  const int k_tiles = (a.encode.weights.d_in + kTileK - 1) / kTileK;
  const bool has_tile =
      static_cast<int>(blockIdx.x) * kTileF < a.encode.weights.num_features;
  const int first = has_tile ? min(kFirstStages, k_tiles) : 0;
  prefetch_rows(a.stream, a.encode.weights.d_in);
  if (t == kWeightsThread)
    request_first(m, &maps.w, first, k_tiles, a.encode.weights.first_feature);
  const int n = list_active(a, own, m);
  if (blockIdx.x == 0 && t == 0) *ws.count = n;
  if (n == 0) {
    if (t == kWeightsThread) drain_first(m, first);
    return;
  }
  const TileWalk walk = tile_walk(a.encode.weights.num_features, n, kPeers,
                                  kPeers > 1 ? cluster_rank() : 0,
                                  a.encode.weights.first_feature);
  if (t >= kConsumers) {
    give_registers<40>();
    if (t == kTokensThread) await_tokens(ws);
    producer<kPeers, Leaves::kUsual, false>(a.encode, m, maps, n, first, walk);
  } else {
    take_registers<232>();
    gather_active(a, m, n, own.limit);
    announce_tokens(ws);
    consumer<kPeers, Leaves::kUsual, false>(a.encode, m, n, walk);
  }
  if (kPeers > 1 && shares_tiles(n)) cluster_sync();
#else
  __trap();
#endif
}

}  // namespace vllm_steering
