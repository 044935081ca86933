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

// The delta tier. `source`: what a transcoder reads, else nothing. `gated`: the
// slot may hold a TopK module.
void clamp(int64_t held, Tensors stream, Tensors source, bool gated) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b =
        make_bundles<T>(held, stream, Side::kWritten, Scratch::kNone);
    const Weights<T>& w = b.weights;
    const Stream<T>& s = b.stream;
    STD_TORCH_CHECK(!source.empty() || w.d_in == w.d_out,
                    "steering: an encoder of width ", w.d_in,
                    " cannot read a stream of width ", w.d_out);
    ClampArgs<T, T> a = {b.step, w, s, w.w_dec, nullptr, 0, w.d_out, gated};
    const cudaStream_t on = stream_of(stream[kHidden]);
    if (source.empty()) return launch_encoding<T, false>(a, on);
    const Stream<T> read = make_stream<T>(source, w.d_in, b.expected);
    STD_TORCH_CHECK(read.tokens == s.tokens && read.residual == nullptr,
                    "steering: source has ", read.tokens, " tokens, expected ",
                    s.tokens);
    a.source = read.hidden;
    a.source_stride = read.hidden_stride;
    launch_encoding<T, true>(a, on);
  });
}

// The additive tier; `directions` is float32 [V, D].
void add_vectors(Tensors step, Tensor directions, Tensors stream) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const Expected e = expected_of(stream);
    const int64_t d_model = stream[kHidden].size(1);
    check(directions, "directions", ScalarType::Float, {kAny, d_model}, e);
    check_aligned(directions, "directions");
    check_width(d_model);
    const Stream<T> s = make_stream<T>(stream, d_model, e);
    const Step counted = make_step(step, s.tokens, e, directions.size(0));
    const ClampArgs<T, float> a = {counted,
                                   {},
                                   s,
                                   data<float>(directions),
                                   nullptr,
                                   0,
                                   static_cast<int>(d_model),
                                   false};
    launch_clamp(s.residual != nullptr
                     ? clamp_kernel<T, float, false, true, false>
                     : clamp_kernel<T, float, false, false, false>,
                 a, stream_of(stream[kHidden]));
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
  m.def("clamp(" STEERING_HELD "Tensor[] source, bool gated) -> ()");
  m.def(
      "add_vectors(Tensor[] step, Tensor directions, Tensor(a!)[] stream)"
      " -> ()");
  m.def("has_clamps(Tensor on) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CUDA, m) {
  m.impl("clamp", TORCH_BOX(&vllm_steering::clamp));
  m.impl("add_vectors", TORCH_BOX(&vllm_steering::add_vectors));
  m.impl("has_clamps", TORCH_BOX(&vllm_steering::has_clamps));
}
