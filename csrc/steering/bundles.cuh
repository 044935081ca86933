// SPDX-License-Identifier: Apache-2.0
// What an op is given, as kernels see it: raw pointers and sizes, four bundles.
// checks.h makes them from tensors and checks them.
#pragma once

#include <type_traits>

#include "pack.cuh"
#include "records.cuh"

namespace vllm_steering {

// One SAE; SAEWeights in layers/steering_state.py.
template <typename T>
struct Weights {
  const T* w_enc;          // [F, D_in]
  const float* b_enc;      // [F]
  const float* threshold;  // [F]
  const T* w_dec;          // [F, D_out]
  const float* b_dec;      // [D_out]
  const int* meta;
  const float* norm_limit;
  int num_features;  // rows of W_enc that this rank holds
  int d_in, d_out;   // equal, but for some transcoders and for shards
  // Of an SAE that ranks share: rows of W_dec, and the feature of W_enc's
  // first.
  int all_features, first_feature;
};

// Who reads, and where to; ReadBuffers in layers/steering_read_state.py.
struct Reads {
  const int* index;  // [tokens], rows of the table; null: nobody
  const int* table;
  const float* scale;  // [F]
  int* out;            // [tokens, 2 + 2 max_read]
  int64_t table_stride, out_stride;
};

// Rows and flags of the step's tokens, and the clamps of the rows.
struct Step {
  const int* index;  // [tokens]
  const int* flags;  // [tokens]
  ClampTable table;
  // Write-backs that were limited: one counter of a slot, or one a vector.
  unsigned long long* saturated;
  Reads reads;
};

// The residual stream: hidden + residual, or hidden alone. What a transcoder
// reads, and what it replaces, are a stream each.
template <typename T>
struct Stream {
  T *hidden, *residual;  // [tokens, width]; residual may be null
  int64_t hidden_stride, residual_stride;
  int tokens;
};

// Columns of a token that a block of the decoder makes at a time: one access of
// a warp.
constexpr int kColumnsOfSlice = 256;

// The largest component that is written back.
template <typename T>
constexpr float kStreamLimit = power_of_2(
    std::is_same_v<T, __half> ? kStreamLimitFloat16 : kStreamLimitBfloat16);

// A component that may be written: within the limit, the lower one for NaN.
// `over` becomes true where that changes it.
template <typename T>
__device__ __forceinline__ float saturate(float x, bool& over) {
  constexpr float kLimit = kStreamLimit<T>;
  over |= !(fabsf(x) <= kLimit);
  return fminf(fmaxf(x, -kLimit), kLimit);
}

// Eight components that may be written, rounded.
template <typename T>
__device__ __forceinline__ Pack8<T> saturate8(const float (&x)[8], bool& over) {
  Pack8<T> out;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    out.two[k] =
        pack2<T>(saturate<T>(x[2 * k], over), saturate<T>(x[2 * k + 1], over));
  return out;
}

// Writes eight columns of a token from c on. The residual takes the whole
// value and hidden becomes 0, so the model's own sum is this value to the bit.
template <typename T>
__device__ __forceinline__ void write_back(const Stream<T>& s, int64_t token,
                                           int64_t c, const Pack8<T>& value) {
  T* hidden = s.hidden + token * s.hidden_stride + c;
  if (s.residual != nullptr) {
    store8(s.residual + token * s.residual_stride + c, value);
    store8(hidden, zeros8<T>());
  } else {
    store8(hidden, value);
  }
}

// Counts a token once, however many of its components were limited, and by
// whichever thread.
__device__ __forceinline__ void count_saturated(bool over, int* counted,
                                                unsigned long long* total) {
  if (over && atomicExch(counted, 1) == 0) atomicAdd(total, 1ull);
}

// Adds a token to the counter of each vector of its row, once.
// A call: it is rare, and costs the kernel no registers.
inline __device__ __noinline__ void count_vectors(
    const int* feature, int count, unsigned long long* saturated) {
#pragma unroll 1
  for (int c = 0; c < count; ++c) {
    bool seen = false;
#pragma unroll 1
    for (int before = 0; before < c; ++before)
      seen |= feature[before] == feature[c];
    if (!seen) atomicAdd(saturated + feature[c], 1ull);
  }
}

// Scratch memory of one chunk of at most `rows` active tokens.
template <typename T>
struct Workspace {
  T* x;                  // [rows, D_in], what the active tokens' encoder reads
  TokenRecord* records;  // [rows]
  int* count;            // active tokens of the whole step
  int* sync;             // [kSyncInts], SyncField
  int64_t* entries;      // [rows, capacity]
  float* scores;         // [rows, F], TopK only, else null
  int64_t* kth;          // [rows], TopK only
  float* coef;           // [rows, max_clamps], g - f
  const float* skip;     // [rows, D_out], b_dec + W_skip x; null: no W_skip
  int rows, capacity;
  int base;  // active tokens before this chunk

  __device__ __forceinline__ int tokens() const {
    return min(*count - base, rows);
  }
};

}  // namespace vllm_steering
