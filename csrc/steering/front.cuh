// SPDX-License-Identifier: Apache-2.0
// Stages 1 and 2 of a decoding step in one launch.
//
// One block a multiprocessor, all of them resident; a barrier of the grid
// stands where longer steps have a kernel boundary. Every block finds out for
// itself which tokens are active, so that a step without any ends at once, and
// W_enc is requested while the activations are still being gathered. Not all at
// once: what the gather waits for would queue behind it in memory.
#pragma once

#include "compact.cuh"
#include "encode.cuh"

namespace vllm_steering {

constexpr int kFrontTokens = kMaxListed;
constexpr int kFirstStages = 2;  // of W_enc, before the tokens are known

struct FrontArgs {
  CompactArgs compact;
  EncodeArgs encode;
  int* sync;  // [2] arrivals and exits of blocks, zero between launches
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

// What is read before anything is known; all loads are in flight together.
struct FrontLoads {
  int row, flags, skip, topk;
  float limit;
};

__device__ __forceinline__ FrontLoads load_front(const CompactArgs& a, int t) {
  const bool there = t < a.num_tokens;
  return {there ? a.index[t] : 0, there ? a.flags[t] : 0, a.meta[kSkipMask],
          a.meta[kUsesTopk], *a.norm_limit};
}

// Asks L2 for the rows that this block may have to gather.
template <typename T>
__device__ void prefetch_rows(const CompactArgs& a, const T* hidden,
                              const T* residual) {
  for (int t = blockIdx.x; t < a.num_tokens; t += gridDim.x) {
    for (int d = threadIdx.x * 64; d < a.d_model; d += blockDim.x * 64) {
      asm volatile(
          "prefetch.global.L2 [%0];" ::"l"(hidden + t * a.hidden_stride + d));
      if (residual != nullptr)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(
            residual + t * a.residual_stride + d));
    }
  }
}

// Lists the active tokens in order in shared memory; returns how many.
__device__ int list_active(const CompactArgs& a, const FrontLoads& own,
                           EncodeMemory& m) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool on = a.gate < 0 || (own.topk != 0) == (a.gate != 0);
  const bool active = on && own.row != 0 && (own.flags & own.skip) == 0 &&
                      a.table[own.row * a.table_stride] != 0;
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
__device__ void gather_active(const CompactArgs& a, EncodeMemory& m,
                              const T* hidden, const T* residual, T* x, int n,
                              float limit) {
  float* squares = reinterpret_cast<float*>(m.sums);
  const int blocks = gridDim.x;
  const bool pairs = n > blocks;
  const int threads = pairs ? kConsumers / 2 : kConsumers;
  const int mine = pairs && threadIdx.x >= kConsumers / 2 ? blocks : 0;
#pragma unroll 1
  for (int first = blockIdx.x; first < n;
       first += pairs ? 2 * blocks : blocks) {
    const int i = first + mine;
    if (i < n && (threadIdx.x & (threads - 1)) == 0) a.lines[i * kLine] = 0;
    gather_together(a, hidden, residual, x, i < n ? m.tokens[i] : -1, i, limit,
                    squares, threads);
    sync_threads<kCompactThreads>();
  }
}
static_assert(kCompactThreads == kConsumers, "who gathers multiplies");

#endif

template <typename T>
__global__ void __launch_bounds__(kEncodeThreads, 1)
    front_kernel(const __grid_constant__ FrontArgs a,
                 const __grid_constant__ EncodeMaps maps, const T* hidden,
                 const T* residual, T* x) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw[];
  EncodeMemory& m = encode_memory(raw);
  const int t = threadIdx.x;
  if (t == kWeightsThread) {
    init_barriers(m);
    prefetch_map(&maps.w);
  }
  if (t == kTokensThread)
    for (int i = 0; i < kWidths; ++i) prefetch_map(&maps.x[i]);
  const FrontLoads own = load_front(a.compact, t);
  // A row of the tier is a hint: this site may still have nothing to do.
  if (!__syncthreads_or(own.row != 0)) {
    if (blockIdx.x == 0 && t == 0) *a.compact.count = 0;
    return;
  }
  const int k_tiles = (a.encode.d_model + kTileK - 1) / kTileK;
  const bool has_tile =
      static_cast<int>(blockIdx.x) * kTileF < a.encode.num_features;
  const int first = has_tile ? min(kFirstStages, k_tiles) : 0;
  prefetch_rows(a.compact, hidden, residual);
  if (t == kWeightsThread) request_first(m, &maps.w, first, k_tiles);
  const int n = list_active(a.compact, own, m);
  if (blockIdx.x == 0 && t == 0) *a.compact.count = n;
  if (n == 0) {
    if (t == kWeightsThread) drain_first(m, first);
    return;
  }
  if (t >= kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (t == kTokensThread) {
      grid_wait(a.sync, gridDim.x);
      grid_leave(a.sync, a.sync + 1);
      fence_async();
    }
    serve(a.encode, m, maps, n, first);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    gather_active<T>(a.compact, m, hidden, residual, x, n, own.limit);
    fence_async();
    sync_threads<kConsumers>();
    if (t == 0) grid_arrive(a.sync);
    multiply_all<T>(a.encode, m, n);
  }
#endif
}

}  // namespace vllm_steering
