// SPDX-License-Identifier: Apache-2.0
// What the launches of the encoder share: tensor maps, and the grid.
#pragma once

#include "encode_kernel.cuh"
#include "held.h"
#include "tensor_map.h"

namespace vllm_steering {

template <typename T>
EncodeMaps make_encode_maps(const Workspace<T>& ws, const Weights<T>& w) {
  EncodeMaps maps;
  maps.w = tensor_map(w.w_enc, w.num_features, w.d_in, kTileF, kTileK);
  for (int i = 0; i < kWidths; ++i)
    maps.x[i] = tensor_map(ws.x, ws.rows, w.d_in, kWidth[i], kTileK);
  return maps;
}

template <typename T>
const EncodeMaps& encode_maps(const Bundles<T>& b) {
  return b.checked->encode_maps.template get<EncodeMaps>(
      [&] { return make_encode_maps(b.ws, b.weights); });
}

// Whether a chunk of so many tokens is spread evenly. Kernels that can do so
// have twice the code, which is cold: 5 us where the tiles are the usual ones.
inline bool spreads_evenly(int rows) {
  return rows > kWidest && even_width(rows) != kWidest;
}

// Launches the encoder over `features` rows of W_enc in clusters, one block a
// multiprocessor, as many as there are tiles for.
template <typename T>
void launch_encoder(void (*kernel)(EncodeArgs<T>, EncodeMaps),
                    const EncodeArgs<T>& a, const EncodeMaps& maps,
                    int features, int processors, cudaStream_t stream) {
  constexpr int kRows = kTileF * kEncodePeers;
  const int64_t tiles = static_cast<int64_t>((features + kRows - 1) / kRows) *
                        ((a.ws.rows + 255) / 256);
  const int clusters = static_cast<int>(
      std::clamp<int64_t>(tiles, 1, std::max(processors / kEncodePeers, 1)));
  launch_clusters(kernel, clusters * kEncodePeers, kEncodePeers, kEncodeThreads,
                  kEncodeSmem, stream, a, maps);
}

}  // namespace vllm_steering
