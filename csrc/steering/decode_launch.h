// SPDX-License-Identifier: Apache-2.0
// How the stages that decode are launched: for SAEs that this rank holds whole,
// and for those that ranks share.
#pragma once

#include <algorithm>

#include "decode_all_kernel.cuh"
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

template <typename T>
const DenseMaps& dense_maps(const Bundles<T>& b, const DenseScratch<T>& s) {
  return b.checked->dense_maps.template get<DenseMaps>(
      [&] { return make_dense_maps(s, b.weights); });
}

template <typename T>
DenseArgs<T> dense_args(const Bundles<T>& b, const DenseScratch<T>& scratch,
                        bool topk, const Exchange& exchange,
                        const DensePart& part) {
  STD_TORCH_CHECK(b.step.table.max_clamps <= kDenseClamps,
                  "steering: more than ", kDenseClamps, " clamps a row");
  return {b.weights, b.stream, b.ws,     b.step.table, b.step.saturated,
          topk,      scratch,  exchange, part};
}

// Whether one launch decodes all tokens of a short step, of those that lists
// hold and those that none does: its memory for the latter is not the lists'.
template <typename T>
bool takes_all(const DecodeArgs<T>& a, const DenseScratch<T>& scratch) {
  const auto* end =
      a.ws.entries + static_cast<int64_t>(a.ws.rows) * a.ws.capacity;
  return a.ws.rows <= kCompactEncodeTokens &&
         static_cast<const void*>(scratch.x) >= end &&
         decode_all_smem(kTeams<8>, a.table.max_clamps) <= 227 * 1024;
}

template <int Ahead, typename T>
void launch_all(DecodeArgs<T> lists, const DenseArgs<T>& dense,
                const DenseMaps& maps, int processors, cudaStream_t stream) {
  lists.notes_dense = false;
  const DecodeAllArgs<T> a = {lists, dense};
  launch(lists.reads.index != nullptr ? decode_all_kernel<T, Ahead, true>
                                      : decode_all_kernel<T, Ahead, false>,
         processors, kTeams<Ahead> * kDecodeThreads,
         decode_all_smem(kTeams<Ahead>, lists.table.max_clamps), stream, a,
         maps);
}

// Tokens that no list holds: their number is known on the device only.
template <typename T>
void launch_dense(const Bundles<T>& b, bool topk, int processors,
                  cudaStream_t stream, const Exchange& exchange,
                  const DensePart& part) {
  const auto scratch = dense_scratch(b);
  launch(dense_kernel<T>, processors, kEncodeThreads, kDenseSmem<128>, stream,
         dense_args(b, scratch, topk, exchange, part), dense_maps(b, scratch));
}

}  // namespace vllm_steering
