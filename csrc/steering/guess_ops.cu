// SPDX-License-Identifier: Apache-2.0
// Stages 2 and 3 of TopK SAEs by a guess that is verified, as one op.
#include <algorithm>

#include "encode_launch.h"
#include "guess_kernel.cuh"
#include "held.h"

namespace vllm_steering {
namespace {

// The guess's own tensors, checked.
template <typename T>
GuessArgs<T> make_guess(const Tensors& guess, const Bundles<T>& b) {
  const Expected& e = b.expected;
  const Tensor& samples =
      check(get(guess, kSamples, "samples"), "samples", ScalarType::Short,
            {b.ws.rows, kGuessSample}, e);
  const Tensor& bars =
      check(get(guess, kBars, "bars"), "bars", ScalarType::Float, {kAny}, e);
  const Tensor& failed = check(get(guess, kFailed, "failed"), "failed",
                               ScalarType::Int, {kAny}, e);
  check_aligned(samples, "samples");
  check_length(bars, whole_tiles(b.ws.rows), "bars");
  check_length(failed, b.stream.tokens, "failed");
  STD_TORCH_CHECK(b.ws.capacity <= kGuessCapacity, "steering: lists of ",
                  b.ws.capacity, " entries, expected at most ", kGuessCapacity);
  return {{b.weights, b.ws, false, data<uint16_t>(samples), data<float>(bars)},
          b.step.table,
          data<float>(bars),
          data<int>(failed)};
}

void guess(int64_t held, Tensors stream, Tensors guess, int64_t base) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b =
        make_bundles<T>(held, stream, Side::kRead, Scratch::kLists, base);
    const GuessArgs<T> a = make_guess(guess, b);
    const int processors = multiprocessors(stream[kHidden]);
    const cudaStream_t on = stream_of(stream[kHidden]);
    const int blocks = std::min(b.ws.rows, 8 * processors);
    const EncodeMaps& maps = encode_maps(b);
    launch_encoder(sample_kernel<T>, a.encode, maps, kGuessSample, processors,
                   on);
    launch(bars_kernel<T>, blocks, kGuessThreads, 0, on, a);
    launch_encoder(spreads_evenly(b.ws.rows) ? candidates_kernel<T, true>
                                             : candidates_kernel<T, false>,
                   a.encode, maps, b.weights.num_features, processors, on);
    launch(choose_kernel<T>, blocks, kGuessThreads, 0, on, a);
  });
}

}  // namespace
}  // namespace vllm_steering

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_steering, m) {
  m.def("guess(" STEERING_HELD "Tensor(c!)[] guess, int base) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CUDA, m) {
  m.impl("guess", TORCH_BOX(&vllm_steering::guess));
}
