// SPDX-License-Identifier: Apache-2.0
// Stage 1: the active tokens of a step, in order, and their activations side by
// side.
//
//   tokens = [t : active(t)],  x[i] = hidden[t] + residual[t],  count =
//   len(tokens)
//
// Every block counts the active tokens before its own, so one launch does it
// all and the order needs no atomics. A token past the norm limit keeps its
// place with -1 in `tokens`: its norm is known only once its row has been read.
#pragma once

#include "async.cuh"
#include "common.cuh"

namespace vllm_steering {

constexpr int kCompactWarps = 8;
constexpr int kCompactThreads = kCompactWarps * 32;

struct CompactArgs {
  const int* index;  // [T]
  const int* flags;  // [T]
  const int* table;  // packed clamp rows, row r at r * table_stride
  const int* meta;   // SAEWeights.meta
  const float* norm_limit;
  int* tokens;  // [rows]
  int* lines;   // [rows, kLine]
  int* count;   // [1], active tokens of the whole step
  int64_t table_stride, hidden_stride, residual_stride;
  int num_tokens, base, rows, d_model;
  int gate;  // -1: any module, else the value of USES_TOPK that this run is for
  int per_block;  // tokens a block owns, at most 32
};

__device__ __forceinline__ bool is_active(const CompactArgs& a, int t,
                                          int skip) {
  const int row = a.index[t];
  return row != 0 && a.table[row * a.table_stride] != 0 &&
         (a.flags[t] & skip) == 0;
}

// Copies one token's row with `threads` threads; returns this thread's share of
// the squared norm.
template <typename T>
__device__ float gather_row(const T* hidden, const T* residual, T* x,
                            int d_model, int thread, int threads) {
  constexpr int kInFlight = 3;
  const int step = threads * 8;
  float square = 0.f;
  for (int first = thread * 8; first < d_model; first += kInFlight * step) {
    Vec8<T> h[kInFlight], r[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int d = first + u * step;
      if (d >= d_model) continue;
      h[u] = load8(hidden + d);
      if (residual != nullptr) r[u] = load8(residual + d);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int d = first + u * step;
      if (d >= d_model) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (residual != nullptr)
          h[u].at[j] =
              from_float<T>(to_float(h[u].at[j]) + to_float(r[u].at[j]));
        square += to_float(h[u].at[j]) * to_float(h[u].at[j]);
      }
      store8(x + d, h[u]);
    }
  }
  return warp_sum(square);
}

// The i-th active token is t, unless its norm is past the limit.
__device__ __forceinline__ void note_token(const CompactArgs& a, int i, int t,
                                           bool within) {
  a.tokens[i] = a.lines[i * kLine + kToken] = within ? t : -1;
  a.lines[i * kLine + kRow] = a.index[t];
}

// Of the first kCompactThreads threads, each `threads` (a power of two) in a
// row copy one token to row i of x: token t, none where t < 0. `squares` has
// room for a float of each of their warps.
template <typename T>
__device__ void gather_together(const CompactArgs& a, const T* hidden,
                                const T* residual, T* x, int t, int i,
                                float limit, float* squares, int threads) {
  const int own = threadIdx.x & (threads - 1), warp = threadIdx.x / 32;
  if (t >= 0) {
    const T* r =
        residual == nullptr ? nullptr : residual + t * a.residual_stride;
    const float square = gather_row(hidden + t * a.hidden_stride, r,
                                    x + static_cast<int64_t>(i) * a.d_model,
                                    a.d_model, own, threads);
    if (own % 32 == 0) squares[warp] = square;
  }
  sync_threads<kCompactThreads>();
  if (t >= 0 && own == 0) {
    float total = 0.f;
    for (int w = 0; w < threads / 32; ++w) total += squares[warp + w];
    note_token(a, i, t, sqrtf(total) <= limit);
  }
}

template <typename T>
__global__ void __launch_bounds__(kCompactThreads)
    compact_kernel(CompactArgs a, const T* hidden, const T* residual, T* x) {
  __shared__ int partial[kCompactWarps];
  wait_for_previous();
  launch_dependents();  // after the wait: the encoder reads weights ahead of
                        // its own
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int skip = a.meta[kSkipMask];
  const bool on = a.gate < 0 || (a.meta[kUsesTopk] != 0) == (a.gate != 0);
  const int total = on ? a.num_tokens : 0;
  const int start = blockIdx.x * a.per_block;

  int before = 0;
  for (int t = threadIdx.x; t < min(start, total); t += blockDim.x)
    before += is_active(a, t, skip);
  before = warp_sum(before);
  if (lane == 0) partial[warp] = before;
  __syncthreads();
  before = 0;
#pragma unroll
  for (int w = 0; w < kCompactWarps; ++w) before += partial[w];

  const int own = start + lane;
  const bool mine =
      lane < a.per_block && own < total && is_active(a, own, skip);
  const unsigned active = __ballot_sync(~0u, mine);
  if (threadIdx.x == 0 && blockIdx.x == gridDim.x - 1)
    *a.count = before + __popc(active);
  if (warp == 0 && lane < a.per_block && own < a.rows) a.lines[own * kLine] = 0;

  const float limit = *a.norm_limit;
  if (a.per_block == 1) {  // few tokens: the whole block copies one row
    const int i = before - a.base;
    if (active == 0 || i < 0 || i >= a.rows) return;
    __shared__ float squares[kCompactWarps];
    gather_together(a, hidden, residual, x, start, i, limit, squares,
                    kCompactThreads);
    return;
  }
  for (int j = warp; j < a.per_block; j += kCompactWarps) {
    if (!(active >> j & 1)) continue;
    const int i = before + __popc(active & ((1u << j) - 1)) - a.base;
    if (i < 0 || i >= a.rows) continue;
    const int64_t t = start + j;
    const T* r =
        residual == nullptr ? nullptr : residual + t * a.residual_stride;
    T* out = x + static_cast<int64_t>(i) * a.d_model;
    const float square =
        gather_row(hidden + t * a.hidden_stride, r, out, a.d_model, lane, 32);
    if (lane == 0)
      note_token(a, i, static_cast<int>(t), sqrtf(square) <= limit);
  }
}

}  // namespace vllm_steering
