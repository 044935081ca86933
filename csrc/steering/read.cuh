// SPDX-License-Identifier: Apache-2.0
// Reading features: what a token's row asks of its list of non-zeros.
//
//   out[t] = [active, listed, values of the given features, top-k features,
//             top-k values]
//
// A block reads a token where the decoder has its list. An activation and its
// feature make one key, larger for a larger value and, at equal values, for a
// lower feature.
#pragma once

#include "decode.cuh"
#include "histogram.cuh"

namespace vllm_steering {

// A row of the reading table, and where its answer goes.
struct ReadRow {
  const int* row;
  const float* scale;
  int* out;

  __device__ __forceinline__ int top_k() const { return row[kReadTopK]; }
  __device__ __forceinline__ int given() const { return row[kReadCount]; }
  __device__ __forceinline__ int feature(int g) const {
    return row[kTableHead + g];
  }
  __device__ __forceinline__ float value(int f, float act) const {
    return act * scale[f];
  }
  __device__ __forceinline__ void put_counts(int active) const {
    out[0] = active;
    out[1] = min(active, top_k());
  }
  __device__ __forceinline__ void put_given(int g, float value) const {
    out[2 + g] = __float_as_int(value);
  }
  // The largest but `rank`.
  __device__ __forceinline__ void put_listed(int rank,
                                             unsigned long long key) const {
    int* to = out + 2 + given() + rank;
    to[0] = key_feature(key);
    to[top_k()] = __float_as_int(key_score(key));
  }
};

__device__ __forceinline__ ReadRow read_row(const Reads& r, int row,
                                            int token) {
  return {r.table + row * r.table_stride, r.scale,
          r.out + token * r.out_stride};
}

// Ranks n keys in shared memory and writes the top_k.
__device__ __forceinline__ void put_largest(const ReadRow& r,
                                            const unsigned long long* keys,
                                            int n) {
  const int top_k = r.top_k();
  for (int e = team_thread(); e < n; e += kDecodeThreads) {
    const unsigned long long key = keys[e];
    int above = 0;
#pragma unroll 4
    for (int o = 0; o < n; ++o) above += keys[o] > key;
    if (above < top_k) r.put_listed(above, key);
  }
}

// A sorted list in shared memory. `keys` has room for n of them.
__device__ __forceinline__ void read_list(const ReadRow& r, const int2* list,
                                          int n, unsigned long long* keys) {
  for (int e = team_thread(); e < n; e += kDecodeThreads)
    keys[e] =
        sort_key(r.value(list[e].x, __int_as_float(list[e].y)), list[e].x);
  for (int g = team_thread(); g < r.given(); g += kDecodeThreads) {
    const int f = r.feature(g);
    r.put_given(g, r.value(f, find_feature(list, n, f)));
  }
  if (team_thread() == 0) r.put_counts(n);
  sync_decoders();
  put_largest(r, keys, n);
  sync_decoders();
}

struct LongReadMemory {
  union {  // needed one after another
    Histogram<kDecodeThreads> histogram;
    unsigned long long keys[kMaxRead];
  };
  int kept;
};

// A list in global memory, of any order and more entries than a block sorts.
// Not inlined: rare, and its registers are not to be the decoder's.
static __device__ __noinline__ void read_long(ReadRow r, const int64_t* own,
                                              int n, LongReadMemory& m) {
  const int given = r.given(), top_k = r.top_k();
  const auto key_at = [&](int e) {
    const int f = entry_feature(own[e]);
    return sort_key(r.value(f, entry_value(own[e])), f);
  };
  for (int g = team_thread(); g < given; g += kDecodeThreads)
    r.put_given(g, 0.f);
  if (team_thread() == 0) {
    r.put_counts(n);
    m.kept = 0;
  }
  sync_decoders();
  for (int e = team_thread(); given > 0 && e < n; e += kDecodeThreads) {
    const int f = entry_feature(own[e]);
    int low = 0, high = given;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (r.feature(middle) < f)
        low = middle + 1;
      else
        high = middle;
    }
    if (low < given && r.feature(low) == f)
      r.put_given(low, r.value(f, entry_value(own[e])));
  }
  if (top_k == 0) return;
  const unsigned long long kth = search_kth(m.histogram, n, top_k, key_at);
  sync_decoders();  // the histogram has been read
  for (int e = team_thread(); e < n; e += kDecodeThreads) {
    const unsigned long long key = key_at(e);
    if (key < kth) continue;
    const int slot = atomicAdd(&m.kept, 1);
    if (slot < kMaxRead) m.keys[slot] = key;
  }
  sync_decoders();
  put_largest(r, m.keys, min(m.kept, kMaxRead));
  sync_decoders();
}

}  // namespace vllm_steering
