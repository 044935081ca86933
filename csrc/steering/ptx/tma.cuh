// SPDX-License-Identifier: Apache-2.0
// Bulk copies through tensor maps, the fence that orders them with ordinary
// accesses, and requests to L2.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace vllm_steering {

// Fetches a tensor map ahead of its first copy.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the box at (column, row) to shared memory; its bytes arrive at `bar`.
__device__ __forceinline__ void copy_tile(const CUtensorMap* map, uint32_t to,
                                          uint32_t bar, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::"
      "bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(bar), "r"(column), "r"(row)
      : "memory");
}

// Orders this thread's ordinary accesses with asynchronous copies around it.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

// The same for accesses to shared memory alone.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Asks L2 for one line, or for `bytes` (a multiple of 16).
__device__ __forceinline__ void prefetch_line(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

__device__ __forceinline__ void prefetch_bytes(const void* p, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p),
               "r"(bytes));
}

}  // namespace vllm_steering
