// SPDX-License-Identifier: Apache-2.0
// The integer tensor cores of a warpgroup: D[64 x N] += A[64 x 32] B[N x 32]^T,
// signed bytes, exact 32-bit sums. B is in shared memory (128-byte swizzle,
// K-major), A likewise or in registers. A thread holds N / 2 sums, in the
// places that wgmma.cuh describes, and of A in registers the bytes 4 (lane % 4)
// .. + 3 of its rows (row lane / 4 of a warp's 16, then 8 below), then the same
// 16 columns further.
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
#define STEERING_D32(i) STEERING_D16(i), STEERING_D16(i + 16)
#define STEERING_D64(i) STEERING_D32(i), STEERING_D32(i + 32)

// One width: N, N / 2, and the numbers of the operands behind the sums.
#define STEERING_WGMMA_INT8(n, half, o0, o1, o2, o3, o4)                        \
  template <>                                                                   \
  struct WgmmaInt8<n> {                                                         \
    static __device__ __forceinline__ void mma(int (&d)[half], uint64_t a,      \
                                               uint64_t b) {                    \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                   \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {"     \
                   STEERING_NAMES_##half "}, %" #o0 ", %" #o1 ", p;\n}\n"       \
                   : STEERING_D##half(0)                                        \
                   : "l"(a), "l"(b));                                           \
    }                                                                           \
    static __device__ __forceinline__ void mma(                                 \
        int (&d)[half], const uint32_t (&a)[4], uint64_t b) {                   \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                   \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {"     \
                   STEERING_NAMES_##half "}, {%" #o0 ", %" #o1 ", %" #o2 ", %"  \
                   #o3 "}, %" #o4 ", p;\n}\n"                                   \
                   : STEERING_D##half(0)                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));       \
    }                                                                           \
  };
STEERING_WGMMA_INT8(16, 8, 8, 9, 10, 11, 12)
STEERING_WGMMA_INT8(32, 16, 16, 17, 18, 19, 20)
STEERING_WGMMA_INT8(64, 32, 32, 33, 34, 35, 36)
STEERING_WGMMA_INT8(128, 64, 64, 65, 66, 67, 68)

#undef STEERING_WGMMA_INT8
#undef STEERING_D4
#undef STEERING_D8
#undef STEERING_D16
#undef STEERING_D32
#undef STEERING_D64
#undef STEERING_8
#undef STEERING_10
#undef STEERING_30
#undef STEERING_NAMES_8
#undef STEERING_NAMES_16
#undef STEERING_NAMES_32
#undef STEERING_NAMES_64
// clang-format on

}  // namespace vllm_steering
