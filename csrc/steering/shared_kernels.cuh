// SPDX-License-Identifier: Apache-2.0
// What only an SAE that ranks share needs: lists are sent, rows are pulled, and
// whole tokens are written from the columns of all ranks (exchange.cuh).
#pragma once

#include "exchange.cuh"
#include "ptx/launch_control.cuh"

namespace vllm_steering {

// Sends a chunk's lists to all ranks.
template <typename T>
__global__ void __launch_bounds__(kExchangeThreads)
    push_kernel(const __grid_constant__ Workspace<T> ws,
                const __grid_constant__ Exchange x) {
  launch_dependents();
  wait_for_previous();
  push_lists(ws, x, ws.tokens(), x.round());
}

// Rows that peers read out of each other's staging, [rows, row_bytes].
struct PullArgs {
  Exchange exchange;
  const int* count;  // how many rows, with `base` of them before
  int base, rows;
  bool all;  // all `rows`, if there is any
  int64_t row_bytes;
  char* out;  // row i of rank r goes to out + i * row_step + r * rank_step
  int64_t row_step, rank_step;

  __device__ __forceinline__ int taken() const {
    const int n = min(*count - base, rows);
    return all && n > 0 ? rows : n;
  }
};

// Parts of a pull, one after another: ranks on one device take turns between.
enum PullPart { kAnnounce = 1, kCopy = 2, kAwait = 4 };

__device__ __forceinline__ void wait_pulls(const Exchange& x, int field,
                                           unsigned pull) {
  if (threadIdx.x < x.size) {
    const unsigned* from = x.header(x.rank) + field + threadIdx.x;
    while (static_cast<int>(load_acquire(from) - pull) < 0) {
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kExchangeThreads)
    pull_kernel(const __grid_constant__ PullArgs a, int parts) {
  launch_dependents();
  wait_for_previous();
  const int n = a.taken();
  if (n <= 0) return;
  const Exchange& x = a.exchange;
  unsigned* own = x.header(x.rank);
  const unsigned pull = *static_cast<volatile unsigned*>(own + kPull) + 1;
  if ((parts & kAnnounce) != 0 && blockIdx.x == 0 && threadIdx.x < x.size)
    store_release(x.header(threadIdx.x) + kReady + x.rank, pull);
  if ((parts & kCopy) != 0) {
    wait_pulls(x, kReady, pull);
    const int64_t each = a.row_bytes / 16, all = each * n;
    for (int k = 0; k < x.size; ++k) {
      const int r = (x.rank + k) % x.size;  // not all from the same one at once
      const char* from = x.at[r] + x.staging;
      for (int64_t at = blockIdx.x * blockDim.x + threadIdx.x; at < all;
           at += static_cast<int64_t>(gridDim.x) * blockDim.x) {
        const int64_t i = at / each, part = at % each * 16;
        *reinterpret_cast<uint4*>(a.out + i * a.row_step + r * a.rank_step +
                                  part) =
            *reinterpret_cast<const uint4*>(from + i * a.row_bytes + part);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence_system();
  if (atomicAdd(own + kLeft, 1u) != gridDim.x - 1) return;
  own[kLeft] = 0;
  __threadfence_system();
  if ((parts & kCopy) != 0)
    for (int r = 0; r < x.size; ++r)
      store_release(x.header(r) + kDone + x.rank, pull);
  if ((parts & kAwait) == 0) return;
  for (int r = 0; r < x.size; ++r)
    while (static_cast<int>(load_acquire(own + kDone + r) - pull) < 0) {
    }
  own[kPull] = pull;
}

// Writes back whole tokens, and ends the round. `dense`: the others have been
// written.
template <typename T>
__global__ void __launch_bounds__(kExchangeThreads)
    write_kernel(const __grid_constant__ Workspace<T> ws,
                 const __grid_constant__ Stream<T> stream,
                 const __grid_constant__ Exchange x,
                 unsigned long long* saturated, bool dense) {
  launch_dependents();
  wait_for_previous();
  const int n = ws.tokens();
  if (n <= 0) return;
  const unsigned round = x.round();
  const int width = x.width / 2;
  const int last = dense && ws.sync[kDenseCount] == 0 ? 0 : n;
  for (int64_t i = blockIdx.x; i < last; i += gridDim.x) {
    const int token = ws.records[i].token, row = ws.records[i].row;
    if (dense && ws.records[i].listed <= kListMax) continue;
    const bool over = wait_slices(x, i, round, 0, x.slices);
    const bool limited = __syncthreads_or(over) != 0;
    if (token < 0 || row == 0) continue;
    const T* from = x.template row<T>(x.rank, i);
    T* h = stream.hidden + token * stream.hidden_stride;
    T* r = stream.residual == nullptr
               ? nullptr
               : stream.residual + token * stream.residual_stride;
    Pack8<T> zero;
    zero.raw = make_uint4(0, 0, 0, 0);
    for (int c = threadIdx.x * 8; c < width; c += blockDim.x * 8) {
      store8((r != nullptr ? r : h) + c, load8(from + c));
      if (r != nullptr) store8(h + c, zero);
    }
    if (limited && threadIdx.x == 0) atomicAdd(saturated, 1ull);
  }
  __syncthreads();
  unsigned* own = x.header(x.rank);
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(own + kLeft, 1u) != gridDim.x - 1) return;
  own[kLeft] = 0;
  ws.sync[kDenseCount] = 0;
  own[kRound] = round;
}

}  // namespace vllm_steering
