// SPDX-License-Identifier: Apache-2.0
// What the decoder's kernels share: a token's list, sorted, with the
// corrections of its clamps behind the entries.
#pragma once

#include "dense.cuh"
#include "packets.cuh"
#include "ptx/launch_control.cuh"
#include "ptx/mbarrier.cuh"

namespace vllm_steering {

constexpr int kDecodeWarps = 8;
constexpr int kDecodeThreads = kDecodeWarps * 32;
constexpr int kColumns = kColumnsOfSlice;
static_assert(kColumns == kDecodeThreads, "a thread finishes a column");
static_assert(kListMax % kDecodeThreads == 0, "threads take equal parts");
constexpr int kFewTokens = 8;  // up to here a token's latency counts

// A token's list is the work of a team of threads; a block has one or more.
__device__ __forceinline__ int team_thread() {
  return threadIdx.x % kDecodeThreads;
}
__device__ __forceinline__ void sync_decoders() { sync_team<kDecodeThreads>(); }

template <typename T>
struct DecodeArgs {
  Weights<T> weights;
  Stream<T> stream;
  Workspace<T> ws;
  ClampTable table;
  unsigned long long* saturated;
  bool resolved;  // ws.coef holds g - f of the clamps already
  bool delta;     // add to the stream: no entries, no b_dec
  Reads reads;
  // Of an SAE that ranks share: lists come from all ranks (`joined`; TopK has
  // selected among all scores), columns go to all of them.
  Exchange exchange;
  bool joined;
  int parts;                // SharedPart
  bool notes_dense = true;  // for a launch that follows
};

__host__ __device__ inline int decode_slices(int d_out) {
  return (d_out + kColumns - 1) / kColumns;
}

// A warp's sum of its entries, this lane's columns.
struct Partial {
  float at[8];
};

// acc += weight * W_dec[feature, columns of this lane].
template <typename T>
__device__ __forceinline__ void add_row(float (&acc)[8], const Pack8<T>& w,
                                        float weight) {
#pragma unroll
  for (int j = 0; j < 8; ++j) acc[j] += weight * to_float(w.at[j]);
}

// A thread's entries of a token's list, requested before their number is known:
// that saves one of the dependent loads. Places past `room` are not read.
struct EntryLoads {
  int64_t at[kListMax / kDecodeThreads];
};

__device__ __forceinline__ EntryLoads load_entries(const int64_t* own,
                                                   int room) {
  EntryLoads l;
#pragma unroll
  for (int u = 0; u < kListMax / kDecodeThreads; ++u) {
    const int e = team_thread() + u * kDecodeThreads;
    l.at[u] = e < room ? own[e] : 0;
  }
  return l;
}

// As load_entries, of a token's lists of all ranks, which have come.
__device__ __forceinline__ EntryLoads load_joined(const Exchange& x, int64_t i,
                                                  const int* counts, int n) {
  EntryLoads l;
#pragma unroll
  for (int u = 0; u < kListMax / kDecodeThreads; ++u) {
    const int e = team_thread() + u * kDecodeThreads;
    l.at[u] = e < n ? joined_entry(x, i, counts, e) : 0;
  }
  return l;
}

// The same from packets, which may be on their way.
__device__ __forceinline__ EntryLoads wait_joined(const Exchange& x, int64_t i,
                                                  unsigned round,
                                                  const int* counts, int n) {
  EntryLoads l;
#pragma unroll
  for (int u = 0; u < kListMax / kDecodeThreads; ++u) {
    const int e = threadIdx.x + u * kDecodeThreads;
    l.at[u] = e < n ? wait_entry(x, i, round, counts, e) : 0;
  }
  return l;
}

// Sorted (feature, weight) of the token in `list`. An entry's place is the
// number of features below its own.
inline __device__ void sort_entries(const EntryLoads& l, int n, int2* list,
                                    int* features) {
  int2 mine[kListMax / kDecodeThreads];
#pragma unroll
  for (int u = 0; u < kListMax / kDecodeThreads; ++u) {
    const int e = team_thread() + u * kDecodeThreads;
    mine[u] = make_int2(entry_feature(l.at[u]), static_cast<int>(l.at[u]));
    // Sorts last; rounds n up to a multiple of 4.
    if (e >= n) mine[u] = make_int2(0x7FFFFFFF, 0);
    features[e] = mine[u].x;
  }
  sync_decoders();
#pragma unroll
  for (int u = 0; u < kListMax / kDecodeThreads; ++u) {
    if (team_thread() + u * kDecodeThreads >= n) continue;
    int rank = 0;
#pragma unroll 4
    for (int o = 0; o < n; o += 4) {
      const int4 other = *reinterpret_cast<const int4*>(features + o);
      rank += (other.x < mine[u].x) + (other.y < mine[u].x) +
              (other.z < mine[u].x) + (other.w < mine[u].x);
    }
    list[rank] = mine[u];
  }
  sync_decoders();
}

// The activation of `feature` in the sorted list, 0 when absent.
inline __device__ float find_feature(const int2* list, int n, int feature) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list[middle].x < feature)
      low = middle + 1;
    else
      high = middle;
  }
  return low < n && list[low].x == feature ? __int_as_float(list[low].y) : 0.f;
}

}  // namespace vllm_steering
