// SPDX-License-Identifier: Apache-2.0
// The stages of full reconstruction as ops: bundles of tensors in, launches
// out. The order of a bundle's tensors is in constants.cuh. The stream of
// stages 1 to 3 is what the encoder reads, that of stage 4 what is replaced.
#include <algorithm>

#include "checks.h"
#include "compact_encode_kernel.cuh"
#include "compact_kernel.cuh"
#include "decode_launch.h"
#include "encode_launch.h"
#include "select_kernel.cuh"

namespace vllm_steering {
namespace {

// Stage 1 of one chunk.
void compact(Tensors step, Tensors weights, Tensors stream, Tensors workspace,
             int64_t base, int64_t gate) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b = make_bundles<T>(step, weights, stream, workspace,
                                   Side::kRead, false, base);
    const int per_block = tokens_per_block(b.stream.tokens);
    const int blocks = (b.stream.tokens + per_block - 1) / per_block;
    const CompactArgs<T> a = {
        b.step, b.weights, b.stream, b.ws, static_cast<int>(gate), per_block};
    launch(compact_kernel<T>, blocks, kCompactThreads, 0,
           stream_of(stream[kHidden]), a);
  });
}

// Stage 2 of one chunk.
void encode(Tensors step, Tensors weights, Tensors stream, Tensors workspace,
            int64_t base, bool topk) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b = make_bundles<T>(step, weights, stream, workspace,
                                   Side::kRead, topk, base);
    const EncodeArgs<T> a = {b.weights, b.ws, false};
    launch_encoder(encode_kernel<T>, a, b.weights.num_features,
                   multiprocessors(stream[kHidden]),
                   stream_of(stream[kHidden]));
  });
}

// Stages 1 and 2 at once, for a step of at most kCompactEncodeTokens tokens.
void compact_encode(Tensors step, Tensors weights, Tensors stream,
                    Tensors workspace, int64_t gate, bool topk) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b =
        make_bundles<T>(step, weights, stream, workspace, Side::kRead, topk, 0);
    STD_TORCH_CHECK(
        b.stream.tokens <= kCompactEncodeTokens && b.ws.rows >= b.stream.tokens,
        "steering: too many tokens for one launch");
    const CompactEncodeArgs<T> a = {
        b.step, b.stream, {b.weights, b.ws, true}, static_cast<int>(gate)};
    launch_together(compact_encode_kernel<T>, multiprocessors(stream[kHidden]),
                    kEncodeThreads, kEncodeSmem, stream_of(stream[kHidden]), a,
                    encode_maps(b.ws, b.weights));
  });
}

// Stage 3 of TopK SAEs.
void select(Tensors step, Tensors weights, Tensors stream, Tensors workspace,
            int64_t base) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b = make_bundles<T>(step, weights, stream, workspace,
                                   Side::kRead, true, base);
    const SelectArgs a = {
        b.step.table,
        b.weights.meta,
        {b.ws.x, b.ws.records, b.ws.count, b.ws.sync, b.ws.entries, b.ws.scores,
         b.ws.kth, b.ws.coef, b.ws.skip, b.ws.rows, b.ws.capacity, b.ws.base},
        b.weights.all_features};
    const int blocks =
        std::min(a.ws.rows, 4 * multiprocessors(stream[kHidden]));
    launch(select_kernel, blocks, kSelectThreads, 0, stream_of(stream[kHidden]),
           a);
  });
}

// Stage 4, and stage 3 of threshold SAEs. `many`: sort in a launch of its own.
void decode(Tensors step, Tensors weights, Tensors stream, Tensors workspace,
            int64_t base, bool topk, bool delta, bool many) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b = make_bundles<T>(step, weights, stream, workspace,
                                   Side::kWritten, topk, base);
    const int processors = multiprocessors(stream[kHidden]);
    const cudaStream_t on = stream_of(stream[kHidden]);
    STD_TORCH_CHECK(
        delta || b.ws.capacity >= std::min(b.weights.num_features, kListMax),
        "steering: lists of ", b.ws.capacity, " entries are too short");
    const DecodeArgs<T> a = {b.weights,        b.stream, b.ws,  b.step.table,
                             b.step.saturated, topk,     delta, b.step.reads,
                             Exchange{},       false,    0};
    launch_decode<false>(a, many && !delta, processors, on);
    if (delta || b.weights.num_features <= kListMax) return;
    launch_dense(b, make_dense_scratch(workspace, b.weights, b.expected), topk,
                 processors, on, Exchange{}, DensePart{0, kPhases, 0});
  });
}

// Stage 4 of tokens that a guess has chosen: their lists are final, and short.
void decode_chosen(Tensors step, Tensors weights, Tensors stream,
                   Tensors workspace, int64_t base, bool delta, bool many) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b = make_bundles<T>(step, weights, stream, workspace,
                                   Side::kWritten, false, base);
    const DecodeArgs<T> a = {b.weights,        b.stream, b.ws,  b.step.table,
                             b.step.saturated, true,     delta, b.step.reads,
                             Exchange{},       false,    0};
    launch_decode<false>(a, many && !delta, multiprocessors(stream[kHidden]),
                         stream_of(stream[kHidden]));
  });
}

}  // namespace
}  // namespace vllm_steering

#define STEERING_BUNDLES                                            \
  "Tensor[] step, Tensor[] weights, Tensor(a!)[] stream, Tensor(b!" \
  ")[] workspace, "

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_steering, m) {
  m.def("compact(" STEERING_BUNDLES "int base, int gate) -> ()");
  m.def("encode(" STEERING_BUNDLES "int base, bool topk) -> ()");
  m.def("compact_encode(" STEERING_BUNDLES "int gate, bool topk) -> ()");
  m.def("select(" STEERING_BUNDLES "int base) -> ()");
  m.def("decode(" STEERING_BUNDLES
        "int base, bool topk, bool delta, bool many) -> ()");
  m.def("decode_chosen(" STEERING_BUNDLES
        "int base, bool delta, bool many) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CUDA, m) {
  m.impl("compact", TORCH_BOX(&vllm_steering::compact));
  m.impl("encode", TORCH_BOX(&vllm_steering::encode));
  m.impl("compact_encode", TORCH_BOX(&vllm_steering::compact_encode));
  m.impl("select", TORCH_BOX(&vllm_steering::select));
  m.impl("decode", TORCH_BOX(&vllm_steering::decode));
  m.impl("decode_chosen", TORCH_BOX(&vllm_steering::decode_chosen));
}
