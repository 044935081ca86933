// SPDX-License-Identifier: Apache-2.0
// The delta tier of threshold SAEs and the additive tier as ops.
#include <algorithm>

#include "checks.h"
#include "shared_clamp.cuh"

namespace vllm_steering {
namespace {

// Leaves the shared memory that two blocks per SM do not need to L1: blocks
// that read the same rows at the same time get them from there.
template <typename Kernel>
void share_l1(Kernel* kernel, int smem) {
  constexpr int kReserved = 2 * 1024;  // the system's, and the static part
  constexpr int kPerMultiprocessor = 228 * 1024;
  const int bytes = 2 * (smem + kReserved);
  const int percent =
      (bytes * 100 + kPerMultiprocessor - 1) / kPerMultiprocessor;
  check_cuda(cudaFuncSetAttribute(
                 kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                 std::min(percent, 100)),
             "carveout");
}

// `blocks` tokens; `args` is `a`, or holds it.
template <typename Args, typename T, typename W>
void launch_blocks(void (*kernel)(Args), const Args& args,
                   const ClampArgs<T, W>& a, int blocks, cudaStream_t stream) {
  const int d_source = a.source != nullptr ? a.weights.d_in : 0;
  const int threads = clamp_threads(std::max(a.d_model, d_source));
  const int smem =
      clamp_smem(threads, a.d_model, d_source, a.step.table.max_clamps);
  share_l1(kernel, smem);
  launch(kernel, blocks, threads, smem, stream, args);
}

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
void clamp(Tensors step, Tensors weights, Tensors source, Tensors stream,
           bool gated) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const Expected e = expected_of(stream);
    const Weights<T> w = make_weights<T>(weights, e);
    const Stream<T> s = make_stream<T>(stream, w.d_out, e);
    STD_TORCH_CHECK(!source.empty() || w.d_in == w.d_out,
                    "steering: an encoder of width ", w.d_in,
                    " cannot read a stream of width ", w.d_out);
    ClampArgs<T, T> a = {make_step(step, s.tokens, e),
                         w,
                         s,
                         w.w_dec,
                         nullptr,
                         0,
                         w.d_out,
                         gated};
    const cudaStream_t on = stream_of(stream[kHidden]);
    if (source.empty()) return launch_encoding<T, false>(a, on);
    const Stream<T> read = make_stream<T>(source, w.d_in, e);
    STD_TORCH_CHECK(read.tokens == s.tokens && read.residual == nullptr,
                    "steering: source has ", read.tokens, " tokens, expected ",
                    s.tokens);
    a.source = read.hidden;
    a.source_stride = read.hidden_stride;
    launch_encoding<T, true>(a, on);
  });
}

// Where the clamps' regions of an arena are, int64 in the host's memory.
ClampExchange make_clamp_exchange(const Tensor& regions, const Exchange& x,
                                  int max_clamps, int64_t base, int64_t parts) {
  STD_TORCH_CHECK(!regions.is_cuda() &&
                      regions.scalar_type() == ScalarType::Long &&
                      regions.is_contiguous() &&
                      regions.numel() == kClampFields,
                  "steering: regions is not int64 in the host's memory");
  const int64_t* at = data<int64_t>(regions);
  STD_TORCH_CHECK(at[kClampRows] <= x.rows && x.slices <= at[kClampSlices] &&
                      max_clamps <= at[kClampEach] && base >= 0,
                  "steering: the clamps do not fit their regions");
  return {x,
          static_cast<int>(at[kClampEach]),
          static_cast<int>(at[kClampSlices]),
          at[kClampRounds],
          at[kClampHeads],
          at[kClampActs],
          at[kClampFlags],
          static_cast<int>(base),
          static_cast<int>(parts)};
}

// The delta tier of an SAE that ranks share, of the tokens from `base` on that
// fit the regions. `parts`: of ClampPart.
void shared_clamp(Tensors step, Tensors weights, Tensors stream, Tensor regions,
                  bool gated, int64_t base, int64_t parts) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const Expected e = expected_of(stream);
    const Weights<T> w = make_weights<T>(weights, e);
    const Exchange x = make_exchange(weights, w.d_out);
    STD_TORCH_CHECK(x.size > 1, "steering: the SAE is not shared");
    const Stream<T> s = make_stream<T>(stream, w.d_out * x.size, e);
    STD_TORCH_CHECK(w.d_in == w.d_out * x.size, "steering: an encoder of width ",
                    w.d_in, " cannot read this stream");
    const Step st = make_step(step, s.tokens, e);
    SharedClampArgs<T> a = {
        {st, w, s, w.w_dec, nullptr, 0, w.d_in, gated},
        make_clamp_exchange(regions, x, st.table.max_clamps, base, parts)};
    const int blocks =
        std::min(s.tokens - static_cast<int>(base),
                 static_cast<int>(data<int64_t>(regions)[kClampRows]));
    STD_TORCH_CHECK(blocks > 0, "steering: no tokens from ", base, " on");
    auto* kernel = s.residual != nullptr ? shared_clamp_kernel<T, true>
                                         : shared_clamp_kernel<T, false>;
    const cudaStream_t on = stream_of(stream[kHidden]);
    // Few enough to be on the device together, whatever else is.
    if (blocks <= multiprocessors(stream[kHidden]))
      return launch_blocks(kernel, a, a.clamp, blocks, on);
    for (const int part : {kSendActs, kSendColumns, kWriteTokens}) {
      a.exchange.parts = static_cast<int>(parts) & part;
      if (a.exchange.parts != 0)
        launch_blocks(kernel, a, a.clamp, blocks, on);
    }
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

}  // namespace
}  // namespace vllm_steering

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_steering, m) {
  m.def(
      "clamp(Tensor[] step, Tensor[] weights, Tensor[] source, Tensor(a!)[] "
      "stream, bool gated) -> ()");
  m.def(
      "shared_clamp(Tensor[] step, Tensor[] weights, Tensor(a!)[] stream, "
      "Tensor regions, bool gated, int base, int parts) -> ()");
  m.def(
      "add_vectors(Tensor[] step, Tensor directions, Tensor(a!)[] stream)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CUDA, m) {
  m.impl("clamp", TORCH_BOX(&vllm_steering::clamp));
  m.impl("shared_clamp", TORCH_BOX(&vllm_steering::shared_clamp));
  m.impl("add_vectors", TORCH_BOX(&vllm_steering::add_vectors));
}
