// SPDX-License-Identifier: Apache-2.0
// Copies to shared memory, and loads, that do not wait.
#pragma once

#include <cstdint>

namespace vllm_steering {

// Loads that the compiler does not move, so all are in flight before the first
// use. With a guard in C++ the compiler would wait for each of them.
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

// Copies 16 or 4 bytes, or writes zeros and reads nothing. It goes through L1,
// because the blocks of an SM often read the same rows.
template <int kBytes>
__device__ __forceinline__ void copy_async(const void* to, const void* from,
                                           bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "n"(kBytes), "r"(there ? kBytes : 0)
               : "memory");
}

// Copies 16 bytes past L1, or writes zeros and reads nothing. L2 fetches the
// 256 bytes around them.
__device__ __forceinline__ void stream_async(uint32_t to, const void* from,
                                             bool there) {
  asm volatile(
      "cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to),
      "l"(from), "r"(there ? 16 : 0)
      : "memory");
}

// This thread arrives at `bar` when its copies so far have landed; the barrier
// counts that arrival from the start.
__device__ __forceinline__ void arrive_after_copies(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar)
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

}  // namespace vllm_steering
