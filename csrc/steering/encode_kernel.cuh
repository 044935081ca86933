// SPDX-License-Identifier: Apache-2.0
// Stage 2: p = x W_enc^T + b_enc on Hopper's tensor cores; only non-zeros
// leave. Entries of a token are appended in any order; the decoder sorts them.
#pragma once

#include "pipeline.cuh"

namespace vllm_steering {

// The block's part of a launch, once its tokens are known.
template <Leaves kLeaves, bool kEven, typename T, typename Walk>
__device__ __forceinline__ void encode_tiles(const EncodeArgs<T>& a,
                                             EncodeMemory& m,
                                             const EncodeMaps& maps, int n,
                                             Walk walk) {
  if (threadIdx.x >= kConsumers) {
    give_registers<40>();
    producer<kEncodePeers, kLeaves, kEven>(a, m, maps, n, 0, walk);
  } else {
    take_registers<232>();
    consumer<kEncodePeers, kLeaves, kEven>(a, m, n, walk);
  }
  if (shares_tiles(n)) cluster_sync();
}

// Barriers are ready in every block of the cluster; returns the block's rank.
__device__ __forceinline__ int prepare_cluster(EncodeMemory& m,
                                               const EncodeMaps& maps) {
  if (threadIdx.x == kWeightsThread) {
    init_barriers(m, kEncodePeers);
    for (int i = 0; i < kWidths; ++i) prefetch_map(&maps.x[i]);
  }
  cluster_sync();
  return cluster_rank();
}

// A block of a kernel that encodes in clusters, ready for its tiles.
struct EncodeBlock {
  EncodeMemory& memory;
  int rank;  // in its cluster
  int n;     // active tokens
};

// How every such kernel begins.
template <typename T>
__device__ __forceinline__ EncodeBlock begin_encode(const EncodeArgs<T>& a,
                                                    const EncodeMaps& maps) {
  extern __shared__ char raw[];
  EncodeMemory& memory = encode_memory(raw);
  const int rank = prepare_cluster(memory, maps);
  wait_for_previous();
  return {memory, rank, a.ws.tokens()};
}

template <typename T, bool kEven>
__global__ void __launch_bounds__(kEncodeThreads, 1)
    encode_kernel(const __grid_constant__ EncodeArgs<T> a,
                  const __grid_constant__ EncodeMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const auto [m, rank, n] = begin_encode(a, maps);
  if (n <= 0) return;
  encode_tiles<Leaves::kUsual, kEven>(
      a, m, maps, n,
      tile_walk<kEven>(a.weights.num_features, n, kEncodePeers, rank,
                       a.weights.first_feature));
#else
  __trap();
#endif
}

}  // namespace vllm_steering
