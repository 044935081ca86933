// SPDX-License-Identifier: Apache-2.0
// The delta tier of threshold SAEs and the additive tier as ops.
#include <algorithm>

#include "clamp_launch.h"

namespace vllm_steering {
namespace {

template <typename T, typename W>
void launch_clamp(void (*kernel)(ClampArgs<T, W>), const ClampArgs<T, W>& a,
                  cudaStream_t stream) {
  launch_blocks(kernel, a, a, a.stream.tokens, stream);
}

template <typename T, bool kSource>
void launch_encoding(const ClampArgs<T, T>& a, cudaStream_t stream) {
  launch_clamp(a.stream.residual != nullptr
                   ? clamp_kernel<T, T, true, true, kSource>
                   : clamp_kernel<T, T, true, false, kSource>,
               a, stream);
}

// The delta tier's arguments. `source`: what a transcoder reads, else nothing.
// `gated`: the slot may hold a TopK module.
template <typename T>
ClampArgs<T, T> make_clamps(Tensors step, Tensors weights, Tensors source,
                            Tensors stream, bool gated) {
  const Expected e = expected_of(stream);
  const Weights<T> w = make_weights<T>(weights, e);
  const Stream<T> s = make_stream<T>(stream, w.d_out, e);
  STD_TORCH_CHECK(!source.empty() || w.d_in == w.d_out,
                  "steering: an encoder of width ", w.d_in,
                  " cannot read a stream of width ", w.d_out);
  ClampArgs<T, T> a = {
      make_step(step, s.tokens, e), w, s, w.w_dec, nullptr, 0, w.d_out, gated};
  if (source.empty()) return a;
  const Stream<T> read = make_stream<T>(source, w.d_in, e);
  STD_TORCH_CHECK(read.tokens == s.tokens && read.residual == nullptr,
                  "steering: source has ", read.tokens, " tokens, expected ",
                  s.tokens);
  a.source = read.hidden;
  a.source_stride = read.hidden_stride;
  return a;
}

// The additive tier's; `directions` is float32 [V, D].
template <typename T>
ClampArgs<T, float> make_vectors(Tensors step, const Tensor& directions,
                                 Tensors stream) {
  const Expected e = expected_of(stream);
  const int64_t d_model = stream[kHidden].size(1);
  check(directions, "directions", ScalarType::Float, {kAny, d_model}, e);
  check_aligned(directions, "directions");
  check_width(d_model);
  const Stream<T> s = make_stream<T>(stream, d_model, e);
  return {make_step(step, s.tokens, e, directions.size(0)),
          {},
          s,
          data<float>(directions),
          nullptr,
          0,
          static_cast<int>(d_model),
          false};
}

void clamp(Tensors step, Tensors weights, Tensors source, Tensors stream,
           bool gated) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto a = make_clamps<T>(step, weights, source, stream, gated);
    const cudaStream_t on = stream_of(stream[kHidden]);
    if (source.empty()) return launch_encoding<T, false>(a, on);
    launch_encoding<T, true>(a, on);
  });
}

void add_vectors(Tensors step, Tensor directions, Tensors stream) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto a = make_vectors<T>(step, directions, stream);
    launch_clamp(a.stream.residual != nullptr
                     ? clamp_kernel<T, float, false, true, false>
                     : clamp_kernel<T, float, false, false, false>,
                 a, stream_of(stream[kHidden]));
  });
}

// Both, the vectors first; `vectors` is the additive tier's step.
void vectors_and_clamp(Tensors vectors, Tensor directions, Tensors step,
                       Tensors weights, Tensors source, Tensors stream) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto first = make_vectors<T>(vectors, directions, stream);
    const auto a = make_clamps<T>(step, weights, source, stream, false);
    const int threads = threads_of(a);
    const int smem = std::max(smem_of(first, threads), smem_of(a, threads));
    const bool two = a.stream.residual != nullptr;
    const auto kernel = source.empty()
                            ? (two ? vectors_and_clamp_kernel<T, true, false>
                                   : vectors_and_clamp_kernel<T, false, false>)
                            : (two ? vectors_and_clamp_kernel<T, true, true>
                                   : vectors_and_clamp_kernel<T, false, true>);
    share_l1(kernel, smem);
    launch(kernel, a.stream.tokens, threads, smem, stream_of(stream[kHidden]),
           first, a);
  });
}

// Whether these ops run on the tensor's device, which is the current one.
int64_t has_clamps(Tensor on) {
  STD_TORCH_CHECK(on.is_cuda(), "steering: not a CUDA device");
  return has_code(
      clamp_kernel<__nv_bfloat16, __nv_bfloat16, true, true, false>);
}

}  // namespace
}  // namespace vllm_steering

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_steering, m) {
  m.def(
      "clamp(Tensor[] step, Tensor[] weights, Tensor[] source, Tensor(a!)[] "
      "stream, bool gated) -> ()");
  m.def(
      "add_vectors(Tensor[] step, Tensor directions, Tensor(a!)[] stream)"
      " -> ()");
  m.def(
      "vectors_and_clamp(Tensor[] vectors, Tensor directions, Tensor[] step, "
      "Tensor[] weights, Tensor[] source, Tensor(a!)[] stream) -> ()");
  m.def("has_clamps(Tensor on) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CUDA, m) {
  m.impl("clamp", TORCH_BOX(&vllm_steering::clamp));
  m.impl("add_vectors", TORCH_BOX(&vllm_steering::add_vectors));
  m.impl("vectors_and_clamp", TORCH_BOX(&vllm_steering::vectors_and_clamp));
  m.impl("has_clamps", TORCH_BOX(&vllm_steering::has_clamps));
}
