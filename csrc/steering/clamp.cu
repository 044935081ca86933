// SPDX-License-Identifier: Apache-2.0
// The binding of clamp.cuh.
#include <algorithm>
#include <optional>

#include "clamp.cuh"
#include "launch.h"

namespace vllm_steering {
namespace {

// Leaves to L1 what two blocks an SM do not need as shared memory: blocks that
// want the same rows at the same time get them from there.
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

template <typename Kernel, typename... Args>
void launch_clamp(Kernel* kernel, const ClampArgs& a, int tokens,
                  cudaStream_t stream, Args... args) {
  const int smem = clamp_smem(a.d_model, a.max_clamps);
  share_l1(kernel, smem);
  launch(kernel, tokens, clamp_threads(a.d_model), smem, stream, a, args...);
}

// Without w_enc (and flags, meta, norm_limit, b_enc, threshold): the additive
// tier, whose directions w_dec are float32.
void clamp(Tensor index, Tensor table, std::optional<Tensor> flags,
           std::optional<Tensor> meta, std::optional<Tensor> norm_limit,
           std::optional<Tensor> w_enc, std::optional<Tensor> b_enc,
           std::optional<Tensor> threshold, Tensor w_dec, Tensor hidden,
           std::optional<Tensor> residual, bool gated) {
  ClampArgs a = {};
  a.index = data<int>(index);
  a.table = data<int>(table);
  a.table_stride = static_cast<uint32_t>(table.stride(0));
  a.hidden_stride = static_cast<uint32_t>(hidden.stride(0));
  a.residual_stride = residual ? static_cast<uint32_t>(residual->stride(0)) : 0;
  a.d_model = static_cast<int>(hidden.size(1));
  a.max_clamps = static_cast<int>((table.size(1) - 2) / 3);
  a.gated = gated;
  if (w_enc) {
    STD_TORCH_CHECK(flags && meta && norm_limit && b_enc && threshold,
                    "steering: an encoder comes with all of its tensors");
    a.flags = data<int>(*flags);
    a.meta = data<int>(*meta);
    a.norm_limit = data<float>(*norm_limit);
    a.b_enc = data<float>(*b_enc);
    a.threshold = data<float>(*threshold);
  }
  const int tokens = static_cast<int>(hidden.size(0));
  const cudaStream_t stream = stream_of(hidden);
  for_type(hidden, [&](auto type) {
    using T = decltype(type);
    T* out = residual ? data<T>(*residual) : nullptr;
    if (w_enc)
      launch_clamp(residual ? clamp_kernel<T, T, true, true>
                            : clamp_kernel<T, T, true, false>,
                   a, tokens, stream, data<T>(*w_enc), data<T>(w_dec),
                   data<T>(hidden), out);
    else
      launch_clamp(residual ? clamp_kernel<T, float, false, true>
                            : clamp_kernel<T, float, false, false>,
                   a, tokens, stream, static_cast<T*>(nullptr),
                   data<float>(w_dec), data<T>(hidden), out);
  });
}

}  // namespace
}  // namespace vllm_steering

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_steering, m) {
  m.def(
      "clamp(Tensor index, Tensor table, Tensor? flags, Tensor? meta,"
      " Tensor? norm_limit, Tensor? w_enc, Tensor? b_enc, Tensor? threshold,"
      " Tensor w_dec, Tensor(a!) hidden, Tensor(b!)? residual, bool gated)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CUDA, m) {
  m.impl("clamp", TORCH_BOX(&vllm_steering::clamp));
}
