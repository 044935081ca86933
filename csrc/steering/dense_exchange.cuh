// SPDX-License-Identifier: Apache-2.0
// The phases of the dense kernel in which ranks that share an SAE exchange
// activations, as limbs, and its end.
#pragma once

#include "dense.cuh"
#include "pipeline.cuh"

namespace vllm_steering {

// Waits until all peers have read what this rank staged before. Then, once a
// round, lists the dense tokens again, in their order: blocks note them as they
// come, but all ranks need the same places.
template <typename T>
__device__ __forceinline__ void order_dense(const DenseArgs<T>& a) {
  __shared__ int votes[32];
  const Exchange& x = a.exchange;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  if (threadIdx.x < x.size) {
    const unsigned before = x.header(x.rank)[kPull];
    const unsigned* done = x.header(x.rank) + kDone + threadIdx.x;
    while (static_cast<int>(load_acquire(done) - before) < 0) {
    }
  }
  __syncthreads();
  if (a.part.chunk != 0) return;
  const int n = a.ws.tokens();
  int total = 0;
  for (int first = 0; first < n; first += kEncodeThreads) {
    const int i = first + threadIdx.x;
    const bool dense = i < n && a.ws.records[i].listed > kListMax;
    const unsigned own = __ballot_sync(~0u, dense);
    if (lane == 0) votes[warp] = __popc(own);
    __syncthreads();
    int place = total + __popc(own & ((1u << lane) - 1));
    for (int w = 0; w < kEncodeThreads / 32; ++w) {
      if (w < warp) place += votes[w];
      total += votes[w];
    }
    if (dense) a.ws.records[place].dense = i;
    __syncthreads();
  }
}

// Tells all ranks that this rank's limbs may be read.
__device__ __forceinline__ void publish_limbs(const Exchange& x) {
  const unsigned pull = x.header(x.rank)[kPull] + 1;
  if (threadIdx.x < x.size)
    store_release(x.header(threadIdx.x) + kReady + x.rank, pull);
}

// Both limbs of the d-th dense token of the chunk, of rank r's features.
template <typename T>
__device__ __forceinline__ void pull_limbs(const DenseArgs<T>& a, int d,
                                           int r) {
  const Exchange& x = a.exchange;
  if (threadIdx.x == 0) {
    const unsigned pull = x.header(x.rank)[kPull] + 1;
    const unsigned* ready = x.header(x.rank) + kReady + r;
    while (static_cast<int>(load_acquire(ready) - pull) < 0) {
    }
  }
  __syncthreads();
  const DenseScratch<T> from = a.staged(r);
  const int width = from.padded;
  for (int plane = 0; plane < 2; ++plane) {
    const int64_t row = static_cast<int64_t>(plane) * from.rows + d;
    const T* source = from.limbs + row * width;
    T* to = a.scratch.limbs + row * a.scratch.padded + r * width;
    for (int f = threadIdx.x * 8; f < width; f += kEncodeThreads * 8)
      store8(to + f, load8(source + f));
  }
}

// All columns of token i that this rank has are in its peers' memory.
__device__ __forceinline__ void release_dense(const Exchange& x, int64_t i,
                                              int d_out, bool over) {
  __syncthreads();
  const int slices = (d_out + kColumnsOfSlice - 1) / kColumnsOfSlice;
  const unsigned flag = slice_flag(x.round(), over);
  for (int slice = 0; slice < slices; ++slice) release_slice(x, i, slice, flag);
}

// The last block resets the counters to zero for the next launch.
// How many dense tokens a shared SAE has is still needed; `write_kernel` resets
// that.
template <typename T>
__device__ __forceinline__ void leave_dense(const DenseArgs<T>& a) {
  int* sync = a.ws.sync;
  if (atomicAdd(sync + kDenseExits, 1) != static_cast<int>(gridDim.x) - 1)
    return;
  for (int field = kDenseTicket; field <= kDenseExits; ++field) sync[field] = 0;
  if (!a.shared()) sync[kDenseCount] = 0;
  if (!a.shared() || a.topk || a.part.end != kPhases) return;
  __threadfence_system();
  const Exchange& x = a.exchange;
  const unsigned pull = x.header(x.rank)[kPull] + 1;
  for (int r = 0; r < x.size; ++r)
    store_release(x.header(r) + kDone + x.rank, pull);
  x.header(x.rank)[kPull] = pull;
}

}  // namespace vllm_steering
