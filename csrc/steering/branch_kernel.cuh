// SPDX-License-Identifier: Apache-2.0
// Says which modules of a site a step needs, to a conditional node of the
// graph.
#pragma once

#include <cstdint>

namespace vllm_steering {

constexpr int kMaxBranches = 16;
constexpr int kBranchThreads = 256;
static_assert(kMaxBranches <= 32, "modules are bits of a word");

// A table whose rows begin with whether they do anything.
struct BranchRows {
  const int* rows;
  int64_t stride;
};

// Rows of the step's tokens, and a table for each module.
struct BranchTables {
  const int* index;
  BranchRows rows[kMaxBranches];
  int count;
};

struct Branches {
  BranchTables edits, reads;
  int tokens;
};

#if CUDART_VERSION >= 12080

// The modules, a bit each, in whose tables this row does something.
inline __device__ unsigned modules_of(const BranchTables& t, int token) {
  const int64_t row = t.index[token];
  if (row == 0) return 0;
  unsigned found = 0;
  for (int i = 0; i < t.count; ++i)
    found |= (t.rows[i].rows[row * t.rows[i].stride] != 0) << i;
  return found;
}

__global__ void __launch_bounds__(kBranchThreads)
    branch_kernel(cudaGraphConditionalHandle handle,
                  const __grid_constant__ Branches b) {
  __shared__ unsigned all;
  if (threadIdx.x == 0) all = 0;
  __syncthreads();
  unsigned own = 0;
  for (int t = threadIdx.x; t < b.tokens; t += kBranchThreads)
    own |= modules_of(b.edits, t) | modules_of(b.reads, t);
  own = __reduce_or_sync(~0u, own);
  if (threadIdx.x % 32 == 0 && own != 0) atomicOr(&all, own);
  __syncthreads();
  if (threadIdx.x != 0) return;
  const unsigned count = b.edits.count;
  unsigned body = count + 1;  // none
  if (all != 0) body = __popc(all) == 1 ? __ffs(all) - 1 : count;
  cudaGraphSetConditional(handle, body);
}

#endif

}  // namespace vllm_steering
