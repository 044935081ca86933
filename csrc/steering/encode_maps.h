// SPDX-License-Identifier: Apache-2.0
// The tensor maps of the encoder.
#pragma once

#include "pipeline.cuh"
#include "tensor_map.h"

namespace vllm_steering {

template <typename T>
EncodeMaps encode_maps(const Workspace<T>& ws, const Weights<T>& w) {
  EncodeMaps maps;
  maps.w = tensor_map(w.w_enc, w.num_features, w.d_in, kTileF, kTileK);
  for (int i = 0; i < kWidths; ++i)
    maps.x[i] = tensor_map(ws.x, ws.rows, w.d_in, kWidth[i], kTileK);
  return maps;
}

}  // namespace vllm_steering
