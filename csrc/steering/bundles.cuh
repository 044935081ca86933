// SPDX-License-Identifier: Apache-2.0
// What an op is given, as kernels see it: raw pointers and sizes, four bundles.
// bundles.h makes them from tensors and checks them.
#pragma once

#include "pack.cuh"
#include "records.cuh"

namespace vllm_steering {

// One SAE; SAEWeights in layers/steering_state.py.
template <typename T>
struct Weights {
  const T* w_enc;          // [F, D]
  const float* b_enc;      // [F]
  const float* threshold;  // [F]
  const T* w_dec;          // [F, D]
  const float* b_dec;      // [D]
  const int* meta;
  const float* norm_limit;
  int num_features, d_model;
};

// Rows and flags of the step's tokens, and the clamps of the rows.
struct Step {
  const int* index;  // [tokens]
  const int* flags;  // [tokens]
  ClampTable table;
};

// The residual stream: hidden + residual, or hidden alone.
template <typename T>
struct Stream {
  T *hidden, *residual;  // [tokens, D]; residual may be null
  int64_t hidden_stride, residual_stride;
  int tokens;
};

// Scratch memory of one chunk of at most `rows` active tokens.
template <typename T>
struct Workspace {
  T* x;                  // [rows, D], the active tokens' stream
  TokenRecord* records;  // [rows]
  int* count;            // active tokens of the whole step
  int* sync;             // counters of a grid's barrier, zero between launches
  int64_t* entries;      // [rows, capacity]
  float* scores;         // [rows, F], TopK only, else null
  int64_t* kth;          // [rows], TopK only
  float* coef;           // [rows, max_clamps], g - f
  int rows, capacity;
  int base;  // active tokens before this chunk

  __device__ __forceinline__ int tokens() const {
    return min(*count - base, rows);
  }
};

}  // namespace vllm_steering
