// SPDX-License-Identifier: Apache-2.0
// Barriers: mbarriers in shared memory (sm_90), a barrier of some of a block's
// warps, and one of all blocks of a grid.
#pragma once

#include <cstdint>

namespace vllm_steering {

// Synchronises the first `Threads` threads of a block, and only those.
template <int Threads>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(Threads) : "memory");
}

// Synchronises this thread's team: `Threads` neighbours of a block. Block-wide
// syncs and sync_threads are barriers 0 and 1.
template <int Threads>
__device__ __forceinline__ void sync_team() {
  asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.x / Threads + 2), "n"(Threads)
               : "memory");
}

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint32_t barrier_at(const uint64_t* bars, int i) {
  return smem_address(bars + i);
}

__device__ __forceinline__ void barrier_init(uint32_t bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar),
               "r"(arrivals));
}

// Makes the initialisations of this thread visible to asynchronous copies.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t bar, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t bar, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
}

// Announces that this block has reached the barrier. Blocks that wait see what
// this block wrote before a block-wide sync and this call.
__device__ __forceinline__ void grid_arrive(int* arrivals) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(arrivals)
               : "memory");
}

// Waits until `target` arrivals have been counted since the launch.
__device__ __forceinline__ void grid_wait(const int* arrivals, int target) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                 : "=r"(seen)
                 : "l"(arrivals)
                 : "memory");
  } while (seen < target);
}

// Called once by every block after its last wait. The last block resets the
// counters to zero for the next launch.
__device__ __forceinline__ void grid_leave(int* arrivals, int* exits) {
  if (atomicAdd(exits, 1) != static_cast<int>(gridDim.x) - 1) return;
  *arrivals = 0;
  *exits = 0;
}

}  // namespace vllm_steering
