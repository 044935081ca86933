// SPDX-License-Identifier: Apache-2.0
// What the decoder's kernels share.
#pragma once

#include "common.cuh"

namespace vllm_steering {

constexpr int kDecodeWarps = 8;
constexpr int kDecodeThreads = kDecodeWarps * 32;
constexpr int kSortMax =
    512;  // entries sorted by rank; more go window by window
constexpr int kWindow = 4096;  // features of a window
constexpr int kColumns = 256;  // columns of D of a block: one warp-wide access
constexpr int kFewTokens = 8;  // up to here a token's latency counts

struct DecodeArgs {
  const int* table;
  const int* count;
  const int* lines;        // [rows, kLine]
  const int64_t* entries;  // [rows, capacity]
  const float* coef;       // [rows, max_clamps] g - f, or null: resolve here
  const float* b_dec;
  // For tokens past the capacity: what the encoder read, or TopK scores.
  const void* w_enc;
  const float *b_enc, *threshold;
  const float* scores;  // [rows, F], or null
  const int64_t* kth;   // [rows]
  const int* meta;
  int64_t table_stride, hidden_stride, residual_stride;
  int base, rows, num_features, d_model, capacity, max_clamps;
  bool delta;
  bool long_only;  // only lists that are not sorted: another kernel has those
};

// The longest list that is sorted; longer ones go window by window.
__host__ __device__ __forceinline__ int sorted_max(const DecodeArgs& a) {
  return min(kSortMax, a.capacity);
}

}  // namespace vllm_steering
