// SPDX-License-Identifier: Apache-2.0
// Stages 3 and 4 of a short step in one launch: tokens that lists hold, then
// those that none holds.
//
// A block fills a multiprocessor with teams, each of which decodes lists as a
// block of decode_kernel.cuh does. If some list of the step is too long, the
// first three warpgroups of every block take the items of dense_kernel.cuh
// afterwards. Every block finds the dense tokens itself, in order, from the
// lengths of the lists; and the scratch memory of dense tokens is not that of
// the lists, which other blocks may still read. So no block waits for another
// before it takes items.
#pragma once

#include <algorithm>

#include "decode_kernel.cuh"
#include "dense_kernel.cuh"
#include "ptx/cp_async.cuh"

namespace vllm_steering {

// Teams of a block: the registers of a multiprocessor, by rows in flight.
template <int Ahead>
constexpr int kTeams = 32 / Ahead;

template <typename T>
struct DecodeAllArgs {
  DecodeArgs<T> lists;
  DenseArgs<T> dense;
};

// Bytes of shared memory of a team, and of a block, which has it anew for dense
// tokens.
__host__ __device__ inline int team_smem(int max_clamps) {
  return (decode_smem(max_clamps) + 15) / 16 * 16;
}
inline int decode_all_smem(int teams, int max_clamps) {
  return std::max(kDenseSmem<64>, teams * team_smem(max_clamps));
}

// Lists the dense tokens among n in order; returns how many.
template <typename T>
__device__ __forceinline__ int find_dense(const Workspace<T>& ws,
                                          DenseMemory<64>& m, int n) {
  __shared__ int votes[kEncodeThreads / 32];
  const int i = threadIdx.x, warp = i / 32, lane = i % 32;
  bool dense = false;
  if (i < n) {
    const TokenRecord& r = ws.records[i];
    dense = r.listed > kListMax && r.token >= 0 && r.row != 0;
  }
  const unsigned own = __ballot_sync(~0u, dense);
  if (lane == 0) votes[warp] = __popc(own);
  __syncthreads();
  int before = 0, total = 0;
#pragma unroll
  for (int w = 0; w < kEncodeThreads / 32; ++w) {
    if (w == warp) before = total;
    total += votes[w];
  }
  if (dense)
    m.tokens[before + __popc(own & ((1u << lane) - 1))] =
        static_cast<uint8_t>(i);
  __syncthreads();
  return total;
}

template <typename T, int Ahead, bool kReads>
__global__ void __launch_bounds__(kTeams<Ahead>* kDecodeThreads, 1)
    decode_all_kernel(const __grid_constant__ DecodeAllArgs<T> a,
                      const __grid_constant__ DenseMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(16) char raw[];
  launch_dependents();
  wait_for_previous();
  const Workspace<T>& ws = a.lists.ws;
  const int n = ws.tokens();
  if (n <= 0) return;
  // Requested now, and looked at when lists are done.
  int listed = 0;
  if (static_cast<int>(threadIdx.x) < n)
    listed = load_now(&ws.records[threadIdx.x].listed);
  const int team = threadIdx.x / kDecodeThreads;
  decode_lists<T, Ahead, kReads, false>(
      a.lists, raw + team * team_smem(a.lists.table.max_clamps), n,
      blockIdx.x + team * gridDim.x, gridDim.x * kTeams<Ahead>, 0);
  if (!__syncthreads_or(listed > kListMax)) return;
  if (threadIdx.x >= kEncodeThreads) return;
  DenseMemory<64>& m = *reinterpret_cast<DenseMemory<64>*>(aligned_memory(raw));
  const int dense = find_dense(ws, m, n);
  if (dense > 0)
    run_dense<64>(a.dense, m, maps, dense,
                  [&](int d) -> int { return m.tokens[d]; });
#else
  __trap();
#endif
}

}  // namespace vllm_steering
