// SPDX-License-Identifier: Apache-2.0
// How ranks that share an SAE pass data: each stores straight into its peers'
// memory and releases a flag there.
//
// Every rank has an arena of the same layout, which all ranks can address
// (steering_kernels/peers.py):
//
//   header    words of 32 bits, HeaderField: the round, and flags of pulls
//   lists     [ranks, rows, 1 + kListMax] of 64 bits: a token's list by rank
//   flags     [rows, ranks, slices] of 32 bits: whose columns have come
//   columns   [rows, D]
//   staging   what peers read from here
//   packets   [ranks, packet rows, 1 + kListMax] of 128 bits: lists
//   column packets  [packet rows, D / 4] of 128 bits
//
// Steps of few tokens send packets (packets.cuh) instead of lists, flags and
// columns: each half of one carries the round, so nothing has to be ordered.
//
// A round is one passage of a chunk with active tokens. It has a number, which
// is part of every flag, so no flag is ever reset. A region needs no second
// copy: a rank sends lists again only after it has got all columns of the round
// before, which its peers send after they have read the lists; and it sends
// columns only after it has got the lists of the same round, which its peers
// send after they have written the tokens of the round before.
//
// How many tokens take part is decided by integers that all ranks share. A
// token past the norm limit takes part too, with an empty list, so ranks can
// never wait for data that another does not send.
#pragma once

#include "bundles.cuh"
#include "ptx/system.cuh"

namespace vllm_steering {

constexpr int kMaxRanks = 8;
constexpr int kExchangeThreads = 256;  // of a block that sends or waits

enum HeaderField {
  kRound = 0,   // rounds that have ended
  kPull = 1,    // pulls that have ended
  kLeft = 2,    // blocks that have left a launch
  kReady = 16,  // [rank]: the pull for which its staging is filled
  kDone = 32,   // [rank]: the pull that it has ended
};

static_assert(kReady + kMaxRanks <= kDone, "flags of pulls overlap");

struct Exchange {
  char* at[kMaxRanks];  // arenas
  int rank, size;       // size 1: nothing is shared
  int rows, slices;     // the regions' room
  int width;            // bytes of a token's columns, of all ranks
  int64_t lists, flags, columns, staging;  // offsets in an arena
  int packet_rows;
  int64_t packets, column_packets;

  __device__ __forceinline__ unsigned* header(int of) const {
    return reinterpret_cast<unsigned*>(at[of]);
  }
  __device__ __forceinline__ unsigned round() const {
    return *static_cast<volatile unsigned*>(header(rank) + kRound) + 1;
  }
  // The list of token i that rank `from` sends to rank `to`.
  __device__ __forceinline__ int64_t* list(int to, int from, int64_t i) const {
    return reinterpret_cast<int64_t*>(at[to] + lists) +
           (static_cast<int64_t>(from) * rows + i) * (1 + kListMax);
  }
  __device__ __forceinline__ unsigned* flag(int to, int from, int64_t i) const {
    return reinterpret_cast<unsigned*>(at[to] + flags) +
           (i * size + from) * slices;
  }
  template <typename T>
  __device__ __forceinline__ T* row(int to, int64_t i) const {
    return reinterpret_cast<T*>(at[to] + columns + i * width);
  }
};

// What a launch of a shared SAE's decoder does. With few tokens one launch does
// all three, else kPushes and kWrites are launches of their own. kPackets: by
// packets, and all of it.
enum SharedPart { kPushes = 1, kDecodes = 2, kWrites = 4, kPackets = 8 };

// A thread's entries of a token's own list, requested before their number is
// known, and how many of the list are sent: none if it is too long.
struct OwnList {
  static constexpr int kEach = kListMax / kExchangeThreads;
  int64_t entry[kEach];
  int listed, sent;

  template <typename T>
  __device__ __forceinline__ OwnList(const Workspace<T>& ws, int64_t i) {
    const int64_t* own = ws.entries + i * ws.capacity;
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      const int e = threadIdx.x + u * kExchangeThreads;
      entry[u] = e < ws.capacity ? own[e] : 0;
    }
    const TokenRecord& record = ws.records[i];
    listed = record.token < 0 ? 0 : record.listed;
    sent = listed <= kListMax ? listed : 0;
  }
};
static_assert(kListMax % kExchangeThreads == 0, "threads take equal parts");

// kExchangeThreads threads a block: sends each active token's list to all
// ranks, its head last. A list that is too long is not sent, only its length:
// the token is dense on every rank.
template <typename T>
__device__ __forceinline__ void push_lists(const Workspace<T>& ws,
                                           const Exchange& x, int n,
                                           unsigned round) {
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const OwnList own(ws, i);
#pragma unroll
    for (int u = 0; u < OwnList::kEach; ++u) {
      const int e = threadIdx.x + u * kExchangeThreads;
      if (e >= own.sent) continue;
      for (int to = 0; to < x.size; ++to)
        x.list(to, x.rank, i)[1 + e] = own.entry[u];
    }
    __syncthreads();
    if (threadIdx.x < x.size)
      store_release(reinterpret_cast<uint64_t*>(x.list(threadIdx.x, x.rank, i)),
                    static_cast<uint64_t>(round) << 32 |
                        static_cast<unsigned>(own.listed));
  }
}

// The flag of a slice: the round, and whether a component was limited.
__device__ __forceinline__ unsigned slice_flag(unsigned round, bool over) {
  return round << 1 | (over ? 1u : 0u);
}

// The first `size` threads tell all ranks that there is nothing more to come of
// slice `slice` of token i.
__device__ __forceinline__ void release_slice(const Exchange& x, int64_t i,
                                              int slice, unsigned flag) {
  if (threadIdx.x < x.size)
    store_release(x.flag(threadIdx.x, x.rank, i) + slice, flag);
}

// Waits for a token's lists of all ranks; `counts` [kMaxRanks] is shared.
// Returns how many features fire on all of them.
__device__ __forceinline__ int wait_lists(const Exchange& x, int64_t i,
                                          unsigned round, int* counts) {
  if (threadIdx.x < x.size) {
    const int64_t* head = x.list(x.rank, threadIdx.x, i);
    uint64_t seen;
    do {
      seen = load_acquire(reinterpret_cast<const uint64_t*>(head));
    } while (static_cast<unsigned>(seen >> 32) != round);
    counts[threadIdx.x] = static_cast<int>(seen);
  }
  __syncthreads();
  int total = 0;
  for (int r = 0; r < x.size; ++r) total += counts[r];
  return total;
}

// Entry e of a token's list of all ranks, in rank order.
__device__ __forceinline__ int64_t joined_entry(const Exchange& x, int64_t i,
                                                const int* counts, int e) {
  int r = 0;
  while (r + 1 < x.size && e >= counts[r]) e -= counts[r++];
  return x.list(x.rank, r, i)[1 + e];
}

// Waits for `slices` slices of a token, from the first on, from all ranks, a
// thread each; true where this thread saw that a component was limited.
__device__ __forceinline__ bool wait_slices(const Exchange& x, int64_t i,
                                            unsigned round, int first,
                                            int slices) {
  bool over = false;
  for (int k = threadIdx.x; k < x.size * slices; k += blockDim.x) {
    const unsigned* from = x.flag(x.rank, k / slices, i) + first + k % slices;
    unsigned seen;
    do {
      seen = load_acquire(from);
    } while (seen >> 1 != (round & 0x7FFFFFFF));
    over |= (seen & 1) != 0;
  }
  return over;
}

// One warp a rank: the block's slice, `n` numbers from column `first` of this
// rank's `d_out`, goes to every rank, then its flag.
template <typename T>
__device__ __forceinline__ void push_slice(const Exchange& x, const T* slice,
                                           int64_t i, int d_out, int first,
                                           int n, int which, unsigned flag) {
  const int lane = threadIdx.x & 31;
  for (int to = threadIdx.x / 32; to < x.size; to += blockDim.x / 32) {
    if (lane * 8 < n)
      store8(x.template row<T>(to, i) + x.rank * d_out + first + lane * 8,
             load8(slice + lane * 8));
    __syncwarp();
    if (lane == 0) store_release(x.flag(to, x.rank, i) + which, flag);
  }
}

}  // namespace vllm_steering
