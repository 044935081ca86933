// SPDX-License-Identifier: Apache-2.0
// Blocks of a cluster (sm_90): their barrier, arrivals at one another's
// barriers, and a copy that lands in several of them.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace vllm_steering {

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Every thread of every block of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;\n" ::
          : "memory");
}

// Arrives at the barrier of block `rank` that lies where `bar` lies here. It
// orders no ordinary accesses of this thread for other blocks: that would be a
// fence of the whole GPU (at every stage, it made the encoder 25 % slower).
__device__ __forceinline__ void barrier_arrive_at(uint32_t bar, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(bar),
      "r"(rank)
      : "memory");
}

// Copies the box at (column, row) to the same place in the shared memory of
// each block of `mask`; its bytes arrive at the barrier of each.
__device__ __forceinline__ void copy_tile_to(const CUtensorMap* map,
                                             uint32_t to, uint32_t bar,
                                             int column, int row, int mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::"
      "bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(bar), "r"(column), "r"(row),
      "h"(static_cast<uint16_t>(mask))
      : "memory");
}

}  // namespace vllm_steering
