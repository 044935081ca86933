// SPDX-License-Identifier: Apache-2.0
// How the stages that decode are launched: for SAEs that this rank holds whole,
// and for those that ranks share.
#pragma once

#include <algorithm>

#include "decode_kernel.cuh"
#include "dense_kernel.cuh"
#include "gather_kernel.cuh"
#include "held.h"
#include "sort_kernel.cuh"
#include "tensor_map.h"

namespace vllm_steering {

template <int Ahead, bool kShared, typename T>
void launch_lists(const DecodeArgs<T>& a, int processors, cudaStream_t stream) {
  // Ranks that share an SAE read elsewhere.
  const bool reads = !kShared && a.reads.index != nullptr;
  const int64_t each = decode_slices(a.weights.d_out) + reads;
  const int64_t blocks =
      std::min<int64_t>(a.ws.rows * each, 32 / Ahead * processors);
  launch(reads ? decode_kernel<T, Ahead, !kShared, kShared>
               : decode_kernel<T, Ahead, false, kShared>,
         static_cast<int>(blocks), kDecodeThreads,
         decode_smem(a.table.max_clamps), stream, a);
}

// Tokens that lists hold. Few: one kernel. Many: sort once, then gather.
template <bool kShared, typename T>
void launch_decode(const DecodeArgs<T>& a, bool many, int processors,
                   cudaStream_t stream) {
  if (many) {
    launch(!kShared && a.reads.index != nullptr
               ? sort_kernel<T, !kShared, kShared>
               : sort_kernel<T, false, kShared>,
           std::min(a.ws.rows, 8 * processors), kDecodeThreads, 0, stream, a);
    const int64_t work =
        static_cast<int64_t>(a.ws.rows) * decode_slices(a.weights.d_out);
    const int64_t blocks = std::min<int64_t>((work + 7) / 8, 2 * processors);
    launch(gather_kernel<T, kShared>, static_cast<int>(blocks), kDecodeThreads,
           0, stream, a);
  } else if (a.ws.rows <= kFewTokens) {
    launch_lists<16, kShared>(a, processors, stream);
  } else {
    launch_lists<8, kShared>(a, processors, stream);
  }
}

template <typename T>
DenseMaps make_dense_maps(const DenseScratch<T>& s, const Weights<T>& w) {
  DenseMaps maps;
  maps.w_enc = tensor_map(w.w_enc, w.num_features, w.d_in, kTileF, kTileK);
  maps.w_dec = tensor_map(w.w_dec, w.all_features, w.d_out, kTileK, 64);
  for (int i = 0; i < kDenseWidths; ++i) {
    maps.x[i] = tensor_map(s.x, s.rows, w.d_in, kWidth[i], kTileK);
    maps.limbs[i] =
        tensor_map(s.limbs, 2 * s.rows, s.padded, kWidth[i], kTileK);
  }
  return maps;
}

template <typename T>
DenseScratch<T> dense_scratch(const Bundles<T>& b) {
  return make_dense_scratch(b.held->workspace, b.weights, b.expected);
}

// Tokens that no list holds: their number is known on the device only.
template <typename T>
void launch_dense(const Bundles<T>& b, bool topk, int processors,
                  cudaStream_t stream, const Exchange& exchange,
                  const DensePart& part) {
  STD_TORCH_CHECK(b.step.table.max_clamps <= kDenseClamps,
                  "steering: more than ", kDenseClamps, " clamps a row");
  const auto scratch = dense_scratch(b);
  const DenseArgs<T> a = {b.weights,    b.stream,         b.ws,
                          b.step.table, b.step.saturated, topk,
                          scratch,      exchange,         part};
  launch(dense_kernel<T>, processors, kEncodeThreads, kDenseSmem, stream, a,
         b.checked->dense_maps.template get<DenseMaps>(
             [&] { return make_dense_maps(scratch, b.weights); }));
}

}  // namespace vllm_steering
