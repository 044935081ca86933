// SPDX-License-Identifier: Apache-2.0
// The instructions that clamp.cuh is made of: packed numbers, loads and copies
// that do not wait, the tensor core.
#pragma once

#include "common.cuh"

namespace vllm_steering {

// Eight 16-bit numbers as four words of two.
union Words {
  uint4 raw;
  uint32_t at[4];
};

__device__ __forceinline__ float2 unpack(uint32_t two, __nv_bfloat16) {
  return make_float2(__uint_as_float(two << 16),
                     __uint_as_float(two & 0xffff0000u));
}

__device__ __forceinline__ float2 unpack(uint32_t two, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&two));
}

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}

__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  const __half2 two = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}

// Loads that stay where they are written, all in flight before the first use.
// A guard in C++ would make the compiler wait for one after the other.
__device__ __forceinline__ uint4 load_if(const void* from, bool there) {
  uint4 v;
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.s32 p, %5, 0;\n"
      " mov.b32 %0, 0;\n mov.b32 %1, 0;\n mov.b32 %2, 0;\n mov.b32 %3, 0;\n"
      " @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(from), "r"(static_cast<int>(there))
      : "memory");
  return v;
}

__device__ __forceinline__ int load_if(const int* from, bool there,
                                       int otherwise) {
  int v = otherwise;
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.s32 p, %2, 0;\n"
      " @p ld.global.b32 %0, [%1];\n}"
      : "+r"(v)
      : "l"(from), "r"(static_cast<int>(there))
      : "memory");
  return v;
}

__device__ __forceinline__ int load_now(const int* from) {
  return load_if(from, true, 0);
}

// Copies 16 or 4 bytes, or writes zeros and reads nothing. Through L1, for the
// blocks of an SM often want the same rows.
template <int kBytes>
__device__ __forceinline__ void copy_async(const void* to, const void* from,
                                           bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "n"(kBytes), "r"(there ? kBytes : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the `kLeft` groups of copies committed last are under
// way.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

__device__ __forceinline__ void mma(float (&c)[4], const uint4& a, uint32_t b0,
                                    uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&c)[4], const uint4& a, uint32_t b0,
                                    uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Swaps the middle words: between the order in memory and that of the tensor
// core's A, whose words 0 and 2 are columns of rows 0-7, 1 and 3 of rows 8-15.
__device__ __forceinline__ uint4 swap_middle(const uint4& v) {
  return make_uint4(v.x, v.z, v.y, v.w);
}

}  // namespace vllm_steering
