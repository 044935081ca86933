// SPDX-License-Identifier: Apache-2.0
// What every binding needs between torch and a kernel: errors, stream, launch.
// libtorch stable ABI only, so one build serves every torch from 2.10 on.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

namespace vllm_steering {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "steering ", what, ": ",
                  cudaGetErrorString(error));
}

inline cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  const auto error =
      aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream);
  STD_TORCH_CHECK(error == 0, "steering: no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Multiprocessors that the current context may use. A context can have a part
// of its device, and a grid that must be resident has to fit into that part.
inline int context_multiprocessors(int of_device) {
#if CUDA_VERSION >= 12040
  using GetResource =
      CUresult (*)(CUcontext, CUdevResource*, CUdevResourceType);
  static GetResource get = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const auto error = cudaGetDriverEntryPointByVersion(
        "cuCtxGetDevResource", &found, 12040, cudaEnableDefault, &status);
    const bool there =
        error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    return reinterpret_cast<GetResource>(there ? found : nullptr);
  }();
  using GetCurrent = CUresult (*)(CUcontext*);
  static GetCurrent current = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const auto error = cudaGetDriverEntryPointByVersion(
        "cuCtxGetCurrent", &found, 12000, cudaEnableDefault, &status);
    return reinterpret_cast<GetCurrent>(error == cudaSuccess ? found : nullptr);
  }();
  CUcontext context = nullptr;
  if (get == nullptr || current == nullptr || current(&context) != CUDA_SUCCESS)
    return of_device;
  static thread_local CUcontext known = nullptr;
  static thread_local int count = 0;
  if (context == known && count > 0) return count;
  CUdevResource resource;
  if (get(context, &resource, CU_DEV_RESOURCE_TYPE_SM) != CUDA_SUCCESS)
    return of_device;
  known = context;
  count = static_cast<int>(resource.sm.smCount);
  return count;
#else
  return of_device;
#endif
}

inline int multiprocessors(const Tensor& t) {
  static int known[64] = {};
  const int device = t.get_device_index();
  int& count = known[device];
  if (count == 0)
    check_cuda(
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "device attribute");
  return std::min(count, context_multiprocessors(count));
}

template <typename... Params, typename... Args>
void launch_with(cudaLaunchAttribute* attributes, int count,
                 void (*kernel)(Params...), int blocks, int threads, int smem,
                 cudaStream_t stream, const Args&... args) {
  if (smem > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(
                   kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem),
               "shared memory");
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "launch");
}

inline int current_device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "device attribute");
  return value;
}

// Whether this build has machine code of a kernel for the current device.
template <typename... Params>
bool has_code(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  cudaGetLastError();  // an error is the answer
  return error == cudaSuccess;
}

// Launches so that the kernel's prologue may overlap the previous kernel's end,
// on devices that can.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int blocks, int threads, int smem,
            cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  static const bool overlaps =
      current_device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  launch_with(&overlap, overlaps ? 1 : 0, kernel, blocks, threads, smem, stream,
              args...);
}

// As `launch`, in clusters of `peers` blocks, which run at the same time.
template <typename... Params, typename... Args>
void launch_clusters(void (*kernel)(Params...), int blocks, int peers,
                     int threads, int smem, cudaStream_t stream,
                     const Args&... args) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(peers), 1, 1};
  launch_with(attributes, 2, kernel, blocks, threads, smem, stream, args...);
}

// Launches blocks that wait for one another: all of them run, or none. So two
// such grids never each hold a part of the multiprocessors.
template <typename... Params, typename... Args>
void launch_together(void (*kernel)(Params...), int blocks, int threads,
                     int smem, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute together;
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  launch_with(&together, 1, kernel, blocks, threads, smem, stream, args...);
}

// As `launch_together`, in clusters of `peers` blocks.
template <typename... Params, typename... Args>
void launch_clusters_together(void (*kernel)(Params...), int blocks, int peers,
                              int threads, int smem, cudaStream_t stream,
                              const Args&... args) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(peers), 1, 1};
  launch_with(attributes, 2, kernel, blocks, threads, smem, stream, args...);
}

}  // namespace vllm_steering
