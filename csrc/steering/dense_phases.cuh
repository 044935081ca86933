// SPDX-License-Identifier: Apache-2.0
// The phases through which tokens pass that have more non-zeros than a list
// holds (dense.cuh).
//
// Blocks take items by ticket, in order, and an item waits for the phase before
// its own. Whoever is waited for has started already, so the grid need not be
// resident as a whole. A chunk of tokens passes through four phases: their
// stream side by side, activations as limbs (for TopK out of the scores, in the
// first phase), products with W_dec, the sum and the write-back. The products
// are made by dense_kernel.cuh, or by dense_tail.cuh: the same ones.
#pragma once

#include "dense.cuh"
#include "pipeline.cuh"

namespace vllm_steering {

// Phase 1: row d of x; for TopK the limbs of the selected features, instead.
template <typename T>
__device__ void gather_dense(const DenseArgs<T>& a, int d, int64_t i) {
  if (!a.topk) {
    const T* from = a.ws.x + i * a.weights.d_model;
    T* to = a.scratch.x + static_cast<int64_t>(d) * a.weights.d_model;
    for (int k = threadIdx.x * 8; k < a.weights.d_model; k += blockDim.x * 8)
      store8(to + k, load8(from + k));
    return;
  }
  const float* p = a.ws.scores + i * a.weights.num_features;
  const auto kth = static_cast<unsigned long long>(a.ws.kth[i]);
  const bool relu = a.weights.meta[kTopkRelu] != 0;
  const int d_sae = a.weights.meta[kDSae];
  uint32_t* high = reinterpret_cast<uint32_t*>(
      a.scratch.limbs + static_cast<int64_t>(d) * a.scratch.padded);
  uint32_t* low =
      high + static_cast<int64_t>(a.scratch.rows) * a.scratch.padded / 2;
  for (int f = threadIdx.x * 2; f < a.scratch.padded; f += blockDim.x * 2) {
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

// What the producer requests and the consumers multiply for one tile: `steps`
// stages from k-tile `k0`, which wraps at `k_tiles`; rows `row` of the weights
// (columns of W_dec when decoding) and tokens from `t0`.
struct DenseTile {
  int row, t0, k0, k_tiles, steps;
};

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
  const int lane = threadIdx.x & 31, d_model = a.weights.d_model;
  float* to = a.scratch.partial +
              static_cast<int64_t>(split) * a.scratch.rows * d_model;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int t = t0 + i / 4 * 8 + (lane & 3) * 2 + (i & 1);
    const int c = column + (i & 2 ? 8 : 0);
    if (t < tokens && c < d_model)
      to[static_cast<int64_t>(t) * d_model + c] = acc[i] * Limbs<T>::kUnit;
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
    const int n_d = (a.weights.d_model + kTileF - 1) / kTileF;
    const int k_tiles = a.scratch.padded / kTileK;
    const int each = (k_tiles + kDenseSplits - 1) / kDenseSplits;
    split = rest / n_d;
    const int k0 = min(split * each, k_tiles);
    return {rest % n_d * kTileF, t * width, k0, k_tiles,
            min(each, k_tiles - k0)};
  } else {
    const int k_tiles = (a.weights.d_model + kTileK - 1) / kTileK;
    return {rest * kTileF, t * width, first_k(rest, k_tiles), k_tiles, k_tiles};
  }
}

// Phase 4: adds the splits and the clamps in order, rounds once, writes back.
template <typename T>
__device__ void finish_dense(const DenseArgs<T>& a, float* deltas, int d,
                             int64_t i) {
  TokenRecord* record = a.ws.records + i;
  const int token = record->token, d_model = a.weights.d_model;
  if (token < 0) return;
  const ClampRow row = a.table.row(record->row);
  const int clamps = row.count();
  for (int c = threadIdx.x; c < clamps; c += blockDim.x)
    deltas[c] = a.topk ? a.ws.coef[i * row.max_clamps + c]
                       : clamp_delta(row, c, [&](int f) {
                           return limb_value(a.scratch, d, f);
                         });
  __syncthreads();
  bool over = false;
  for (int c = threadIdx.x * 8; c < d_model; c += blockDim.x * 8) {
    float total[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) total[j] = a.weights.b_dec[c + j];
#pragma unroll
    for (int s = 0; s < kDenseSplits; ++s) {
      const auto* part = reinterpret_cast<const float4*>(
          a.scratch.partial +
          (static_cast<int64_t>(s) * a.scratch.rows + d) * d_model + c);
      const float4 low = part[0], high = part[1];
      const float add[8] = {low.x,  low.y,  low.z,  low.w,
                            high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) total[j] += add[j];
    }
#pragma unroll 1
    for (int k = 0; k < clamps; ++k) {
      const auto w = load8(a.weights.w_dec +
                           static_cast<int64_t>(row.feature(k)) * d_model + c);
#pragma unroll
      for (int j = 0; j < 8; ++j) total[j] += deltas[k] * to_float(w.at[j]);
    }
    Pack8<T> out, zero;
    zero.raw = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      out.at[j] = from_float<T>(saturate<T>(total[j], over));
    T* h = a.stream.hidden + token * a.stream.hidden_stride + c;
    if (a.stream.residual != nullptr) {
      store8(a.stream.residual + token * a.stream.residual_stride + c, out);
      store8(h, zero);
    } else {
      store8(h, out);
    }
  }
  count_saturated(over, &record->saturated, a.saturated);
}

// The last block to go makes the counters zero again, for the next launch.
template <typename T>
__device__ __forceinline__ void leave_dense(const Workspace<T>& ws) {
  if (atomicAdd(ws.sync + kDenseExits, 1) != static_cast<int>(gridDim.x) - 1)
    return;
  for (int field = kDenseCount; field <= kDenseExits; ++field)
    ws.sync[field] = 0;
  ws.sync[kCrossed] = 0;
}

}  // namespace vllm_steering
