// SPDX-License-Identifier: Apache-2.0
// Loads and stores that order memory among the GPUs of a host.
#pragma once

#include <cstdint>

namespace vllm_steering {

// What this thread wrote, and what others of its block wrote before a barrier,
// is visible to whoever acquires the value.
__device__ __forceinline__ void store_release(unsigned* to, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value)
               : "memory");
}

__device__ __forceinline__ void store_release(uint64_t* to, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value)
               : "memory");
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(from)
               : "memory");
  return value;
}

__device__ __forceinline__ uint64_t load_acquire(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];"
               : "=l"(value)
               : "l"(from)
               : "memory");
  return value;
}

// A number that says by itself whether it has come: one access of 8 bytes,
// which orders nothing.
__device__ __forceinline__ void store_packet(uint64_t* to, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value)
               : "memory");
}

__device__ __forceinline__ uint64_t load_packet(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];"
               : "=l"(value)
               : "l"(from)
               : "memory");
  return value;
}

}  // namespace vllm_steering
