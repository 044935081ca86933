// SPDX-License-Identifier: Apache-2.0
// Small device helpers shared by the stages. Raw pointers only, no torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace vllm_steering {

// Columns of SAEWeights.meta, ClampKind and its flag
// (layers/steering_state.py).
enum Meta { kDSae = 0, kUsesTopk = 1, kK = 2, kTopkRelu = 3, kSkipMask = 4 };
enum Clamp { kAbsolute = 0, kAdditive = 1, kScale = 2, kOnlyIfActive = 4 };

// What the stages know of an active token, in a cache line of its own, or the
// atomics of a whole tile would queue for a few lines: how many non-zeros it
// has, its id in the step (-1: past the norm limit) and its row. Ints a line:
// steering_kernels/plan.py, COUNTER_STRIDE.
constexpr int kLine = 32;
enum Line { kListed = 0, kToken = 1, kRow = 2 };

// Lets the next kernel of the stream be scheduled while this one runs.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernels before this one have finished and their writes are
// visible.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename T>
__device__ __forceinline__ float to_float(T x);
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float(float x) {
  return __float2half_rn(x);
}

// Eight 16-bit numbers, one 16-byte access.
template <typename T>
union Vec8 {
  uint4 raw;
  T at[8];
};

template <typename T>
__device__ __forceinline__ Vec8<T> load8(const T* p) {
  Vec8<T> v;
  v.raw = *reinterpret_cast<const uint4*>(p);
  return v;
}

template <typename T>
__device__ __forceinline__ void store8(T* p, const Vec8<T>& v) {
  *reinterpret_cast<uint4*>(p) = v.raw;
}

// g - f of one clamp.
__device__ __forceinline__ float clamp_delta(int code, float value, float f) {
  if (code >= kOnlyIfActive && f == 0.f) return 0.f;
  const int kind = code & 3;
  if (kind == kAdditive) return value;
  return (kind == kScale ? f * value : value) - f;
}

template <typename N>
__device__ __forceinline__ N warp_sum(N x) {
  for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

}  // namespace vllm_steering
