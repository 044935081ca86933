// SPDX-License-Identifier: Apache-2.0
// The k-th largest of many keys by histograms of eleven of their bits, a team
// of a block's threads together. The selection has a search_kth of its own,
// which is not inlined: its usual path has few candidates, and is 3 us faster
// with less code.
#pragma once

#include "keys.cuh"
#include "ptx/mbarrier.cuh"

namespace vllm_steering {

constexpr int kHistogramBins = 2048;

// What the search keeps in shared memory. Kernels may have a struct of their
// own with these members.
template <int kThreads>
struct Histogram {
  int bins[kHistogramBins];
  int warp_sums[kThreads / 32];
  int bound, above;
};

// Finds the bin that holds the k-th from the top: h.bound is the bin, h.above
// what the bins over it hold. Without so many in all, both stay as they are.
template <int kThreads, typename Memory>
__device__ void find_bin(Memory& h, int k) {
  // Thread i owns the i-th highest few bins; a scan finds whose hold the k-th.
  constexpr int kOwn = kHistogramBins / kThreads;
  static_assert(kHistogramBins % kThreads == 0, "threads own equal parts");
  const int thread = threadIdx.x % kThreads, lane = thread % 32;
  const int highest = kHistogramBins - 1 - thread * kOwn;
  int own = 0;
  for (int b = 0; b < kOwn; ++b) own += h.bins[highest - b];
  int upto = own;
  for (int d = 1; d < 32; d <<= 1) {
    const int other = __shfl_up_sync(~0u, upto, d);
    if (lane >= d) upto += other;
  }
  if (lane == 31) h.warp_sums[thread / 32] = upto;
  sync_team<kThreads>();
  for (int w = 0; w < thread / 32; ++w) upto += h.warp_sums[w];
  int before = upto - own;
  if (before < k && upto >= k) {
    for (int b = 0; b < kOwn; ++b) {
      const int here = h.bins[highest - b];
      if (before + here >= k) {
        h.bound = highest - b;
        h.above = before;
        break;
      }
      before += here;
    }
  }
  sync_team<kThreads>();
}

// Adds one to a thread's bin, if it has one. Where a warp's bins are the same,
// as when scores tie, one thread adds for all.
__device__ __forceinline__ void count_in_bin(int* bins, int bin) {
  const unsigned mask = __activemask();
  int same;
  __match_all_sync(mask, bin, &same);
  if (bin < 0) return;
  if (!same)
    atomicAdd(&bins[bin], 1);
  else if (threadIdx.x % 32 == __ffs(mask) - 1)
    atomicAdd(&bins[bin], __popc(mask));
}

// The k-th largest of n keys, of which there are at least k: eleven of its bits
// at a time, by a histogram of the keys that agree with it so far.
template <int kThreads, typename KeyAt>
__device__ __forceinline__ unsigned long long search_kth(Histogram<kThreads>& h,
                                                         int n, int k,
                                                         const KeyAt& key_at) {
  constexpr int kKeyBits = 63, kDigit = 11;
  static_assert(1 << kDigit == kHistogramBins);
  const int thread = threadIdx.x % kThreads;
  unsigned long long found = 0;
#pragma unroll 1
  for (int top = kKeyBits; top > 0; top -= kDigit) {
    const int shift = max(top - kDigit, 0);
    sync_team<kThreads>();
    for (int b = thread; b < kHistogramBins; b += kThreads) h.bins[b] = 0;
    sync_team<kThreads>();
    for (int f = thread; f < n; f += kThreads) {
      const unsigned long long key = key_at(f);
      const bool agrees = key >> top == found >> top;
      const int digit =
          static_cast<int>(key >> shift) & ((1 << (top - shift)) - 1);
      count_in_bin(h.bins, agrees ? digit : -1);
    }
    sync_team<kThreads>();
    find_bin<kThreads>(h, k);
    found |= static_cast<unsigned long long>(h.bound) << shift;
    k -= h.above;
  }
  return found;
}

}  // namespace vllm_steering
