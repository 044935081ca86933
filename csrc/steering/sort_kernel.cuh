// SPDX-License-Identifier: Apache-2.0
// Stage 3 for many tokens: one block a token sorts its entries in place and
// writes coef = g - f of its clamps; and, with kReads, reads the token.
#pragma once

#include "decode.cuh"
#include "read.cuh"

namespace vllm_steering {

union SortMemory {
  struct {
    int2 list[kListMax];
    unsigned long long scratch[kListMax];  // features to sort, then keys
  };
  LongReadMemory reading;
};

template <typename T, bool kReads, bool kShared>
__global__ void __launch_bounds__(kDecodeThreads)
    sort_kernel(const __grid_constant__ DecodeArgs<T> a) {
  __shared__ __align__(16) SortMemory memory;
  __shared__ int counts[kMaxRanks];
  int2* list = memory.list;
  launch_dependents();
  wait_for_previous();
  const int n = a.ws.tokens();
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    TokenRecord* record = a.ws.records + i;
    const int token = record->token;
    int listed = record->listed;
    const bool joins = kShared && a.joined;
    if (joins) {
      __syncthreads();  // `counts` of the token before have been read
      listed = wait_lists(a.exchange, i, a.exchange.round(), counts);
      if (threadIdx.x == 0) record->listed = listed;
    }
    if (token < 0 && !(kShared && listed > kListMax)) continue;
    const bool reads = kReads && record->read != 0;
    int64_t* own = a.ws.entries + i * a.ws.capacity;
    if (listed > kListMax) {
      if ((record->row != 0 || kShared) && threadIdx.x == 0)
        note_dense(a.ws, i);
      __syncthreads();
      if (reads && listed <= a.ws.capacity)
        read_long(read_row(a.reads, record->read, token), own, listed,
                  memory.reading);
      continue;
    }
    __syncthreads();
    sort_entries(joins ? load_joined(a.exchange, i, counts, listed)
                       : load_entries(own, listed),
                 listed, list, reinterpret_cast<int*>(memory.scratch));
    if (reads)
      read_list(read_row(a.reads, record->read, token), list, listed,
                memory.scratch);
    if (record->row == 0) continue;
    for (int e = threadIdx.x; e < listed; e += kDecodeThreads)
      own[e] = pack_entry(list[e].x, __int_as_float(list[e].y));
    if (a.resolved) continue;
    const ClampRow row = a.table.row(record->row);
    for (int c = threadIdx.x; c < row.count(); c += kDecodeThreads)
      a.ws.coef[i * row.max_clamps + c] = clamp_delta(
          row, c, [=](int f) { return find_feature(list, listed, f); });
  }
}

}  // namespace vllm_steering
