// SPDX-License-Identifier: Apache-2.0
// Lists and columns of few tokens, as packets: 16 bytes of which each half has
// a number and the round (for columns: the flag of a slice). A half is stored
// and loaded at once, so whoever sees the round sees the number, and no store
// waits for others.
#pragma once

#include "exchange.cuh"

namespace vllm_steering {

// Packet e of the list that rank `from` sends to rank `to`; 0 is its length.
__device__ __forceinline__ uint4* list_packet(const Exchange& x, int to,
                                              int from, int64_t i, int e) {
  return reinterpret_cast<uint4*>(x.at[to] + x.packets) +
         (static_cast<int64_t>(from) * x.packet_rows + i) * (1 + kListMax) + e;
}

// The packet of columns c to c + 3, of all ranks, of token i.
__device__ __forceinline__ uint4* column_packet(const Exchange& x, int to,
                                                int64_t i, int c) {
  return reinterpret_cast<uint4*>(x.at[to] + x.column_packets) +
         i * (x.width / 8) + c / 4;
}

// Waits for a packet of this round.
__device__ __forceinline__ uint2 wait_packet(const uint4* from,
                                             unsigned round) {
  uint4 seen;
  do {
    seen = load_packet(from);
  } while (seen.y != round || seen.w != round);
  return make_uint2(seen.x, seen.z);
}

// As push_lists.
template <typename T>
__device__ __forceinline__ void push_packets(const Workspace<T>& ws,
                                             const Exchange& x, int n,
                                             unsigned round) {
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const OwnList own(ws, i);
    if (threadIdx.x < x.size)
      store_packet(list_packet(x, threadIdx.x, x.rank, i, 0),
                   make_uint4(own.listed, round, 0, round));
#pragma unroll
    for (int u = 0; u < OwnList::kEach; ++u) {
      const int e = threadIdx.x + u * kExchangeThreads;
      if (e >= own.sent) continue;
      const uint4 packet =
          make_uint4(static_cast<unsigned>(entry_feature(own.entry[u])), round,
                     static_cast<unsigned>(own.entry[u]), round);
      for (int to = 0; to < x.size; ++to)
        store_packet(list_packet(x, to, x.rank, i, 1 + e), packet);
    }
  }
}

// As wait_lists; the entries may still be on their way.
__device__ __forceinline__ int wait_lengths(const Exchange& x, int64_t i,
                                            unsigned round, int* counts) {
  if (threadIdx.x < x.size)
    counts[threadIdx.x] = static_cast<int>(
        wait_packet(list_packet(x, x.rank, threadIdx.x, i, 0), round).x);
  __syncthreads();
  int total = 0;
  for (int r = 0; r < x.size; ++r) total += counts[r];
  return total;
}

// As joined_entry; waits for it.
__device__ __forceinline__ int64_t wait_entry(const Exchange& x, int64_t i,
                                              unsigned round, const int* counts,
                                              int e) {
  int r = 0;
  while (r + 1 < x.size && e >= counts[r]) e -= counts[r++];
  const uint2 seen = wait_packet(list_packet(x, x.rank, r, i, 1 + e), round);
  return static_cast<int64_t>(seen.x) << 32 | seen.y;
}

// As push_slice: one warp a rank. `slice` null: zeros, of a token that is not
// written.
template <typename T>
__device__ __forceinline__ void push_column_packets(const Exchange& x,
                                                    const T* slice, int64_t i,
                                                    int d_out, int first, int n,
                                                    unsigned flag) {
  const int lane = threadIdx.x & 31;
  for (int to = threadIdx.x / 32; to < x.size; to += blockDim.x / 32) {
    if (lane * 8 >= n) continue;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (slice != nullptr) v = load8(slice + lane * 8).raw;
    uint4* at = column_packet(x, to, i, x.rank * d_out + first + lane * 8);
    store_packet(at, make_uint4(v.x, flag, v.y, flag));
    store_packet(at + 1, make_uint4(v.z, flag, v.w, flag));
  }
}

// Waits for eight columns from c on; `over`: whether their slice was limited.
template <typename T>
__device__ __forceinline__ Pack8<T> wait_columns(const Exchange& x, int64_t i,
                                                 int c, unsigned round,
                                                 bool& over) {
  const uint4* from = column_packet(x, x.rank, i, c);
  const unsigned wanted = round & 0x7FFFFFFF;
  uint4 a, b;
  do {
    a = load_packet(from);
    b = load_packet(from + 1);
  } while (a.y >> 1 != wanted || a.w >> 1 != wanted || b.y >> 1 != wanted ||
           b.w >> 1 != wanted);
  over = (a.y & 1) != 0;
  Pack8<T> columns;
  columns.raw = make_uint4(a.x, a.z, b.x, b.z);
  return columns;
}

}  // namespace vllm_steering
