// SPDX-License-Identifier: Apache-2.0
// Several modules at one site: a conditional node of the graph that is being
// captured, with a body for each module, and one for steps that use several.
// Launches then run only where some token of the step needs them.
#include <algorithm>

#include "branch_kernel.cuh"
#include "checks.h"

namespace vllm_steering {
namespace {

constexpr int kSwitchVersion = 12080;  // of CUDA, which has switches

// Whether the driver has such nodes.
int64_t has_branches(Tensor on) {
  STD_TORCH_CHECK(on.is_cuda(), "steering: not a CUDA device");
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver), "driver version");
  return driver >= kSwitchVersion;
}

#if CUDART_VERSION >= 12080

// What a capture on this stream has come to.
struct Capture {
  cudaGraph_t graph;
  const cudaGraphNode_t* after;
  const cudaGraphEdgeData* edges;
  size_t count;
};

Capture capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  unsigned long long id;
  Capture c;
#if CUDART_VERSION >= 13000
  const auto error = cudaStreamGetCaptureInfo(stream, &status, &id, &c.graph,
                                              &c.after, &c.edges, &c.count);
#else
  const auto error = cudaStreamGetCaptureInfo_v3(stream, &status, &id, &c.graph,
                                                 &c.after, &c.edges, &c.count);
#endif
  check_cuda(error, "capture");
  STD_TORCH_CHECK(status == cudaStreamCaptureStatusActive,
                  "steering: nothing is captured");
  return c;
}

cudaGraphNode_t add_switch(cudaStream_t stream,
                           cudaGraphConditionalHandle handle, int64_t* bodies,
                           int count) {
  const Capture c = capture_of(stream);
  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = cudaGraphCondTypeSwitch;
  params.conditional.size = count;
  cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
  check_cuda(
      cudaGraphAddNode(&node, c.graph, c.after, c.edges, c.count, &params),
      "conditional node");
#else
  check_cuda(
      cudaGraphAddNode_v2(&node, c.graph, c.after, c.edges, c.count, &params),
      "conditional node");
#endif
  for (int i = 0; i < count; ++i)
    bodies[i] = reinterpret_cast<int64_t>(params.conditional.phGraph_out[i]);
  return node;
}

// Adds the node. Body i runs in steps of which module i alone has tokens, the
// last one where several have some. `index` and `tables` are of the full tier,
// `read_index` and `reads` of reading; `bodies` is int64 in the host's memory.
void branch(Tensor index, Tensors tables, Tensor read_index, Tensors reads,
            int64_t tokens, Tensor bodies) {
  const int count = static_cast<int>(tables.size());
  const Expected e = {index.get_device_index(), ScalarType::BFloat16};
  const auto i32 = ScalarType::Int;
  STD_TORCH_CHECK(count >= 1 && count <= kMaxBranches && reads.size() <= count,
                  "steering: found ", count, " modules, expected 1 to ",
                  kMaxBranches);
  check_length(check(index, "index", i32, {kAny}, e), tokens, "index");
  check_length(check(read_index, "read_index", i32, {kAny}, e), tokens,
               "read_index");
  STD_TORCH_CHECK(
      !bodies.is_cuda() && bodies.scalar_type() == ScalarType::Long &&
          bodies.is_contiguous() && bodies.numel() == count + 1,
      "steering: bodies is not int64 [", count + 1, "] in the host's memory");
  Branches b = {};
  b.edits = {data<int>(index), {}, count};
  b.reads = {data<int>(read_index), {}, static_cast<int>(reads.size())};
  b.tokens = static_cast<int>(tokens);
  for (int i = 0; i < count; ++i) {
    check(tables[i], "table", i32, {kAny, kAny}, e, true);
    b.edits.rows[i] = {data<int>(tables[i]), tables[i].stride(0)};
  }
  for (size_t i = 0; i < reads.size(); ++i) {
    check(reads[i], "read_table", i32, {kAny, kAny}, e, true);
    b.reads.rows[i] = {data<int>(reads[i]), reads[i].stride(0)};
  }
  const cudaStream_t stream = stream_of(index);
  cudaGraphConditionalHandle handle;
  check_cuda(
      cudaGraphConditionalHandleCreate(&handle, capture_of(stream).graph, 0, 0),
      "conditional handle");
  branch_kernel<<<1, kBranchThreads, 0, stream>>>(handle, b);
  check_cuda(cudaGetLastError(), "branch");
  cudaGraphNode_t node =
      add_switch(stream, handle, data<int64_t>(bodies), count + 1);
#if CUDART_VERSION >= 13000
  check_cuda(cudaStreamUpdateCaptureDependencies(
                 stream, &node, nullptr, 1, cudaStreamSetCaptureDependencies),
             "capture");
#else
  check_cuda(cudaStreamUpdateCaptureDependencies(
                 stream, &node, 1, cudaStreamSetCaptureDependencies),
             "capture");
#endif
}

// What the current stream is given from now on goes into a body.
void begin_body(Tensor on, int64_t body) {
  check_cuda(cudaStreamBeginCaptureToGraph(
                 stream_of(on), reinterpret_cast<cudaGraph_t>(body), nullptr,
                 nullptr, 0, cudaStreamCaptureModeThreadLocal),
             "body");
}

void end_body(Tensor on) {
  cudaGraph_t body;
  check_cuda(cudaStreamEndCapture(stream_of(on), &body), "body");
}

#endif

}  // namespace
}  // namespace vllm_steering

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_steering, m) {
  m.def("has_branches(Tensor on) -> int");
#if CUDART_VERSION >= 12080
  m.def(
      "branch(Tensor index, Tensor[] tables, Tensor read_index, Tensor[] reads,"
      " int tokens, Tensor(a!) bodies) -> ()");
  m.def("begin_body(Tensor on, int body) -> ()");
  m.def("end_body(Tensor on) -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CUDA, m) {
  m.impl("has_branches", TORCH_BOX(&vllm_steering::has_branches));
#if CUDART_VERSION >= 12080
  m.impl("branch", TORCH_BOX(&vllm_steering::branch));
  m.impl("begin_body", TORCH_BOX(&vllm_steering::begin_body));
  m.impl("end_body", TORCH_BOX(&vllm_steering::end_body));
#endif
}
