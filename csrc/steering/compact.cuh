// SPDX-License-Identifier: Apache-2.0
// What both ways of finding a step's active tokens share: which tokens are
// active, and how a row of the stream is copied and measured.
#pragma once

#include "bundles.cuh"
#include "ptx/mbarrier.cuh"

namespace vllm_steering {

constexpr int kCompactWarps = 8;
constexpr int kCompactThreads = kCompactWarps * 32;

// Which modules a run is for: any, or those whose USES_TOPK has this value.
constexpr int kAnyModule = -1;

__device__ __forceinline__ bool is_meant(int gate, int uses_topk) {
  return gate == kAnyModule || (uses_topk != 0) == (gate != 0);
}

// A token's rows at this site, 0 where it is not edited, or not read.
struct TokenRows {
  int edit, read;
};

__device__ __forceinline__ TokenRows active_rows(const Step& step, int edit,
                                                 int read) {
  if (edit != 0 && !step.table.row(edit).active()) edit = 0;
  const Reads& r = step.reads;
  if (read != 0 && r.table[read * r.table_stride + kReadActive] == 0) read = 0;
  return {edit, read};
}

__device__ __forceinline__ int read_index(const Step& step, int t) {
  return step.reads.index == nullptr ? 0 : step.reads.index[t];
}

__device__ __forceinline__ bool is_active(const Step& step, int t, int skip) {
  const TokenRows rows = active_rows(step, step.index[t], read_index(step, t));
  return (rows.edit | rows.read) != 0 && (step.flags[t] & skip) == 0;
}

// Copies one token's row with `threads` threads; returns this thread's share of
// the squared norm. Without kTwo the residual is not read.
template <bool kTwo, typename T>
__device__ __forceinline__ float gather_row(const T* hidden, const T* residual,
                                            T* x, int d_in, int thread,
                                            int threads) {
  constexpr int kInFlight = 3;
  const int step = threads * 8;
  float square = 0.f;
  for (int first = thread * 8; first < d_in; first += kInFlight * step) {
    Pack8<T> h[kInFlight], r[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int d = first + u * step;
      if (d >= d_in) continue;
      h[u] = load8(hidden + d);
      if constexpr (kTwo) r[u] = load8(residual + d);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int d = first + u * step;
      if (d >= d_in) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if constexpr (kTwo)
          h[u].at[j] =
              from_float<T>(to_float(h[u].at[j]) + to_float(r[u].at[j]));
        square += to_float(h[u].at[j]) * to_float(h[u].at[j]);
      }
      store8(x + d, h[u]);
    }
  }
  return warp_sum(square);
}

// Token t of the stream goes to row i of x.
template <typename T>
__device__ __forceinline__ float gather_token(const Stream<T>& stream,
                                              const Workspace<T>& ws, int64_t t,
                                              int64_t i, int d_in, int thread,
                                              int threads) {
  const T* hidden = stream.hidden + t * stream.hidden_stride;
  T* x = ws.x + i * d_in;
  if (stream.residual == nullptr)
    return gather_row<false>(hidden, hidden, x, d_in, thread, threads);
  const T* residual = stream.residual + t * stream.residual_stride;
  return gather_row<true>(hidden, residual, x, d_in, thread, threads);
}

// The i-th active token is t, unless its norm is past the limit.
template <typename T>
__device__ __forceinline__ void note_token(const Workspace<T>& ws,
                                           const Step& step, int i, int t,
                                           bool within) {
  TokenRows rows = {step.index[t], 0};
  if (step.reads.index != nullptr)
    rows = active_rows(step, rows.edit, step.reads.index[t]);
  ws.records[i].token = within ? t : -1;
  ws.records[i].row = rows.edit;
  ws.records[i].read = rows.read;
  ws.records[i].saturated = 0;
}

// Of the first kCompactThreads threads, each `threads` (a power of two) in a
// row copy one token to row i of x: token t, none where t < 0. `squares` has
// room for a float of each of their warps.
template <typename T>
__device__ void gather_together(const Step& step, const Stream<T>& stream,
                                const Workspace<T>& ws, int d_in, int t, int i,
                                float limit, float* squares, int threads) {
  const int own = threadIdx.x & (threads - 1), warp = threadIdx.x / 32;
  if (t >= 0) {
    const float square = gather_token(stream, ws, t, i, d_in, own, threads);
    if (own % 32 == 0) squares[warp] = square;
  }
  sync_threads<kCompactThreads>();
  if (t >= 0 && own == 0) {
    float total = 0.f;
    for (int w = 0; w < threads / 32; ++w) total += squares[warp + w];
    note_token(ws, step, i, t, sqrtf(total) <= limit);
  }
}

}  // namespace vllm_steering
