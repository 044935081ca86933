// SPDX-License-Identifier: Apache-2.0
// Stage 1: the active tokens of a step, in order, and their activations side by
// side.
//
//   tokens = [t : active(t)],  x[i] = hidden[t] + residual[t],  count =
//   len(tokens)
//
// Every block counts the active tokens before its own. So one launch is enough,
// and the order needs no atomics. A token past the norm limit keeps its place
// with -1 as its id, because its norm is known only after its row was read.
#pragma once

#include "compact.cuh"
#include "ptx/launch_control.cuh"

namespace vllm_steering {

constexpr int kMostPerBlock = 32;

// Tokens that a block owns, in a step of `tokens`.
inline int tokens_per_block(int tokens) {
  return tokens <= 256 ? 1 : tokens <= 2048 ? 8 : kMostPerBlock;
}

template <typename T>
struct CompactArgs {
  Step step;
  Weights<T> weights;
  Stream<T> stream;  // what the encoder reads
  Workspace<T> ws;
  int gate;
  int per_block;
};

// Active tokens before `end`, the whole block counting.
template <typename T>
__device__ int count_before(const CompactArgs<T>& a, int end, int skip) {
  __shared__ int partial[kCompactWarps];
  int before = 0;
  for (int t = threadIdx.x; t < end; t += blockDim.x)
    before += is_active(a.step, t, skip);
  before = warp_sum(before);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = before;
  __syncthreads();
  before = 0;
#pragma unroll
  for (int w = 0; w < kCompactWarps; ++w) before += partial[w];
  return before;
}

template <typename T>
__global__ void __launch_bounds__(kCompactThreads)
    compact_kernel(const __grid_constant__ CompactArgs<T> a) {
  wait_for_previous();
  launch_dependents();  // after the wait: the encoder reads weights ahead of
                        // its own
  // The first chunk of the step has counted the tokens: none are left.
  if (a.ws.base > 0 && *a.ws.count <= a.ws.base) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int skip = a.weights.meta[kSkipMask], d_in = a.weights.d_in;
  const bool on = is_meant(a.gate, a.weights.meta[kUsesTopk]);
  const int total = on ? a.stream.tokens : 0;
  const int start = blockIdx.x * a.per_block;
  const int before = count_before(a, min(start, total), skip);

  const int own = start + lane;
  const bool mine =
      lane < a.per_block && own < total && is_active(a.step, own, skip);
  const unsigned active = __ballot_sync(~0u, mine);
  if (threadIdx.x == 0 && blockIdx.x == gridDim.x - 1)
    *a.ws.count = before + __popc(active);
  if (warp == 0 && lane < a.per_block && own < a.ws.rows)
    a.ws.records[own].listed = 0;

  const float limit = *a.weights.norm_limit;
  if (a.per_block == 1) {  // few tokens: the whole block copies one row
    const int i = before - a.ws.base;
    if (active == 0 || i < 0 || i >= a.ws.rows) return;
    __shared__ float squares[kCompactWarps];
    gather_together(a.step, a.stream, a.ws, d_in, start, i, limit, squares,
                    kCompactThreads);
    return;
  }
  for (int j = warp; j < a.per_block; j += kCompactWarps) {
    if (!(active >> j & 1)) continue;
    const int i = before + __popc(active & ((1u << j) - 1)) - a.ws.base;
    if (i < 0 || i >= a.ws.rows) continue;
    const int t = start + j;
    const float square = gather_token(a.stream, a.ws, t, i, d_in, lane, 32);
    if (lane == 0) note_token(a.ws, a.step, i, t, sqrtf(square) <= limit);
  }
}

}  // namespace vllm_steering
