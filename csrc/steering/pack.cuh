// SPDX-License-Identifier: Apache-2.0
// How numbers are packed: eight of 16 bits in 16 bytes (Pack8), two in a word,
// and an entry of a token's list (feature high, activation low).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace vllm_steering {

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

// Two 16-bit numbers in a word, the first in the low half.
template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t two);
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t two) {
  return make_float2(__uint_as_float(two << 16),
                     __uint_as_float(two & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t two) {
  return __half22float2(*reinterpret_cast<const __half2*>(&two));
}

template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low,
                                                         float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  const __half2 two = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}

// Eight 16-bit numbers, one 16-byte access; also as four words of two.
template <typename T>
union Pack8 {
  uint4 raw;
  T at[8];
  uint32_t two[4];
};

template <typename T>
__device__ __forceinline__ Pack8<T> load8(const T* p) {
  Pack8<T> v;
  v.raw = *reinterpret_cast<const uint4*>(p);
  return v;
}

template <typename T>
__device__ __forceinline__ void store8(T* p, const Pack8<T>& v) {
  *reinterpret_cast<uint4*>(p) = v.raw;
}

template <typename T>
__device__ __forceinline__ Pack8<T> zeros8() {
  Pack8<T> v;
  v.raw = make_uint4(0, 0, 0, 0);
  return v;
}

template <typename T>
__device__ __forceinline__ void unpack8(float (&to)[8], const Pack8<T>& v) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float2 two = unpack2<T>(v.two[k]);
    to[2 * k] = two.x;
    to[2 * k + 1] = two.y;
  }
}

__device__ __forceinline__ float infinity() {
  return __int_as_float(0x7F800000);
}

// An entry of a token's list.
__device__ __forceinline__ int64_t pack_entry(int64_t feature, float value) {
  return feature << 32 | static_cast<int64_t>(__float_as_uint(value));
}

__device__ __forceinline__ int entry_feature(int64_t e) {
  return static_cast<int>(e >> 32);
}

__device__ __forceinline__ float entry_value(int64_t e) {
  return __uint_as_float(static_cast<uint32_t>(e));
}

template <typename N>
__device__ __forceinline__ N warp_sum(N x) {
  for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

}  // namespace vllm_steering
