// SPDX-License-Identifier: Apache-2.0
// What a block of the clamp kernel keeps in shared memory: the token's stream,
// what a transcoder reads, a table row, and a ring of decoder rows for each
// thread.
#pragma once

#include "bundles.cuh"
#include "ptx/cp_async.cuh"

namespace vllm_steering {

constexpr int kClampThreads = 448;  // two blocks an SM with 72 registers
constexpr int kClampWarps = kClampThreads / 32;
constexpr int kClampGroup = 8;    // clamps that are encoded at a time
constexpr int kWordsOfClamp = 5;  // in shared memory, see StagedRow
// 16-byte parts of a thread's ring, and the distance of two threads' rings: an
// odd number, so that threads side by side meet different banks.
constexpr int kRingParts = 8, kRingPitch = kRingParts + 1;

// A block covers the row in the fewest rounds of at most kClampThreads
// threads, each with 8 columns.
inline int clamp_threads(int d_model) {
  const int parts = d_model / 8;
  const int rounds = (parts + kClampThreads - 1) / kClampThreads;
  const int threads = (parts + rounds - 1) / rounds;
  return (threads + 31) / 32 * 32;
}

__host__ __device__ inline int padded_clamps(int max_clamps) {
  return (max_clamps + kClampGroup - 1) & -kClampGroup;
}

// 16-byte parts of a row, up to whole warps.
__host__ __device__ inline int padded_parts(int d_model) {
  return (d_model + 255) >> 8 << 5;
}

// 16-byte parts before the table row: ring, hidden, residual, then the source
// (`d_source`: 0 without one).
__host__ __device__ inline int clamp_parts(int threads, int d_model,
                                           int d_source) {
  return kRingPitch * threads + 2 * padded_parts(d_model) +
         padded_parts(d_source);
}

// Dynamic shared memory of a block: these parts, then the table row.
inline int clamp_smem(int threads, int d_model, int d_source, int max_clamps) {
  return clamp_parts(threads, d_model, d_source) * 16 +
         padded_clamps(max_clamps) * kWordsOfClamp * 4;
}

// The token's row of the stream, in memory and in shared memory; `residual`
// only where the stream is two tensors.
template <typename T, bool kTwo>
struct TokenStream {
  T *hidden, *residual;
  uint4* x;  // hidden, later the sum; behind it the residual
  unsigned d_model;

  // Every thread its columns; zeros up to the end of the warp.
  __device__ __forceinline__ void request() const {
    const unsigned parts = padded_parts(d_model);
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < parts; i += blockDim.x) {
      const unsigned d = i * 8;
      copy_async<16>(x + i, hidden + d, d < d_model);
      if constexpr (kTwo)
        copy_async<16>(x + parts + i, residual + d, d < d_model);
    }
  }

  // The sum, rounded as the model rounds it.
  __device__ __forceinline__ Pack8<T> combine(unsigned i) const {
    Pack8<T> sum = {x[i]};
    if constexpr (kTwo) {
      const Pack8<T> other = {x[padded_parts(d_model) + i]};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 h = unpack2<T>(sum.two[k]), r = unpack2<T>(other.two[k]);
        sum.two[k] = pack2<T>(h.x + r.x, h.y + r.y);
      }
    }
    return sum;
  }

  // True where a component was limited.
  __device__ __forceinline__ bool write(unsigned d,
                                        const float (&value)[8]) const {
    Pack8<T> out;
    bool over = false;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out.two[i] = pack2<T>(saturate<T>(value[2 * i], over),
                            saturate<T>(value[2 * i + 1], over));
    *reinterpret_cast<uint4*>((kTwo ? residual : hidden) + d) = out.raw;
    if constexpr (kTwo)
      *reinterpret_cast<uint4*>(hidden + d) = make_uint4(0, 0, 0, 0);
    return over;
  }
};

// A table row in shared memory, padded with clamps that add 0. `delta` holds
// the clamp's value until its g - f is known.
struct StagedRow {
  struct Head {
    int count;
    bool on;  // the token is steered, its norm aside
    float norm_limit;
  };
  int *feature, *code;
  float *delta, *bias, *threshold;
  const Head* head;
  int count;  // not known before the head is

  // `memory` has room for kWordsOfClamp words of each of `padded` clamps.
  __device__ __forceinline__ StagedRow(uint4* memory, int padded,
                                       const Head* head)
      : feature(reinterpret_cast<int*>(memory)),
        code(feature + padded),
        delta(reinterpret_cast<float*>(code + padded)),
        bias(delta + padded),
        threshold(bias + padded),
        head(head) {}
};

// The thread's columns of decoder rows, in the order in which they are added:
// clamp after clamp, then the next columns. Batches of rows are requested two
// ahead. A thread reads only what it requested itself, so it waits only for its
// own copies.
template <typename T, typename W>
struct RowRing {
  static constexpr int kParts = sizeof(W) / 2;  // 16-byte parts of 8 numbers
  static constexpr int kBatch = kRingParts / 2 / kParts;
  struct alignas(4 * kBatch) Features {
    int at[kBatch];
  };
  struct alignas(4 * kBatch) Deltas {
    float at[kBatch];
  };
  const uint4* slots;  // the thread's ring
  const char* column;  // the thread's columns in row 0
  int d_model, d;
  int clamp = 0, half = 0, taken = 0;  // next: clamp to request, half to use

  __device__ __forceinline__ void request(const StagedRow& row) {
    const int inside = d < d_model ? row.count - clamp : 0;
    const auto feature =
        *reinterpret_cast<const Features*>(row.feature + clamp);
    const uint32_t row_bytes = d_model * static_cast<uint32_t>(sizeof(W));
#pragma unroll
    for (int i = 0; i < kBatch * kParts; ++i) {
      const int j = i / kParts, part = i % kParts;
      const uint32_t f = feature.at[j];
      copy_async<16>(slots + half + i,
                     column + static_cast<uint64_t>(f) * row_bytes + part * 16,
                     j < inside);
    }
    commit_copies();
    half ^= kRingParts / 2;
    clamp += kBatch;
    if (clamp < row.count) return;
    clamp = 0;
    d += blockDim.x * 8;
    column += blockDim.x * 8 * sizeof(W);
  }

  // The first two batches.
  __device__ __forceinline__ void start(const StagedRow& row) {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) request(row);
  }

  // acc += the oldest batch, clamps from `first`; its place goes to a new one.
  __device__ __forceinline__ void add(float (&acc)[8], const StagedRow& row,
                                      int first) {
    wait_copies<1>();
    const auto delta = *reinterpret_cast<const Deltas*>(row.delta + first);
#pragma unroll
    for (int i = 0; i < kBatch * kParts; ++i) {
      const float scale = delta.at[i / kParts];
      const Pack8<T> w = {slots[taken + i]};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (kParts == 2) {
          float& sum = acc[i % 2 * 4 + k];
          sum = fmaf(scale, __uint_as_float(w.two[k]), sum);
        } else {
          const float2 two = unpack2<T>(w.two[k]);
          acc[2 * k] = fmaf(scale, two.x, acc[2 * k]);
          acc[2 * k + 1] = fmaf(scale, two.y, acc[2 * k + 1]);
        }
      }
    }
    taken ^= kRingParts / 2;
    request(row);
  }

  // acc = x and the rows of all clamps, for the thread's next columns.
  __device__ __forceinline__ void sum(float (&acc)[8], const Pack8<T>& x,
                                      const StagedRow& row) {
    unpack8(acc, x);
#pragma unroll 1
    for (int c = 0; c < row.count; c += kBatch) add(acc, row, c);
  }
};

// Which features this rank encodes: all of them.
struct WholeEncoder {
  static constexpr bool kShared = false;
  __device__ __forceinline__ bool encodes(int) const { return true; }
  __device__ __forceinline__ int row(int feature) const { return feature; }
};

}  // namespace vllm_steering
