// SPDX-License-Identifier: Apache-2.0
// TopK of many tokens without all scores in memory: guess a bar, verify it.
//
// The scores of kGuessSample features, tiles at equal distances, are stored
// coarsely. A token's bar is the r-th largest of them, r so that about
// r d_sae / kGuessSample scores reach it, several times k. The encoder then
// lists every score that is not below the bar. If it lists at least k, the k
// largest of the list are the k largest of all, ties included. Otherwise, or if
// the list has no room, the token is left to the path that stores all scores:
// its row is noted in `failed`, which is the index of that path's step.
#pragma once

#include "encode_kernel.cuh"
#include "keys.cuh"

namespace vllm_steering {

constexpr int kGuessThreads = 256;
static_assert(kGuessSample % (2 * kTileF) == 0, "whole pairs of tiles");
static_assert(kGuessSample % (8 * kGuessThreads) == 0, "16 bytes a thread");

template <typename T>
struct GuessArgs {
  EncodeArgs<T> encode;
  ClampTable table;
  float* bars;  // [whole_tiles(rows)]
  int* failed;  // [tokens of the step]
};

// Which of a token's sampled scores is its bar; 0: there is no guess. With
// m = k kGuessSample / d_sae, about m sampled scores are among the k largest;
// that more than the rank are happens less than once in 10^5 tokens. A list has
// no room about as rarely for k = 64, and once in 2000 tokens for the largest
// k.
__device__ __forceinline__ int guess_rank(const int* meta) {
  const int d_sae = meta[kDSae], k = meta[kK];
  if (d_sae < 4 * kGuessSample || k <= 0 || k > kListMax) return 0;
  const float each = static_cast<float>(d_sae) / kGuessSample, mean = k / each;
  const float rank = ceilf(mean + 4.2f * sqrtf(mean) + 3.f);
  const float most = rank * each * (1.f + 4.f / sqrtf(rank));
  return most <= kGuessCapacity ? static_cast<int>(rank) : 0;
}

template <typename T>
__global__ void __launch_bounds__(kEncodeThreads, 1)
    sample_kernel(const __grid_constant__ EncodeArgs<T> a,
                  const __grid_constant__ EncodeMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const auto [m, rank, n] = begin_encode(a, maps);
  if (n <= 0 || guess_rank(a.weights.meta) == 0) return;
  SampleWalk walk;
  static_cast<TileWalk&>(walk) = tile_walk(kGuessSample, n, kEncodePeers, rank);
  walk.pairs = kGuessSample / (2 * kTileF);
  walk.of = a.weights.meta[kDSae] / (2 * kTileF);
  encode_tiles<Leaves::kSample, false>(a, m, maps, n, walk);
#else
  __trap();
#endif
}

template <typename T, bool kEven>
__global__ void __launch_bounds__(kEncodeThreads, 1)
    candidates_kernel(const __grid_constant__ EncodeArgs<T> a,
                      const __grid_constant__ EncodeMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const auto [m, rank, n] = begin_encode(a, maps);
  if (n <= 0 || guess_rank(a.weights.meta) == 0) return;
  encode_tiles<Leaves::kCandidates, kEven>(
      a, m, maps, n,
      tile_walk<kEven>(a.weights.num_features, n, kEncodePeers, rank));
#else
  __trap();
#endif
}

// The sum over a block of one number a thread.
__device__ __forceinline__ int block_sum(int own, int* sums) {
  own = __reduce_add_sync(~0u, own);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = own;
  __syncthreads();
  int all = 0;
#pragma unroll
  for (int w = 0; w < kGuessThreads / 32; ++w) all += sums[w];
  return all;
}

// The rank-th largest of a token's sample, bit by bit from the top.
__device__ __forceinline__ unsigned nth_of_sample(const uint16_t* sample,
                                                  int rank, int* sums) {
  constexpr int kOwn = kGuessSample / kGuessThreads / 2;
  uint32_t own[kOwn];  // two of them in each
  const uint4* from = reinterpret_cast<const uint4*>(sample);
#pragma unroll
  for (int u = 0; u < kOwn / 4; ++u) {
    const uint4 v = from[threadIdx.x + u * kGuessThreads];
    own[4 * u] = v.x, own[4 * u + 1] = v.y, own[4 * u + 2] = v.z,
            own[4 * u + 3] = v.w;
  }
  unsigned found = 0;
#pragma unroll 1
  for (int bit = 15; bit >= 0; --bit) {
    const unsigned least = found | 1u << bit;
    int reach = 0;
#pragma unroll
    for (int u = 0; u < kOwn; ++u)
      reach += ((own[u] & 0xFFFF) >= least) + (own[u] >> 16 >= least);
    if (block_sum(reach, sums) >= rank) found = least;
  }
  return found;
}

// Bars of all tokens; infinite for places of a tile that have no token.
template <typename T>
__global__ void __launch_bounds__(kGuessThreads)
    bars_kernel(const __grid_constant__ GuessArgs<T> a) {
  __shared__ int sums[kGuessThreads / 32];
  launch_dependents();
  wait_for_previous();
  const Workspace<T>& ws = a.encode.ws;
  const int n = ws.tokens(), rank = guess_rank(a.encode.weights.meta);
  if (rank == 0) return;
  for (int64_t i = blockIdx.x; i < whole_tiles(n); i += gridDim.x) {
    float bar = infinity();
    if (i < n && ws.records[i].token >= 0)
      bar = score_of(
          nth_of_sample(a.encode.samples + i * kGuessSample, rank, sums) << 16);
    if (threadIdx.x == 0) a.bars[i] = bar;
  }
}

struct ChooseMemory {
  unsigned long long keys[kGuessCapacity];
  unsigned long long kth;
  int sums[kGuessThreads / 32];
  int listed;
};

// Keys of a token's candidates in shared memory, 0 for features past the end;
// returns how many there are.
__device__ __forceinline__ int load_keys(ChooseMemory& m, const int64_t* own,
                                         int listed, int d_sae) {
  int valid = 0;
  for (int e = threadIdx.x; e < listed; e += kGuessThreads) {
    const int f = entry_feature(own[e]);
    m.keys[e] = f < d_sae ? sort_key(entry_value(own[e]), f) : 0;
    valid += f < d_sae;
  }
  return block_sum(valid, m.sums);
}

// Lists the k largest of the candidates, those that survive.
__device__ __forceinline__ void choose_largest(ChooseMemory& m, int64_t* own,
                                               int listed, int k, bool relu) {
  for (int e = threadIdx.x; e < listed; e += kGuessThreads) {
    const unsigned long long key = m.keys[e];
    int above = 0;
#pragma unroll 8
    for (int o = 0; o < listed; ++o) above += m.keys[o] > key;
    if (above == k - 1) m.kth = key;
    const float p = key_score(key);
    if (above < k && survives(p, relu))
      own[atomicAdd(&m.listed, 1)] = pack_entry(key_feature(key), p);
  }
}

// Chooses among the candidates of every token; leaves tokens whose guess failed
// to the other path.
template <typename T>
__global__ void __launch_bounds__(kGuessThreads)
    choose_kernel(const __grid_constant__ GuessArgs<T> a) {
  __shared__ ChooseMemory m;
  launch_dependents();
  wait_for_previous();
  const Workspace<T>& ws = a.encode.ws;
  const int* meta = a.encode.weights.meta;
  const int n = ws.tokens(), d_sae = meta[kDSae], k = meta[kK];
  const bool guessed = guess_rank(meta) != 0, relu = meta[kTopkRelu] != 0;
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    TokenRecord* record = ws.records + i;
    const int token = record->token, listed = record->listed;
    if (token < 0) continue;
    int64_t* own = ws.entries + i * ws.capacity;
    const ClampRow row = a.table.row(record->row);
    __syncthreads();
    if (threadIdx.x == 0) m.listed = 0;
    const bool fits = guessed && listed >= k && listed <= ws.capacity;
    if (!fits || load_keys(m, own, listed, d_sae) < k) {
      __syncthreads();
      if (threadIdx.x == 0) {
        a.failed[token] = record->row;
        record->token = -1;
      }
      continue;
    }
    choose_largest(m, own, listed, k, relu);
    __syncthreads();
    const auto activation = [&](int f) {
      for (int e = 0; e < listed; ++e) {
        const unsigned long long key = m.keys[e];
        const float p = key_score(key);
        if (key != 0 && key_feature(key) == f)
          return key >= m.kth && (p > 0.f || !relu) ? p : 0.f;
      }
      return 0.f;
    };
    for (int c = threadIdx.x; c < row.count(); c += kGuessThreads)
      ws.coef[i * row.max_clamps + c] = clamp_delta(row, c, activation);
    if (threadIdx.x == 0) record->listed = m.listed;
  }
}

}  // namespace vllm_steering
