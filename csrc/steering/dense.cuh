// SPDX-License-Identifier: Apache-2.0
// Tokens with more non-zeros than a list holds: what their path works with.
//
// Which tokens take it depends on a token's own number of non-zeros (more than
// kListMax) and on nothing else, so a token has the same bits in any batch. All
// of their activations are made again, dense, and decoded by the tensor cores:
//
//   x' = b_dec + sum_s (sum over features of split s) + sum_c (g_c - f_c) W_dec
//
// The sum over features is cut in kDenseSplits equal ranges, which are added in
// order: few tokens still make work for every multiprocessor. An activation is
// two 16-bit limbs, so that 16-bit products with W_dec keep 16 bits of it.
#pragma once

#include "exchange.cuh"
#include "keys.cuh"
#include "scheduler.cuh"

namespace vllm_steering {

// Scratch memory of `rows` dense tokens at a time; it takes the place of the
// lists, which have been read by then.
template <typename T>
struct DenseScratch {
  T* x;            // [rows, D_in]
  T* limbs;        // [2, rows, padded], high limbs, then low ones
  float* partial;  // [kDenseSplits, rows, D_out]
  int rows;
  int padded;  // F, up to a multiple of kTileK
};

// What one launch does: phases [first, end) of chunk `chunk`. A launch for an
// SAE that this rank holds whole does everything.
struct DensePart {
  int first, end, chunk;
};

template <typename T>
struct DenseArgs {
  Weights<T> weights;
  Stream<T> stream;
  Workspace<T> ws;
  ClampTable table;
  unsigned long long* saturated;
  bool topk;
  DenseScratch<T> scratch;
  Exchange exchange;
  DensePart part;

  __device__ __forceinline__ bool shared() const { return exchange.size > 1; }
  // Where this rank's limbs wait for its peers to read them.
  __device__ __forceinline__ DenseScratch<T> staged(int rank) const {
    DenseScratch<T> s = scratch;
    s.limbs = reinterpret_cast<T*>(exchange.at[rank] + exchange.staging);
    s.padded = weights.num_features;
    return s;
  }
};

// What entries are added to: b_dec, with a skip connection b_dec + W_skip x.
template <typename T>
__device__ __forceinline__ const float* base_of(const Weights<T>& weights,
                                                const Workspace<T>& ws,
                                                int64_t i) {
  return ws.skip == nullptr ? weights.b_dec : ws.skip + i * weights.d_out;
}

// Called by one thread for each token whose list is too short for it.
template <typename T>
__device__ __forceinline__ void note_dense(const Workspace<T>& ws, int i) {
  const int at = atomicAdd(ws.sync + kDenseCount, 1);
  ws.records[at].dense = i;
}

// An activation as two limbs: (high + low) * kUnit. float16's range is short,
// so its limbs count in sixteens: 2e6 is the largest, 2^-21 the precision.
template <typename T>
struct Limbs {
  static constexpr float kUnit = std::is_same_v<T, __half> ? 16.f : 1.f;

  static __device__ __forceinline__ float bounded(float x) {
    if constexpr (std::is_same_v<T, __half>)
      return fminf(fmaxf(x, -65504.f), 65504.f);
    return x;
  }
  // The limbs of two neighbours, packed.
  static __device__ __forceinline__ uint2 split(float a, float b) {
    a *= 1.f / kUnit;
    b *= 1.f / kUnit;
    const uint32_t high = pack2<T>(bounded(a), bounded(b));
    const float2 rounded = unpack2<T>(high);
    return make_uint2(high,
                      pack2<T>(bounded(a - rounded.x), bounded(b - rounded.y)));
  }
};

// The activation of feature f of the d-th dense token of a chunk.
template <typename T>
__device__ __forceinline__ float limb_value(const DenseScratch<T>& s, int d,
                                            int f) {
  const T* high = s.limbs + static_cast<int64_t>(d) * s.padded + f;
  const T* low = high + static_cast<int64_t>(s.rows) * s.padded;
  return (to_float(*high) + to_float(*low)) * Limbs<T>::kUnit;
}

// Work of the dense kernel, in the order in which blocks take it. A phase
// begins when all that is before it is done.
// kOrder, kPublish and kPulled are of an SAE that ranks share: the dense tokens
// are listed in order, and limbs are exchanged.
enum DensePhase {
  kOrder,
  kGather,
  kEncode,
  kPublish,
  kPulled,
  kDecode,
  kFinish,
  kPhases
};

// The tokens of a tile; a kernel's registers bound it.
template <int kWidest>
__device__ __forceinline__ int dense_width(int n) {
  return n <= 8 ? 8 : n <= 32 ? 32 : n <= 64 ? 64 : kWidest;
}

struct DenseItem {
  int phase;  // kPhases: there is no more work
  int index;  // within its phase
  int first;  // items before its phase
  int base;   // dense tokens before its chunk
  int tokens, token_tiles;
};

// The items of each phase of a chunk of n tokens.
template <int kWidest>
struct DenseCounts {
  int of[kPhases];
  template <typename T>
  __device__ DenseCounts(const DenseArgs<T>& a, int n) {
    const int n_f = (a.weights.num_features + kTileF - 1) / kTileF;
    const int n_d = (a.weights.d_out + kTileF - 1) / kTileF;
    const int width = dense_width<kWidest>(n), tiles = (n + width - 1) / width;
    const bool pulls = a.shared() && !a.topk;
    of[kOrder] = pulls ? 1 : 0;
    of[kGather] = n;
    of[kEncode] = a.topk ? 0 : n_f * tiles;
    of[kPublish] = pulls ? 1 : 0;
    of[kPulled] = pulls ? n * a.exchange.size : 0;
    of[kDecode] = n_d * tiles * kDenseSplits;
    of[kFinish] = n;
#pragma unroll
    for (int phase = 0; phase < kPhases; ++phase)
      if (phase < a.part.first || phase >= a.part.end) of[phase] = 0;
  }
  __device__ int total() const {
    int sum = 0;
#pragma unroll
    for (int phase = 0; phase < kPhases; ++phase) sum += of[phase];
    return sum;
  }
};

// How many dense tokens a launch has to do with, of `n`.
template <typename T>
__device__ __forceinline__ int dense_tokens(const DenseArgs<T>& a, int n) {
  if (!a.shared()) return n;
  return min(a.scratch.rows, n - a.part.chunk * a.scratch.rows);
}

// The ticket-th item of a launch with n dense tokens.
template <int kWidest, typename T>
__device__ DenseItem dense_item(const DenseArgs<T>& a, int ticket, int n) {
  const int rows = a.scratch.rows;
  const int full = DenseCounts<kWidest>(a, rows).total();
  const int chunk = min(ticket / full, n / rows);
  DenseItem item = {kPhases,
                    ticket - chunk * full,
                    chunk * full,
                    (a.part.chunk + chunk) * rows,
                    min(rows, n - chunk * rows),
                    0};
  if (item.tokens <= 0) return item;
  const int width = dense_width<kWidest>(item.tokens);
  item.token_tiles = (item.tokens + width - 1) / width;
  const DenseCounts<kWidest> counts(a, item.tokens);
#pragma unroll
  for (int phase = 0; phase < kPhases; ++phase) {
    if (item.phase != kPhases) continue;
    if (item.index < counts.of[phase]) {
      item.phase = phase;
    } else {
      item.index -= counts.of[phase];
      item.first += counts.of[phase];
    }
  }
  return item;
}

}  // namespace vllm_steering
