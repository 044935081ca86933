// SPDX-License-Identifier: Apache-2.0
// The delta tier of a threshold SAE that ranks share, as an op.
#include "clamp_launch.h"
#include "shared_clamp.cuh"

namespace vllm_steering {
namespace {

// Where the clamps' regions of an arena are, int64 in the host's memory.
ClampExchange make_clamp_exchange(const Tensor& regions, const Exchange& x,
                                  int max_clamps, int64_t base, int64_t parts) {
  STD_TORCH_CHECK(
      !regions.is_cuda() && regions.scalar_type() == ScalarType::Long &&
          regions.is_contiguous() && regions.numel() == kClampFields,
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
void shared_clamp(int64_t held, Tensors stream, Tensor regions, bool gated,
                  int64_t base, int64_t parts) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b =
        make_bundles<T>(held, stream, Side::kWritten, Scratch::kNone);
    const Weights<T>& w = b.weights;
    const Stream<T>& s = b.stream;
    const Exchange x = make_exchange(b.held->weights, w.d_out);
    STD_TORCH_CHECK(x.size > 1, "steering: the SAE is not shared");
    STD_TORCH_CHECK(w.d_in == w.d_out * x.size,
                    "steering: an encoder of width ", w.d_in,
                    " cannot read this stream");
    SharedClampArgs<T> a = {
        {b.step, w, s, w.w_dec, nullptr, 0, w.d_in, gated},
        make_clamp_exchange(regions, x, b.step.table.max_clamps, base, parts)};
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
      if (a.exchange.parts != 0) launch_blocks(kernel, a, a.clamp, blocks, on);
    }
  });
}

}  // namespace
}  // namespace vllm_steering

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_steering, m) {
  m.def("shared_clamp(" STEERING_HELD
        "Tensor regions, bool gated, int base, int parts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CUDA, m) {
  m.impl("shared_clamp", TORCH_BOX(&vllm_steering::shared_clamp));
}
