// SPDX-License-Identifier: Apache-2.0
// The stages of full reconstruction as ops: tensors in, launches out. Most of
// the tensors are held (held.h); the order of each bundle is in constants.cuh.
// The stream of stages 1 to 3 is what the encoder reads, that of stage 4 what
// is replaced.
#include <algorithm>

#include "compact_encode_kernel.cuh"
#include "compact_kernel.cuh"
#include "decode_launch.h"
#include "encode_launch.h"
#include "held.h"
#include "select_kernel.cuh"

namespace vllm_steering {
namespace {

// Holds tensors for the ops that follow; they take the number.
int64_t hold(Tensors step, Tensors weights, Tensors workspace) {
  return held_table().add(std::make_shared<Held>(
      std::move(step), std::move(weights), std::move(workspace)));
}

// Longer steps than this, of SAEs at least this wide, encode in pairs of
// blocks. In shorter steps memory is the limit, and of narrower SAEs a block
// has a tile or two.
constexpr int kAloneRows = 128, kPairsFeatures = 65536;

// Whether blocks that wait for one another may be in pairs: on a whole device,
// where all pairs run at the same time.
template <typename T>
bool takes_pairs(const Bundles<T>& b, int processors) {
  return b.ws.rows > kAloneRows && b.weights.num_features >= kPairsFeatures &&
         processors % kEncodePeers == 0 &&
         processors == current_device_attribute(cudaDevAttrMultiProcessorCount);
}

void release(int64_t held) { held_table().remove(held); }

// Stage 1 of one chunk.
void compact(int64_t held, Tensors stream, int64_t base, int64_t gate) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b =
        make_bundles<T>(held, stream, Side::kRead, Scratch::kLists, base);
    const int per_block = tokens_per_block(b.stream.tokens);
    const int blocks = (b.stream.tokens + per_block - 1) / per_block;
    const CompactArgs<T> a = {
        b.step, b.weights, b.stream, b.ws, static_cast<int>(gate), per_block};
    launch(compact_kernel<T>, blocks, kCompactThreads, 0,
           stream_of(stream[kHidden]), a);
  });
}

// Stage 2 of one chunk.
void encode(int64_t held, Tensors stream, int64_t base, bool topk) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b =
        make_bundles<T>(held, stream, Side::kRead, scratch_of(topk), base);
    const EncodeArgs<T> a = {b.weights, b.ws, false};
    launch_encoder(spreads_evenly(b.ws.rows) ? encode_kernel<T, true>
                                             : encode_kernel<T, false>,
                   a, encode_maps(b), b.weights.num_features,
                   multiprocessors(stream[kHidden]),
                   stream_of(stream[kHidden]));
  });
}

// Stages 1 and 2 at once, for a step of at most kCompactEncodeTokens tokens.
void compact_encode(int64_t held, Tensors stream, int64_t gate, bool topk) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b = make_bundles<T>(held, stream, Side::kRead, scratch_of(topk));
    STD_TORCH_CHECK(
        b.stream.tokens <= kCompactEncodeTokens && b.ws.rows >= b.stream.tokens,
        "steering: too many tokens for one launch");
    const CompactEncodeArgs<T> a = {
        b.step, b.stream, {b.weights, b.ws, true}, static_cast<int>(gate)};
    const int processors = multiprocessors(stream[kHidden]);
    const cudaStream_t on = stream_of(stream[kHidden]);
    if (takes_pairs(b, processors))
      return launch_clusters_together(compact_encode_kernel<T, kEncodePeers>,
                                      processors, kEncodePeers, kEncodeThreads,
                                      kEncodeSmem, on, a, encode_maps(b));
    launch_together(compact_encode_kernel<T, 1>, processors, kEncodeThreads,
                    kEncodeSmem, on, a, encode_maps(b));
  });
}

// Stage 3 of TopK SAEs.
void select(int64_t held, Tensors stream, int64_t base) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b =
        make_bundles<T>(held, stream, Side::kRead, Scratch::kScores, base);
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
void decode(int64_t held, Tensors stream, int64_t base, bool topk, bool delta,
            bool many) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b =
        make_bundles<T>(held, stream, Side::kWritten, scratch_of(topk), base);
    const int processors = multiprocessors(stream[kHidden]);
    const cudaStream_t on = stream_of(stream[kHidden]);
    STD_TORCH_CHECK(
        delta || b.ws.capacity >= std::min(b.weights.num_features, kListMax),
        "steering: lists of ", b.ws.capacity, " entries are too short");
    const DecodeArgs<T> a = {b.weights,        b.stream, b.ws,  b.step.table,
                             b.step.saturated, topk,     delta, b.step.reads,
                             Exchange{},       false,    0};
    if (delta || b.weights.num_features <= kListMax)
      return launch_decode<false>(a, many && !delta, processors, on);
    const DenseScratch<T> scratch = dense_scratch(b);
    const DensePart part = {0, kPhases, 0};
    if (takes_all(a, scratch)) {
      const auto dense = dense_args(b, scratch, topk, Exchange{}, part);
      const DenseMaps& maps = dense_maps(b, scratch);
      if (b.ws.rows <= kFewTokens)
        return launch_all<16>(a, dense, maps, processors, on);
      return launch_all<8>(a, dense, maps, processors, on);
    }
    launch_decode<false>(a, many, processors, on);
    launch_dense(b, topk, processors, on, Exchange{}, part);
  });
}

// Stage 4 of tokens that a guess has chosen: their lists are final, and short.
void decode_chosen(int64_t held, Tensors stream, int64_t base, bool delta,
                   bool many) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b =
        make_bundles<T>(held, stream, Side::kWritten, Scratch::kLists, base);
    const DecodeArgs<T> a = {b.weights,        b.stream, b.ws,  b.step.table,
                             b.step.saturated, true,     delta, b.step.reads,
                             Exchange{},       false,    0};
    launch_decode<false>(a, many && !delta, multiprocessors(stream[kHidden]),
                         stream_of(stream[kHidden]));
  });
}

}  // namespace
}  // namespace vllm_steering

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_steering, m) {
  m.def("hold(Tensor[] step, Tensor[] weights, Tensor[] workspace) -> int");
  m.def("release(int held) -> ()");
  m.def("compact(" STEERING_HELD "int base, int gate) -> ()");
  m.def("encode(" STEERING_HELD "int base, bool topk) -> ()");
  m.def("compact_encode(" STEERING_HELD "int gate, bool topk) -> ()");
  m.def("select(" STEERING_HELD "int base) -> ()");
  m.def("decode(" STEERING_HELD
        "int base, bool topk, bool delta, bool many) -> ()");
  m.def("decode_chosen(" STEERING_HELD
        "int base, bool delta, bool many) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CUDA, m) {
  m.impl("hold", TORCH_BOX(&vllm_steering::hold));
  m.impl("compact", TORCH_BOX(&vllm_steering::compact));
  m.impl("encode", TORCH_BOX(&vllm_steering::encode));
  m.impl("compact_encode", TORCH_BOX(&vllm_steering::compact_encode));
  m.impl("select", TORCH_BOX(&vllm_steering::select));
  m.impl("decode", TORCH_BOX(&vllm_steering::decode));
  m.impl("decode_chosen", TORCH_BOX(&vllm_steering::decode_chosen));
}

// Without tensors an op is of no device.
STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CompositeExplicitAutograd, m) {
  m.impl("release", TORCH_BOX(&vllm_steering::release));
}
