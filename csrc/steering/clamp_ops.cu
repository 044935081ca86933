// SPDX-License-Identifier: Apache-2.0
// The delta tier of threshold SAEs and the additive tier as ops.
#include <algorithm>

#include "checks.h"
#include "clamp_kernel.cuh"

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

template <typename T, typename W>
void launch_clamp(void (*kernel)(ClampArgs<T, W>), const ClampArgs<T, W>& a,
                  cudaStream_t stream) {
  const int smem = clamp_smem(a.d_model, a.step.table.max_clamps);
  share_l1(kernel, smem);
  launch(kernel, a.stream.tokens, clamp_threads(a.d_model), smem, stream, a);
}

// The delta tier. `gated`: the slot may hold a TopK module.
void clamp(Tensors step, Tensors weights, Tensors stream, bool gated) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const Expected e = expected_of(stream);
    const int64_t d_model = stream[kHidden].size(1);
    const Stream<T> s = make_stream<T>(stream, e);
    const Weights<T> w = make_weights<T>(weights, d_model, e);
    const ClampArgs<T, T> a = {make_step(step, s.tokens, e), w,    s, w.w_dec,
                               static_cast<int>(d_model),    gated};
    launch_clamp(s.residual != nullptr ? clamp_kernel<T, T, true, true>
                                       : clamp_kernel<T, T, true, false>,
                 a, stream_of(stream[kHidden]));
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
    const Stream<T> s = make_stream<T>(stream, e);
    const ClampArgs<T, float> a = {
        make_step(step, s.tokens, e, directions.size(0)), {},   s, data<float>(directions),
        static_cast<int>(d_model),    false};
    launch_clamp(s.residual != nullptr ? clamp_kernel<T, float, false, true>
                                       : clamp_kernel<T, float, false, false>,
                 a, stream_of(stream[kHidden]));
  });
}

}  // namespace
}  // namespace vllm_steering

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_steering, m) {
  m.def(
      "clamp(Tensor[] step, Tensor[] weights, Tensor(a!)[] stream, bool gated)"
      " -> ()");
  m.def(
      "add_vectors(Tensor[] step, Tensor directions, Tensor(a!)[] stream)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CUDA, m) {
  m.impl("clamp", TORCH_BOX(&vllm_steering::clamp));
  m.impl("add_vectors", TORCH_BOX(&vllm_steering::add_vectors));
}
