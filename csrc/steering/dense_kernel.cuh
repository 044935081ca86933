// SPDX-License-Identifier: Apache-2.0
// Full reconstruction of the tokens that have more non-zeros than a list holds
// (dense.cuh), in one launch, whatever their number.
//
// Blocks take items by ticket, in order, and an item waits for the phase before
// its own. An item only waits for items that have started, so the grid does not
// have to be resident as a whole. A chunk of tokens passes through four phases:
// their stream side by side, activations as limbs (for TopK out of the scores,
// in the first phase), products with W_dec, the sum and the write-back.
#pragma once

#include "dense_exchange.cuh"
#include "dense_pipeline.cuh"

namespace vllm_steering {

// Phase 1: row d of x; for TopK the limbs of the selected features, instead.
template <typename T>
__device__ void gather_dense(const DenseArgs<T>& a, int d, int64_t i) {
  if (!a.topk) {
    const T* from = a.ws.x + i * a.weights.d_in;
    T* to = a.scratch.x + static_cast<int64_t>(d) * a.weights.d_in;
    for (int k = threadIdx.x * 8; k < a.weights.d_in; k += kEncodeThreads * 8)
      store8(to + k, load8(from + k));
    return;
  }
  const float* p = a.ws.scores + i * a.weights.all_features;
  const auto kth = static_cast<unsigned long long>(a.ws.kth[i]);
  const bool relu = a.weights.meta[kTopkRelu] != 0;
  const int d_sae = a.weights.meta[kDSae];
  uint32_t* high = reinterpret_cast<uint32_t*>(
      a.scratch.limbs + static_cast<int64_t>(d) * a.scratch.padded);
  uint32_t* low =
      high + static_cast<int64_t>(a.scratch.rows) * a.scratch.padded / 2;
  for (int f = threadIdx.x * 2; f < a.scratch.padded; f += kEncodeThreads * 2) {
    float act[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const float score = f + u < d_sae ? p[f + u] : 0.f;
      const bool chosen = f + u < d_sae && sort_key(score, f + u) >= kth;
      act[u] = chosen && survives(score, relu) ? score : 0.f;
    }
    const uint2 limbs = Limbs<T>::split(act[0], act[1]);
    high[f / 2] = limbs.x;
    low[f / 2] = limbs.y;
  }
}

// Phase 2's end: activations leave as limbs. Lanes that hold features f and
// f + 1 of two tokens swap, so that each stores two features of one token.
template <typename T, int N>
__device__ __forceinline__ void store_limbs(const DenseScratch<T>& to,
                                            const float (&acc)[N / 2],
                                            const LaneFeatures& l, int f,
                                            int t0, int tokens) {
  const int lane = threadIdx.x & 31, odd = lane >> 2 & 1;
  const int64_t low = static_cast<int64_t>(to.rows) * to.padded;
#pragma unroll
  for (int i = 0; i < N / 2; i += 2) {
    const float cut = i & 2 ? l.cut.y : l.cut.x;
    const float bias = i & 2 ? l.bias.y : l.bias.x;
    const float first = acc[i] > cut ? acc[i] + bias : 0.f;
    const float second = acc[i + 1] > cut ? acc[i + 1] + bias : 0.f;
    const float got = __shfl_xor_sync(~0u, odd ? first : second, 4);
    const uint2 limbs = Limbs<T>::split(odd ? got : first, odd ? second : got);
    const int t = t0 + i / 4 * 8 + (lane & 3) * 2 + odd;
    const int feature = f - odd + (i & 2 ? 8 : 0);
    if (t >= tokens || feature >= to.padded) continue;
    T* at = to.limbs + static_cast<int64_t>(t) * to.padded + feature;
    *reinterpret_cast<uint32_t*>(at) = limbs.x;
    *reinterpret_cast<uint32_t*>(at + low) = limbs.y;
  }
}

// Phase 3's end: the sums of one split.
template <typename T, int N>
__device__ __forceinline__ void store_partial(const DenseArgs<T>& a,
                                              const float (&acc)[N / 2],
                                              int split, int column, int t0,
                                              int tokens) {
  const int lane = threadIdx.x & 31, d_out = a.weights.d_out;
  float* to =
      a.scratch.partial + static_cast<int64_t>(split) * a.scratch.rows * d_out;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int t = t0 + i / 4 * 8 + (lane & 3) * 2 + (i & 1);
    const int c = column + (i & 2 ? 8 : 0);
    if (t < tokens && c < d_out)
      to[static_cast<int64_t>(t) * d_out + c] = acc[i] * Limbs<T>::kUnit;
  }
}

// The tile of an item of phase 2 or 3; the token tile is the fast index.
template <typename T, bool kDecodes>
__device__ __forceinline__ DenseTile dense_tile(const DenseArgs<T>& a,
                                                const DenseItem& item,
                                                int width, int& split) {
  const int t = item.index % item.token_tiles;
  const int rest = item.index / item.token_tiles;
  split = 0;
  if constexpr (kDecodes) {
    const int n_d = (a.weights.d_out + kTileF - 1) / kTileF;
    const int k_tiles = a.scratch.padded / kTileK;
    const int each = (k_tiles + kDenseSplits - 1) / kDenseSplits;
    split = rest / n_d;
    const int k0 = min(split * each, k_tiles);
    return {rest % n_d * kTileF, t * width, k0, k_tiles,
            min(each, k_tiles - k0)};
  } else {
    const int k_tiles = (a.weights.d_in + kTileK - 1) / kTileK;
    const int f_tile = a.weights.first_feature / kTileF + rest;
    return {rest * kTileF, t * width, first_k(f_tile, k_tiles), k_tiles,
            k_tiles};
  }
}

// Phases 2 and 3 for one tile. One thread requests, two warpgroups multiply.
// Returns the block's count of stages.
template <typename T, int N, int kWidest, bool kDecodes>
__device__ __forceinline__ int run_dense_tile(const DenseArgs<T>& a,
                                              DenseMemory<kWidest>& m,
                                              const DenseMaps& maps,
                                              const DenseItem& item, int it) {
  int split;
  const DenseTile tile = dense_tile<T, kDecodes>(a, item, N, split);
  if (threadIdx.x == kWeightsThread) {
    fence_async();  // what was stored before is read by copies now
    request_dense<N, kWidest, kDecodes>(
        m, maps, a.scratch.rows, tile,
        dense_rows_of_tile<N, kWidest>(item.tokens, tile.t0), it);
  } else if (threadIdx.x < kConsumers) {
    const int row = tile.row + threadIdx.x / 32 * 16 + (threadIdx.x & 31) / 4;
    float acc[N / 2];
    if constexpr (kDecodes) {
      multiply_dense<T, N, kWidest, true>(acc, m, tile.steps, it);
      store_partial<T, N>(a, acc, split, row, tile.t0, item.tokens);
    } else {
      const LaneFeatures l = load_features(a.weights, row);
      multiply_dense<T, N, kWidest, false>(acc, m, tile.steps, it);
      store_limbs<T, N>(a.shared() ? a.staged(a.exchange.rank) : a.scratch, acc,
                        l, row, tile.t0, item.tokens);
    }
  }
  return it + tile.steps;
}

template <typename T, int kWidest, bool kDecodes>
__device__ __forceinline__ int run_dense_tile(const DenseArgs<T>& a,
                                              DenseMemory<kWidest>& m,
                                              const DenseMaps& maps,
                                              const DenseItem& item, int it) {
#define STEERING_DENSE(N) \
  return run_dense_tile<T, N, kWidest, kDecodes>(a, m, maps, item, it)
  STEERING_DENSE_WIDTHS(item.tokens, STEERING_DENSE)
#undef STEERING_DENSE
}

// Phase 4: adds the splits and the clamps in order, rounds once, writes back.
template <typename T>
__device__ void finish_dense(const DenseArgs<T>& a, float* deltas, int d,
                             int64_t i) {
  TokenRecord* record = a.ws.records + i;
  const int token = record->token, d_out = a.weights.d_out;
  if (token < 0) {  // its peers wait for its columns all the same
    if (a.shared()) release_dense(a.exchange, i, d_out, false);
    return;
  }
  const float* base = base_of(a.weights, a.ws, i);
  const ClampRow row = a.table.row(record->row);
  const int clamps = row.count();
  for (int c = threadIdx.x; c < clamps; c += kEncodeThreads)
    deltas[c] = a.topk ? a.ws.coef[i * row.max_clamps + c]
                       : clamp_delta(row, c, [&](int f) {
                           return limb_value(a.scratch, d, f);
                         });
  __syncthreads();
  bool over = false;
  for (int c = threadIdx.x * 8; c < d_out; c += kEncodeThreads * 8) {
    float total[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) total[j] = base[c + j];
#pragma unroll
    for (int s = 0; s < kDenseSplits; ++s) {
      const auto* part = reinterpret_cast<const float4*>(
          a.scratch.partial +
          (static_cast<int64_t>(s) * a.scratch.rows + d) * d_out + c);
      const float4 low = part[0], high = part[1];
      const float add[8] = {low.x,  low.y,  low.z,  low.w,
                            high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) total[j] += add[j];
    }
#pragma unroll 1
    for (int k = 0; k < clamps; ++k) {
      const auto w = load8(a.weights.w_dec +
                           static_cast<int64_t>(row.feature(k)) * d_out + c);
#pragma unroll
      for (int j = 0; j < 8; ++j) total[j] += deltas[k] * to_float(w.at[j]);
    }
    Pack8<T> out;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      out.at[j] = from_float<T>(saturate<T>(total[j], over));
    if (a.shared()) {
      for (int to = 0; to < a.exchange.size; ++to)
        store8(a.exchange.template row<T>(to, i) + a.exchange.rank * d_out + c,
               out);
      continue;
    }
    write_back(a.stream, token, c, out);
  }
  if (a.shared())
    release_dense(a.exchange, i, d_out, __syncthreads_or(over) != 0);
  else
    count_saturated(over, &record->saturated, a.saturated);
}

// Takes items until there are none. `token_at` tells the d-th of the n dense
// tokens.
template <int kWidest, typename T, typename TokenAt>
__device__ __forceinline__ void run_dense(const DenseArgs<T>& a,
                                          DenseMemory<kWidest>& m,
                                          const DenseMaps& maps, int n,
                                          const TokenAt& token_at) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < kDenseStages<kWidest>; ++s) {
      barrier_init(barrier_at(m.full, s), 1);
      barrier_init(barrier_at(m.empty, s), 2);
    }
    barrier_init_fence();
  }
  int it = 0;
  while (true) {
    __syncthreads();
    if (threadIdx.x == 0) m.ticket = atomicAdd(a.ws.sync + kDenseTicket, 1);
    __syncthreads();
    const DenseItem item = dense_item<kWidest>(a, m.ticket, n);
    if (item.phase == kPhases) break;
    if (threadIdx.x == 0) grid_wait(a.ws.sync + kDenseDone, item.first);
    __syncthreads();
    const int d = item.index;
    if (item.phase == kOrder) {
      order_dense(a);
    } else if (item.phase == kPublish) {
      publish_limbs(a.exchange);
    } else if (item.phase == kPulled) {
      pull_limbs(a, d / a.exchange.size, d % a.exchange.size);
    } else if (item.phase == kGather) {
      gather_dense(a, d, token_at(item.base + d));
    } else if (item.phase == kEncode) {
      it = run_dense_tile<T, kWidest, false>(a, m, maps, item, it);
    } else if (item.phase == kDecode) {
      it = run_dense_tile<T, kWidest, true>(a, m, maps, item, it);
    } else {
      finish_dense(a, reinterpret_cast<float*>(m.operands), d,
                   token_at(item.base + d));
    }
    fence_async();  // copies of other blocks may read what was stored here
    __syncthreads();
    if (threadIdx.x == 0) grid_arrive(a.ws.sync + kDenseDone);
  }
  if (threadIdx.x == 0) leave_dense(a);
}

template <typename T>
__global__ void __launch_bounds__(kEncodeThreads, 1)
    dense_kernel(const __grid_constant__ DenseArgs<T> a,
                 const __grid_constant__ DenseMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw[];
  // Nothing that earlier kernels write is read yet, only moved into L2.
  if (threadIdx.x == 0) prefetch_line(a.ws.sync + kDenseCount);
  wait_for_previous();
  launch_dependents();
  const int n = dense_tokens(a, a.ws.sync[kDenseCount]);
  if (n <= 0) return;
  run_dense<128>(a, *reinterpret_cast<DenseMemory<128>*>(aligned_memory(raw)),
                 maps, n, [&](int d) { return a.ws.records[d].dense; });
#else
  __trap();
#endif
}

}  // namespace vllm_steering
