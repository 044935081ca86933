// SPDX-License-Identifier: Apache-2.0
// The stages of an SAE that ranks share, as ops (exchange.cuh).
#include <algorithm>

#include "decode_launch.h"
#include "shared_kernels.cuh"

namespace vllm_steering {
namespace {

// The exchange of the weights' bundle; a chunk must fit its regions.
template <typename T>
Exchange shared_exchange(const Bundles<T>& b) {
  const Exchange x = make_exchange(b.held->weights, b.weights.d_out);
  STD_TORCH_CHECK(x.size > 1, "steering: the SAE is not shared");
  STD_TORCH_CHECK(b.ws.rows <= x.rows, "steering: ", b.ws.rows,
                  " rows, the exchange has room for ", x.rows);
  return x;
}

// Sends the lists of a chunk's active tokens to all ranks.
void push(int64_t held, Tensors stream, int64_t base) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b =
        make_bundles<T>(held, stream, Side::kRead, Scratch::kLists, base);
    const Exchange x = shared_exchange(b);
    const int blocks =
        std::min(b.ws.rows, 4 * multiprocessors(stream[kHidden]));
    launch(push_kernel<T>, blocks, kExchangeThreads, 0,
           stream_of(stream[kHidden]), b.ws, x);
  });
}

// Gathers `rows` rows of all ranks' staging, `own` [rows, n] of each, in
// `out`: [size, rows, n] if `stacked`, else [rows, size * n].
void pull(Tensor own, Tensor out, Tensor shared, Tensor count, int64_t base,
          bool stacked, bool all, int64_t parts) {
  const Exchange x = make_exchange(Tensors(kShared + 1, shared), 1);
  STD_TORCH_CHECK(own.is_cuda() && out.is_cuda() && own.is_contiguous() &&
                      out.is_contiguous() && own.dim() == 2 &&
                      out.numel() == own.numel() * x.size,
                  "steering: a pull's tensors do not fit");
  const int64_t rows = own.size(0);
  const int64_t bytes = own.size(1) * static_cast<int64_t>(own.element_size());
  STD_TORCH_CHECK(
      reinterpret_cast<char*>(own.data_ptr()) == x.at[x.rank] + x.staging,
      "steering: what is pulled does not lie in the staging");
  STD_TORCH_CHECK(bytes % 16 == 0, "steering: rows of ", bytes,
                  " bytes, expected a multiple of 16");
  check_aligned(out, "out");
  check(count, "count", ScalarType::Int, {1},
        {own.get_device_index(), ScalarType::Int});
  const PullArgs a = {x,
                      data<int>(count),
                      static_cast<int>(base),
                      static_cast<int>(rows),
                      all,
                      bytes,
                      data<char>(out),
                      stacked ? bytes : x.size * bytes,
                      stacked ? rows * bytes : bytes};
  // Few enough to be on the device together, whatever else is.
  const int64_t blocks =
      std::clamp<int64_t>(rows * bytes / 16384, 1, multiprocessors(own) / 2);
  launch(pull_kernel, static_cast<int>(blocks), kExchangeThreads, 0,
         stream_of(own), a, static_cast<int>(parts));
}

// What one launch of the decoder does for few tokens. Its blocks wait for those
// of the other ranks, so all must be resident; and one that writes must not
// have another item to send afterwards.
template <typename T>
int shared_parts(const Bundles<T>& b, const Exchange& x, bool topk,
                 int processors) {
  const int64_t items =
      static_cast<int64_t>(b.ws.rows) * decode_slices(b.weights.d_out);
  const int each = b.ws.rows <= kFewTokens ? 2 : 4;  // as launch_decode has it
  const int parts = kDecodes | (topk ? 0 : kPushes);
  if (items > static_cast<int64_t>(each) * processors) return parts;
  return parts | kWrites | (b.ws.rows <= x.packet_rows ? kPackets : 0);
}

// Stage 4 on this rank's columns, which go to all ranks; for threshold SAEs
// the lists of all ranks are joined first. `together`: with shared_parts.
void decode_columns(int64_t held, Tensors stream, int64_t base, bool topk,
                    bool delta, bool many, bool together) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b =
        make_bundles<T>(held, stream, Side::kWritten, scratch_of(topk), base);
    const Exchange x = shared_exchange(b);
    STD_TORCH_CHECK(
        delta || b.ws.capacity >= std::min(b.weights.all_features, kListMax),
        "steering: lists of ", b.ws.capacity, " entries are too short");
    const int processors = multiprocessors(stream[kHidden]);
    // Not all blocks of the many would be resident.
    STD_TORCH_CHECK(!many || !together,
                    "steering: too many tokens for one launch");
    const int parts =
        together ? shared_parts(b, x, topk, processors) : kDecodes;
    const DecodeArgs<T> a = {
        b.weights, b.stream, b.ws,  b.step.table, b.step.saturated, topk, delta,
        Reads{},   x,        !topk, parts};
    launch_decode<true>(a, many && !delta, processors,
                        stream_of(stream[kHidden]));
  });
}

// One chunk of the tokens that no list holds: phases [first, end) of
// DensePhase.
void dense_columns(int64_t held, Tensors stream, int64_t base, bool topk,
                   int64_t chunk, int64_t first, int64_t end) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b =
        make_bundles<T>(held, stream, Side::kWritten, scratch_of(topk), base);
    const Exchange x = shared_exchange(b);
    const int rows = dense_scratch(b).rows;
    const int64_t staged = int64_t{4} * rows * b.weights.num_features;
    const int64_t room =
        data<int64_t>(b.held->weights[kShared])[kShareStagingBytes];
    STD_TORCH_CHECK(topk || staged <= room, "steering: ", rows,
                    " dense tokens do not fit the staging");
    launch_dense(b, topk, multiprocessors(stream[kHidden]),
                 stream_of(stream[kHidden]), x,
                 DensePart{static_cast<int>(first), static_cast<int>(end),
                           static_cast<int>(chunk)});
  });
}

// Writes whole tokens from the columns of all ranks, and ends the round.
// `together`: as for decode_columns, which may have written all but the dense.
void write_columns(int64_t held, Tensors stream, int64_t base, bool together) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b =
        make_bundles<T>(held, stream, Side::kWritten, Scratch::kLists, base);
    const Exchange x = shared_exchange(b);
    const int processors = multiprocessors(stream[kHidden]);
    const bool dense =
        together && (shared_parts(b, x, false, processors) & kWrites) != 0;
    const int blocks = std::min(b.ws.rows, 4 * processors);
    launch(write_kernel<T>, blocks, kExchangeThreads, 0,
           stream_of(stream[kHidden]), b.ws, b.stream, x, b.step.saturated,
           dense);
  });
}

}  // namespace
}  // namespace vllm_steering

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_steering, m) {
  m.def("push(" STEERING_HELD "int base) -> ()");
  m.def(
      "pull(Tensor own, Tensor(a!) out, Tensor shared, Tensor count, int base,"
      " bool stacked, bool all, int parts) -> ()");
  m.def("decode_columns(" STEERING_HELD
        "int base, bool topk, bool delta, bool many, bool together) -> ()");
  m.def("dense_columns(" STEERING_HELD
        "int base, bool topk, int chunk, int first, int end) -> ()");
  m.def("write_columns(" STEERING_HELD "int base, bool together) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CUDA, m) {
  m.impl("push", TORCH_BOX(&vllm_steering::push));
  m.impl("pull", TORCH_BOX(&vllm_steering::pull));
  m.impl("decode_columns", TORCH_BOX(&vllm_steering::decode_columns));
  m.impl("dense_columns", TORCH_BOX(&vllm_steering::dense_columns));
  m.impl("write_columns", TORCH_BOX(&vllm_steering::write_columns));
}
