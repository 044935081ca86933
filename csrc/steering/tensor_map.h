// SPDX-License-Identifier: Apache-2.0
// Tensor maps for bulk copies, encoded by the driver.
#pragma once

#include <cuda.h>

#include "launch.h"

namespace vllm_steering {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t,
                                 void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

inline EncodeTiled tensor_map_encoder() {
  static EncodeTiled encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    check_cuda(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                         12000, cudaEnableDefault, &status),
        "cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return encode;
}

// A map over a contiguous [rows, columns] matrix of 16-bit numbers or bytes, in
// boxes of box_rows x box_columns (at most 128 bytes: a swizzle row).
template <typename T>
CUtensorMap tensor_map(const T* p, int64_t rows, int64_t columns, int box_rows,
                       int box_columns) {
  CUtensorMap map;
  const auto type = sizeof(T) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                    : std::is_same_v<T, __nv_bfloat16>
                        ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns),
                               static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * sizeof(T)};
  const cuuint32_t boxes[2] = {static_cast<cuuint32_t>(box_columns),
                               static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status = tensor_map_encoder()(
      &map, type, 2, const_cast<T*>(p), sizes, strides, boxes, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(status == CUDA_SUCCESS, "steering: no tensor map for [", rows,
                  ", ", columns, "]");
  return map;
}

}  // namespace vllm_steering
