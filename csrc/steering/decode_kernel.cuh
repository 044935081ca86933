// SPDX-License-Identifier: Apache-2.0
// Stages 3 and 4 for few tokens: sort a token's entries, resolve its clamps,
// gather rows of W_dec.
//
//   full:  x' = b_dec + sum_i f_i W_dec[i] + sum_c (g_c - f_c) W_dec[c]
//   delta: x' = x + sum_c (g_c - f_c) W_dec[c]
//
// A transcoder's delta adds to what it replaces, and its b_dec may have a skip
// connection added (`base_of`).
//
// A block owns one token and some slices of D; its eight warps take the sorted
// entries in turn and their partial sums are added in a fixed order, so a
// token's bits depend neither on the run nor on its batch.
#pragma once

#include "decode.cuh"
#include "read.cuh"

namespace vllm_steering {

// The number of slots of the sorted list: entries, then clamps.
__host__ __device__ inline int list_slots(int max_clamps) {
  return kListMax + max_clamps;
}

// Bytes of shared memory: list (feature, weight), then features to sort or the
// partial sums, which are needed one after another.
static_assert(sizeof(LongReadMemory) <=
              kListMax * 8 + kDecodeWarps * kColumns * 4);
__host__ __device__ inline int decode_smem(int max_clamps) {
  return list_slots(max_clamps) * 8 + kDecodeWarps * kColumns * 4;
}

// Appends the clamps' corrections behind the entries; returns the new length.
template <typename T>
__device__ int append_clamps(const DecodeArgs<T>& a, const ClampRow& row,
                             int64_t i, int2* list, int n) {
  const int clamps = row.count();
  if (clamps == 0) return n;
  for (int c = team_thread(); c < clamps; c += kDecodeThreads) {
    const int feature = row.feature(c);
    const float delta = a.resolved ? a.ws.coef[i * row.max_clamps + c]
                                   : clamp_delta(row, c, [=](int f) {
                                       return find_feature(list, n, f);
                                     });
    list[n + c] = make_int2(feature, __float_as_int(delta));
  }
  sync_decoders();
  return n + clamps;
}

// acc += this warp's entries, `Ahead` rows in flight. Places past the end
// repeat the last entry with no weight: loads without branches are issued back
// to back.
template <int Ahead, typename T>
__device__ __forceinline__ void gather_list(float (&acc)[8], const int2* list,
                                            int n, const T* w_dec, int column,
                                            int d_out) {
  const T* columns = w_dec + min(column, d_out - 8);
#pragma unroll 1
  for (int j = team_thread() / 32; j < n; j += kDecodeWarps * Ahead) {
    Pack8<T> w[Ahead];
    float weight[Ahead];
#pragma unroll
    for (int u = 0; u < Ahead; ++u) {
      const int at = j + u * kDecodeWarps;
      const int2 e = list[min(at, n - 1)];
      weight[u] = at < n ? __int_as_float(e.y) : 0.f;
      w[u] = load8(columns + static_cast<int64_t>(e.x) * d_out);
    }
#pragma unroll
    for (int u = 0; u < Ahead; ++u) add_row(acc, w[u], weight[u]);
  }
}

// Sends a slice of a shared SAE's columns to all ranks.
template <typename T>
__device__ __forceinline__ void send_slice(const DecodeArgs<T>& a, int64_t i,
                                           int first, float total, bool over,
                                           unsigned round) {
  __shared__ __align__(16) T slice[kColumns];
  slice[threadIdx.x] = from_float<T>(total);
  const unsigned flag = slice_flag(round, __syncthreads_or(over) != 0);
  const int d_out = a.weights.d_out, n = min(kColumns, d_out - first);
  if ((a.parts & kPackets) != 0)
    push_column_packets(a.exchange, slice, i, d_out, first, n, flag);
  else
    push_slice(a.exchange, slice, i, d_out, first, n, first / kColumns, flag);
}

// Tells all ranks that nothing comes of a slice: the token is not written.
template <typename T>
__device__ __forceinline__ void send_nothing(const DecodeArgs<T>& a, int64_t i,
                                             int slice, unsigned round) {
  const unsigned flag = slice_flag(round, false);
  const int d_out = a.weights.d_out, first = slice * kColumns;
  if ((a.parts & kPackets) != 0)
    push_column_packets<T>(a.exchange, nullptr, i, d_out, first,
                           min(kColumns, d_out - first), flag);
  else
    release_slice(a.exchange, i, slice, flag);
}

// Waits for a slice of a shared SAE's token from all ranks, and writes it back:
// a warp a rank. `token` < 0: there is nothing to write.
template <typename T>
__device__ __forceinline__ void write_slice(const DecodeArgs<T>& a, int64_t i,
                                            int slice, int token,
                                            unsigned round, int* counted) {
  const Exchange& x = a.exchange;
  const int d_out = a.weights.d_out, lane = threadIdx.x & 31;
  const bool packets = (a.parts & kPackets) != 0;
  bool limited = false;
  if (!packets) {
    const bool over = wait_slices(x, i, round, slice, 1);
    limited = __syncthreads_or(over) != 0;
    if (token < 0) return;
  }
  const int column = slice * kColumns + lane * 8;
  for (int from = threadIdx.x / 32; from < x.size; from += kDecodeWarps) {
    if (column >= d_out) continue;
    const int c = from * d_out + column;
    bool over = false;
    const Pack8<T> out = packets ? wait_columns<T>(x, i, c, round, over)
                                 : load8(x.template row<T>(x.rank, i) + c);
    if (token < 0) continue;
    limited |= over;
    write_back(a.stream, token, c, out);
  }
  count_saturated(limited && (packets || threadIdx.x == 0), counted,
                  a.saturated);
}

// Adds the eight partial sums and the base, rounds once, writes back exactly.
template <bool kShared, typename T>
__device__ void finish_slice(const Partial& sum, const DecodeArgs<T>& a,
                             float* sums, int64_t i, T* hidden, T* residual,
                             int* counted, int first, unsigned round) {
  const int thread = team_thread(), warp = thread / 32, lane = thread % 32;
  float4* to = reinterpret_cast<float4*>(sums + warp * kColumns + lane * 8);
  to[0] = make_float4(sum.at[0], sum.at[1], sum.at[2], sum.at[3]);
  to[1] = make_float4(sum.at[4], sum.at[5], sum.at[6], sum.at[7]);
  const int c = first + thread;
  const bool inside = c < a.weights.d_out;
  float total = 0.f;
  if (inside && !a.delta) {
    total = base_of(a.weights, a.ws, i)[c];
  } else if (inside) {
    total = to_float(hidden[c]);
    if (residual != nullptr)  // rounded as the model rounds it
      total = to_float(from_float<T>(total + to_float(residual[c])));
  }
  sync_decoders();
  if constexpr (kShared) {
    bool over = false;
    if (inside) {
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w)
        total += sums[w * kColumns + thread];
      total = saturate<T>(total, over);
    }
    send_slice(a, i, first, total, over, round);
  } else if (inside) {
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) total += sums[w * kColumns + thread];
    bool over = false;
    total = saturate<T>(total, over);
    count_saturated(over, counted, a.saturated);
    if (residual != nullptr) {
      residual[c] = from_float<T>(total);
      hidden[c] = from_float<T>(0.f);
    } else {
      hidden[c] = from_float<T>(total);
    }
  }
  sync_decoders();
}

// The list of a token of a shared SAE; returns its length.
template <typename T>
__device__ __forceinline__ int shared_list(const DecodeArgs<T>& a, int64_t i,
                                           int listed, unsigned round,
                                           EntryLoads& mine) {
  __shared__ int counts[kMaxRanks];
  if (!a.joined) {
    mine = load_entries(a.ws.entries + i * a.ws.capacity,
                        a.delta ? 0 : a.ws.capacity);
    return listed;
  }
  __syncthreads();  // `counts` of the token before have been read
  const bool packets = (a.parts & kPackets) != 0;
  const int total = packets ? wait_lengths(a.exchange, i, round, counts)
                            : wait_lists(a.exchange, i, round, counts);
  // Of a dense token there are no entries.
  if (packets)
    mine = wait_joined(a.exchange, i, round, counts,
                       total <= kListMax ? total : 0);
  else
    mine = load_joined(a.exchange, i, counts, total);
  return total;
}

// The lists of n tokens. Teams share a token's slices in groups, as many as
// keep all of them busy: the list is sorted once a group, not once a slice.
// `Ahead` rows are in flight in a warp. With kReads a group more reads the
// token, or the last group does so too, where teams are scarce. `memory` is the
// team's own.
template <typename T, int Ahead, bool kReads, bool kShared>
__device__ __forceinline__ void decode_lists(const DecodeArgs<T>& a,
                                             char* memory, int n, int team,
                                             int teams, unsigned round) {
  int2* list = reinterpret_cast<int2*>(memory);
  float* scratch =
      reinterpret_cast<float*>(memory + list_slots(a.table.max_clamps) * 8);
  const int d_out = a.weights.d_out;
  const bool writes = kShared && (a.parts & kWrites) != 0;
  const int slices = (d_out + kColumns - 1) / kColumns;
  const int groups = max(1, min(slices, teams / max(n, 1)));
  const int room = a.delta ? 0 : a.ws.capacity;
  const bool apart = kReads && n * (groups + 1) <= teams;
  const int reader = apart ? groups : groups - 1;
  for (int work = team; work < n * (groups + apart); work += teams) {
    const int64_t i = work % n;
    const int64_t* own = a.ws.entries + i * a.ws.capacity;
    TokenRecord* record = a.ws.records + i;
    const int token = record->token;
    int listed = a.delta ? 0 : record->listed;
    EntryLoads mine;
    if constexpr (kShared) {
      listed = shared_list(a, i, listed, round, mine);
      // All of its activations count, and none past the norm limit.
      if (a.joined && work < n && team_thread() == 0) record->listed = listed;
    } else {
      mine = load_entries(own, room);
    }
    const bool edits = record->row != 0 && work < n * groups;
    const bool reads = kReads && record->read != 0 && work / n == reader;
    if constexpr (kShared) {
      if (listed <= kListMax && (token < 0 || !edits)) {
        for (int slice = work / n; slice < slices; slice += groups) {
          send_nothing(a, i, slice, round);
          if (writes) write_slice(a, i, slice, -1, round, &record->saturated);
        }
        continue;
      }
    } else if (token < 0 || !(edits || reads)) {
      continue;
    }
    if (listed > kListMax) {
      if (a.notes_dense && (edits || kShared) && work < n && team_thread() == 0)
        note_dense(a.ws, i);
      if (reads && listed <= a.ws.capacity)
        read_long(read_row(a.reads, record->read, token), own, listed,
                  *reinterpret_cast<LongReadMemory*>(memory));
      continue;
    }
    const ClampRow row = a.table.row(record->row);
    const int before = kShared ? a.exchange.rank * d_out : 0;
    T* h = a.stream.hidden + token * a.stream.hidden_stride + before;
    T* r = a.stream.residual == nullptr
               ? nullptr
               : a.stream.residual + token * a.stream.residual_stride + before;
    sort_entries(mine, listed, list, reinterpret_cast<int*>(scratch));
    if constexpr (kReads) {
      if (reads)
        read_list(read_row(a.reads, record->read, token), list, listed,
                  reinterpret_cast<unsigned long long*>(scratch));
      if (!edits) continue;
    }
    const int total = append_clamps(a, row, i, list, listed);
    for (int slice = work / n; slice < slices; slice += groups) {
      const int first = slice * kColumns,
                column = first + (threadIdx.x & 31) * 8;
      Partial sum = {};
      gather_list<Ahead>(sum.at, list, total, a.weights.w_dec, column, d_out);
      finish_slice<kShared>(sum, a, scratch, i, h, r, &record->saturated, first,
                            round);
    }
    if (writes)
      for (int slice = work / n; slice < slices; slice += groups)
        write_slice(a, i, slice, token, round, &record->saturated);
  }
}

// One team a block. Blocks share a multiprocessor by `Ahead`: many for many
// tokens, few for one token's latency.
template <typename T, int Ahead, bool kReads, bool kShared>
__global__ void __launch_bounds__(kDecodeThreads, 32 / Ahead)
    decode_kernel(const __grid_constant__ DecodeArgs<T> a) {
  extern __shared__ __align__(16) char memory[];
  launch_dependents();
  wait_for_previous();
  const int n = a.ws.tokens();
  unsigned round = 0;
  if constexpr (kShared) {
    if (n <= 0) return;
    round = a.exchange.round();
    if ((a.parts & kPushes) != 0) {
      if ((a.parts & kPackets) != 0)
        push_packets(a.ws, a.exchange, n, round);
      else
        push_lists(a.ws, a.exchange, n, round);
    }
    if ((a.parts & kDecodes) == 0) return;
  }
  decode_lists<T, Ahead, kReads, kShared>(a, memory, n, blockIdx.x, gridDim.x,
                                          round);
}

}  // namespace vllm_steering
