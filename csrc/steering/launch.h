// SPDX-License-Identifier: Apache-2.0
// What every binding needs between torch and a kernel: errors, stream, launch.
// libtorch stable ABI only, so one build serves every torch from 2.10 on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

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

inline int multiprocessors(const Tensor& t) {
  static int known[64] = {};
  const int device = t.get_device_index();
  int& count = known[device];
  if (count == 0)
    check_cuda(
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "device attribute");
  return count;
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

// Launches so that the kernel's prologue may overlap the end of the one before.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int blocks, int threads, int smem,
            cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  launch_with(&overlap, 1, kernel, blocks, threads, smem, stream, args...);
}

// Launches blocks that wait for one another: all of them run, or none. Two such
// grids never hold a part of the multiprocessors each.
template <typename... Params, typename... Args>
void launch_together(void (*kernel)(Params...), int blocks, int threads,
                     int smem, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute together;
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  launch_with(&together, 1, kernel, blocks, threads, smem, stream, args...);
}

}  // namespace vllm_steering
