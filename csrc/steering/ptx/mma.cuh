// SPDX-License-Identifier: Apache-2.0
// The tensor core of one warp: C[16 x 8] += A[16 x 16] B[16 x 8].
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace vllm_steering {

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
