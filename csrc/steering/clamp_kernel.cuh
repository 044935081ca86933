// SPDX-License-Identifier: Apache-2.0
// The delta tier of threshold SAEs, and the additive tier: one block a token.
//
//     x' = x + sum_c (g_c - f_c) W_dec[c],  f_c = act(x . W_enc[c] + b_enc[c])
//
// A steering vector that does more than add has the projection on it as f_c. A
// transcoder's f_c is of what it reads, its source, in place of x.
//
// Latency is the limit: a token reads a few rows, each from cold memory, and a
// row's address is known only after another load has returned. So the chain is
// index -> table row and x -> encoder rows, decoder rows, bias -> result. All
// loads of one link are in flight at once, and the code is small because it is
// cold too. Encoder rows go to registers in the layout of the tensor
// core, which sums over a warp's columns without shuffles; decoder rows go to
// a ring in shared memory, where each thread reads only what it copied itself.
#pragma once

#include "clamp_rows.cuh"
#include "ptx/launch_control.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"

namespace vllm_steering {

// W: the element type of the directions w_dec.
template <typename T, typename W>
struct ClampArgs {
  Step step;
  Weights<T> weights;  // w_dec unused; without an encoder all of it
  Stream<T> stream;
  const W* directions;  // [F, D]
  const T* source;      // [tokens, D_in]; null: the encoder reads the stream
  int64_t source_stride;
  int d_model;  // the width of the stream
  bool gated;   // the slot may hold TopK modules: not this kernel's
};

// What the first warp does once every warp has its part of the dot products:
// four lanes a clamp add the warps' parts in a fixed order.
__device__ __forceinline__ float sum_over_warps(const float* partial) {
  const int lane = threadIdx.x, warps = blockDim.x / 32;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < (kClampWarps + 3) / 4; ++i) {
    const int warp = (lane & 3) + 4 * i;
    sum += warp < warps ? partial[warp * kClampGroup + lane / 4] : 0.f;
  }
  sum += __shfl_xor_sync(~0u, sum, 1);
  return sum + __shfl_xor_sync(~0u, sum, 2);
}

__device__ __forceinline__ float float_warp_sum(float x) {
#pragma unroll 1
  for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// One warp: a clamp whose condition does not hold changes nothing. Places of
// conditions have 1 in `bias` where they hold, else 0.
__device__ __forceinline__ void apply_conditions(const StagedRow& row) {
  __syncwarp();
#pragma unroll 1
  for (int c = threadIdx.x; c < row.count; c += 32) {
    const int needed = (row.code[c] >> kConditionShift) - 1;
    if (needed >= 0 && row.bias[needed] == 0.f) row.delta[c] = 0.f;
  }
}

// Turns values into g - f, sums the stream and starts the ring; false where
// the norm is past its limit. A warp owns 256 columns. In the tensor core's
// terms clamp c is column c of B, and x is in A: the first halves of 16 bytes
// in rows 0-7, the second in rows 8-15. So of the products with the halves of
// W, `low` is right in the upper rows and `high` in the lower ones. The order
// of columns within a product is free, so lanes load 16 bytes of a row at once.
// With kSource `stream` is the source, and the ring has been started: a warp
// may own columns of the stream and none of the source. An encoder that ranks
// share sends the activations instead of turning them into g - f.
template <typename T, bool kTwo, bool kSource, typename Encoder = WholeEncoder>
__device__ __forceinline__ bool resolve_clamps(
    const T* w_enc, const TokenStream<T, kTwo>& stream, const StagedRow& row,
    RowRing<T, T>& ring, const Encoder& encoder = {}) {
  // Read in pairs.
  __shared__ __align__(8) float partial[2][kClampWarps * kClampGroup];
  __shared__ float norms[kClampWarps];
  __shared__ bool within;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned quad = lane & 3;
  const unsigned d_model = stream.d_model;
  float square = 0.f;
  int conditions = 0;
#pragma unroll 1
  for (int first = 0, turn = 0; first == 0 || first < row.count;
       first += kClampGroup, turn ^= 1) {
    const int clamp = first + lane / 4;
    const bool needs = reads_activation(row.code[clamp]) &&
                       encoder.encodes(row.feature[clamp]);
    const T* w_row = w_enc + quad * 8 +
                     static_cast<uint64_t>(static_cast<uint32_t>(
                         encoder.row(row.feature[clamp]))) *
                         d_model;
    float low[4] = {}, high[4] = {};
#pragma unroll 1
    for (unsigned base = warp * 256; base < d_model; base += blockDim.x * 8) {
      const int inside =
          needs ? static_cast<int>(d_model - base - quad * 8) : 0;
      uint4 w[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        w[i] = load_if(w_row + base + 32 * i, 32 * i < inside);
      uint4* const columns = stream.x + base / 8;
      if (first == 0) {
        if (!kSource && base == warp * 256) ring.start(row);
        wait_copies<2>();  // all but the ring
        const Pack8<T> sum = stream.combine(base / 8 + lane);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 two = unpack2<T>(sum.two[k]);
          square = fmaf(two.x, two.x, fmaf(two.y, two.y, square));
        }
        columns[lane] = swap_middle(sum.raw);
        __syncwarp();
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint4 x = columns[4 * i + quad];
        mma(low, x, w[i].x, w[i].y, T());
        mma(high, x, w[i].z, w[i].w, T());
      }
    }
    if (lane < 4)
      reinterpret_cast<float2*>(partial[turn])[warp * 4 + lane] =
          make_float2(low[0] + high[2], low[1] + high[3]);
    if (first == 0) {
      square = float_warp_sum(square);
      if (lane == 0) norms[warp] = square;
    }
    __syncthreads();
    if (warp != 0) continue;
    const float bias = row.bias[clamp];
    const float p = sum_over_warps(partial[turn]) + bias;
    const bool fires = needs && p > fmaxf(row.threshold[clamp], 0.f);
    if constexpr (Encoder::kShared) {
      if (quad == 0 && needs) encoder.send(clamp, fires ? p : 0.f);
    } else if (quad == 0) {
      const int code = row.code[clamp];
      const float value = row.delta[clamp], f = fires ? p : 0.f;
      row.delta[clamp] = clamp_delta(code, value, f);
      if ((code & (kIfAbove | kIfBelow)) != 0)
        row.bias[clamp] = holds(code, value, f) ? 1.f : 0.f;
      conditions |= code >> kConditionShift;
    }
    if (first != 0) continue;
    square = float_warp_sum(lane < blockDim.x / 32 ? norms[lane] : 0.f);
    if (lane == 0) within = sqrtf(square) <= row.head->norm_limit;
  }
  if (warp == 0 && __any_sync(~0u, conditions != 0)) apply_conditions(row);
  __syncthreads();
  return within;
}

// Turns the values of vectors that want more than to be added into g - f, in
// units of the vector: a projection is on the unit vector, a relative value is
// in units of the norm. A warp takes a clamp.
template <typename T, bool kTwo>
__device__ __forceinline__ void resolve_vectors(
    const float* directions, const TokenStream<T, kTwo>& stream,
    const StagedRow& row, float norm) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int c = threadIdx.x / 32; c < row.count; c += blockDim.x / 32) {
    const int code = row.code[c];
    if (code < kProjection) continue;
    const float* v =
        directions + static_cast<uint64_t>(row.feature[c]) * stream.d_model;
    float dot = 0.f, square = 0.f;
#pragma unroll 4
    for (unsigned i = lane; i * 8 < stream.d_model; i += 32) {
      const Pack8<T> x = stream.combine(i);
      const float4 v0 = reinterpret_cast<const float4*>(v + i * 8)[0];
      const float4 v1 = reinterpret_cast<const float4*>(v + i * 8)[1];
      const float along[8] = {v0.x, v0.y, v0.z, v0.w, v1.x, v1.y, v1.z, v1.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 two = unpack2<T>(x.two[k]);
        dot = fmaf(two.x, along[2 * k], fmaf(two.y, along[2 * k + 1], dot));
        square = fmaf(along[2 * k], along[2 * k],
                      fmaf(along[2 * k + 1], along[2 * k + 1], square));
      }
    }
    dot = float_warp_sum(dot);
    const float length = sqrtf(float_warp_sum(square));
    if (lane != 0) continue;
    const bool projects = (code & kProjection) != 0;
    const float value = row.delta[c] * ((code & kRelative) != 0 ? norm : 1.f);
    const float f = projects && length > 0.f ? dot / length : 0.f;
    const float delta = clamp_delta(code, value, f);
    // A vector of zeros has no direction: whatever it is scaled by adds 0.
    const float scaled = length > 0.f ? limit_coefficient(delta / length) : 0.f;
    row.delta[c] = projects ? scaled : delta;
  }
}

// Resolves vectors; false where the norm of the token's stream exceeds
// float32. `extended`: a clamp of this thread wants more than to be added.
template <typename T, bool kTwo>
__device__ __forceinline__ bool prepare_vectors(
    const float* directions, const TokenStream<T, kTwo>& stream,
    const StagedRow& row, bool extended) {
  __shared__ float norms[kClampWarps];
  float square = 0.f;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i * 8 < stream.d_model; i += blockDim.x) {
    const Pack8<T> x = stream.combine(i);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 two = unpack2<T>(x.two[k]);
      square = fmaf(two.x, two.x, fmaf(two.y, two.y, square));
    }
  }
  // Usually every share is far below the bound, and so is their sum.
  constexpr float kLargest = 3.402823466e38f;
  const bool usual = !extended && square <= kLargest / kClampThreads;
  if (!__syncthreads_or(!usual)) return true;
  square = float_warp_sum(square);
  if (threadIdx.x % 32 == 0) norms[threadIdx.x / 32] = square;
  __syncthreads();
  float total = 0.f;
#pragma unroll 1
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += norms[w];
  if (!(total <= kLargest)) return false;
  resolve_vectors(directions, stream, row, sqrtf(total));
  __syncthreads();
  return true;
}

// Starts copying the clamps of a table row; entries past the count become
// clamps that add 0. Without an encoder an entry has its g - f at once, or this
// returns true.
template <bool kEncodes, typename T>
__device__ __forceinline__ bool load_clamps(const Weights<T>& weights,
                                            const ClampRow& from,
                                            const StagedRow& row) {
  const int most = from.max_clamps;
  bool extended = false;
#pragma unroll 1
  for (int c = threadIdx.x; c < padded_clamps(most); c += blockDim.x) {
    const int* entry = from.packed + 2 + c;  // one round trip for all loads
    const int feature = load_if(entry, c < most, 0);
    const int code = load_if(entry + most, c < most, kAdditive);
    const int bits = load_if(entry + 2 * most, c < most, 0);
    const bool inside = c < load_now(from.packed + 1);
    row.feature[c] = inside ? feature : 0;
    row.code[c] = inside ? code : kAdditive;
    float value = inside ? __int_as_float(bits) : 0.f;
    if constexpr (kEncodes) {
      const bool needs = inside && reads_activation(code);
      copy_async<4>(row.bias + c, weights.b_enc + feature, needs);
      copy_async<4>(row.threshold + c, weights.threshold + feature, needs);
    } else if (inside && code >= kProjection) {
      extended = true;
    } else {
      value = clamp_delta(inside ? code : kAdditive, value, 0.f);
    }
    row.delta[c] = value;
  }
  return extended;
}

// Work of the last thread meanwhile: its warp usually loads no clamps.
template <bool kEncodes, typename T, typename W>
__device__ __forceinline__ void load_head(const ClampArgs<T, W>& a, uint64_t t,
                                          const ClampRow& from,
                                          StagedRow::Head* head) {
  int blocked = 0, topk = 0, limit = 0;
  if constexpr (kEncodes) {
    limit = load_now(reinterpret_cast<const int*>(a.weights.norm_limit));
    topk = load_now(a.weights.meta + kUsesTopk);
    blocked = load_now(a.step.flags + t) & load_now(a.weights.meta + kSkipMask);
  }
  const int active = load_now(from.packed);
  head->count = min(load_now(from.packed + 1), from.max_clamps);
  head->on = active != 0 && blocked == 0 && !(a.gated && topk != 0);
  head->norm_limit = __int_as_float(limit);
}

// Writes x' of the thread's columns, once the deltas are known; true where a
// component was limited. kSwapped: the stream's sum is in shared memory, as
// `resolve_clamps` leaves it.
template <typename T, typename W, bool kSwapped, bool kTwo>
__device__ __forceinline__ bool add_rows(const TokenStream<T, kTwo>& stream,
                                         const StagedRow& row,
                                         RowRing<T, W>& ring) {
  bool over = false;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i * 8 < stream.d_model; i += blockDim.x) {
    Pack8<T> x;
    if constexpr (kSwapped)
      x.raw = swap_middle(stream.x[i]);
    else
      x = stream.combine(i);
    float acc[8];
    ring.sum(acc, x, row);
    over |= stream.write(i * 8, acc);
  }
  return over;
}

// Turns the clamps' values into g - f; false where the token is left alone.
template <bool kEncodes, bool kSource, typename T, typename W, bool kTwo>
__device__ __forceinline__ bool resolve(const ClampArgs<T, W>& a,
                                        const TokenStream<T, kTwo>& stream,
                                        const TokenStream<T, false>& source,
                                        const StagedRow& row, bool extended,
                                        RowRing<T, W>& ring) {
  if constexpr (kSource) {
    ring.start(row);
    wait_copies<2>();  // all but the ring
    return resolve_clamps<T, false, true>(a.weights.w_enc, source, row, ring);
  } else if constexpr (kEncodes) {
    return resolve_clamps<T, kTwo, false>(a.weights.w_enc, stream, row, ring);
  } else {
    ring.start(row);
    wait_copies<2>();  // all but the ring
    return prepare_vectors(a.directions, stream, row, extended);
  }
}

template <typename T, typename W, bool kEncodes, bool kTwo, bool kSource>
__global__ void __launch_bounds__(kClampThreads, 2)
    clamp_kernel(const __grid_constant__ ClampArgs<T, W> a) {
  extern __shared__ uint4 shared[];
  __shared__ StagedRow::Head head;
  __shared__ int counted;
  const uint64_t t = blockIdx.x;
  // This does not read what the previous kernel wrote; it only moves it to L2.
  if (threadIdx.x == 0) prefetch_line(a.step.index + t);
  wait_for_previous();
  launch_dependents();
  const uint32_t index = load_now(a.step.index + t);
  if (index == 0) return;  // row 0 is empty: most launches end here

  const ClampRow from = a.step.table.row(index);
  const int padded = padded_clamps(from.max_clamps);
  uint4* const x = shared + kRingPitch * blockDim.x;
  StagedRow row(
      shared + clamp_parts(blockDim.x, a.d_model, kSource ? a.weights.d_in : 0),
      padded, &head);
  const TokenStream<T, kTwo> stream = {
      a.stream.hidden + t * static_cast<uint32_t>(a.stream.hidden_stride),
      a.stream.residual + t * static_cast<uint32_t>(a.stream.residual_stride),
      x, static_cast<unsigned>(a.d_model)};
  const TokenStream<T, false> source = {
      const_cast<T*>(a.source) + t * static_cast<uint32_t>(a.source_stride),
      nullptr, x + 2 * padded_parts(a.d_model),
      static_cast<unsigned>(a.weights.d_in)};
  // The table first: the addresses of everything else depend on it.
  const bool extended = load_clamps<kEncodes>(a.weights, from, row);
  if (threadIdx.x == blockDim.x - 1) load_head<kEncodes>(a, t, from, &head);
  if (threadIdx.x == 0) counted = 0;
  stream.request();
  if constexpr (kSource) source.request();
  commit_copies();
  __syncthreads();

  row.count = head.count;
  bool within = head.on;
  if (within) {
    const unsigned own = threadIdx.x * 8;
    RowRing<T, W> ring = {shared + kRingPitch * threadIdx.x,
                          reinterpret_cast<const char*>(a.directions + own),
                          a.d_model, static_cast<int>(own)};
    constexpr bool kSwapped = kEncodes && !kSource;
    within = resolve<kEncodes, kSource>(a, stream, source, row, extended, ring);
    if (within) {
      const bool over = add_rows<T, W, kSwapped>(stream, row, ring);
      if constexpr (kEncodes)
        count_saturated(over, &counted, a.step.saturated);
      else if (over && atomicExch(&counted, 1) == 0)
        count_vectors(row.feature, row.count, a.step.saturated);
    }
  }
  wait_copies<0>();  // none may land after the block has ended
}

}  // namespace vllm_steering
