// SPDX-License-Identifier: Apache-2.0
// The integer tensor cores of a warpgroup: D[64 x N] += A[64 x 32] B[N x 32]^T,
// signed bytes in shared memory (128-byte swizzle, K-major), exact 32-bit sums.
// A thread holds N / 2 of them, in the places that wgmma.cuh describes.
#pragma once

#include "wgmma.cuh"

namespace vllm_steering {

template <int N>
struct WgmmaInt8;

// clang-format off
#define STEERING_8(d) "%" d "0, %" d "1, %" d "2, %" d "3, %" d "4, %" d "5, %" d "6, %" d "7"
#define STEERING_10(d) STEERING_8(d) ", %" d "8, %" d "9"
#define STEERING_NAMES_8 STEERING_8("")
#define STEERING_NAMES_16 STEERING_10("") ", %10, %11, %12, %13, %14, %15"
#define STEERING_30 STEERING_10("") ", " STEERING_10("1") ", " STEERING_10("2")
#define STEERING_NAMES_32 STEERING_30 ", %30, %31"
#define STEERING_NAMES_64                                                      \
  STEERING_30 ", " STEERING_10("3") ", " STEERING_10("4") ", " STEERING_10("5") \
  ", %60, %61, %62, %63"

#define STEERING_D4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define STEERING_D8(i) STEERING_D4(i), STEERING_D4(i + 4)
#define STEERING_D16(i) STEERING_D8(i), STEERING_D8(i + 8)
#define STEERING_D32(i) STEERING_D8(i), STEERING_D8(i + 8), STEERING_D8(i + 16), STEERING_D8(i + 24)
#define STEERING_D64(i) STEERING_D32(i), STEERING_D32(i + 32)

// One instruction: N, N / 2, and the numbers of the two operands behind.
#define STEERING_WGMMA_INT8(n, half, a_, b_)                                    \
  template <>                                                                   \
  struct WgmmaInt8<n> {                                                         \
    static __device__ __forceinline__ void mma(int (&d)[half], uint64_t a,      \
                                               uint64_t b) {                    \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                   \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {"     \
                   STEERING_NAMES_##half "}, %" #a_ ", %" #b_ ", p;\n}\n"       \
                   : STEERING_D##half(0)                                        \
                   : "l"(a), "l"(b));                                           \
    }                                                                           \
    static __device__ __forceinline__ void mma(                                 \
        int (&d)[half], const uint32_t (&a)[4], uint64_t b) {                   \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                   \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {"     \
                   STEERING_NAMES_##half "}, {%" #a_ ", %" #b_ ", %"            \
                   STEERING_NEXT_##half "}, %" STEERING_LAST_##half ", p;\n}\n"  \
                   : STEERING_D##half(0)                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));       \
    }                                                                           \
  };
#define STEERING_NEXT_8 "10, %11"
#define STEERING_LAST_8 "12"
#define STEERING_NEXT_16 "18, %19"
#define STEERING_LAST_16 "20"
#define STEERING_NEXT_32 "34, %35"
#define STEERING_LAST_32 "36"
#define STEERING_NEXT_64 "66, %67"
#define STEERING_LAST_64 "68"
STEERING_WGMMA_INT8(16, 8, 8, 9)
STEERING_WGMMA_INT8(32, 16, 16, 17)
STEERING_WGMMA_INT8(64, 32, 32, 33)
STEERING_WGMMA_INT8(128, 64, 64, 65)

#undef STEERING_WGMMA_INT8
#undef STEERING_D4
#undef STEERING_D8
#undef STEERING_D32
#undef STEERING_D64
#undef STEERING_8
#undef STEERING_10
#undef STEERING_30
#undef STEERING_NAMES_8
#undef STEERING_NAMES_32
#undef STEERING_NAMES_64
// clang-format on

}  // namespace vllm_steering
