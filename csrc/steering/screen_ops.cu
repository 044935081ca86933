// SPDX-License-Identifier: Apache-2.0
// Stages 1 and 2 of a decoding step with a screen, as an op.
#include <numeric>

#include "encode_launch.h"
#include "held.h"
#include "screen_kernel.cuh"

namespace vllm_steering {
namespace {

struct ScreenBundle {
  Screen screen;
  const int8_t* w;
};

template <typename T>
ScreenBundle make_screen(const Tensors& s, const Weights<T>& w,
                         const Expected& e) {
  const auto i32 = ScalarType::Int, f32 = ScalarType::Float;
  const auto i8 = ScalarType::Char;
  const int64_t padded =
      (w.d_in + kScreenColumns - 1) / kScreenColumns * kScreenColumns;
  const int k_tiles = (w.d_in + kTileK - 1) / kTileK;
  const int orders = k_tiles / std::gcd(k_tiles, kOrderStep);
  const int pairs = tile_pairs(w.num_features);
  STD_TORCH_CHECK(w.d_in <= kMostScreened, "steering: width ", w.d_in,
                  " is too wide to screen");
  const Tensor& copy = check(get(s, kScreenW, "screen W"), "screen W", i8,
                             {w.num_features, padded}, e);
  const Tensor& rows = check(get(s, kScreenRows, "screen rows"), "screen rows",
                             f32, {w.num_features, 4}, e);
  const Tensor& state =
      check(get(s, kScreenState, "screen state"), "screen state", i32, {4}, e);
  const Tensor& limbs =
      check(get(s, kScreenLimbs, "screen limbs"), "screen limbs", i8,
            {2 * kScreenTokens, padded}, e);
  const Tensor& facts =
      check(get(s, kScreenFacts, "screen facts"), "screen facts", f32,
            {kScreenTokens + kScreenTokens / 4, 4}, e);
  const int groups = (w.d_in + kFineColumns - 1) / kFineColumns;
  const Tensor& fine = check(get(s, kScreenFine, "screen fine"), "screen fine",
                             i8, {w.num_features, groups * 64}, e);
  const Tensor& sums =
      check(get(s, kScreenSums, "screen sums"), "screen sums", f32, {kAny}, e);
  const Tensor& found = check(get(s, kScreenCandidates, "screen candidates"),
                              "screen candidates", i32, {kAny}, e);
  const Tensor& counts = check(get(s, kScreenCounts, "screen counts"),
                               "screen counts", i32, {4}, e);
  const int room = pairs * 2 * kTileF;
  check_length(found, 2 * static_cast<int64_t>(room), "screen candidates");
  check_length(sums, static_cast<int64_t>(room) * kScreenTokens, "screen sums");
  for (const Tensor& t : s) check_aligned(t, "a screen's tensor");
  return {{data<float4>(rows), data<uint4>(fine), data<int8_t>(limbs),
           data<float4>(facts), data<float>(facts) + 4 * kScreenTokens,
           data<float>(sums), data<int>(found), data<int>(counts),
           data<int>(state), static_cast<int>(padded), orders, groups, room},
          data<int8_t>(copy)};
}

template <typename T>
ScreenMaps screen_maps(const ScreenBundle& b, const Weights<T>& w) {
  constexpr int kBox[3] = {8, 32, 64};
  ScreenMaps maps;
  maps.w =
      tensor_map(b.w, w.num_features, b.screen.padded, kTileF, kScreenColumns);
  for (int i = 0; i < 3; ++i)
    maps.limbs[i] = tensor_map(b.screen.limbs, 2 * kScreenTokens,
                               b.screen.padded, kBox[i], kScreenColumns);
  return maps;
}

// Stages 1 and 2 at once, for a step of at most kCompactEncodeTokens tokens;
// lists of non-zeros as compact_encode makes them.
void screen_encode(int64_t held, Tensors stream, Tensors screen, int64_t gate) {
  for_type(stream, [&](auto type) {
    using T = decltype(type);
    const auto b = make_bundles<T>(held, stream, Side::kRead, Scratch::kLists);
    STD_TORCH_CHECK(
        b.stream.tokens <= kCompactEncodeTokens && b.ws.rows >= b.stream.tokens,
        "steering: too many tokens for one launch");
    const ScreenBundle own = make_screen<T>(screen, b.weights, b.expected);
    const ScreenArgs<T> a = {
        {b.step, b.stream, {b.weights, b.ws, true}, static_cast<int>(gate)},
        own.screen};
    launch_together(screen_kernel<T>, multiprocessors(stream[kHidden]),
                    kEncodeThreads, kScreenSmem, stream_of(stream[kHidden]), a,
                    encode_maps(b), screen_maps(own, b.weights));
  });
}

}  // namespace
}  // namespace vllm_steering

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_steering, m) {
  m.def("screen_encode(" STEERING_HELD "Tensor(c!)[] screen, int gate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CUDA, m) {
  m.impl("screen_encode", TORCH_BOX(&vllm_steering::screen_encode));
}
