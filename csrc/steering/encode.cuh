// SPDX-License-Identifier: Apache-2.0
// Stage 2: p = x W_enc^T + b_enc on Hopper's tensor cores; only non-zeros
// leave.
//
// Features are the rows of the product (128 a tile, 64 for each of two consumer
// warpgroups) and tokens its columns, so few tokens make a narrow tile and
// W_enc streams through shared memory once, by bulk copies of one producer
// warp. The active count, known on the device only, picks the tile width.
// Entries of a token are appended in any order; the decoder sorts them.
#pragma once

#include <cuda.h>

#include "common.cuh"
#include "wgmma.cuh"

namespace vllm_steering {

constexpr int kTileF = 128;
constexpr int kTileK = 64;  // one 128-byte swizzle row of 16-bit numbers
constexpr int kWidths = 5;
constexpr int kConsumerWarps = 8;
constexpr int kEncodeThreads = 128 + kConsumerWarps * 32;
constexpr int kStageW = kTileF * kTileK * 2;
constexpr int kMaxStages = 8;
constexpr int kOperandBytes = 4 * (kStageW + 256 * kTileK * 2);
constexpr int kHitsPerLane = 16;
constexpr int kHitsPerWarp = 32 * kHitsPerLane;
constexpr int kEncodeSmem = kOperandBytes + kConsumerWarps * kHitsPerWarp * 8 +
                            2 * kMaxStages * 8 + 1024;

struct EncodeArgs {
  const float* b_enc;      // [F]
  const float* threshold;  // [F]
  const int* count;
  int* nnz;           // [rows, kCounterStride]
  int64_t* entries;   // [rows, capacity], or null
  float* scores;      // [rows, F], or null: dense output for TopK
  const char* w_dec;  // rows to prefetch into L2, or null
  int base, rows, num_features, d_model, capacity, group;
};

struct EncodeMaps {
  CUtensorMap w;           // box kTileF x kTileK
  CUtensorMap x[kWidths];  // box N x kTileK for N of the tile widths
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(uint32_t bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar),
               "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(uint32_t bar, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar),
      "r"(bytes)
      : "memory");
}

// Announces bytes without arriving: the phase stays open.
__device__ __forceinline__ void barrier_announce(uint32_t bar, int bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar),
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

// Fetches a tensor map ahead of its first copy.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void copy_tile(const CUtensorMap* map, uint32_t to,
                                          uint32_t bar, int k, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::"
      "bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(bar), "r"(k), "r"(row)
      : "memory");
}

// Shared memory descriptor of a K-major tile with 128-byte swizzle.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  return (static_cast<uint64_t>(1) << 62) | (static_cast<uint64_t>(64) << 32) |
         (static_cast<uint64_t>(1) << 16) | ((address & 0x3FFFF) >> 4);
}

// Walks the tiles of one block: a group of token tiles stays in L2 while the
// features pass, and the token tile is the fast index, so a tile of W_enc is
// fetched once.
struct TileWalk {
  int n_f, n_t, group;
  __device__ void at(int tile, int& f, int& t) const {
    const int first = tile / (group * n_f) * group;
    const int width = min(n_t - first, group);
    const int rest = tile % (group * n_f);
    t = first + rest % width;
    f = rest / width;
  }
};

// Where tile `f` of the features begins its reduction. Blocks that work side by
// side begin at different columns, or all would read the same lines of x at the
// same time; the order of a feature's sum depends on the feature alone.
__device__ __forceinline__ int first_k(int f, int k_tiles) {
  return f * 7 % k_tiles;
}

template <int N>
struct Shape {
  static constexpr int kStageX = N * kTileK * 2;
  static constexpr int kFit = kOperandBytes / (kStageW + kStageX);
  static constexpr int kStages = kFit < kMaxStages ? kFit : kMaxStages;
  static constexpr int kX0 = kStages * kStageW;  // where the x stages begin
};

template <int N>
__device__ void produce(const EncodeArgs& a, const CUtensorMap* w,
                        const CUtensorMap* x, uint32_t operands, uint32_t full,
                        uint32_t empty, TileWalk walk, int early) {
  using S = Shape<N>;
  const int k_tiles = (a.d_model + kTileK - 1) / kTileK;
  int it = 0;
  for (int tile = blockIdx.x; tile < walk.n_f * walk.n_t; tile += gridDim.x) {
    int f, t;
    walk.at(tile, f, t);
    int k = first_k(f, k_tiles);
    for (int step = 0; step < k_tiles; ++step, ++it) {
      const int s = it % S::kStages, round = it / S::kStages;
      if (round > 0) barrier_wait(empty + 8 * s, (round - 1) & 1);
      if (it < early) {  // this stage of W_enc was requested before x was ready
        barrier_expect(full + 8 * s, S::kStageX);
      } else {
        barrier_expect(full + 8 * s, kStageW + S::kStageX);
        copy_tile(w, operands + s * kStageW, full + 8 * s, k * kTileK,
                  f * kTileF);
      }
      copy_tile(x, operands + S::kX0 + s * S::kStageX, full + 8 * s, k * kTileK,
                t * N);
      k = k + 1 == k_tiles ? 0 : k + 1;
    }
  }
}

// Appends this lane's hits to their tokens' lists, four atomics in flight at a
// time.
__device__ __forceinline__ void append_hits(const EncodeArgs& a,
                                            const uint2* hits, int own, int f0,
                                            int t0) {
  const int most = __reduce_max_sync(~0u, own);
  for (int first = 0; first < most; first += 4) {
    uint2 hit[4];
    int slot[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if (first + u >= own) continue;
      hit[u] = hits[(first + u) * 32];
      slot[u] = atomicAdd(a.nnz + (t0 + (hit[u].x >> 8)) * kCounterStride, 1);
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if (first + u >= own || slot[u] >= a.capacity) continue;
      const int64_t f = f0 + (hit[u].x & 0xFF), t = t0 + (hit[u].x >> 8);
      a.entries[t * a.capacity + slot[u]] =
          f << 32 | static_cast<int64_t>(hit[u].y);
      if (a.w_dec != nullptr) {  // the decoder will want this row soon
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                         a.w_dec + f * a.d_model * 2),
                     "r"(a.d_model * 2));
      }
    }
  }
}

// Notes the hits among accumulators [From, To) in this lane's column of `hits`;
// returns how many there are, which may be more than fit.
template <int From, int To, int R>
__device__ __forceinline__ int note_hits(const float (&p)[R], float2 bias,
                                         float2 cut, uint2* hits,
                                         uint32_t where) {
  int own = 0;
#pragma unroll
  for (int i = From; i < To; ++i) {
    if (p[i] > (i & 2 ? cut.y : cut.x)) {
      // Token in the high bits, feature of the tile in the low eight.
      const uint32_t at =
          where + (((i / 4) * 8 + (i & 1)) << 8) + (i & 2 ? 8 : 0);
      const float value = p[i] + (i & 2 ? bias.y : bias.x);
      if (own < kHitsPerLane)
        hits[own * 32] = make_uint2(at, __float_as_uint(value));
      ++own;
    }
  }
  return own;
}

template <int From, int R>
__device__ __forceinline__ void emit_parts(const EncodeArgs& a,
                                           const float (&p)[R], float2 bias,
                                           float2 cut, uint2* hits,
                                           uint32_t where, int f0, int t0) {
  if constexpr (From < R) {
    constexpr int kTo = From + kHitsPerLane < R ? From + kHitsPerLane : R;
    append_hits(a, hits, note_hits<From, kTo>(p, bias, cut, hits, where), f0,
                t0);
    emit_parts<kTo>(a, p, bias, cut, hits, where, f0, t0);
  }
}

// Emits one tile's non-zeros: p > bar, tested as x W > bar - b.
template <int N>
__device__ __forceinline__ void emit_hits(const EncodeArgs& a,
                                          float (&p)[N / 2], float2 bias,
                                          float2 cut, uint2* hits, int row,
                                          int f0, int t0, int n) {
  const int lane = threadIdx.x & 31;
  if (t0 + N > n) {  // columns past the last token hold junk
    const int last = n - t0 - (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      if ((i / 4) * 8 + (i & 1) >= last) p[i] = __int_as_float(0xFF800000);
  }
  uint2* own_hits = hits + lane;
  const uint32_t where = ((lane & 3) * 2) << 8 | row;
  const int own = note_hits<0, N / 2>(p, bias, cut, own_hits, where);
  if (__any_sync(~0u, own > kHitsPerLane))  // many non-zeros: part by part
    emit_parts<0>(a, p, bias, cut, own_hits, where, f0, t0);
  else
    append_hits(a, own_hits, own, f0, t0);
}

template <int N>
__device__ void store_scores(const EncodeArgs& a, float (&p)[N / 2],
                             float2 bias, int f, int t0, int n) {
  const int first = t0 + (threadIdx.x & 3) * 2;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int t = first + (i / 4) * 8 + (i & 1);
    const int row = f + (i & 2 ? 8 : 0);
    if (t < n && row < a.num_features)
      a.scores[static_cast<int64_t>(t) * a.num_features + row] =
          p[i] + (i & 2 ? bias.y : bias.x);
  }
}

template <typename T, int N>
__device__ void consume(const EncodeArgs& a, uint32_t operands, uint32_t full,
                        uint32_t empty, uint2* hits, TileWalk walk, int n) {
  using S = Shape<N>;
  const int k_tiles = (a.d_model + kTileK - 1) / kTileK;
  const int group = threadIdx.x / 128 - 1, lane = threadIdx.x & 31;
  const int row = group * 64 + (threadIdx.x % 128) / 32 * 16 + lane / 4;
  uint2* own_hits = hits + (threadIdx.x / 32 - 4) * kHitsPerWarp;
  int it = 0;
  for (int tile = blockIdx.x; tile < walk.n_f * walk.n_t; tile += gridDim.x) {
    int f_tile, t_tile;
    walk.at(tile, f_tile, t_tile);
    const int f0 = f_tile * kTileF, f = f0 + row;
    const float inf = __int_as_float(0x7F800000);
    float2 bias = make_float2(-inf, -inf), cut = make_float2(inf, inf);
    if (f < a.num_features) {
      bias.x = a.b_enc[f];
      cut.x = fmaxf(a.threshold[f], 0.f) - bias.x;
    }
    if (f + 8 < a.num_features) {
      bias.y = a.b_enc[f + 8];
      cut.y = fmaxf(a.threshold[f + 8], 0.f) - bias.y;
    }
    float acc[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) acc[i] = 0.f;
    for (int k = 0; k < k_tiles; ++k, ++it) {
      const int s = it % S::kStages;
      barrier_wait(full + 8 * s, it / S::kStages & 1);
      const uint64_t w =
          tile_descriptor(operands + s * kStageW + group * 64 * 128);
      const uint64_t x = tile_descriptor(operands + S::kX0 + s * S::kStageX);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int kk = 0; kk < kTileK / 16; ++kk)
        Wgmma<T, N>::mma(acc, w + 2 * kk, x + 2 * kk, 1);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      // The product of the previous stage is done: its buffers may be refilled.
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (k > 0 && threadIdx.x % 128 == 0)
        barrier_arrive(empty + 8 * ((it - 1) % S::kStages));
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");
    if (threadIdx.x % 128 == 0)
      barrier_arrive(empty + 8 * ((it - 1) % S::kStages));
    // Not sooner: blocks of the decoder would crowd on the few idle
    // multiprocessors.
    launch_dependents();
    if (a.scores != nullptr)
      store_scores<N>(a, acc, bias, f, t_tile * N, n);
    else
      emit_hits<N>(a, acc, bias, cut, own_hits, row, f0, t_tile * N, n);
  }
}

#endif

template <typename T>
__global__ void __launch_bounds__(kEncodeThreads, 1)
    encode_kernel(EncodeArgs a, const __grid_constant__ EncodeMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char raw[];
  const uint32_t pad = (1024 - (smem_address(raw) & 1023)) & 1023;
  char* memory = raw + pad;
  const uint32_t operands = smem_address(memory);
  uint2* hits = reinterpret_cast<uint2*>(memory + kOperandBytes);
  const uint32_t full =
      operands + kOperandBytes + kConsumerWarps * kHitsPerWarp * 8;
  const uint32_t empty = full + 8 * kMaxStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kMaxStages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 2);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const bool producer = threadIdx.x == 0;
  const int n_f = (a.num_features + kTileF - 1) / kTileF;
  // With one token tile at most, block b begins with feature tile b: its
  // weights are requested while the kernel before is still gathering x.
  const int k_tiles = (a.d_model + kTileK - 1) / kTileK;
  int early = a.rows <= 64 ? Shape<64>::kStages : Shape<256>::kStages;
  early = a.rows <= 256 ? min(early, k_tiles) : 0;
  if (producer) {
    for (int s = 0; s < early; ++s) {
      barrier_announce(full + 8 * s, kStageW);
      const int k = (first_k(blockIdx.x, k_tiles) + s) % k_tiles;
      copy_tile(&maps.w, operands + s * kStageW, full + 8 * s, k * kTileK,
                blockIdx.x * kTileF);
    }
    for (int i = 0; i < kWidths; ++i) prefetch_map(&maps.x[i]);
  }
  wait_for_previous();
  const int n = min(*a.count - a.base, a.rows);
  if (n <= 0) {
    launch_dependents();
    if (producer) {  // copies in flight must land before the block goes
      for (int s = 0; s < early; ++s) {
        barrier_arrive(full + 8 * s);
        barrier_wait(full + 8 * s, 0);
      }
    }
    return;
  }
  const int width = n <= 8     ? 8
                    : n <= 32  ? 32
                    : n <= 64  ? 64
                    : n <= 128 ? 128
                               : 256;
  const TileWalk walk{n_f, (n + width - 1) / width, a.group};
#define STEERING_WIDTHS(RUN) \
  if (width == 8) {          \
    RUN(8, 0);               \
  } else if (width == 32) {  \
    RUN(32, 1);              \
  } else if (width == 64) {  \
    RUN(64, 2);              \
  } else if (width == 128) { \
    RUN(128, 3);             \
  } else {                   \
    RUN(256, 4);             \
  }
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (producer) {
#define STEERING_PRODUCE(N, M) \
  produce<N>(a, &maps.w, &maps.x[M], operands, full, empty, walk, early)
      STEERING_WIDTHS(STEERING_PRODUCE)
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
#define STEERING_CONSUME(N, M) \
  consume<T, N>(a, operands, full, empty, hits, walk, n)
    STEERING_WIDTHS(STEERING_CONSUME)
  }
#undef STEERING_WIDTHS
#undef STEERING_PRODUCE
#undef STEERING_CONSUME
#endif
}

}  // namespace vllm_steering
