// SPDX-License-Identifier: Apache-2.0
// The tensor cores of a warpgroup: D[64 x N] += A[64 x 16] B[N x 16]^T, float32
// accumulators, both operands in shared memory (128-byte swizzle), B K-major. A
// thread holds N / 2 accumulators. PTX ISA, "Asynchronous Warpgroup Level
// Matrix Instructions".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace vllm_steering {

// Shared memory descriptor of a 128-byte-swizzled operand at `address` whose
// groups of eight 128-byte rows follow one another: rows of A or B where it is
// K-major, of K where A is M-major.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  return (static_cast<uint64_t>(1) << 62) | (static_cast<uint64_t>(64) << 32) |
         (static_cast<uint64_t>(1) << 16) | ((address & 0x3FFFF) >> 4);
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most the `kLeft` groups committed last are under way.
template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// kTransposeA: A is M-major, that is, memory holds its transpose.
template <typename T, int N, bool kTransposeA = false>
struct Wgmma;

// clang-format off
// Operand names %0 to %(N/2 - 1) in the text: ten of a decade at a time.
#define STEERING_4(d) "%" d "0, %" d "1, %" d "2, %" d "3"
#define STEERING_6(d) STEERING_4(d) ", %" d "4, %" d "5"
#define STEERING_8(d) STEERING_6(d) ", %" d "6, %" d "7"
#define STEERING_10(d) STEERING_8(d) ", %" d "8, %" d "9"
#define STEERING_NAMES_4 STEERING_4("")
#define STEERING_NAMES_16 STEERING_10("") ", " STEERING_6("1")
#define STEERING_30 STEERING_10("") ", " STEERING_10("1") ", " STEERING_10("2")
#define STEERING_NAMES_32 STEERING_30 ", %30, %31"
#define STEERING_60 STEERING_30 ", " STEERING_10("3") ", " STEERING_10("4") ", " STEERING_10("5")
#define STEERING_NAMES_64 STEERING_60 ", " STEERING_4("6")
#define STEERING_NAMES_80 STEERING_60 ", " STEERING_10("6") ", " STEERING_10("7")
#define STEERING_90 STEERING_NAMES_80 ", " STEERING_10("8")
#define STEERING_NAMES_96 STEERING_90 ", " STEERING_6("9")
#define STEERING_NAMES_112 STEERING_90 ", " STEERING_10("9") ", " STEERING_10("10") ", %110, %111"
#define STEERING_NAMES_128                                                   \
  STEERING_60 ", " STEERING_10("6") ", " STEERING_10("7") ", " STEERING_10("8") ", " \
  STEERING_10("9") ", " STEERING_10("10") ", " STEERING_10("11") ", " STEERING_8("12")

// The accumulators as operands.
#define STEERING_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define STEERING_D16(i) STEERING_D4(i), STEERING_D4(i + 4), STEERING_D4(i + 8), STEERING_D4(i + 12)
#define STEERING_D32(i) STEERING_D16(i), STEERING_D16(i + 16)
#define STEERING_D64(i) STEERING_D32(i), STEERING_D32(i + 32)
#define STEERING_D80(i) STEERING_D64(i), STEERING_D16(i + 64)
#define STEERING_D96(i) STEERING_D64(i), STEERING_D32(i + 64)
#define STEERING_D112(i) STEERING_D96(i), STEERING_D16(i + 96)
#define STEERING_D128(i) STEERING_D64(i), STEERING_D64(i + 64)

// One instruction: element type in C++ and PTX, N, N / 2, whether A is M-major,
// and the numbers of the three operands behind the accumulators.
#define STEERING_WGMMA(T, ptx, n, half, transpose, a_, b_, more_)              \
  template <>                                                                  \
  struct Wgmma<T, n, transpose> {                                              \
    static __device__ __forceinline__ void mma(float (&d)[half], uint64_t a,   \
                                               uint64_t b, int accumulate) {   \
      asm volatile(                                                            \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %" #more_ ", 0;\n"                 \
          "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx "." ptx " {"   \
          STEERING_NAMES_##half "}, %" #a_ ", %" #b_ ", p, 1, 1, %"            \
          STEERING_NEXT_##half ", 0;\n}\n"                                     \
          : STEERING_D##half(0)                                                \
          : "l"(a), "l"(b), "r"(accumulate), "n"(transpose ? 1 : 0));          \
    }                                                                          \
  };
#define STEERING_NEXT_4 "7"
#define STEERING_NEXT_16 "19"
#define STEERING_NEXT_32 "35"
#define STEERING_NEXT_64 "67"
#define STEERING_NEXT_80 "83"
#define STEERING_NEXT_96 "99"
#define STEERING_NEXT_112 "115"
#define STEERING_NEXT_128 "131"

#define STEERING_WGMMA_WIDTHS(T, ptx, transpose)             \
  STEERING_WGMMA(T, ptx, 8, 4, transpose, 4, 5, 6)           \
  STEERING_WGMMA(T, ptx, 32, 16, transpose, 16, 17, 18)      \
  STEERING_WGMMA(T, ptx, 64, 32, transpose, 32, 33, 34)      \
  STEERING_WGMMA(T, ptx, 128, 64, transpose, 64, 65, 66)     \
  STEERING_WGMMA(T, ptx, 256, 128, transpose, 128, 129, 130)
STEERING_WGMMA_WIDTHS(__nv_bfloat16, "bf16", false)
STEERING_WGMMA_WIDTHS(__nv_bfloat16, "bf16", true)
STEERING_WGMMA_WIDTHS(__half, "f16", false)
STEERING_WGMMA_WIDTHS(__half, "f16", true)

// Of tiles of long steps.
#define STEERING_WGMMA_LONG(T, ptx)                     \
  STEERING_WGMMA(T, ptx, 160, 80, false, 80, 81, 82)    \
  STEERING_WGMMA(T, ptx, 192, 96, false, 96, 97, 98)    \
  STEERING_WGMMA(T, ptx, 224, 112, false, 112, 113, 114)
STEERING_WGMMA_LONG(__nv_bfloat16, "bf16")
STEERING_WGMMA_LONG(__half, "f16")

#undef STEERING_WGMMA_WIDTHS
#undef STEERING_WGMMA_LONG
#undef STEERING_WGMMA
#undef STEERING_NEXT_4
#undef STEERING_NEXT_16
#undef STEERING_NEXT_32
#undef STEERING_NEXT_64
#undef STEERING_NEXT_80
#undef STEERING_NEXT_96
#undef STEERING_NEXT_112
#undef STEERING_NEXT_128
#undef STEERING_D4
#undef STEERING_D16
#undef STEERING_D32
#undef STEERING_D64
#undef STEERING_D80
#undef STEERING_D96
#undef STEERING_D112
#undef STEERING_D128
#undef STEERING_4
#undef STEERING_6
#undef STEERING_8
#undef STEERING_10
#undef STEERING_30
#undef STEERING_60
#undef STEERING_NAMES_4
#undef STEERING_NAMES_16
#undef STEERING_NAMES_32
#undef STEERING_NAMES_64
#undef STEERING_90
#undef STEERING_NAMES_80
#undef STEERING_NAMES_96
#undef STEERING_NAMES_112
#undef STEERING_NAMES_128
// clang-format on

}  // namespace vllm_steering
