// SPDX-License-Identifier: Apache-2.0
// Which tiles of a product a block works on, in which order, and how wide they
// are: pure functions.
#pragma once

namespace vllm_steering {

constexpr int kTileF = 128;  // rows of the product: two warpgroups of 64
constexpr int kTileK = 64;   // one 128-byte swizzle row of 16-bit numbers

// Widths of a tile in tokens, and how many there are. The active count, known
// on the device only, picks the narrowest that holds all tokens.
constexpr int kWidths = 5;
constexpr int kWidth[kWidths] = {8, 32, 64, 128, 256};

constexpr int kWidest = kWidth[kWidths - 1];
constexpr int kWide = 320;  // the widest of steps that are spread evenly

// n tokens, up to whole tiles of any width.
constexpr __host__ __device__ int whole_tiles(int n) {
  return (n + kWidest - 1) / kWidest * kWidest;
}

// The place of the widest of them that is at most `rows`.
constexpr __host__ __device__ int box_index(int rows) {
  int i = 0;
  while (i + 1 < kWidths && kWidth[i + 1] <= rows) ++i;
  return i;
}

// Calls RUN(N) for the narrowest width N that holds n tokens.
#define STEERING_WIDTHS(n, RUN) \
  if (n <= 8) {                 \
    RUN(8);                     \
  } else if (n <= 32) {         \
    RUN(32);                    \
  } else if (n <= 64) {         \
    RUN(64);                    \
  } else if (n <= 128) {        \
    RUN(128);                   \
  } else {                      \
    RUN(256);                   \
  }

// The width of all tiles of a step of n > kWidest tokens that is spread evenly.
// A little wider than kWidest where that saves one of a few: then W_enc is
// fetched less often.
constexpr __host__ __device__ int even_width(int n) {
  const int tiles = (n + kWidest - 1) / kWidest;
  const int wide = (n + kWide - 1) / kWide;
  if (wide < tiles && wide <= 3) return kWide;
  return ((n + tiles - 1) / tiles + 31) / 32 * 32;
}

// As STEERING_WIDTHS, with the widths of steps that are spread evenly.
#define STEERING_EVEN_WIDTHS(n, RUN) \
  switch (tile_width<true>(n)) {     \
    case 192:                        \
      RUN(192);                      \
      break;                         \
    case 224:                        \
      RUN(224);                      \
      break;                         \
    case 320:                        \
      RUN(320);                      \
      break;                         \
    default:                         \
      STEERING_WIDTHS(n, RUN)        \
  }

template <bool kEven>
__device__ __forceinline__ int tile_width(int n) {
  if (kEven && n > kWidest) return even_width(n);
  return n <= 8 ? 8 : n <= 32 ? 32 : n <= 64 ? 64 : n <= 128 ? 128 : 256;
}

// Iterates over the tiles of one block. The token tile is the fast index, and a
// group of token tiles stays in L2 while the features change, so a tile of
// weights is fetched once. `peers` blocks of a cluster take as many
// neighbouring feature tiles of the same tokens, one each; `n_f` counts such
// rows of tiles.
struct TileWalk {
  int n_f, n_t, group;
  int peers, rank;
  int first, stride;  // this block's: first, first + stride, ...
  int before;  // feature tiles of the ranks before this one, an even number
  __device__ void at(int tile, int& f, int& t) const {
    const int start = tile / (group * n_f) * group;
    const int width = min(n_t - start, group);
    const int rest = tile % (group * n_f);
    t = start + rest % width;
    f = rest / width * peers + rank;
  }
  __device__ int tiles() const { return n_f * n_t; }
};

// A walk over `pairs` pairs of neighbouring feature tiles, which are a sample
// of `of` pairs at equal distances.
struct SampleWalk : TileWalk {
  int pairs, of;
  __device__ void at(int tile, int& f, int& t) const {
    TileWalk::at(tile, f, t);
    f = f / 2 * of / pairs * 2 + f % 2;
  }
  // Where the tile lies in the sample.
  __device__ int place(int tile) const {
    int f, t;
    TileWalk::at(tile, f, t);
    return f;
  }
};

constexpr int kTokenGroup = 8;  // token tiles of a group

template <bool kEven = false>
__device__ __forceinline__ TileWalk tile_walk(int num_features, int n,
                                              int peers = 1, int rank = 0,
                                              int first_feature = 0) {
  const int width = tile_width<kEven>(n), rows = kTileF * peers;
  return {(num_features + rows - 1) / rows,
          (n + width - 1) / width,
          kTokenGroup,
          peers,
          rank,
          static_cast<int>(blockIdx.x) / peers,
          static_cast<int>(gridDim.x) / peers,
          first_feature / kTileF};
}

// Where feature tile `f` begins its reduction. Blocks that run at the same time
// begin at different columns; otherwise all would read the same lines of x at
// once. Two neighbours begin at the same one, so that a cluster can share x.
// The order of a feature's sum depends on the feature alone.
constexpr int kOrderStep = 7;
__device__ __forceinline__ int first_k(int f, int k_tiles) {
  return f / 2 * kOrderStep % k_tiles;
}

}  // namespace vllm_steering
