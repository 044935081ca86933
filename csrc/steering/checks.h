// SPDX-License-Identifier: Apache-2.0
// Turns the tensors that an op is given into the bundles that kernels take
// (bundles.cuh), and checks all of it: number, dtype, shape, layout, alignment,
// device. A message names the tensor as Python does. held.h does it once for
// many ops.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "bundles.cuh"
#include "dense.cuh"
#include "exchange.cuh"
#include "launch.h"

namespace vllm_steering {

using Tensors = std::vector<Tensor>;

template <typename T>
T* data(const Tensor& t) {
  return reinterpret_cast<T*>(t.data_ptr());
}

constexpr int64_t kAny = -1;  // a size that may be anything

// The device that everything must be on, and the model's element type.
struct Expected {
  int device;
  ScalarType type;

  bool operator==(const Expected& other) const {
    return device == other.device && type == other.type;
  }
};

inline const Tensor& get(const Tensors& bundle, size_t i, const char* name) {
  STD_TORCH_CHECK(i < bundle.size(), "steering: ", name, " is missing");
  return bundle[i];
}

// A tensor of `sizes` whose rows are contiguous; all of it unless `strided`.
inline const Tensor& check(const Tensor& t, const char* name, ScalarType type,
                           std::vector<int64_t> sizes, const Expected& e,
                           bool strided = false) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == e.device,
                  "steering: ", name, " is not on CUDA device ", e.device);
  STD_TORCH_CHECK(t.scalar_type() == type, "steering: ", name, " has dtype ",
                  static_cast<int>(t.scalar_type()), ", expected ",
                  static_cast<int>(type));
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i)
    fits = sizes[i] == kAny || t.size(i) == sizes[i];
  STD_TORCH_CHECK(fits, "steering: ", name, " has an unexpected shape");
  const bool rows =
      t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1;
  STD_TORCH_CHECK(
      strided ? rows : t.is_contiguous(), "steering: ", name,
      strided ? " has rows that are not contiguous" : " is not contiguous");
  return t;
}

inline void check_aligned(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0,
                  "steering: ", name, " is not 16-byte aligned");
}

inline void check_length(const Tensor& t, int64_t least, const char* name) {
  STD_TORCH_CHECK(t.numel() >= least, "steering: ", name, " has ", t.numel(),
                  " elements, expected at least ", least);
}

inline Expected expected_of(const Tensors& stream) {
  const Tensor& hidden = get(stream, kHidden, "hidden");
  STD_TORCH_CHECK(hidden.is_cuda(), "steering: hidden is not on a CUDA device");
  const ScalarType type = hidden.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "steering: the CUDA kernels take bfloat16 and float16");
  return {hidden.get_device_index(), type};
}

inline void check_width(int64_t width) {
  STD_TORCH_CHECK(width % 8 == 0 && width > 0, "steering: width ", width,
                  " is no multiple of 8");
}

template <typename T>
Stream<T> make_stream(const Tensors& stream, int64_t width, const Expected& e) {
  const Tensor& hidden = get(stream, kHidden, "hidden");
  const int64_t tokens = hidden.size(0);
  for (size_t i = 0; i < stream.size(); ++i) {
    const char* name = i == kHidden ? "hidden" : "residual";
    check(stream[i], name, e.type, {tokens, width}, e, true);
    check_aligned(stream[i], name);
    STD_TORCH_CHECK(stream[i].stride(0) % 8 == 0, "steering: rows of ", name,
                    " are not 16-byte aligned");
  }
  const bool two = stream.size() > kResidual;
  return {data<T>(hidden), two ? data<T>(stream[kResidual]) : nullptr,
          hidden.stride(0), two ? stream[kResidual].stride(0) : 0,
          static_cast<int>(tokens)};
}

// How ranks share the SAE, int64 in the host's memory; a whole one shares
// nothing.
inline Exchange make_exchange(const Tensors& w, int64_t d_out) {
  Exchange x = {};
  x.size = 1;
  if (w.size() <= kShared) return x;
  const Tensor& t = w[kShared];
  STD_TORCH_CHECK(!t.is_cuda() && t.scalar_type() == ScalarType::Long &&
                      t.is_contiguous() && t.numel() > kShareAddresses,
                  "steering: shared is not int64 in the host's memory");
  const int64_t* at = data<int64_t>(t);
  const int64_t size = at[kShareSize];
  STD_TORCH_CHECK(
      size > 1 && size <= kMaxRanks && at[kShareRank] >= 0 &&
          at[kShareRank] < size && t.numel() == kShareAddresses + size,
      "steering: found ", size, " ranks, expected 2 to ", kMaxRanks);
  for (int r = 0; r < size; ++r)
    x.at[r] = reinterpret_cast<char*>(at[kShareAddresses + r]);
  x.rank = static_cast<int>(at[kShareRank]);
  x.size = static_cast<int>(size);
  x.rows = static_cast<int>(at[kShareRows]);
  x.slices = static_cast<int>((d_out + kColumnsOfSlice - 1) / kColumnsOfSlice);
  x.width = static_cast<int>(2 * d_out * size);
  x.lists = at[kShareLists];
  x.flags = at[kShareFlags];
  x.columns = at[kShareColumns];
  x.staging = at[kShareStaging];
  x.packet_rows = static_cast<int>(at[kSharePacketRows]);
  x.packets = at[kSharePackets];
  x.column_packets = at[kShareColumnPackets];
  return x;
}

template <typename T>
Weights<T> make_weights(const Tensors& w, const Expected& e) {
  const auto f32 = ScalarType::Float;
  const Tensor& w_enc =
      check(get(w, kWEnc, "W_enc"), "W_enc", e.type, {kAny, kAny}, e);
  const int64_t f = w_enc.size(0), d_in = w_enc.size(1);
  const Tensor& w_dec =
      check(get(w, kWDec, "W_dec"), "W_dec", e.type, {kAny, kAny}, e);
  const int64_t d_out = w_dec.size(1);
  const Exchange x = make_exchange(w, d_out);
  STD_TORCH_CHECK(w_dec.size(0) == f * x.size, "steering: W_dec has ",
                  w_dec.size(0), " rows, expected ", f * x.size);
  // The two blocks of a cluster of the encoder take neighbouring tiles.
  constexpr int kRows = 2 * kTileF;
  STD_TORCH_CHECK(x.size == 1 || f % kRows == 0, "steering: a rank has ", f,
                  " features, expected a multiple of ", kRows);
  check_width(d_in);
  check_width(d_out);
  const Tensor& b_enc = check(get(w, kBEnc, "b_enc"), "b_enc", f32, {f}, e);
  const Tensor& threshold =
      check(get(w, kThreshold, "threshold"), "threshold", f32, {f}, e);
  const Tensor& b_dec = check(get(w, kBDec, "b_dec"), "b_dec", f32, {d_out}, e);
  const Tensor& meta =
      check(get(w, kMeta, "meta"), "meta", ScalarType::Int, {kAny}, e);
  const Tensor& norm_limit =
      check(get(w, kNormLimit, "norm_limit"), "norm_limit", f32, {1}, e);
  check_length(meta, kSkipMask + 1, "meta");
  check_aligned(w_enc, "W_enc");
  check_aligned(w_dec, "W_dec");
  return {data<T>(w_enc),
          data<float>(b_enc),
          data<float>(threshold),
          data<T>(w_dec),
          data<float>(b_dec),
          data<int>(meta),
          data<float>(norm_limit),
          static_cast<int>(f),
          static_cast<int>(d_in),
          static_cast<int>(d_out),
          static_cast<int>(f * x.size),
          static_cast<int>(f * x.rank)};
}

// Who reads, where a step's bundle says so; the scale is checked with weights.
inline Reads make_reads(const Tensors& step, int64_t tokens,
                        const Expected& e) {
  if (step.size() <= kReadIndex) return {};
  const auto i32 = ScalarType::Int;
  const Tensor& index = check(step[kReadIndex], "read_index", i32, {kAny}, e);
  const Tensor& table = check(get(step, kReadTable, "read_table"), "read_table",
                              i32, {kAny, kAny}, e, true);
  const Tensor& scale = check(get(step, kReadScale, "read_scale"), "read_scale",
                              ScalarType::Float, {kAny}, e);
  const Tensor& out = check(get(step, kReadOut, "read_out"), "read_out", i32,
                            {kAny, kAny}, e, true);
  check_length(index, tokens, "read_index");
  STD_TORCH_CHECK(out.size(0) >= tokens, "steering: read_out has ", out.size(0),
                  " rows, expected at least ", tokens);
  STD_TORCH_CHECK(table.size(1) >= kTableHead, "steering: read_table has ",
                  table.size(1), " columns, expected at least ", kTableHead);
  return {data<int>(index), data<int>(table), data<float>(scale),
          data<int>(out),   table.stride(0),  out.stride(0)};
}

// The longest step that these tensors have room for.
inline int64_t most_tokens(const Tensors& step) {
  int64_t most = std::min(step[kIndex].numel(), step[kFlags].numel());
  if (step.size() <= kReadIndex) return most;
  most = std::min(most, step[kReadIndex].numel());
  return std::min(most, step[kReadOut].size(0));
}

// `counters`: how many write-backs are counted in, one of each vector.
inline Step make_step(const Tensors& step, int64_t tokens, const Expected& e,
                      int64_t counters = 1) {
  const auto i32 = ScalarType::Int;
  const Tensor& index =
      check(get(step, kIndex, "index"), "index", i32, {kAny}, e);
  const Tensor& flags =
      check(get(step, kFlags, "flags"), "flags", i32, {kAny}, e);
  const Tensor& table =
      check(get(step, kTable, "table"), "table", i32, {kAny, kAny}, e, true);
  const Tensor& saturated = check(get(step, kSaturated, "saturated"),
                                  "saturated", ScalarType::Long, {counters}, e);
  check_length(index, tokens, "index");
  check_length(flags, tokens, "flags");
  STD_TORCH_CHECK(table.size(1) >= 2 && (table.size(1) - 2) % 3 == 0,
                  "steering: table has rows of ", table.size(1),
                  " columns, expected 2 + 3 K");
  return {data<int>(index),
          data<int>(flags),
          {data<int>(table), table.stride(0),
           static_cast<int>((table.size(1) - 2) / 3)},
          data<unsigned long long>(saturated),
          make_reads(step, tokens, e)};
}

// `topk`: with scores and the k-th keys.
template <typename T>
Workspace<T> make_workspace(const Tensors& ws, const Weights<T>& weights,
                            int max_clamps, bool topk, const Expected& e) {
  const auto i32 = ScalarType::Int, i64 = ScalarType::Long;
  const auto f32 = ScalarType::Float;
  const Tensor& x =
      check(get(ws, kX, "x"), "x", e.type, {kAny, weights.d_in}, e);
  const int64_t rows = x.size(0);
  check_aligned(x, "x");
  const Tensor& records = check(get(ws, kRecords, "records"), "records", i32,
                                {kAny, kRecordInts}, e);
  check_length(records, rows * kRecordInts, "records");
  check(get(ws, kCount, "count"), "count", i32, {1}, e);
  check(get(ws, kSync, "sync"), "sync", i32, {kSyncInts}, e);
  const Tensor& entries =
      check(get(ws, kEntries, "entries"), "entries", i64, {rows, kAny}, e);
  check(get(ws, kCoef, "coef"), "coef", f32, {rows, max_clamps}, e);
  if (topk) {
    // Those of this rank's features, or of all.
    const Tensor& scores =
        check(get(ws, kScores, "scores"), "scores", f32, {rows, kAny}, e);
    STD_TORCH_CHECK(scores.size(1) == weights.num_features ||
                        scores.size(1) == weights.all_features,
                    "steering: scores has ", scores.size(1), " columns");
    check_length(check(get(ws, kKth, "kth"), "kth", i64, {kAny}, e), rows,
                 "kth");
  }
  const bool has_skip = ws.size() > kSkip;
  if (has_skip) check(ws[kSkip], "skip", f32, {rows, weights.d_out}, e);
  return {data<T>(x),
          data<TokenRecord>(records),
          data<int>(ws[kCount]),
          data<int>(ws[kSync]),
          data<int64_t>(entries),
          topk ? data<float>(ws[kScores]) : nullptr,
          topk ? data<int64_t>(ws[kKth]) : nullptr,
          data<float>(ws[kCoef]),
          has_skip ? data<float>(ws[kSkip]) : nullptr,
          static_cast<int>(rows),
          static_cast<int>(entries.size(1)),
          0};
}

// The scratch memory of dense tokens, uint8 [rows, bytes of a token].
template <typename T>
DenseScratch<T> make_dense_scratch(const Tensors& ws, const Weights<T>& weights,
                                   const Expected& e) {
  const Tensor& bytes = check(get(ws, kDense, "dense"), "dense",
                              ScalarType::Byte, {kAny, kAny}, e);
  check_aligned(bytes, "dense");
  const int64_t rows = bytes.size(0);
  const int64_t padded = (weights.all_features + kTileK - 1) / kTileK * kTileK;
  const int64_t each =
      2 * weights.d_in + 4 * padded + 4 * kDenseSplits * weights.d_out;
  STD_TORCH_CHECK(rows >= 1 && bytes.size(1) >= each, "steering: dense has ",
                  bytes.size(1), " bytes a token, expected ", each);
  T* x = data<T>(bytes);
  T* limbs = x + rows * weights.d_in;
  return {x, limbs, reinterpret_cast<float*>(limbs + 2 * rows * padded),
          static_cast<int>(rows), static_cast<int>(padded)};
}

// Calls f with a value of the stream's element type.
template <typename F>
void for_type(const Tensors& stream, F&& f) {
  if (expected_of(stream).type == ScalarType::BFloat16)
    f(__nv_bfloat16{});
  else
    f(__half{});
}

}  // namespace vllm_steering
