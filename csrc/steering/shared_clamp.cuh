// SPDX-License-Identifier: Apache-2.0
// The delta tier of a threshold SAE that ranks share: one block a token.
//
// Each rank encodes those of a token's clamps whose features it holds, as
// clamp_kernel.cuh does, and stores the activations into all ranks' memory.
// With those of all ranks each computes its own columns, stores them there too,
// and writes the whole token when it has the others'.
//
// Regions of an arena, besides `columns` (exchange.cuh):
//
//   rounds  [rows] of 32 bits: how often the row has been used; of this rank
//   heads   [rows, ranks] of 64 bits: that a rank has begun the row's round
//   acts    [rows, clamps] of 64 bits: round and activation, from its owner
//   flags   [rows, ranks, slices] of 32 bits: whose columns have come
//
// A row has rounds of its own, because each block knows only about its token.
// Which tokens take part follows from integers that all ranks have, so all
// ranks count the same rounds. A rank stores columns only when all ranks have
// begun the round, hence have written the row's token of the round before; and
// it begins the next one only when it has all columns of this one, which its
// peers send after they have read its activations.
#pragma once

#include "clamp_kernel.cuh"
#include "exchange.cuh"

namespace vllm_steering {

// What a launch does. Blocks that wait for peers' blocks must all be resident:
// with many tokens each part is a launch of its own.
enum ClampPart { kSendActs = 1, kSendColumns = 2, kWriteTokens = 4 };

struct ClampExchange {
  Exchange x;
  int clamps, slices;  // the regions' room
  int64_t rounds, heads, acts, flags;
  int base, parts;  // tokens before this launch

  template <typename W>
  __device__ __forceinline__ W* at(int rank, int64_t offset) const {
    return reinterpret_cast<W*>(x.at[rank] + offset);
  }
  __device__ __forceinline__ unsigned* round(int64_t i) const {
    return at<unsigned>(x.rank, rounds) + i;
  }
  __device__ __forceinline__ uint64_t* head(int to, int from, int64_t i) const {
    return at<uint64_t>(to, heads) + i * x.size + from;
  }
  __device__ __forceinline__ uint64_t* act(int to, int64_t i, int c) const {
    return at<uint64_t>(to, acts) + i * clamps + c;
  }
  __device__ __forceinline__ unsigned* flag(int to, int from, int64_t i) const {
    return at<unsigned>(to, flags) + (i * x.size + from) * slices;
  }
};

template <typename T>
struct SharedClampArgs {
  ClampArgs<T, T> clamp;
  ClampExchange exchange;
};

// The features of this rank; where their activations go.
struct SharedEncoder {
  static constexpr bool kShared = true;
  const ClampExchange& exchange;
  int64_t i;
  unsigned round;
  int first, held;
  bool sends;

  __device__ __forceinline__ int row(int feature) const {
    return encodes(feature) ? feature - first : 0;
  }
  __device__ __forceinline__ bool encodes(int feature) const {
    return feature >= first && feature < first + held;
  }
  // One store carries the round too: nothing has to be ordered.
  __device__ __forceinline__ void send(int c, float f) const {
    if (!sends) return;
    const uint64_t packet =
        static_cast<uint64_t>(round) << 32 | __float_as_uint(f);
#pragma unroll 1
    for (int to = 0; to < exchange.x.size; ++to)
      store_packet(exchange.act(to, i, c), packet);
  }
};

// As load_clamps, with the biases and thresholds of this rank's features.
template <typename T>
__device__ __forceinline__ void load_shared_clamps(const Weights<T>& weights,
                                                   const ClampRow& from,
                                                   const StagedRow& row) {
  const int most = from.max_clamps;
#pragma unroll 1
  for (int c = threadIdx.x; c < padded_clamps(most); c += blockDim.x) {
    const int* entry = from.packed + 2 + c;
    const int feature = load_if(entry, c < most, 0);
    const int code = load_if(entry + most, c < most, kAdditive);
    const int bits = load_if(entry + 2 * most, c < most, 0);
    const bool inside = c < load_now(from.packed + 1);
    const int local = feature - weights.first_feature;
    const bool needs = inside && reads_activation(code) && local >= 0 &&
                       local < weights.num_features;
    row.feature[c] = inside ? feature : 0;
    row.code[c] = inside ? code : kAdditive;
    row.delta[c] = inside ? __int_as_float(bits) : 0.f;
    copy_async<4>(row.bias + c, weights.b_enc + (needs ? local : 0), needs);
    copy_async<4>(row.threshold + c, weights.threshold + (needs ? local : 0),
                  needs);
  }
}

// Waits for the activations of all ranks, and turns values into g - f.
__device__ __forceinline__ void receive_acts(const ClampExchange& e, int64_t i,
                                             unsigned round,
                                             const StagedRow& row) {
  const Exchange& x = e.x;
  if (threadIdx.x < x.size)
    while (load_acquire(e.head(x.rank, threadIdx.x, i)) != round) {
    }
#pragma unroll 1
  for (int c = threadIdx.x; c < row.count; c += blockDim.x) {
    const int code = row.code[c];
    float f = 0.f;
    if (reads_activation(code)) {
      const uint64_t* from = e.act(x.rank, i, c);
      uint64_t packet;
      do {
        packet = load_packet(from);
      } while (static_cast<unsigned>(packet >> 32) != round);
      f = __uint_as_float(static_cast<unsigned>(packet));
    }
    const float value = row.delta[c];
    row.delta[c] = clamp_delta(code, value, f);
    if ((code & (kIfAbove | kIfBelow)) != 0)
      row.bias[c] = holds(code, value, f) ? 1.f : 0.f;
  }
  __syncthreads();
#pragma unroll 1
  for (int c = threadIdx.x; c < row.count; c += blockDim.x) {
    const int needed = (row.code[c] >> kConditionShift) - 1;
    if (needed >= 0 && row.bias[needed] == 0.f) row.delta[c] = 0.f;
  }
  __syncthreads();
}

// Adds the clamps' rows to this rank's columns, a slice a warp, and sends them.
template <typename T, bool kTwo>
__device__ __forceinline__ void send_columns(const ClampExchange& e, int64_t i,
                                             unsigned round, unsigned width,
                                             const TokenStream<T, kTwo>& stream,
                                             const StagedRow& row,
                                             RowRing<T, T>& ring) {
  const Exchange& x = e.x;
  const unsigned parts = width / 8, lane = threadIdx.x % 32;
#pragma unroll 1
  for (unsigned p = threadIdx.x; p / 32 * 32 < parts; p += blockDim.x) {
    const bool inside = p < parts;
    const Pack8<T> own = {
        swap_middle(stream.x[x.rank * parts + min(p, parts - 1)])};
    float acc[8];
    ring.sum(acc, own, row);
    bool over = false;
    const Pack8<T> out = saturate8<T>(acc, over);
    if (inside)
#pragma unroll 1
      for (int to = 0; to < x.size; ++to)
        store8(x.row<T>(to, i) + x.rank * width + p * 8, out);
    const bool any = __any_sync(~0u, inside && over) != 0;
    __syncwarp();
    if (lane < x.size)
      store_release(e.flag(lane, x.rank, i) + p / 32, slice_flag(round, any));
  }
}

// Waits for all columns, a slice a warp, and writes them back; true where a
// component was limited. `writes`: the token's norm is within its limit.
template <typename T, bool kTwo>
__device__ __forceinline__ bool write_token(const ClampExchange& e, int64_t i,
                                            unsigned round, unsigned width,
                                            const TokenStream<T, kTwo>& stream,
                                            bool writes) {
  const Exchange& x = e.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slices = (width + kColumnsOfSlice - 1) / kColumnsOfSlice;
  bool limited = false;
#pragma unroll 1
  for (int k = warp; k < x.size * slices; k += blockDim.x / 32) {
    const int from = k / slices, slice = k % slices;
    unsigned seen = 0;
    if (lane == 0) {
      const unsigned* flag = e.flag(x.rank, from, i) + slice;
      do {
        seen = load_acquire(flag);
      } while (seen >> 1 != (round & 0x7FFFFFFF));
    }
    limited |= (__shfl_sync(~0u, seen, 0) & 1) != 0;
    const unsigned column = slice * kColumnsOfSlice + lane * 8;
    if (!writes || column >= width) continue;
    const unsigned d = from * width + column;
    store8((kTwo ? stream.residual : stream.hidden) + d,
           load8(x.row<T>(x.rank, i) + d));
    if constexpr (kTwo) store8(stream.hidden + d, zeros8<T>());
  }
  return limited;
}

template <typename T, bool kTwo>
__global__ void __launch_bounds__(kClampThreads, 2)
    shared_clamp_kernel(const __grid_constant__ SharedClampArgs<T> args) {
  extern __shared__ uint4 shared[];
  __shared__ StagedRow::Head head;
  __shared__ int counted;
  const ClampArgs<T, T>& a = args.clamp;
  const ClampExchange& e = args.exchange;
  const int64_t i = blockIdx.x;
  const uint64_t t = e.base + i;
  if (threadIdx.x == 0) prefetch_line(a.step.index + t);
  wait_for_previous();
  launch_dependents();
  const uint32_t index = load_now(a.step.index + t);
  if (index == 0) return;  // row 0 is empty: most launches end here

  const ClampRow from = a.step.table.row(index);
  const int padded = padded_clamps(from.max_clamps);
  uint4* const x = shared + kRingPitch * blockDim.x;
  StagedRow row(shared + clamp_parts(blockDim.x, a.d_model, 0), padded, &head);
  const TokenStream<T, kTwo> stream = {
      a.stream.hidden + t * static_cast<uint32_t>(a.stream.hidden_stride),
      a.stream.residual + t * static_cast<uint32_t>(a.stream.residual_stride),
      x, static_cast<unsigned>(a.d_model)};
  load_shared_clamps(a.weights, from, row);
  if (threadIdx.x == blockDim.x - 1) load_head<true>(a, t, from, &head);
  if (threadIdx.x == 0) counted = 0;
  stream.request();
  commit_copies();
  const unsigned round = *static_cast<volatile unsigned*>(e.round(i)) + 1;
  __syncthreads();

  row.count = head.count;
  if (head.on) {
    const bool begins = (e.parts & kSendActs) != 0;
    if (begins && blockDim.x - 1 - threadIdx.x < e.x.size)
      store_release(e.head(blockDim.x - 1 - threadIdx.x, e.x.rank, i),
                    static_cast<uint64_t>(round));
    const unsigned own = threadIdx.x * 8;
    const int width = a.weights.d_out;
    RowRing<T, T> ring = {shared + kRingPitch * threadIdx.x,
                          reinterpret_cast<const char*>(a.directions + own),
                          width, static_cast<int>(own)};
    const SharedEncoder encoder = {
        e, i, round, a.weights.first_feature, a.weights.num_features, begins};
    const bool within = resolve_clamps<T, kTwo, false>(a.weights.w_enc, stream,
                                                       row, ring, encoder);
    if ((e.parts & kSendColumns) != 0) {
      receive_acts(e, i, round, row);
      send_columns(e, i, round, width, stream, row, ring);
    }
    if ((e.parts & kWriteTokens) != 0) {
      const bool over = write_token(e, i, round, width, stream, within);
      count_saturated(within && over && threadIdx.x % 32 == 0, &counted,
                      a.step.saturated);
      __syncthreads();
      if (threadIdx.x == 0) *e.round(i) = round;
    }
  }
  wait_copies<0>();  // none may land after the block has ended
}

}  // namespace vllm_steering
