// SPDX-License-Identifier: Apache-2.0
// Checks, stream, launch: what stands between torch and the kernels. libtorch
// stable ABI only, so one build serves every torch from 2.10 on.
#include <algorithm>
#include <optional>

#include "compact.cuh"
#include "front.cuh"
#include "gather.cuh"
#include "launch.h"
#include "select.cuh"

namespace vllm_steering {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t,
                                 void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

EncodeTiled tensor_map_encoder() {
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

// A map over a contiguous [rows, d_model] tensor, in boxes of `box` rows by
// kTileK.
CUtensorMap tensor_map(const Tensor& t, int box) {
  CUtensorMap map;
  const auto type = t.scalar_type() == ScalarType::BFloat16
                        ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(t.size(1)),
                               static_cast<cuuint64_t>(t.size(0))};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(t.size(1)) * 2};
  const cuuint32_t boxes[2] = {kTileK, static_cast<cuuint32_t>(box)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status = tensor_map_encoder()(
      &map, type, 2, t.data_ptr(), sizes, strides, boxes, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(status == CUDA_SUCCESS,
                  "steering: no tensor map for this shape");
  return map;
}

CompactArgs compact_args(const Tensor& index, const Tensor& flags,
                         const Tensor& table, const Tensor& meta,
                         const Tensor& norm_limit, const Tensor& hidden,
                         const std::optional<Tensor>& residual, const Tensor& x,
                         const Tensor& tokens, const Tensor& lines,
                         const Tensor& count, int64_t base, int64_t gate) {
  CompactArgs a = {};
  a.index = data<int>(index);
  a.flags = data<int>(flags);
  a.table = data<int>(table);
  a.meta = data<int>(meta);
  a.norm_limit = data<float>(norm_limit);
  a.tokens = data<int>(tokens);
  a.lines = data<int>(lines);
  a.count = data<int>(count);
  a.table_stride = table.stride(0);
  a.hidden_stride = hidden.stride(0);
  a.residual_stride = residual ? residual->stride(0) : 0;
  a.num_tokens = static_cast<int>(hidden.size(0));
  a.base = static_cast<int>(base);
  a.rows = static_cast<int>(x.size(0));
  a.d_model = static_cast<int>(hidden.size(1));
  a.gate = static_cast<int>(gate);
  a.per_block = a.num_tokens <= 256 ? 1 : a.num_tokens <= 2048 ? 8 : 32;
  return a;
}

void compact(Tensor index, Tensor flags, Tensor table, Tensor meta,
             Tensor norm_limit, Tensor hidden, std::optional<Tensor> residual,
             Tensor x, Tensor tokens, Tensor lines, Tensor count, int64_t base,
             int64_t gate) {
  const CompactArgs a =
      compact_args(index, flags, table, meta, norm_limit, hidden, residual, x,
                   tokens, lines, count, base, gate);
  const int blocks = (a.num_tokens + a.per_block - 1) / a.per_block;
  for_type(hidden, [&](auto type) {
    using T = decltype(type);
    launch(compact_kernel<T>, blocks, kCompactThreads, 0, stream_of(hidden), a,
           data<T>(hidden), residual ? data<T>(*residual) : nullptr,
           data<T>(x));
  });
}

// `out` is int64 entries [rows, capacity] or float32 scores [rows, F].
EncodeArgs encode_args(const Tensor& x, const Tensor& w_enc,
                       const Tensor& b_enc, const Tensor& threshold,
                       const Tensor& count, const Tensor& lines,
                       const Tensor& out, int64_t base) {
  EncodeArgs a = {};
  a.b_enc = data<float>(b_enc);
  a.threshold = data<float>(threshold);
  a.count = data<int>(count);
  a.lines = data<int>(lines);
  if (out.scalar_type() == ScalarType::Float)
    a.scores = data<float>(out);
  else
    a.entries = data<int64_t>(out);
  a.base = static_cast<int>(base);
  a.rows = static_cast<int>(x.size(0));
  a.num_features = static_cast<int>(w_enc.size(0));
  a.d_model = static_cast<int>(w_enc.size(1));
  a.capacity = static_cast<int>(out.size(1));
  a.group = 8;
  return a;
}

EncodeMaps encode_maps(const Tensor& x, const Tensor& w_enc) {
  EncodeMaps maps;
  maps.w = tensor_map(w_enc, kTileF);
  const int widths[kWidths] = {8, 32, 64, 128, 256};
  for (int i = 0; i < kWidths; ++i) maps.x[i] = tensor_map(x, widths[i]);
  return maps;
}

// Stages 1 and 2 at once, for steps of at most kFrontTokens tokens. L2 may be
// asked for rows of `w_dec`.
void front(Tensor index, Tensor flags, Tensor table, Tensor meta,
           Tensor norm_limit, Tensor hidden, std::optional<Tensor> residual,
           Tensor x, Tensor tokens, Tensor lines, Tensor count, Tensor w_enc,
           Tensor b_enc, Tensor threshold, Tensor out, Tensor w_dec,
           Tensor sync, int64_t gate) {
  FrontArgs a = {};
  a.compact = compact_args(index, flags, table, meta, norm_limit, hidden,
                           residual, x, tokens, lines, count, 0, gate);
  STD_TORCH_CHECK(a.compact.num_tokens <= kFrontTokens &&
                      a.compact.rows >= a.compact.num_tokens,
                  "steering: too many tokens for one launch");
  a.encode = encode_args(x, w_enc, b_enc, threshold, count, lines, out, 0);
  a.encode.w_dec = data<char>(w_dec);
  a.sync = data<int>(sync);
  for_type(hidden, [&](auto type) {
    using T = decltype(type);
    launch_together(front_kernel<T>, multiprocessors(x), kEncodeThreads,
                    kEncodeSmem, stream_of(hidden), a, encode_maps(x, w_enc),
                    data<T>(hidden), residual ? data<T>(*residual) : nullptr,
                    data<T>(x));
  });
}

void encode(Tensor x, Tensor w_enc, Tensor b_enc, Tensor threshold,
            Tensor count, Tensor lines, Tensor out, int64_t base) {
  const EncodeArgs a =
      encode_args(x, w_enc, b_enc, threshold, count, lines, out, base);
  const int n_f = (a.num_features + kTileF - 1) / kTileF;
  const int64_t tiles = static_cast<int64_t>(n_f) * ((a.rows + 255) / 256);
  const int64_t blocks = std::min<int64_t>(tiles, multiprocessors(x));
  for_type(x, [&](auto type) {
    using T = decltype(type);
    launch(encode_kernel<T>, static_cast<int>(blocks), kEncodeThreads,
           kEncodeSmem, stream_of(x), a, encode_maps(x, w_enc));
  });
}

void select(Tensor table, Tensor meta, Tensor count, Tensor scores,
            Tensor lines, Tensor entries, Tensor kth, Tensor coef,
            int64_t base) {
  SelectArgs a = {};
  a.table = data<int>(table);
  a.meta = data<int>(meta);
  a.count = data<int>(count);
  a.scores = data<float>(scores);
  a.lines = data<int>(lines);
  a.entries = data<int64_t>(entries);
  a.kth = data<int64_t>(kth);
  a.coef = data<float>(coef);
  a.table_stride = table.stride(0);
  a.base = static_cast<int>(base);
  a.rows = static_cast<int>(scores.size(0));
  a.num_features = static_cast<int>(scores.size(1));
  a.capacity = static_cast<int>(entries.size(1));
  a.max_clamps = static_cast<int>(coef.size(1));
  const int blocks = std::min(a.rows, 4 * multiprocessors(scores));
  launch(select_kernel, blocks, kSelectThreads, 0, stream_of(scores), a);
}

template <int Ahead, typename T>
void launch_lists(const DecodeArgs& a, cudaStream_t stream, int processors,
                  const T* x, const T* w_dec, T* hidden, T* residual) {
  const int slices = (a.d_model + kColumns - 1) / kColumns;
  const int64_t work = static_cast<int64_t>(a.rows) * slices;
  const int64_t blocks = std::min<int64_t>(work, 32 / Ahead * processors);
  launch(decode_kernel<T, Ahead>, static_cast<int>(blocks), kDecodeThreads,
         decode_smem(a.max_clamps), stream, a, x, w_dec, hidden, residual);
}

// Few tokens: one kernel. Many: sort once, then gather, then what is too long
// for that.
template <typename T>
void launch_decode(DecodeArgs a, bool many, const Tensor& entries,
                   const Tensor& coef, const Tensor& x, const Tensor& w_dec,
                   const Tensor& hidden,
                   const std::optional<Tensor>& residual) {
  const cudaStream_t stream = stream_of(hidden);
  T* out = residual ? data<T>(*residual) : nullptr;
  const int processors = multiprocessors(x);
  if (many) {
    const int slices = (a.d_model + kColumns - 1) / kColumns;
    const int64_t work = static_cast<int64_t>(a.rows) * slices;
    launch(prepare_kernel, std::min(a.rows, 8 * processors), kDecodeThreads, 0,
           stream, a, data<int64_t>(entries), data<float>(coef));
    const int64_t blocks = std::min<int64_t>((work + 7) / 8, 2 * processors);
    launch(gather_kernel<T>, static_cast<int>(blocks), kDecodeThreads, 0,
           stream, a, data<float>(coef), data<T>(w_dec), data<T>(hidden), out);
    if (a.num_features <= sorted_max(a)) return;
    a.long_only = true;
  }
  if (a.rows <= kFewTokens)
    launch_lists<16>(a, stream, processors, data<T>(x), data<T>(w_dec),
                     data<T>(hidden), out);
  else
    launch_lists<8>(a, stream, processors, data<T>(x), data<T>(w_dec),
                    data<T>(hidden), out);
}

// `scores` and `kth` are there for TopK; `coef` then holds g - f of the clamps
// already.
void decode(Tensor table, Tensor meta, Tensor count, Tensor lines,
            Tensor entries, std::optional<Tensor> scores, Tensor kth,
            Tensor coef, Tensor x, Tensor w_enc, Tensor b_enc, Tensor threshold,
            Tensor w_dec, Tensor b_dec, Tensor hidden,
            std::optional<Tensor> residual, int64_t base, bool delta,
            bool many) {
  DecodeArgs a = {};
  a.table = data<int>(table);
  a.count = data<int>(count);
  a.lines = data<int>(lines);
  a.entries = data<int64_t>(entries);
  a.coef = scores ? data<float>(coef) : nullptr;
  a.b_dec = data<float>(b_dec);
  a.w_enc = data<char>(w_enc);
  a.b_enc = data<float>(b_enc);
  a.threshold = data<float>(threshold);
  a.scores = scores ? data<float>(*scores) : nullptr;
  a.kth = data<int64_t>(kth);
  a.meta = data<int>(meta);
  a.table_stride = table.stride(0);
  a.hidden_stride = hidden.stride(0);
  a.residual_stride = residual ? residual->stride(0) : 0;
  a.base = static_cast<int>(base);
  a.rows = static_cast<int>(x.size(0));
  a.num_features = static_cast<int>(w_dec.size(0));
  a.d_model = static_cast<int>(w_dec.size(1));
  a.capacity = static_cast<int>(entries.size(1));
  a.max_clamps = static_cast<int>(coef.size(1));
  a.delta = delta;
  for_type(hidden, [&](auto type) {
    launch_decode<decltype(type)>(a, many && !delta, entries, coef, x, w_dec,
                                  hidden, residual);
  });
}

}  // namespace
}  // namespace vllm_steering

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_steering, m) {
  m.def(
      "compact(Tensor index, Tensor flags, Tensor table, Tensor meta, Tensor "
      "norm_limit,"
      " Tensor hidden, Tensor? residual, Tensor(a!) x, Tensor(b!) tokens,"
      " Tensor(c!) lines, Tensor(d!) count, int base, int gate) -> ()");
  m.def(
      "encode(Tensor x, Tensor w_enc, Tensor b_enc, Tensor threshold, Tensor "
      "count,"
      " Tensor(a!) lines, Tensor(b!) out, int base) -> ()");
  m.def(
      "front(Tensor index, Tensor flags, Tensor table, Tensor meta, Tensor "
      "norm_limit,"
      " Tensor hidden, Tensor? residual, Tensor(a!) x, Tensor(b!) tokens,"
      " Tensor(c!) lines, Tensor(d!) count, Tensor w_enc, Tensor b_enc,"
      " Tensor threshold, Tensor(e!) out, Tensor w_dec, Tensor(f!) sync,"
      " int gate) -> ()");
  m.def(
      "select(Tensor table, Tensor meta, Tensor count, Tensor scores,"
      " Tensor(a!) lines, Tensor(b!) entries, Tensor(c!) kth, Tensor(d!) coef,"
      " int base) -> ()");
  m.def(
      "decode(Tensor table, Tensor meta, Tensor count, Tensor lines,"
      " Tensor(a!) entries, Tensor? scores, Tensor kth, Tensor(b!) coef,"
      " Tensor x, Tensor w_enc, Tensor b_enc, Tensor threshold, Tensor w_dec,"
      " Tensor b_dec, Tensor(c!) hidden, Tensor(d!)? residual, int base,"
      " bool delta, bool many) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_steering, CUDA, m) {
  m.impl("compact", TORCH_BOX(&vllm_steering::compact));
  m.impl("encode", TORCH_BOX(&vllm_steering::encode));
  m.impl("front", TORCH_BOX(&vllm_steering::front));
  m.impl("select", TORCH_BOX(&vllm_steering::select));
  m.impl("decode", TORCH_BOX(&vllm_steering::decode));
}
