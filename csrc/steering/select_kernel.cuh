// SPDX-License-Identifier: Apache-2.0
// Stage 3 of TopK SAEs: the k largest scores of a token, ties to the lowest
// feature.
//
// A histogram of the maxima of many groups bounds the k-th largest from below;
// the few candidates above the bound are ranked exactly.
#pragma once

#include "bundles.cuh"
#include "histogram.cuh"
#include "ptx/launch_control.cuh"

namespace vllm_steering {

constexpr int kSelectThreads = 512;
constexpr int kGroupsPerThread = 4;
constexpr int kCandidates = 1024;

// The same for every element type of the model: x and the stream are not read.
struct SelectArgs {
  ClampTable table;
  const int* meta;
  Workspace<void> ws;
  int num_features;
};

struct SelectMemory {
  int bins[kHistogramBins];
  unsigned long long keys[kCandidates];
  int warp_sums[kSelectThreads / 32];
  int listed, candidates, bound, above;
  unsigned long long kth;
};

// The scores of one token.
struct Scores {
  const float* p;
  int d_sae;
};

// Order bits of the largest score of each of this thread's groups. Any
// assignment of scores to groups works.
__device__ __forceinline__ void group_maxima(unsigned (&top)[kGroupsPerThread],
                                             const Scores& s) {
  int done = 0;
  if (s.d_sae % 4 == 0 && (reinterpret_cast<uintptr_t>(s.p) & 15) == 0) {
    constexpr int kAhead = 8;
    const int quads = s.d_sae / 4;
    done = s.d_sae;
#pragma unroll 1
    for (int q = threadIdx.x; q < quads; q += kSelectThreads * kAhead) {
      float4 v[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
        v[u] = reinterpret_cast<const float4*>(
            s.p)[min(q + u * kSelectThreads, quads - 1)];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int at = q + u * kSelectThreads;
        if (at >= quads) continue;
        const float most[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          unsigned& own = top[(u * 4 + c) % kGroupsPerThread];
          own = max(own, order_bits(most[c]));
        }
      }
    }
  }
  for (int f = done + threadIdx.x; f < s.d_sae; f += kSelectThreads)
    top[0] = max(top[0], order_bits(s.p[f]));
}

// Leaves in m.bound a lower bound (order bits) of the k-th largest score, zero
// where there are fewer than k groups.
__device__ void bound_scores(SelectMemory& m, const Scores& s, int k) {
  unsigned top[kGroupsPerThread] = {};
  for (int b = threadIdx.x; b < kHistogramBins; b += kSelectThreads)
    m.bins[b] = 0;
  if (threadIdx.x == 0) m.bound = m.listed = m.candidates = 0, m.kth = 0;
  group_maxima(top, s);
  __syncthreads();
#pragma unroll
  for (int g = 0; g < kGroupsPerThread; ++g)
    if (top[g] != 0) atomicAdd(&m.bins[top[g] >> 21], 1);
  __syncthreads();
  find_bin<kSelectThreads>(m, k);
}

// The k-th largest key where there are very many candidates: eleven of its bits
// at a time, by a histogram of the keys that agree with it so far. Not inlined:
// the usual path's code is cold, and short.
__device__ __noinline__ unsigned long long search_kth(SelectMemory& m,
                                                      const Scores& s, int k) {
  constexpr int kKeyBits = 63, kDigit = 11;
  static_assert(1 << kDigit == kHistogramBins);
  unsigned long long found = 0;
#pragma unroll 1
  for (int top = kKeyBits; top > 0; top -= kDigit) {
    const int shift = max(top - kDigit, 0);
    __syncthreads();
    for (int b = threadIdx.x; b < kHistogramBins; b += kSelectThreads)
      m.bins[b] = 0;
    __syncthreads();
    for (int f = threadIdx.x; f < s.d_sae; f += kSelectThreads) {
      const unsigned long long key = sort_key(s.p[f], f);
      const bool agrees = key >> top == found >> top;
      const int digit =
          static_cast<int>(key >> shift) & ((1 << (top - shift)) - 1);
      count_in_bin(m.bins, agrees ? digit : -1);
    }
    __syncthreads();
    find_bin<kSelectThreads>(m, k);
    found |= static_cast<unsigned long long>(m.bound) << shift;
    k -= m.above;
  }
  return found;
}

__device__ void append_entry(SelectMemory& m, const SelectArgs& a, int64_t* own,
                             int f, float p) {
  const int slot = atomicAdd(&m.listed, 1);
  if (slot < a.ws.capacity) own[slot] = pack_entry(f, p);
}

// Ranks the candidates in shared memory; lists those among the k largest.
__device__ void rank_candidates(SelectMemory& m, const SelectArgs& a,
                                int64_t* own, int n, int k, bool relu) {
  for (int e = threadIdx.x; e < n; e += kSelectThreads) {
    const unsigned long long key = m.keys[e];
    int above = 0;
#pragma unroll 8
    for (int o = 0; o < n; ++o) above += m.keys[o] > key;
    if (above == k - 1) m.kth = key;
    const float p = key_score(key);
    if (above < k && survives(p, relu))
      append_entry(m, a, own, key_feature(key), p);
  }
}

// coef = g - f of the token's clamps.
__device__ void resolve_clamps(const SelectMemory& m, const SelectArgs& a,
                               const Scores& s, const ClampRow& row, int64_t i,
                               bool relu) {
  const auto activation = [&](int f) {
    const float score = s.p[f];
    const bool chosen = f < s.d_sae && sort_key(score, f) >= m.kth;
    return chosen && (score > 0.f || !relu) ? score : 0.f;
  };
  for (int c = threadIdx.x; c < row.count(); c += kSelectThreads)
    a.ws.coef[i * row.max_clamps + c] = clamp_delta(row, c, activation);
}

__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(const __grid_constant__ SelectArgs a) {
  __shared__ SelectMemory m;
  launch_dependents();
  wait_for_previous();
  const int n = a.ws.tokens();
  const int d_sae = a.meta[kDSae], k = min(a.meta[kK], d_sae);
  const bool relu = a.meta[kTopkRelu] != 0;
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    TokenRecord* record = a.ws.records + i;
    if (record->token < 0 || k <= 0) continue;
    const Scores s = {a.ws.scores + i * a.num_features, d_sae};
    int64_t* own = a.ws.entries + i * a.ws.capacity;
    __syncthreads();
    bound_scores(m, s, k);
    const unsigned bound = static_cast<unsigned>(m.bound) << 21;
#pragma unroll 8
    for (int f = threadIdx.x; f < d_sae; f += kSelectThreads) {
      const float score = s.p[f];
      if (order_bits(score) >= bound) {
        const int slot = atomicAdd(&m.candidates, 1);
        if (slot < kCandidates) m.keys[slot] = sort_key(score, f);
      }
    }
    __syncthreads();
    if (m.candidates <= kCandidates) {
      rank_candidates(m, a, own, m.candidates, k, relu);
    } else {
      const unsigned long long kth = search_kth(m, s, k);
      for (int f = threadIdx.x; f < d_sae; f += kSelectThreads)
        if (sort_key(s.p[f], f) >= kth && survives(s.p[f], relu))
          append_entry(m, a, own, f, s.p[f]);
      if (threadIdx.x == 0) m.kth = kth;
    }
    __syncthreads();
    resolve_clamps(m, a, s, a.table.row(record->row), i, relu);
    if (threadIdx.x == 0) {
      record->listed = m.listed;
      a.ws.kth[i] = static_cast<int64_t>(m.kth);
    }
  }
}

}  // namespace vllm_steering
