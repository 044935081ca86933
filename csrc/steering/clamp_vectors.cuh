// SPDX-License-Identifier: Apache-2.0
// Steering vectors that do more than add: their values become g - f, where f is
// the projection on the vector, or the unit is the norm of the stream.
#pragma once

#include "clamp_rows.cuh"

namespace vllm_steering {

__device__ __forceinline__ float float_warp_sum(float x) {
#pragma unroll 1
  for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// Turns the values of vectors that want more than to be added into g - f, in
// units of the vector: a projection is on the unit vector, a relative value is
// in units of the norm. A warp takes a clamp.
template <typename T, bool kTwo>
__device__ __forceinline__ void resolve_vectors(
    const float* directions, const TokenStream<T, kTwo>& stream,
    const StagedRow& row, float norm) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int c = threadIdx.x / 32; c < row.count; c += blockDim.x / 32) {
    const int code = row.code[c];
    if (code < kProjection) continue;
    const float* v =
        directions + static_cast<uint64_t>(row.feature[c]) * stream.d_model;
    float dot = 0.f, square = 0.f;
#pragma unroll 4
    for (unsigned i = lane; i * 8 < stream.d_model; i += 32) {
      const Pack8<T> x = stream.combine(i);
      const float4 v0 = reinterpret_cast<const float4*>(v + i * 8)[0];
      const float4 v1 = reinterpret_cast<const float4*>(v + i * 8)[1];
      const float along[8] = {v0.x, v0.y, v0.z, v0.w, v1.x, v1.y, v1.z, v1.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 two = unpack2<T>(x.two[k]);
        dot = fmaf(two.x, along[2 * k], fmaf(two.y, along[2 * k + 1], dot));
        square = fmaf(along[2 * k], along[2 * k],
                      fmaf(along[2 * k + 1], along[2 * k + 1], square));
      }
    }
    dot = float_warp_sum(dot);
    const float length = sqrtf(float_warp_sum(square));
    if (lane != 0) continue;
    const bool projects = (code & kProjection) != 0;
    const float value = row.delta[c] * ((code & kRelative) != 0 ? norm : 1.f);
    const float f = projects && length > 0.f ? dot / length : 0.f;
    const float delta = clamp_delta(code, value, f);
    // A vector of zeros has no direction: whatever it is scaled by adds 0.
    const float scaled = length > 0.f ? limit_coefficient(delta / length) : 0.f;
    row.delta[c] = projects ? scaled : delta;
  }
}

// Resolves vectors; false where the norm of the token's stream exceeds
// float32. `extended`: a clamp of this thread wants more than to be added.
template <typename T, bool kTwo>
__device__ __forceinline__ bool prepare_vectors(
    const float* directions, const TokenStream<T, kTwo>& stream,
    const StagedRow& row, bool extended) {
  __shared__ float norms[kClampWarps];
  float square = 0.f;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i * 8 < stream.d_model; i += blockDim.x) {
    const Pack8<T> x = stream.combine(i);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 two = unpack2<T>(x.two[k]);
      square = fmaf(two.x, two.x, fmaf(two.y, two.y, square));
    }
  }
  // Usually every share is far below the bound, and so is their sum.
  constexpr float kLargest = 3.402823466e38f;
  const bool usual = !extended && square <= kLargest / kClampThreads;
  if (!__syncthreads_or(!usual)) return true;
  square = float_warp_sum(square);
  if (threadIdx.x % 32 == 0) norms[threadIdx.x / 32] = square;
  __syncthreads();
  float total = 0.f;
#pragma unroll 1
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += norms[w];
  if (!(total <= kLargest)) return false;
  resolve_vectors(directions, stream, row, sqrtf(total));
  __syncthreads();
  return true;
}

}  // namespace vllm_steering
